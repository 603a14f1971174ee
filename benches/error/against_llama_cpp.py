#!/usr/bin/env python3
"""How far products of bytes move the logits, beside how far llama.cpp's do, on the same quantized file.

    cargo build --release -p galerne-model --example logits
    python3 benches/error/against_llama_cpp.py MODEL.gguf target/release/examples/logits TEXT [PIECES]

The reference is our f32 path, which computes with the values that the file means. Told are, over all positions of a text
in pieces of 250 tokens: the root mean square of the logits' error as a share of their spread, the mean Kullback-Leibler
divergence of the distributions, and how often the most likely token is another one. Needs the packages
llama-cpp-python and numpy.
"""
import sys

import llama_cpp
import numpy

from logits import Ours, compare, pieces_of, tell

PIECE_TOKENS = 250


def llama(model, prompt):
    """[tokens][vocab]."""
    model.reset()
    model.eval(prompt)
    return numpy.array(model.scores[: len(prompt)], dtype=numpy.float32)


def main(path, binary, text, pieces="8"):
    model = llama_cpp.Llama(path, n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)
    prompts = pieces_of(model, text, PIECE_TOKENS, int(pieces))
    reference, bytes_ = (Ours([binary, path, compute], prompts, model.n_vocab()) for compute in ("f32", "int8"))
    found = {"galerne, int8": [], "llama.cpp": []}
    for prompt in prompts:
        expected = reference.next(len(prompt))
        found["galerne, int8"].append(compare(bytes_.next(len(prompt)), expected))
        found["llama.cpp"].append(compare(llama(model, prompt), expected))
    print(f"{len(prompts)} pieces of {PIECE_TOKENS} tokens, llama.cpp of llama-cpp-python {llama_cpp.__version__}")
    for name, parts in found.items():
        tell(name, parts)


main(*sys.argv[1:])
