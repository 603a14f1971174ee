"""The GPU suite's figures as a table that people read: the goals beside what was reached, and all parts."""

#: What a share of the reading bound is called where a figure is missing.
NONE = "–"


def of(found):
    parts = found["parts"]
    figures = [figure for part in parts.values() for figure in part["found"]]
    machine = found.get("machine", {})
    gpu = machine.get("gpu", {})
    lines = [f"# GPU suite: {gpu.get('name', 'no GPU')}", ""]
    told = [f"driver {gpu['driver_version']}"] if "driver_version" in gpu else []
    told += [machine["date"]] if "date" in machine else []
    told += ["a dry run on the CPU: no figure means anything"] if found["dry_run"] else []
    told += ["cut short (`--quick`)"] if found["quick"] else []
    lines += ["; ".join(told), "", "## Goals", "", "| what | reached | must | aim | verdict |", "|---|---|---|---|---|"]
    lines += [goal.row(Figures(figures)) for goal in GOALS]
    lines += ["", "## Bounds, measured in the same run", "", *bounds(figures)]
    lines += ["", "## Steps", "", *steps(figures)]
    lines += ["", "## Peer: transformers, batch 1", "", *peers(figures)]
    lines += ["", "## Sums between ranks", "", *sums(figures)]
    lines += ["", "## Where the time goes", "", *kernels(figures)]
    lines += ["", "## Right or wrong", "", *checks(parts)]
    return "\n".join(lines) + "\n"


class Figures:
    """Finds figures; what is missing is None, and so is all that is made of it."""

    def __init__(self, figures):
        self.figures = figures

    def one(self, part, **having):
        for figure in self.figures:
            if figure.get("part") == part and "error" not in figure and all(figure.get(k) == v for k, v in having.items()):
                return figure
        return None

    def read(self):
        bound = self.one("bound", name="read")
        return bound and bound["bytes_per_s"]

    def decode(self, batch, context):
        found = self.one("decode", batch=batch, context=context, weights="bf16")
        return found and found["ms"]["p50"]

    def decode_share(self, batch, context, weights="bf16"):
        found, read = self.one("decode", batch=batch, context=context, weights=weights), self.read()
        return found and read and found["bytes"] / (found["ms"]["p50"] * 1e-3) / read

    def attention_share(self, batch, context):
        found, read = self.one("attention", batch=batch, context=context, weights="bf16"), self.read()
        return found and read and found["bytes"] / max(found["added_ms"], 1e-9) / 1e-3 / read

    def prefill(self, numerics):
        return self.one("prefill", weights="bf16", numerics=numerics, tokens=2048)

    def invariance(self):
        own, fast = self.prefill("invariant"), self.prefill("fast")
        return own and fast and own["ms"]["p50"] / fast["ms"]["p50"] - 1

    def prefill_share(self, numerics):
        found, product = self.prefill(numerics), self.one("product")
        return found and product and found["operations"] / (found["ms"]["p50"] * 1e-3) / product["operations_per_s"]

    def against_peer(self):
        own = self.decode(1, 128)
        theirs = [each["ms"] for each in self.figures if each.get("part") == "peer" and "ms" in each]
        return min(theirs) / own if own and theirs else None

    def batches(self):
        one, eight = self.decode(1, 128), self.decode(8, 128)
        return eight / one if one and eight else None

    def first_token(self):
        found = self.one("load", weights="bf16")
        return found and found["first_token_s"]

    def idle(self):
        found = self.one("idle", batch=1, weights="bf16")
        return found and found["idle"]


class Goal:
    def __init__(self, what, figure, must, aim, unit="%", less=False):
        self.what, self.figure, self.must, self.aim, self.unit, self.less = what, figure, must, aim, unit, less

    def shown(self, value):
        if value is None:
            return NONE
        return f"{100 * value:.1f}%" if self.unit == "%" else f"{value:.2f}{self.unit}"

    def row(self, figures):
        value = self.figure(figures)
        reached = lambda goal: goal is not None and (value <= goal if self.less else value >= goal)  # noqa: E731
        if value is None:
            verdict = "not measured"
        elif reached(self.aim):
            verdict = "aim reached"
        elif reached(self.must):
            verdict = "must reached"
        else:
            verdict = f"missed: {value / (self.must or self.aim):.2f} of it"
        return f"| {self.what} | {self.shown(value)} | {self.shown(self.must)} | {self.shown(self.aim)} | {verdict} |"


GOALS = [
    Goal("decode, batch 1, bf16, 128 tokens in: share of the reading bound", lambda f: f.decode_share(1, 128), 0.78, 0.92),
    Goal("the same in FP8", lambda f: f.decode_share(1, 128, "fp8"), 0.70, 0.88),
    Goal("step at batch 8 against batch 1", lambda f: f.batches(), 1.10, 1.03, "×", less=True),
    Goal("decode, batch 64 at 1k: share of (weights + KV) over bandwidth", lambda f: f.decode_share(64, 1024), 0.60, 0.80),
    Goal("decode, batch 256 at 1k: likewise", lambda f: f.decode_share(256, 1024), 0.60, 0.80),
    Goal("prefill of 2,048, `invariant`: share of the 8192³ rate", lambda f: f.prefill_share("invariant"), 0.65, 0.80),
    Goal("the same, `fast`", lambda f: f.prefill_share("fast"), 0.65, 0.80),
    Goal("what `invariant` costs of that prefill", lambda f: f.invariance(), None, 0.25, less=True),
    Goal("decode attention, batch 1 at 4k: share of bandwidth", lambda f: f.attention_share(1, 4096), 0.75, 0.90),
    Goal("decode attention, batch 8 at 4k", lambda f: f.attention_share(8, 4096), 0.75, 0.90),
    Goal("decode attention, batch 1 at 32k", lambda f: f.attention_share(1, 32000), 0.75, 0.90),
    Goal("against the fastest of transformers' ways, batch 1", lambda f: f.against_peer(), 1.3, 2.0, "×"),
    Goal("from start to first token, page cache warm", lambda f: f.first_token(), 8.0, 4.0, " s", less=True),
    Goal("GPU idle in a decode step, batch 1", lambda f: f.idle(), None, 0.02, less=True),
]


