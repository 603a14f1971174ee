"""Drives a running cluster with the official `openai` package, unmodified.

    python3 openai_client.py http://HOST:PORT MODEL http://HOST:ADMIN_PORT
"""
import json, sys, urllib.error, urllib.request
import openai

base, model, admin = sys.argv[1:]
client = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0, timeout=120)
question = [{"role": "user", "content": "What is the capital of France?"}]
greedy = {"temperature": 0, "max_tokens": 24}


def get(path, base=base):
    with urllib.request.urlopen(base + path, timeout=10) as answer:
        return answer.read().decode()


def refused(kind, **arguments):
    """The call must raise `kind`, with OpenAI's error body; returns its message."""
    try:
        client.chat.completions.create(**({"model": model, "messages": question} | arguments))
    except kind as error:
        assert error.body["message"] and error.body["type"], error.body
        return error.body["message"]
    raise AssertionError(f"{arguments} was not refused")


# Models
assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

# Chat, whole
whole = client.chat.completions.create(model=model, messages=question, **greedy)
choice = whole.choices[0]
print(choice.message.content)
assert "Paris" in choice.message.content and choice.message.role == "assistant"
assert choice.finish_reason in ("stop", "length") and whole.object == "chat.completion"
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert 0 < whole.usage.completion_tokens <= 24 and whole.model == model

# Chat, streamed: the same text
chunks = list(client.chat.completions.create(
    model=model, messages=question, stream=True, stream_options={"include_usage": True}, **greedy))
assert chunks[0].choices[0].delta.role == "assistant"
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == choice.message.content, (text, choice.message.content)
assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [choice.finish_reason]
usage = chunks[-1].usage
counts = lambda usage: (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
assert not chunks[-1].choices and counts(usage) == counts(whole.usage), chunks[-1]
# The full KV blocks (of 32 tokens) of the prompt are there from the first time.
assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 32 * 32 > 0, usage
assert len({c.id for c in chunks}) == 1

# Seeds: the same one repeats, another one differs
hot = lambda seed: client.chat.completions.create(
    model=model, messages=question, temperature=1.5, seed=seed, max_tokens=24).choices[0].message.content
assert hot(7) == hot(7) and len({hot(seed) for seed in range(5)}) > 1

# Log probabilities
logs = client.chat.completions.create(model=model, messages=question, logprobs=True, top_logprobs=3, **greedy).choices[0].logprobs.content
assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in logs)
assert all(token.token == token.top_logprobs[0].token for token in logs), "greedy takes the most likely token"

# Completions: text and token ids in; vLLM's extensions
done = client.completions.create(
    model=model, prompt="Once upon a time", temperature=0, max_tokens=8, logprobs=2,
    extra_body={"return_token_ids": True, "ignore_eos": True, "min_tokens": 8, "top_k": 1})
extra = done.choices[0].model_extra
assert len(extra["token_ids"]) == 8 == done.usage.completion_tokens and done.choices[0].finish_reason == "length"
assert len(done.choices[0].logprobs.tokens) == 8
again = client.completions.create(model=model, prompt=extra["prompt_token_ids"], temperature=0, max_tokens=8, stream=True)
assert "".join(c.choices[0].text for c in again if c.choices) == done.choices[0].text

# Stop strings end the text before them
stopped = client.chat.completions.create(model=model, messages=question, stop=["Paris"], **greedy).choices[0]
assert stopped.finish_reason == "stop" and "Paris" not in stopped.message.content

# Several choices: each is what its seed gives alone; streamed, they are told apart
several = {"temperature": 1.2, "seed": 11, "n": 3, "max_tokens": 12}
choices = client.chat.completions.create(model=model, messages=question, **several).choices
assert [c.index for c in choices] == [0, 1, 2] and len({c.message.content for c in choices}) > 1
for seed, one in zip((11, 12, 13), choices):
    alone = client.chat.completions.create(model=model, messages=question, temperature=1.2, seed=seed, max_tokens=12)
    assert alone.choices[0].message.content == one.message.content, seed
texts = ["", "", ""]
for chunk in client.chat.completions.create(model=model, messages=question, stream=True, **several):
    texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
assert texts == [c.message.content for c in choices]
lines = client.completions.create(model=model, prompt=["One, two,", "Red, green,"], n=2, best_of=3, max_tokens=6, seed=3)
assert [c.index for c in lines.choices] == [0, 1, 2, 3] and lines.usage.completion_tokens >= 12

# Prompts echoed with their log probabilities, as lm-eval asks for them
prompt = extra["prompt_token_ids"]
echoed = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=0, logprobs=1, echo=True).choices[0]
assert echoed.text == "Once upon a time" and len(echoed.logprobs.tokens) == len(prompt)
assert echoed.logprobs.token_logprobs[0] is None and all(p <= 0 for p in echoed.logprobs.token_logprobs[1:])
scored = client.completions.create(model=model, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 2}).choices[0].model_extra
for token, entry, logprob in zip(prompt[1:], scored["prompt_logprobs"][1:], echoed.logprobs.token_logprobs[1:]):
    assert abs(entry[str(token)]["logprob"] - logprob) < 1e-5, (token, entry)

# Bias and penalties decide; the client's streaming helper understands the events
biased = client.chat.completions.create(
    model=model, messages=question, logit_bias={extra["token_ids"][0]: 100}, frequency_penalty=-1, **greedy,
    extra_body={"return_token_ids": True, "ignore_eos": True})
assert set(biased.choices[0].model_extra["token_ids"]) == {extra["token_ids"][0]}
with client.chat.completions.stream(model=model, messages=question, **greedy) as stream:
    assert stream.get_final_completion().choices[0].message.content == choice.message.content

# Refusals name what is wrong
refused(openai.NotFoundError, model="nobody")
for field, value in (("temperature", -1), ("top_p", 0), ("max_tokens", 0), ("top_logprobs", 99), ("messages", [])):
    message = refused(openai.BadRequestError, **{field: value} | ({"logprobs": True} if field == "top_logprobs" else {}))
    assert field in message, (field, message)

# What operators look at
assert get("/healthz") and get("/readyz")
metrics = get("/metrics", admin)
for name in ("vllm:generation_tokens", "vllm:time_to_first_token_seconds", "vllm:request_success"):
    assert name in metrics, name
assert json.loads(get("/fleet", admin))["groups"][0]["state"] == "ready"
urllib.request.urlopen(urllib.request.Request(admin + "/log", data=b"info", method="PUT"), timeout=10)
assert get("/log", admin) == "info\n"
for path in ("/nowhere", "/metrics"):
    try:
        get(path)
        raise AssertionError(path)
    except urllib.error.HTTPError as error:
        assert error.code == 404 and json.load(error)["error"]["message"]
print("openai", openai.__version__, "is content")
