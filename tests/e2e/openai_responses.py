"""Drives `/v1/responses` of a running cluster with the official `openai` package, unmodified.

    python3 openai_responses.py http://HOST:PORT MODEL

The model has Mistral's v3 vocabulary and random weights: what it says makes no sense, how it is said must.
"""
import json, sys, typing
import openai, pydantic

base, model = sys.argv[1:]
client = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0, timeout=120)
brief = {"model": model, "temperature": 1, "max_output_tokens": 12, "extra_body": {"seed": 7}}

# Whole: text in, text out, nothing stored
whole = client.responses.create(input="What is the capital of France?", instructions="Be brief.", metadata={"a": "b"}, **brief)
assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
assert whole.output_text and whole.output[0].role == "assistant" and whole.metadata == {"a": "b"}
assert whole.usage.output_tokens == 12 and whole.usage.total_tokens == whole.usage.input_tokens + 12
assert whole.store is False and whole.model == model and whole.instructions == "Be brief."
items = [{"role": "developer", "content": "Be brief."},
         {"role": "user", "content": [{"type": "input_text", "text": "What is the capital of France?"}]}]
assert client.responses.create(input=items, **brief).output_text == whole.output_text

# Streamed: typed events in order, the same text
events = list(client.responses.create(input=items, stream=True, top_logprobs=2, include=["message.output_text.logprobs"], **brief))
assert [event.sequence_number for event in events] == list(range(len(events)))
assert (events[0].type, events[1].type, events[-1].type) == ("response.created", "response.in_progress", "response.incomplete")
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
last = events[-1].response
assert last.output_text == whole.output_text and last.usage == whole.usage
assert len(last.output[0].content[0].logprobs) == 12 and len(last.output[0].content[0].logprobs[0].top_logprobs) == 2
with client.responses.stream(input=items, **brief) as stream:
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text


# A schema, parsed by the client's own helper
class City(pydantic.BaseModel):
    name: typing.Literal["Paris", "London"]
    inhabitants: typing.Literal[1, 2, 3]


long = brief | {"max_output_tokens": 200}
parsed = client.responses.parse(input=items, text_format=City, **long)
assert isinstance(parsed.output_parsed, City) and parsed.status == "completed", parsed
with client.responses.stream(input=items, text_format=City, **long) as stream:
    assert stream.get_final_response().output_parsed == parsed.output_parsed

# Functions: called when they must be, in a stream, too; what they gave goes back
digit = {"type": "integer", "minimum": 0, "maximum": 9}
schema = {"type": "object", "properties": {"a": digit, "b": digit}, "required": ["a", "b"], "additionalProperties": False}
tools = [{"type": "function", "name": "add", "description": "It adds.", "parameters": schema, "strict": True}]
calls = {"input": items, "tools": tools, "parallel_tool_calls": False} | long
for tool_choice in ("required", {"type": "function", "name": "add"}):
    called = client.responses.create(tool_choice=tool_choice, **calls)
    (call,) = called.output
    assert call.type == "function_call" and call.name == "add" and sorted(json.loads(call.arguments)) == ["a", "b"]
    assert called.status == "completed" and called.tools[0].name == "add"
    events = list(client.responses.create(tool_choice=tool_choice, stream=True, **calls))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (again,) = events[-1].response.output
    assert "".join(deltas) == again.arguments == call.arguments and events[-1].type == "response.completed"
output = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
assert client.responses.create(input=items + called.output + [output], tools=tools, tool_choice="none", **brief).output_text
other = [called.output[0].model_dump() | {"call_id": "call_0a1B2c3D4e5F"}, output | {"call_id": "call_0a1B2c3D4e5F"}]  # another model's
assert client.responses.create(input=items + other, tools=tools, tool_choice="none", **brief).output_text

# What needs a memory, or what only a server could run, is refused by name
for name, value in (("previous_response_id", "resp_1"), ("background", True), ("tools", [{"type": "web_search"}]),
                    ("conversation", "conv_1"), ("truncation", "auto")):
    try:
        client.responses.create(**(brief | {"input": "Hello", name: value}))
        raise AssertionError(f"{name} was not refused")
    except openai.BadRequestError as error:
        assert error.param == name, error.body
print("openai", openai.__version__, "is content with responses")