def bounds(figures):
    for each in figures:
        if each.get("part") == "bound":
            yield f"- {each['name']}: {each['bytes_per_s'] / 1e12:.3f} TB/s{' (read + written)' if each['name'] == 'copy' else ''}"
        if each.get("part") == "product":
            yield f"- {each['name']}: {each['operations_per_s'] / 1e12:.1f} TFLOP/s"


def steps(figures):
    yield "| what | p50 ms | min | p90 | p99 | max | bytes/s | operations/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in figures:
        if "ms" not in each or not isinstance(each["ms"], dict):
            continue
        ms = each["ms"]
        rate = each["bytes"] / each.get("added_ms", ms["p50"]) / 1e9 if "bytes" in each else None
        operations = each["operations"] / ms["p50"] / 1e9 if "operations" in each else None
        times = " | ".join(f"{ms[name]:.3f}" for name in ["p50", "min", "p90", "p99", "max"])
        shown = [f"{value:.3f} T" if value is not None else "" for value in (rate, operations)]
        kind = " (FP8)" if each.get("weights") == "fp8" else ""
        yield f"| {each['name']}{kind} | {times} | {shown[0]} | {shown[1]} |"
    yield ""
    for each in figures:
        if each.get("part") == "idle":
            yield f"- {each['name']}, {each['weights']}: a step takes {each['step_ms']:.3f} ms, its kernels {each['busy_ms']:.3f} ms: {100 * each['idle']:.1f}%"
        if each.get("part") == "load":
            yield (
                f"- load, {each['weights']}: {each['bytes'] / 1e9:.2f} GB; GPU open after {each['opened_s']:.2f} s, weights there after "
                f"{each['loaded_s']:.2f} s, first token after {each['first_token_s']:.2f} s"
            )


def peers(figures):
    for each in figures:
        if each.get("part") == "peer":
            yield f"- {each['name']}: {each['ms']:.3f} ms a token" if "ms" in each else f"- {each['name']}: {each['error']}"
        if each.get("part") == "peer prefill":
            yield f"- prefill of {each['tokens']}: {each['ms']:.2f} ms"
        if each.get("part") == "peer load":
            yield f"- torch {each['torch']}, transformers {each['transformers']}; loaded in {each['seconds']:.1f} s"


def sums(figures):
    found = [each for each in figures if each.get("part") == "sums" and "us" in each]
    if not found:
        return
    yield "Pieces of a sum from all to all, in µs, by message; the ranks share this one GPU."
    yield ""
    columns = sorted({(each["ranks"], each["way"]) for each in found})
    yield "| tokens | bytes | " + " | ".join(f"{ranks} ranks, {way}" for ranks, way in columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    us = {(each["tokens"], each["bytes"], each["ranks"], each["way"]): each["us"] for each in found}
    for tokens, size in sorted({key[:2] for key in us}):
        row = [us.get((tokens, size, *column)) for column in columns]
        yield f"| {tokens} | {size:,} | " + " | ".join(NONE if each is None else f"{each:.1f}" for each in row) + " |"


def kernels(figures):
    yield "Kernel by kernel, each waited for: 5 to 10 µs a launch are the waiting."
    yield ""
    yield "| step | kernel | launches | ms |"
    yield "|---|---|---|---|"
    for each in figures:
        if each.get("part") == "kernels" and "kernels" in each:
            for name, told in sorted(each["kernels"].items(), key=lambda item: -item[1]["ms"]):
                yield f"| {each['name']} | {name} | {told['launches']} | {told['ms']:.3f} |"


def checks(parts):
    yield "| part | s | checks | failed | worst distance | error |"
    yield "|---|---|---|---|---|---|"
    for name, part in parts.items():
        judged = [each for each in part["found"] if "ok" in each]
        failed = [each for each in judged if not each["ok"]]
        distances = [each["distance"] for each in part["found"] if isinstance(each.get("distance"), float)]
        worst = f"{max(distances):.4f}" if distances else ""
        said = [each["error"] for each in failed if "error" in each]
        error = " ".join([part.get("error", ""), *said, *part.get("stderr", "").splitlines()[-1:]])
        error = error.replace("|", "/")[:400]
        yield f"| {name} | {part.get('seconds', '')} | {len(judged)} | {len(failed)} | {worst} | {error} |"
    for part in parts.values():
        for each in part["found"]:
            if each.get("part") == "stopped" and "out_ms" in each:
                yield ""
                yield (
                    f"- {each['name']}, which is due to be noticed after {each['due_ms']:.0f} ms: out after {each['out_ms']:.0f} ms; "
                    f"{each['says']}; {each['process_must_exit'] or 'the process may go on'}"
                )
            if each.get("part") == "reference" and "ours" in each:
                yield ""
                for whose in ["ours", "transformers in bf16"]:
                    told = each[whose]
                    yield (
                        f"- {whose}, against transformers in f32, {each['rows']} rows: relative error {told['relative']:.2e}, largest "
                        f"difference {told['distance']:.4f} of the spread, the same best token in {told['same_best']}"
                    )
