"""Calls VllmEngine with the stubs that the public description is published with, as a line of JSON says.

In: {"id": …, "rpc": "Generate", "request": {…}}. Out, as each call ends: its id, and its responses or its status.
"""

import json
import sys
import threading

import grpc
from google.protobuf import json_format, message_factory
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

PATIENCE_S = 20

stub = vllm_engine_pb2_grpc.VllmEngineStub(grpc.insecure_channel(sys.argv[1]))
methods = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name
lock = threading.Lock()


def plain(message):
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def call(line):
    asked = json.loads(line)
    method = methods[asked["rpc"]]
    request = message_factory.GetMessageClass(method.input_type)()
    json_format.ParseDict(asked["request"], request)
    said = {"id": asked["id"]}
    try:
        answer = getattr(stub, asked["rpc"])(request, timeout=PATIENCE_S)
        said["responses"] = [plain(message) for message in (answer if method.server_streaming else [answer])]
    except grpc.RpcError as error:
        said["code"], said["says"] = error.code().name, error.details()
    with lock:
        print(json.dumps(said), flush=True)


for line in sys.stdin:
    threading.Thread(target=call, args=[line], daemon=True).start()
