"""Answers that must have a shape: tool calls and structured output, through the official `openai` package, unmodified.

    python3 openai_shapes.py http://HOST:PORT MODEL [ADMIN, which it leaves alone]
"""
import json, re, sys, typing
import openai, pydantic

base, model = sys.argv[1:3]
client = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0, timeout=120)
question = [{"role": "user", "content": "What is the capital of France?"}]
greedy = {"temperature": 0, "max_tokens": 24}

# Tools: required and named ones are called, whole and in a stream
def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"It does {name}.", "parameters": schema}}


short = {"type": "string", "maxLength": 12}
tools = [tool("weather", city=short), tool("add", a={"type": "integer", "minimum": 0, "maximum": 99})]
asked = {"model": model, "messages": question, "tools": tools, "temperature": 1, "seed": 5, "max_tokens": 160}
call = client.chat.completions.create(tool_choice={"type": "function", "function": {"name": "weather"}}, **asked).choices[0]
assert call.finish_reason == "tool_calls" and call.message.content is None
assert call.message.tool_calls[0].function.name == "weather"
assert list(json.loads(call.message.tool_calls[0].function.arguments)) == ["city"]
for tool_choice in ("required", {"type": "function", "function": {"name": "add"}}):
    forced = client.chat.completions.create(tool_choice=tool_choice, parallel_tool_calls=False, **asked).choices[0]
    (made,) = forced.message.tool_calls
    assert made.function.name in ("weather", "add") and json.loads(made.function.arguments)
    with client.chat.completions.stream(tool_choice=tool_choice, parallel_tool_calls=False, **asked) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        last = stream.get_final_completion().choices[0]
    assert [event.arguments for event in done] == [made.function.arguments], done
    (again,) = last.message.tool_calls
    assert (again.function.name, again.function.arguments) == (made.function.name, made.function.arguments)
    assert last.finish_reason == "tool_calls"
answered = question + [
    call.message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": call.message.tool_calls[0].id, "content": "It rains."},
]
assert client.chat.completions.create(model=model, messages=answered, **greedy).choices[0].message.content is not None


# Structured output, parsed by the client's own helper
class City(pydantic.BaseModel):
    name: typing.Literal["Paris", "London"]
    inhabitants: typing.Literal[1, 2, 3]


parsed = client.chat.completions.parse(
    model=model, messages=question, response_format=City, temperature=1, seed=2, max_tokens=64).choices[0].message.parsed
assert isinstance(parsed, City), parsed
for extra_body, fits in (
    ({"guided_choice": ["Paris", "London"]}, lambda text: text in ("Paris", "London")),
    ({"structured_outputs": {"regex": "[A-Z]{3}-[0-9]{2}"}}, lambda text: re.fullmatch("[A-Z]{3}-[0-9]{2}", text)),
    ({"guided_grammar": 'start: "yes" | "no"'}, lambda text: text in ("yes", "no")),
):
    text = client.chat.completions.create(
        model=model, messages=question, temperature=1, max_tokens=32, extra_body=extra_body).choices[0].message.content
    assert fits(text), (extra_body, text)
bad_schema = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "object", "properties": {"a": {"type": "nothing"}}}}}
try:
    client.chat.completions.create(model=model, messages=question, response_format=bad_schema)
    raise AssertionError("a schema without meaning was not refused")
except openai.BadRequestError as error:
    assert error.param == "response_format" and "properties" in error.body["message"], error.body
print("openai", openai.__version__, "gets its shapes")
