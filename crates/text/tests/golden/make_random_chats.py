#!/usr/bin/env python3
"""Random conversations, right and wrong ones, and what mistral-common makes of them: ids, or null where it refuses.

    python3 make_random_chats.py SEED COUNT > mistral_chats_random.json      (pip install mistral-common==1.13.1 sentencepiece)

Committed are SEED 1, COUNT 150; thousands more were compared when the encoder was written.
"""
import json, random, sys
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TOKENIZERS = {"v1": MistralTokenizer.v1(), "v2": MistralTokenizer.v2(), "v3": MistralTokenizer.v3()}
WORDS = ["Hello", " ", "", "  two  spaces ", "été 東京 🦀", "</s>", "[INST]", "[/INST]\n", "[TOOL_CALLS]", "line\nbreak", "a" * 30, "\t",
         '{"a": 1}', "22", "1e5", "0.10", "[1,2,]", "null", "NaN", "-0", "-0.0", '"q\\u00e9"', '{"b":{"x":[1,2.50,{}]},"b":2}', "tru",
         '"\\ud83d\\ude00"', '  {"s" : "p"}  ', "[REFERENCE_DOC_0]", "<unk>", "▁", "12345678901234567890123", "1.0E-7", "{}", "[]", "\n\n", "ends with spaces   "]
FOLLOW = {"system": ["user", "user", "system", "assistant"], "user": ["assistant", "assistant", "assistant", "user", "system"],
          "assistant": ["user", "tool", "tool", "assistant"], "tool": ["assistant", "user", "tool"]}
SCHEMAS = [{}, {"type": "object", "properties": {"x": {"type": "number", "minimum": 0.5, "default": 1e20}}, "required": ["x"]}, {"type": "object", "properties": {}}]


class Chats(random.Random):
    def often(self, share):
        return self.random() < share

    def text(self):
        return "".join(self.choice(WORDS) for _ in range(self.choice([0, 1, 1, 1, 2, 3])))

    def content(self):
        if self.often(.75):
            return self.text()
        return [{"type": "text", "text": self.text()} for _ in range(self.randrange(0, 4))] if self.often(.8) else None

    def ident(self):
        good = "".join(self.choice("abcXYZ0189") for _ in range(9))
        return good if self.often(.93) else self.choice(["null", "", "call_1", "abcdefghij", "abc-efghi"])

    def name(self):
        return self.choice(["f", "get_weather", "a-b_C9"] if self.often(.97) else ["bad name", "", "x" * 65, "é"])

    def call(self):
        arguments = self.text() if self.often(.6) else self.choice([{"a": self.text(), "n": 1.5}, {}, {"k": [1, {"z": None}]}])
        call = {"type": "function", "function": {"name": self.name(), "arguments": arguments}}
        return call | {"id": self.ident()} if self.often(.97) else call

    def message(self, role):
        if role == "tool":
            message = {"role": role, "content": self.content()}
            if self.often(.96):
                message["tool_call_id"] = self.ident()
            if self.often(.6):
                message["name"] = self.name()
            return message
        if role != "assistant":
            return {"role": role, "content": self.content()}
        message = {"role": role}
        if self.often(.55):
            message["content"] = self.content()
        else:
            message["tool_calls"] = [self.call() for _ in range(self.randrange(0 if self.often(.1) else 1, 3))]
            if self.often(.5):
                message["content"] = self.choice(["", "", "", None, "both"])
        if self.often(.05):
            message["prefix"] = self.often(.7)
        return message

    def request(self):
        roles = [self.choice(["user", "user", "system"] if self.often(.97) else ["assistant", "tool"])]
        for _ in range(self.randrange(0, 7)):
            roles.append(self.choice(FOLLOW[roles[-1]] if self.often(.97) else list(FOLLOW)))
        messages = []
        for role in roles:
            message = self.message(role)
            messages.append(message)
            for call in message.get("tool_calls", []) if self.often(.85) else []:
                messages.append(self.message("tool") | ({"tool_call_id": call["id"]} if "id" in call else {}))
        if messages[-1]["role"] == "assistant" and self.often(.8):
            if self.often(.5) and not messages[-1].get("tool_calls"):
                messages[-1]["prefix"] = True
            else:
                messages.append({"role": "user", "content": self.text()})
        request = {"messages": messages}
        if self.often(.5):
            tools = [{"name": self.name(), "description": self.text(), "parameters": self.choice(SCHEMAS)} for _ in range(self.randrange(0, 3))]
            request["tools"] = [{"type": "function", "function": tool} for tool in tools]
        if messages[-1]["role"] == "assistant" and self.often(.3):
            request["continue_final_message"] = True
        return request


def encode(tokenizer, request):
    try:
        return tokenizer.encode_chat_completion(ChatCompletionRequest.model_validate(json.loads(json.dumps(request)))).tokens
    except Exception:  # each of its checks has an exception of its own
        return None


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:])
    chats = Chats(seed)
    requests = [chats.request() for _ in range(count)]
    cases = [{"case": f"{seed}.{k}", "request": request} | {name: encode(tokenizer, request) for name, tokenizer in TOKENIZERS.items()} for k, request in enumerate(requests)]
    print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
