"""The parts of the GPU suite that torch does: a random model, a reference in f32, a peer, the rate of a large product.

    torch_parts.py [--tiny] product | model FOLDER PROMPTS | peer FOLDER | reference FOLDER PROMPTS LOGITS

Each prints an object a line. `--tiny` does the same in small on the CPU.
"""
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SEED = 20261127
PROMPT_TOKENS = 128
#: Of the prompts that are compared position by position.
SHORT_PROMPTS, SHORT_TOKENS = 3, 24


def tell(**found):
    print(json.dumps(found), flush=True)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def median_s(device, runs, work):
    times = []
    for _ in range(runs):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def product(tiny, device):
    """What the vendor's library reaches: 8192³ in bf16, on numbers that are not zero."""
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=torch.bfloat16)
    each = 1 if tiny else 10
    work = lambda: [torch.mm(a, b, out=out) for _ in range(each)]  # noqa: E731
    work()
    seconds = median_s(device, 5, work) / each
    tell(part="product", name=f"{size}³ in bf16, cuBLASLt by torch", operations_per_s=2 * size**3 / seconds, torch=torch.__version__)


def configuration(tiny):
    sizes = (128, 256, 2, 4, 2, 512) if tiny else (4096, 14336, 32, 32, 8, 32768)
    hidden, intermediate, layers, heads, kv_heads, vocab = sizes
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "max_position_embeddings": 512 if tiny else 33792, "tie_word_embeddings": False, "sliding_window": None,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
    }  # fmt: skip


def tensors(config):
    """Name, shape and spread of each tensor, file by file; norms have no spread."""
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, kv = (config[name] * config["head_dim"] for name in ["num_attention_heads", "num_key_value_heads"])
    spread = config["initializer_range"]
    deep = spread / (2 * config["num_hidden_layers"]) ** 0.5
    yield [("model.embed_tokens.weight", (vocab, hidden), 5 * spread), ("lm_head.weight", (vocab, hidden), 2 * spread),
           ("model.norm.weight", (hidden,), None)]  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        parts = [
            ("input_layernorm", (hidden,), None), ("post_attention_layernorm", (hidden,), None),
            ("self_attn.q_proj", (query, hidden), spread), ("self_attn.k_proj", (kv, hidden), spread),
            ("self_attn.v_proj", (kv, hidden), spread), ("self_attn.o_proj", (hidden, query), deep),
            ("mlp.gate_proj", (intermediate, hidden), spread), ("mlp.up_proj", (intermediate, hidden), spread),
            ("mlp.down_proj", (hidden, intermediate), deep),
        ]  # fmt: skip
        yield [(f"model.layers.{layer}.{name}.weight", shape, std) for name, shape, std in parts]


def model(tiny, device, folder, prompts):
    """A random model of Mistral 7B's shape, in bf16, and some prompts for it."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir()
    config = configuration(tiny)
    noise = torch.Generator(device).manual_seed(SEED)
    start, total, where = time.perf_counter(), 0, {}
    files = list(tensors(config))
    with ThreadPoolExecutor(4) as writers:
        saved = []
        for index, parts in enumerate(files):
            made = {}
            for name, shape, std in parts:
                values = torch.randn(shape, generator=noise, device=device)
                values = values.mul_(std) if std else values.clamp_(-2, 2).mul_(0.05).add_(1)
                made[name] = values.to(torch.bfloat16).cpu()
                total += made[name].nbytes
            file = f"model-{index + 1:05}-of-{len(files):05}.safetensors"
            where |= dict.fromkeys(made, file)
            saved.append(writers.submit(save_file, made, folder / file, {"format": "pt"}))
        for each in saved:
            each.result()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = []
    for _ in range(SHORT_PROMPTS):
        ids = torch.randint(config["vocab_size"], (SHORT_TOKENS,), generator=noise, device=device)
        lines.append(" ".join(str(id) for id in ids.tolist()))
    Path(prompts).write_text("\n".join(lines) + "\n")
    # What stands here last says that all is there.
    (folder / "config.json").write_text(json.dumps(config))
    tell(part="model", name="random model", bytes=total, seconds=time.perf_counter() - start)


def load(folder, device):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return model.to(device).eval()


def peer(tiny, device, folder):
    """transformers at batch 1: a static cache, and each step one CUDA graph; by hand, and by torch.compile."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    start = time.perf_counter()
    model = load(folder, device)
    tell(part="peer load", name="transformers", seconds=time.perf_counter() - start, **versions)
    vocab = model.config.vocab_size
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None] * 7919 % vocab
    steps = 4 if tiny else 64
    def measure(name, way):
        try:
            with torch.inference_mode():
                step, token = way(model, prompt, 3 * steps + 16)
                for _ in range(8):
                    step()
                seconds = median_s(device, steps, step)
            tell(part="peer", name=name, batch=1, context=PROMPT_TOKENS, ms=seconds * 1e3, last=int(token()), **versions)
        except Exception as error:
            tell(part="peer", name=name, error=repr(error)[:800])

    measure("eager", eager)
    if device == "cuda":
        measure("CUDA graph", by_graph)
    long = torch.arange(64 if tiny else 2048, device=device)[None] * 7919 % vocab
    with torch.inference_mode():
        work = lambda: model(long, use_cache=False, logits_to_keep=1)  # noqa: E731
        work()
        tell(part="peer prefill", name="transformers", tokens=long.shape[1], ms=median_s(device, 5, work) * 1e3)
    # Last, because it may take longer than there is time.
    measure("torch.compile, reduce-overhead", compiled)


