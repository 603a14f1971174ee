"""Drives a running cluster with the official `mistralai` package, unmodified.

    python3 mistral_client.py http://HOST:PORT MODEL

The model has Mistral's v3 vocabulary and random weights: what it says makes no sense, how it is said must.
"""
import json, string, sys
from mistralai.client import Mistral, errors

base, model = sys.argv[1:]
client = Mistral(api_key="none", server_url=base, timeout_ms=120_000)
question = [{"role": "user", "content": "What is the capital of France?"}]
brief = {"model": model, "max_tokens": 12, "temperature": 1, "random_seed": 7}

# Models
(card,) = client.models.list().data
assert card.id == model and card.type == "base" and card.max_context_length == 4096, card
assert card.capabilities.completion_chat and card.capabilities.completion_fim and card.capabilities.function_calling
assert client.models.retrieve(model_id=model).id == model

# Chat, whole; the same seed gives the same answer
whole = client.chat.complete(messages=question, **brief)
choice = whole.choices[0]
assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length", choice
assert whole.usage.completion_tokens == 12 and whole.usage.total_tokens == whole.usage.prompt_tokens + 12
assert client.chat.complete(messages=question, **brief).choices[0].message.content == choice.message.content
other = client.chat.complete(messages=question, **(brief | {"random_seed": 8}))
assert other.choices[0].message.content != choice.message.content

# Chat, streamed: the same text, and the usage in the last chunk
chunks = [event.data for event in client.chat.stream(messages=question, **brief)]
assert chunks[0].choices[0].delta.role == "assistant"
assert "".join(chunk.choices[0].delta.content for chunk in chunks) == choice.message.content
assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage == whole.usage, chunks[-1]
assert all(chunk.usage is None for chunk in chunks[:-1])

# The safety prompt is longer than none; log probabilities; several choices
safe = client.chat.complete(messages=question, safe_prompt=True, **brief)
assert safe.usage.prompt_tokens > whole.usage.prompt_tokens + 20
told = client.chat.complete(messages=question, n=2, logprobs=True, top_logprobs=2, prompt_logprobs=True, **brief)
assert [one.index for one in told.choices] == [0, 1]
assert all(len(one.logprobs.content) == 12 and len(one.logprobs.content[0].top_logprobs) == 2 for one in told.choices)
assert len(told.choices[0].prompt_logprobs.content) == told.usage.prompt_tokens - 1
assert told.choices[0].message.content == choice.message.content

# An answer goes on with its prefix, and shows it
begun = question + [{"role": "assistant", "content": "The capital of", "prefix": True}]
assert client.chat.complete(messages=begun, **brief).choices[0].message.content.startswith("The capital of")
streamed = [event.data for event in client.chat.stream(messages=begun, **brief)]
assert streamed[0].choices[0].delta.content == "The capital of"

# The context's end has a word of its own
full = client.chat.complete(model=model, messages=[{"role": "user", "content": "word " * 4040}], random_seed=1)
assert full.choices[0].finish_reason == "model_length", full.choices[0].finish_reason
assert full.usage.total_tokens == 4096


# Tools: any of them must be called; ids have nine letters and digits; what it gave goes back
def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"It does {name}.", "parameters": schema}}


digit = {"type": "integer", "minimum": 0, "maximum": 9}
asked = {"model": model, "messages": question, "temperature": 1, "random_seed": 3, "max_tokens": 200,
         "tools": [tool("weather", city={"enum": ["Paris", "London"]}), tool("add", a=digit, b=digit)]}
for tool_choice in ("any", "required", {"type": "function", "function": {"name": "add"}}):
    answer = client.chat.complete(tool_choice=tool_choice, parallel_tool_calls=False, **asked).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content == "", answer
    (call,) = answer.message.tool_calls
    assert len(call.id) == 9 and set(call.id) <= set(string.ascii_letters + string.digits), call.id
    arguments = json.loads(call.function.arguments)
    assert sorted(arguments) == {"weather": ["city"], "add": ["a", "b"]}[call.function.name], call
    events = [event.data for event in client.chat.stream(tool_choice=tool_choice, parallel_tool_calls=False, **asked)]
    (again,) = [call for chunk in events for call in chunk.choices[0].delta.tool_calls or []]
    assert again.function == call.function and events[-1].choices[0].finish_reason == "tool_calls"
(call,) = client.chat.complete(tool_choice=tool_choice, **asked).choices[0].message.tool_calls  # a named one is called once
result = {"role": "tool", "name": call.function.name, "tool_call_id": call.id, "content": "7"}
after = client.chat.complete(messages=question + [answer.message, result], tools=asked["tools"], tool_choice="none", **brief)
assert after.choices[0].message.content
parsed = client.chat.complete(messages=question, response_format={"type": "json_schema", "json_schema": {
    "name": "sum", "schema": asked["tools"][1]["function"]["parameters"]}}, **(brief | {"max_tokens": 100}))
assert sorted(json.loads(parsed.choices[0].message.content)) == ["a", "b"]

# A gap is filled, whole and streamed; without a suffix, too
gap = {"model": model, "prompt": "def f(", "temperature": 1, "random_seed": 5, "max_tokens": 9, "min_tokens": 2}
filled = client.fim.complete(suffix="return a + b", **gap)
assert filled.choices[0].message.content and filled.usage.completion_tokens == 9
events = [event.data for event in client.fim.stream(suffix="return a + b", **gap)]
assert "".join(chunk.choices[0].delta.content for chunk in events) == filled.choices[0].message.content
assert events[-1].usage == filled.usage
assert client.fim.complete(**gap).usage.prompt_tokens < filled.usage.prompt_tokens


# Errors are the client's own, and name what is wrong
def refused(kind, call, **arguments):
    try:
        call(**arguments)
    except kind as error:
        return error
    raise AssertionError(f"{arguments} was not refused")


wrong = refused(errors.HTTPValidationError, client.chat.complete, messages=question, **(brief | {"temperature": -1}))
assert wrong.data.detail[0].loc == ["body", "temperature"] and "temperature" in wrong.data.detail[0].msg
refused(errors.HTTPValidationError, client.fim.stream, model=model, prompt="a", top_p=0)
refused(errors.HTTPValidationError, client.chat.complete, messages=question, prompt_mode="reasoning", **brief)
missing = refused(errors.SDKError, client.chat.complete, messages=question, **(brief | {"model": "nobody"}))
assert missing.status_code == 404 and json.loads(missing.body)["object"] == "error", missing.body
refused(errors.SDKError, client.agents.complete, agent_id="nobody", messages=question)
print("mistralai is content")
