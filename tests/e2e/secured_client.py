"""Drives a cluster that wants a key and a certificate with the official clients, unmodified.

    GALERNE_API_KEY=KEY python3 secured_client.py https://HOST:PORT MODEL CA CERT CERT_KEY
"""
import os, ssl, sys
import httpx2 as httpx
import openai
from mistralai.client import Mistral, errors

base, model, ca, cert, cert_key = sys.argv[1:]
key = os.environ["GALERNE_API_KEY"]


def http(shows=True):
    """What the clients speak through: the authority of the faces alone is believed."""
    trust = ssl.create_default_context(cafile=ca)
    if shows:
        trust.load_cert_chain(cert, cert_key)
    return httpx.Client(verify=trust)


def client(api_key, shows=True, **more):
    return openai.OpenAI(base_url=base + "/v1", api_key=api_key, http_client=http(shows), max_retries=0, **more)


good = client(key)
assert [card.id for card in good.models.list()] == [model]
whole = good.completions.create(model=model, prompt=[1, 40, 50], max_tokens=8, temperature=0, extra_body={"ignore_eos": True})
chunks = good.completions.create(
    model=model, prompt=[1, 40, 50], max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True})
assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
assert whole.usage.completion_tokens == 8

# The key in a header of its own, behind a proxy that uses the other one.
proxied = client("none", default_headers={"Authorization": "Basic dXNlcjpwYXNz", "x-api-key": key})
assert [card.id for card in proxied.models.list()] == [model]

for wrong in ("galerne-" + "0" * 64, "x"):
    try:
        client(wrong).models.list()
        raise AssertionError("a wrong key is taken")
    except openai.AuthenticationError as error:
        assert error.body["code"] == "invalid_api_key" and wrong not in str(error), error
try:
    client(key, shows=False).models.list()
    raise AssertionError("nobody asks for a certificate")
except openai.APIConnectionError:
    pass

mistral = lambda api_key: Mistral(api_key=api_key, server_url=base, client=http(), timeout_ms=120_000)
assert mistral(key).models.list().data[0].id == model
try:
    mistral("x").models.list()
    raise AssertionError("a wrong key is taken")
except errors.SDKError as error:
    assert error.status_code == 401, error
print("both clients are content")
