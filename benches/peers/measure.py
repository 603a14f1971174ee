#!/usr/bin/env python3
"""Measures one engine that a user could pick instead, inside its own environment, in the terms of our example `speed`.

    measure.py ENGINE MODEL --threads 2 --batches 1,8,16,32 --steps 64

Prints "first token" as soon as a prompt of 16 tokens has given one, then a JSON object: tokens a second of one prompt
of 512 tokens (pp512) and of decoding each batch (steps from prompts of 16), and the peak memory in MB. Prompts are
fixed random ids, every token is the likeliest, and no end stops an answer: only the engine's work is timed.
"""
import argparse
import json
import os
import random
import sys
import time

SHORT_PROMPT_TOKENS = 16
PROMPT_TOKENS = 512


def prompt(tokens, seed):
    numbers = random.Random(seed)
    return [numbers.randrange(300, 30000) for _ in range(tokens)]


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp through its C interface: its own batches, logits copied out as a sampler would want them."""

    def __init__(self, asked):
        import llama_cpp

        self.api = api = llama_cpp
        api.llama_backend_init()
        self.quiet = api.llama_log_callback(lambda *_: None)  # llama.cpp keeps the pointer: so must we
        api.llama_log_set(self.quiet, None)
        self.model = api.llama_model_load_from_file(asked.model.encode(), api.llama_model_default_params())
        if not self.model:
            sys.exit("it cannot read this file")
        params = api.llama_context_default_params()
        most = max(asked.batches)
        params.n_ctx = max(1024, (SHORT_PROMPT_TOKENS + asked.steps + 16) * most)
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = most
        params.n_threads = params.n_threads_batch = asked.threads
        params.kv_unified = True
        self.context = api.llama_init_from_model(self.model, params)
        self.batch = api.llama_batch_init(512, 0, 1)

    def run(self, rows):
        """rows: (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, logits
            batch.seq_id[i][0] = sequence
        if self.api.llama_decode(self.context, batch):
            sys.exit("a step of llama.cpp failed")
        self.api.llama_get_logits_ith(self.context, len(rows) - 1)

    def forget(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def prefill(self, ids):
        self.forget()
        self.run([(token, i, 0, i == len(ids) - 1) for i, token in enumerate(ids)])

    def decode(self, prompts, steps):
        self.forget()
        for sequence, ids in enumerate(prompts):
            self.run([(token, i, sequence, i == len(ids) - 1) for i, token in enumerate(ids)])
        at = len(prompts[0])

        def step(position):
            self.run([(1000 + sequence, position, sequence, True) for sequence in range(len(prompts))])

        step(at)
        return seconds(lambda: [step(at + 1 + i) for i in range(steps)])


class Generates:
    """An engine that only generates whole answers: steps take what a longer answer takes more than a short one."""

    def prefill(self, ids):
        self.generate([ids], 1)

    def decode(self, prompts, steps):
        short = 4
        return -seconds(lambda: self.generate(prompts, short)) + seconds(
            lambda: self.generate(prompts, short + steps)
        )


class OpenVino(Generates):
    """OpenVINO GenAI; activations are quantized to bytes on the fly, which is its default. Paged, it batches
    continuously, as a server would; else it runs a batch as one rectangle, which is quicker."""

    def __init__(self, asked, paged=False):
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        properties = {"INFERENCE_NUM_THREADS": asked.threads}
        if paged:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False
            scheduler.cache_size, scheduler.max_num_batched_tokens = 2, 1024
            properties["scheduler_config"] = scheduler
        else:
            properties["ATTENTION_BACKEND"] = "SDPA"
        self.pipe = openvino_genai.LLMPipeline(asked.model, "CPU", **properties)

    def generate(self, prompts, tokens):
        ids = self.numpy.array(prompts, dtype=self.numpy.int64)
        mask = self.numpy.ones_like(ids)
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(mask))
        self.pipe.generate(inputs, max_new_tokens=tokens, ignore_eos=True, do_sample=False)


class CTranslate2(Generates):
    def __init__(self, asked):
        import ctranslate2

        self.model = ctranslate2.Generator(
            asked.model, device="cpu", compute_type="int8", intra_threads=asked.threads, inter_threads=1
        )
        with open(os.path.join(asked.model, "vocabulary.json"), encoding="utf-8") as file:
            self.words = json.load(file)

    def generate(self, prompts, tokens):
        prompts = [[self.words[token] for token in ids] for ids in prompts]
        self.model.generate_batch(
            prompts, max_length=tokens, min_length=tokens, include_prompt_in_result=False, sampling_topk=1
        )


class Transformers:
    def __init__(self, asked):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(asked.threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        folder, file = os.path.split(asked.model)
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16).eval()

    def step(self, ids, cache=None):
        out = self.model(self.torch.tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True).tolist(), out.past_key_values

    def prefill(self, ids):
        self.step([ids])

    def decode(self, prompts, steps):
        last, cache = self.step(*self.step(prompts))

        def all_steps(last, cache):
            for _ in range(steps):
                last, cache = self.step(last, cache)

        return seconds(lambda: all_steps(last, cache))


ENGINES = {
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "openvino-paged": lambda asked: OpenVino(asked, paged=True),
    "ctranslate2": CTranslate2,
    "transformers": Transformers,
}


def peak_bytes():
    """Of this process alone; what `getrusage` tells begins with what its parent held."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",")], default=[1, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=64)
    asked = parser.parse_args()
    engine = ENGINES[asked.engine](asked)
    engine.prefill(prompt(SHORT_PROMPT_TOKENS, 1))
    print("first token", flush=True)
    long = prompt(PROMPT_TOKENS, 2)
    told = {"pp512": PROMPT_TOKENS / seconds(lambda: engine.prefill(long))}
    for batch in asked.batches:
        prompts = [prompt(SHORT_PROMPT_TOKENS, 10 + i) for i in range(batch)]
        # Noise can make the short answer the longer one: then there is no figure.
        if (took := engine.decode(prompts, asked.steps)) > 0:
            told[f"batch {batch}"] = batch * asked.steps / took
    told["peak_mb"] = peak_bytes() / 1e6
    print(json.dumps(told))


if __name__ == "__main__":
    main()
