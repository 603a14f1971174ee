"""An OTLP receiver: the published service over gRPC, each span one line of JSON on standard output.

    python3 otlp_receiver.py [CERT KEY CLIENT_CA TOKEN]

With arguments it speaks TLS, wants to see a certificate of CLIENT_CA, and takes nothing without the token.
"""
import json, sys, threading
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service


def plain(attributes):
    """Attributes as a dictionary of plain values."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in attributes}


*files, token = sys.argv[1:] or [None]


# Of two that print at once, the lines would run into each other.
printing = threading.Lock()


class Receiver(service.TraceServiceServicer):
    def Export(self, request, context):
        if token and ("authorization", f"Bearer {token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing")
        for part in request.resource_spans:
            resource = plain(part.resource.attributes)
            for span in (span for scope in part.scope_spans for span in scope.spans):
                line = json.dumps({
                    "name": span.name,
                    "kind": span.kind,
                    "status": span.status.code,
                    "trace": span.trace_id.hex(),
                    "id": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "links": [link.span_id.hex() for link in span.links],
                    "start_ns": span.start_time_unix_nano,
                    "end_ns": span.end_time_unix_nano,
                    "attributes": plain(span.attributes),
                    "events": [event.name for event in span.events],
                    "resource": resource,
                })
                with printing:
                    print(line, flush=True)
        return messages.ExportTraceServiceResponse()


server = grpc.server(futures.ThreadPoolExecutor(4))
service.add_TraceServiceServicer_to_server(Receiver(), server)
if token:
    cert, key, client_ca = (open(path, "rb").read() for path in files)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)], client_ca, True))
else:
    port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"receives on http{'s' if token else ''}://127.0.0.1:{port}", flush=True)
server.wait_for_termination()
