#!/usr/bin/env python3
"""How far products of bytes move the logits, beside how far llama.cpp's do, on the same quantized file.

    cargo build --release -p galerne-model --example logits
    python3 benches/error/against_llama_cpp.py MODEL.gguf target/release/examples/logits TEXT [PIECES]

The reference is our f32 path, which computes with the values that the file means. Told are, over all positions of a text
in pieces of 250 tokens: the root mean square of the logits' error as a share of their spread, the mean Kullback-Leibler
divergence of the distributions, and how often the most likely token is another one. Needs the packages
llama-cpp-python and numpy.
"""
import subprocess
import sys

import llama_cpp
import numpy

PIECE_TOKENS = 250


def llama(model, prompt):
    """[tokens][vocab]."""
    model.reset()
    model.eval(prompt)
    return numpy.array(model.scores[: len(prompt)], dtype=numpy.float32)


class Ours:
    """The logits of one prompt after the other."""

    def __init__(self, binary, path, compute, prompts, vocab):
        self.process = subprocess.Popen([binary, path, compute], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.vocab = vocab
        self.process.stdin.write("".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts).encode())
        self.process.stdin.close()

    def next(self, tokens):
        return numpy.frombuffer(self.process.stdout.read(tokens * self.vocab * 4), dtype="<f4").reshape(tokens, -1)


def log_softmax(rows):
    rows = rows.astype(numpy.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - numpy.log(numpy.exp(rows).sum(axis=1, keepdims=True))


def compare(rows, reference):
    """Of every position: error, divergence, whether the first choice is another one."""
    errors = rows - reference
    errors = errors - errors.mean(axis=1, keepdims=True)
    share = numpy.sqrt((errors**2).mean(axis=1)) / reference.std(axis=1)
    logp = log_softmax(reference)
    divergence = (numpy.exp(logp) * (logp - log_softmax(rows))).sum(axis=1)
    return numpy.stack([share, divergence, rows.argmax(axis=1) != reference.argmax(axis=1)])


def main(path, binary, text, pieces="8"):
    model = llama_cpp.Llama(path, n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)
    with open(text, "rb") as file:
        tokens = model.tokenize(file.read(), add_bos=False)
    prompts = [tokens[at : at + PIECE_TOKENS] for at in range(0, len(tokens), PIECE_TOKENS)][: int(pieces)]
    reference, bytes_ = (Ours(binary, path, compute, prompts, model.n_vocab()) for compute in ("f32", "int8"))
    found = {"galerne, int8": [], "llama.cpp": []}
    for prompt in prompts:
        expected = reference.next(len(prompt))
        found["galerne, int8"].append(compare(bytes_.next(len(prompt)), expected))
        found["llama.cpp"].append(compare(llama(model, prompt), expected))
    print(f"{len(prompts)} pieces of {PIECE_TOKENS} tokens, llama.cpp of llama-cpp-python {llama_cpp.__version__}")
    for name, parts in found.items():
        all_ = numpy.concatenate(parts, axis=1)
        (error, divergence, other), sure = all_.mean(axis=1), all_.std(axis=1) / numpy.sqrt(all_.shape[1])
        print(
            f"{name:14} error {error:.4f} ± {sure[0]:.4f} of the spread (worst {all_[0].max():.3f}), divergence "
            f"{divergence:.5f} ± {sure[1]:.5f} nats, another first choice at {100 * other:.1f} ± {100 * sure[2]:.1f}%"
        )


main(*sys.argv[1:])