def begun(model, prompt, room):
    """A cache with the prompt in it, and the token that follows."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + room)
    out = model(prompt, past_key_values=cache, logits_to_keep=1)
    return cache, out.logits[:, -1].argmax(-1, keepdim=True)


def eager(model, prompt, room):
    cache, token = begun(model, prompt, room)

    def step():
        token.copy_(model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))

    return step, lambda: token


def by_graph(model, prompt, room):
    step, token = eager(model, prompt, room)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, token


def compiled(model, prompt, room):
    cache, token = begun(model, prompt, room)
    run = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False)

    def step():
        logits = run(input_ids=token, past_key_values=cache).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    return step, lambda: token


def reference(tiny, device, folder, prompts, logits):
    """Our logits, and transformers' own in bf16, against transformers in f32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = [[int(id) for id in line.split()] for line in Path(prompts).read_text().splitlines()]
    model = load(folder, device)

    def rows():
        with torch.inference_mode():
            found = [model(torch.tensor([prompt], device=device), use_cache=False).logits[0].float() for prompt in prompts]
            return torch.cat(found)

    theirs = rows()
    model.float()
    exact = rows()
    ours = torch.frombuffer(bytearray(Path(logits).read_bytes()), dtype=torch.float32).to(device).reshape(exact.shape)
    spread = exact.std(-1, keepdim=True)
    top = exact.topk(2).values
    told = {}
    for name, found in [("ours", ours), ("transformers in bf16", theirs)]:
        difference = (found - exact) / spread
        told[name] = {
            "distance": difference.abs().max().item(), "rms": difference.square().mean(-1).sqrt().max().item(),
            "relative": ((found - exact).norm() / exact.norm()).item(),
            "same_best": (found.argmax(-1) == exact.argmax(-1)).sum().item(),
        }  # fmt: skip
    # Where the best leads by more than twice what any logit is off, it is the best for us, too.
    leads = (top[:, 0] - top[:, 1]) > 2 * (ours - exact).abs().amax(-1)
    agree = (ours.argmax(-1) == exact.argmax(-1)) | ~leads
    # As near as the same arithmetic elsewhere, with some room: it rounds at other places.
    ok = bool(agree.all()) and told["ours"]["relative"] <= 1.5 * told["transformers in bf16"]["relative"]
    tell(part="reference", name="against transformers in f32", ok=ok, rows=len(exact), sure=int(leads.sum()), **told)


def main():
    words = sys.argv[1:]
    tiny = "--tiny" in words
    what, *rest = [word for word in words if word != "--tiny"]
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    parts = {"product": product, "model": model, "peer": peer, "reference": reference}
    parts[what](tiny, "cpu" if tiny else "cuda", *rest)


if __name__ == "__main__":
    main()
