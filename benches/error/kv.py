#!/usr/bin/env python3
"""How far keys and values in bf16 and int8 move the logits from those with keys and values in f32.

    cargo build --release -p galerne-model --example logits
    python3 benches/error/kv.py MODEL.gguf target/release/examples/logits TEXT [PIECES] [PIECE_TOKENS]

Products are in f32. Told is what against_llama_cpp.py tells, over all positions of a text in pieces of 1,000 tokens.
Needs the packages llama-cpp-python, which cuts the text into tokens, and numpy.
"""
import sys

import llama_cpp

from logits import Ours, compare, pieces_of, tell


def main(path, binary, text, pieces="4", piece_tokens="1000"):
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    prompts = pieces_of(model, text, int(piece_tokens), int(pieces))
    ours = {dtype: Ours([binary, path, "f32", dtype], prompts, model.n_vocab()) for dtype in ("f32", "bf16", "int8")}
    reference, found = ours.pop("f32"), {dtype: [] for dtype in ours}
    for prompt in prompts:
        expected = reference.next(len(prompt))
        for dtype, rows in ours.items():
            found[dtype].append(compare(rows.next(len(prompt)), expected))
    print(f"{sum(map(len, prompts))} positions in {len(prompts)} pieces")
    for dtype, parts in found.items():
        tell(f"keys, values {dtype}", parts)


main(*sys.argv[1:])
