#!/usr/bin/env python3
"""Makes the random model of 1.1 billion weights that the engines are compared on: Mistral's shape, small.

    models.py gguf OUT.gguf TOKENIZER.gguf     in bf16, with the tokenizer of another file cut to 32,000 tokens
    models.py quantize IN.gguf OUT.gguf q8_0   by llama.cpp's own function; needs llama_cpp
    models.py ctranslate2 OUT_FOLDER           the same function in CTranslate2's int8; needs ctranslate2

All need numpy. A tensor depends on its name and shape only, so every form holds the same model.
"""
import hashlib
import json
import os
import struct
import sys

import numpy

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 5632, 22, 32, 8, 64, 32000
EPSILON, ROPE_BASE = 1e-5, 10000.0
ALIGNMENT_BYTES = 32
F32, BF16 = 0, 30  # GGUF's numbers
MOSTLY_BF16 = 32
FILE_TYPES = {"q4_0": 2, "q8_0": 7}


def tensors():
    """(name, shape, standard deviation) of all, in the file's order; a norm has no deviation."""
    deep = 0.02 / (2 * LAYERS) ** 0.5
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "token_embd.weight", (VOCAB, HIDDEN), 0.1
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        yield at + "attn_norm.weight", (HIDDEN,), None
        yield at + "attn_q.weight", (q, HIDDEN), 0.02
        yield at + "attn_k.weight", (kv, HIDDEN), 0.02
        yield at + "attn_v.weight", (kv, HIDDEN), 0.02
        yield at + "attn_output.weight", (HIDDEN, q), deep
        yield at + "ffn_norm.weight", (HIDDEN,), None
        yield at + "ffn_gate.weight", (INTERMEDIATE, HIDDEN), 0.02
        yield at + "ffn_up.weight", (INTERMEDIATE, HIDDEN), 0.02
        yield at + "ffn_down.weight", (HIDDEN, INTERMEDIATE), deep
    yield "output_norm.weight", (HIDDEN,), None
    yield "output.weight", (VOCAB, HIDDEN), 0.04


