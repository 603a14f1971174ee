#!/usr/bin/env python3
"""Writes quantized.json: blocks of floats, and what ggml's own Python package (gguf 0.19, numpy) quantizes them to.

    python3 crates/checkpoint/tests/golden/make_quantized.py > crates/checkpoint/tests/golden/quantized.json

For each of F32, F16 and BF16, hex of `bytes` (little-endian elements) and of the blocks of 32 in `Q8_0` and `Q4_0`.
"""
import json
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

BLOCK = 32
rng = np.random.default_rng(7)


def with_largest(largest, rest):
    """A block whose largest value is given, so that the scale is a round number and values lie between two quants."""
    return np.concatenate([[largest], rest, np.zeros(BLOCK - 1 - len(rest))])


between = [0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 3.5, -3.5, 0.49999997, -0.49999997, 126.5, -126.5, 1e-9]
blocks = [
    *rng.normal(0, 0.02, (12, BLOCK)),
    *rng.normal(0, 1, (4, BLOCK)) * [[1e-4], [1e-7], [1e3], [1e6]],  # scales that f16 holds, rounds to 0, …
    np.zeros(BLOCK),
    -np.zeros(BLOCK),
    with_largest(127, between),  # Q8_0 by steps of 1
    with_largest(-127, between),
    with_largest(-8, [x for x in between if abs(x) < 8] + [7.5, 7.49, -7.5]),  # Q4_0 by steps of 1
    with_largest(8, [-8, 7.5, -7.5, 0.5, 1.5]),  # the first of two largest decides the sign
    with_largest(-8, [8, 7.5, -7.5, 0.5, 1.5]),
    np.linspace(-1, 1, BLOCK),
]
values = np.array(blocks).astype(np.float32)
encoded = {"F32": values.tobytes(), "F16": None, "BF16": None}
halves = np.clip(values, -6e4, 6e4).astype(np.float16)
encoded["F16"] = halves.tobytes()
upper = values.view(np.uint32) >> 16
encoded["BF16"] = upper.astype(np.uint16).tobytes()
meant = {"F32": values, "F16": halves.astype(np.float32), "BF16": (upper.astype(np.uint32) << 16).view(np.float32)}
golden = {
    dtype: {"bytes": encoded[dtype].hex()}
    | {to.name: quantize(meant[dtype], to).tobytes().hex() for to in (Type.Q8_0, Type.Q4_0)}
    for dtype in encoded
}
print(json.dumps(golden))
