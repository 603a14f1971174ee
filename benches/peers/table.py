"""Figures as Markdown: what each engine reached, our ratio to the best peer, our share of the machine's bound."""

COLUMNS = ["pp512", "batch 1", "batch 8", "batch 16", "batch 32", "first token", "peak_mb"]
HEADS = ["pp512", "batch 1", "batch 8", "batch 16", "batch 32", "first token, s", "peak memory, MB"]
LESS_IS_BETTER = {"first token", "peak_mb"}
PROMPT_TOKENS = 512


def best(column, figures):
    figures = [figure for figure in figures if figure is not None]
    if not figures:
        return None
    return min(figures) if column in LESS_IS_BETTER else max(figures)


def figure(column, number):
    if number is None:
        return "–"
    return f"{number:.2f}" if column == "first token" or number < 10 else f"{number:,.0f}"


def row(title, cells):
    """cells: for each column, the texts of 1 thread, 2 threads, …"""
    return "| " + " | ".join([title, *(" / ".join(texts) for texts in cells)]) + " |"


def bound_seconds(column, told, bound, kind):
    """How long a step takes at least: its weights' bytes read once, or its operations at the peak of its products."""
    batch = 1 if column == "pp512" else int(column.removeprefix("batch "))
    tokens = PROMPT_TOKENS if column == "pp512" else batch
    operations = 2 * (told["layer_weights"] * tokens + told["head_weights"] * batch)
    peak = bound.get(kind) or bound.get("f32")
    by_operations = operations / peak / 1e9 if peak else 0
    return max(told["bytes"] / bound["read_gb"] / 1e9, by_operations), tokens


def share(column, told, bound, kind):
    if column in LESS_IS_BETTER or column not in told or not bound:
        return "–"
    seconds, tokens = bound_seconds(column, told, bound, kind)
    return f"{100 * seconds * told[column] / tokens:.0f}%"


def model_table(model, result, threads, bounds, rounds):
    """result: {engine: {threads: {column: figure}}} and, under `failed`, {engine: sentence}."""
    turns = f"{rounds} rounds" if rounds > 1 else "1 round"
    lines = [f"## {model.title} ({turns})", "", row("", [[head] for head in HEADS]), "|---" * (len(COLUMNS) + 1) + "|"]

    def told(engine, count):
        return result["figures"].get(engine, {}).get(count, {})

    ours = [engine for engine in result["figures"] if engine.startswith("galerne")]
    peers = [engine for engine in result["figures"] if engine not in ours]
    for engine in ours + peers:
        title = result["titles"][engine]
        cells = [[figure(c, told(engine, n).get(c)) for n in threads] for c in COLUMNS]
        lines.append(row(f"**{title}**" if engine in ours else title, cells))
    for engine in ours:
        title = result["titles"][engine]
        cells = []
        for c in COLUMNS:
            texts = []
            for n in threads:
                own, other = told(engine, n).get(c), best(c, [told(peer, n).get(c) for peer in peers])
                ratio = own and other and (other / own if c in LESS_IS_BETTER else own / other)
                texts.append(f"{ratio:.2f}×" if ratio else "–")
            cells.append(texts)
        lines.append(row(f"{title}: to the best peer", cells))
        cells = [[share(c, told(engine, n), bounds.get(n), kind(model, told(engine, n))) for n in threads] for c in COLUMNS]
        lines.append(row(f"{title}: of the bound", cells))
    lines.append("")
    lines += [f"- {result['titles'][engine]}: {why}." for engine, why in result["failed"].items()]
    return lines + [""] * bool(result["failed"])


def kind(model, told):
    """The kind of products whose peak bounds this way to compute."""
    if model.products == "bf16" or told.get("how", "").startswith("int8"):
        return model.products
    return "f32"


def bounds_table(bounds):
    kinds = [("read_gb", "reading, GB/s")] + [(kind, f"{kind}, GOP/s") for kind in ("f32", "bf16", "int8", "int4")]
    kinds = [(key, head) for key, head in kinds if any(key in bound for bound in bounds.values())]
    heads = []
    for key, head in kinds:
        instruction = next((bound[f"{key} by"] for bound in bounds.values() if f"{key} by" in bound), None)
        heads.append(f"{head} ({instruction})" if instruction else head)
    lines = [row("threads", [[head] for head in heads]), "|---" * (len(heads) + 1) + "|"]
    for threads, bound in bounds.items():
        lines.append(row(str(threads), [[figure(key, bound.get(key))] for key, _ in kinds]))
    return lines + [""]