def values(name, shape, deviation):
    """f32, with bf16's precision unless they are a norm's, which lie around 1."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    drawn = numpy.random.Generator(numpy.random.SFC64(seed)).standard_normal(shape, dtype=numpy.float32)
    if deviation is None:
        return 1 + 0.05 * numpy.clip(drawn, -2, 2)
    drawn *= numpy.float32(deviation)
    return (drawn.view(numpy.uint32) + 0x8000 & 0xFFFF0000).astype(numpy.uint32).view(numpy.float32)


class Reader:
    """The metadata at the start of a GGUF file."""

    SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    TEXT, LIST = 8, 9

    def __init__(self, path):
        with open(path, "rb") as file:
            self.file = file
            magic, _version, _tensors, keys = self.scalar("IIQQ")
            if magic != 0x46554747:
                sys.exit(f"{path} is no GGUF file")
            self.metadata = {}
            for _ in range(keys):
                key = self.value(self.TEXT)
                (kind,) = self.scalar("I")
                self.metadata[key] = self.value(kind)

    def scalar(self, form):
        form = "<" + form
        return struct.unpack(form, self.file.read(struct.calcsize(form)))

    def value(self, kind):
        if kind == self.TEXT:
            return self.file.read(*self.scalar("Q")).decode()
        if kind == self.LIST:
            kind, count = self.scalar("IQ")
            return [self.value(kind) for _ in range(count)]
        return self.scalar(self.SCALARS[kind])[0]


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def encoded(value):
    """A metadata value, its kind first."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", Reader.TEXT) + text(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", Reader.LIST, Reader.TEXT, len(value)) + b"".join(map(text, value))
    return struct.pack(f"<IIQ{len(value)}i", Reader.LIST, 5, len(value), *value)


def tokenizer(path):
    """Byte-pair merges stand by rank, and tokens after their parts: the first of them are a tokenizer too."""
    found = {key: value for key, value in Reader(path).metadata.items() if key.startswith("tokenizer.ggml.")}
    kept = set(found["tokenizer.ggml.tokens"][:VOCAB])
    for key in ("tokens", "token_type"):
        found[f"tokenizer.ggml.{key}"] = found[f"tokenizer.ggml.{key}"][:VOCAB]
    merges = (merge.split(" ") for merge in found["tokenizer.ggml.merges"])
    found["tokenizer.ggml.merges"] = [f"{a} {b}" for a, b in merges if {a, b, a + b} <= kept]
    return found


def write_gguf(out, tokenizer_path):
    metadata = {
        "general.architecture": "llama",
        "general.name": "random-1b",
        "general.file_type": MOSTLY_BF16,
        "general.alignment": ALIGNMENT_BYTES,
        "llama.vocab_size": VOCAB,
        "llama.context_length": 32768,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": ROPE_BASE,
    } | tokenizer(tokenizer_path)
    found = list(tensors())
    head = struct.pack("<IIQQ", 0x46554747, 3, len(found), len(metadata))
    head += b"".join(text(key) + encoded(value) for key, value in metadata.items())
    offset = 0
    for name, shape, deviation in found:
        kind, width = (F32, 4) if deviation is None else (BF16, 2)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
        offset += int(numpy.prod(shape)) * width  # of every shape here a multiple of the alignment
    with open(out + ".part", "wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT_BYTES))
        for i, (name, shape, deviation) in enumerate(found):
            drawn = values(name, shape, deviation)
            file.write(drawn.tobytes() if deviation is None else drawn.view(numpy.uint16)[..., 1::2].tobytes())
            progress(i + 1, len(found))
    os.replace(out + ".part", out)


def quantize(source, out, kind):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    if llama_cpp.llama_model_quantize(source.encode(), (out + ".part").encode(), params):
        sys.exit(f"llama.cpp could not quantize to {kind}")
    os.replace(out + ".part", out)


def write_ctranslate2(out):
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        LAYERS, HEADS, activation=common_spec.Activation.SWISH, pre_norm=True, ffn_glu=True, rms_norm=True,
        rotary_dim=0, rotary_interleave=True, rotary_base=ROPE_BASE, num_heads_kv=KV_HEADS,
    )  # fmt: skip
    drawn = {}
    for name, shape, deviation in tensors():
        drawn[name] = values(name, shape, deviation)
        progress(len(drawn), 3 + 9 * LAYERS)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = drawn["token_embd.weight"]
    decoder.layer_norm.gamma = drawn["output_norm.weight"]
    decoder.projection.weight = drawn["output.weight"]
    for i, layer in enumerate(decoder.layer):
        def of(name):
            return drawn.pop(f"blk.{i}.{name}.weight")

        attention, ffn = layer.self_attention, layer.ffn
        attention.layer_norm.gamma, ffn.layer_norm.gamma = of("attn_norm"), of("ffn_norm")
        attention.linear[0].weight = numpy.concatenate([of("attn_q"), of("attn_k"), of("attn_v")])
        attention.linear[1].weight = of("attn_output")
        ffn.linear_0.weight, ffn.linear_0_noact.weight = of("ffn_gate"), of("ffn_up")
        ffn.linear_1.weight = of("ffn_down")
    words = ["<unk>", "<s>", "</s>"]
    spec.register_vocabulary(words + [f"w{i}" for i in range(len(words), VOCAB)])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", "</s>", "<unk>"
    spec.config.layer_norm_epsilon = EPSILON
    spec.validate()
    spec.optimize(quantization="int8")
    os.makedirs(out + ".part", exist_ok=True)
    spec.save(out + ".part")
    with open(os.path.join(out + ".part", "vocabulary.json"), encoding="utf-8") as file:
        assert len(json.load(file)) == VOCAB
    os.rename(out + ".part", out)


def progress(done, total):
    print(f"\r  {done}/{total} tensors", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    form, *arguments = sys.argv[1:] or ["none"]
    forms = {"gguf": write_gguf, "quantize": quantize, "ctranslate2": write_ctranslate2}
    if form not in forms:
        sys.exit(__doc__)
    forms[form](*arguments)
