#!/usr/bin/env python3
"""Galerne's engine beside what a user would pick instead, on this machine, in one run: `make bench`.

    cargo build --release -p galerne-model --example speed --example bounds
    python3 benches/peers/run.py [--models smollm2,bf16,q8_0,q4_0] [--peers llama.cpp,openvino,…] [--rounds N]
        [--threads 1,2] [--batches 1,8,16,32] [--steps N] [--venvs DIR] [--out FILE.md]

Every engine gets an environment of its own below target/peers, made if it is missing; so are the models. Engines take
turns: each round runs every engine once, in a process of its own for each number of threads, and the best of the
rounds counts. The machine's bounds are measured before the first round and after the last. An engine that cannot be
installed or cannot read a model becomes a sentence in the report. Time to the first token counts from the start of the
process to the first of 16 prompt tokens' answer, for the peers with Python's start. transformers is left out unless
named: PyPI's torch takes more than 3 GB of disk.
"""
import argparse
import datetime
import json
import mmap
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import table
from engines import ENGINES, Failed, clean_environment, ensure, last_line, python

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
HERE = Path(__file__).resolve().parent
DEMO = ROOT / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
PROCESS_SECONDS_MAX = 900
PEERS = [name for name in ENGINES if name != "transformers"]


class Model(NamedTuple):
    """What all engines run, each in the form that it reads; an engine without a form has the reason why."""

    title: str
    file: str
    # The kind of products, among the machine's bounds, that weights of this format can be multiplied by.
    products: str
    # How ours computes: a row for each.
    ways: list
    steps: int
    rounds: int
    # Other files than `file`, and reasons (in brackets) why there is none.
    other: dict = {}


NO_INT8_FORM = "[its converter wants a Hugging Face checkpoint]"
MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct, Q4_1", str(DEMO), "int4", ["auto", "int8"], 64, 2, {"ctranslate2": NO_INT8_FORM}
    ),
    "bf16": Model(
        "Random Mistral of 1.1 B weights, bf16", "random-1b.bf16.gguf", "bf16", ["auto"], 16, 1,
        {"ctranslate2": "[bf16 on a CPU is not among its ways to compute]"},
    ),
    "q8_0": Model(
        "Random Mistral of 1.1 B weights, Q8_0", "random-1b.q8_0.gguf", "int8", ["auto"], 16, 1,
        {"ctranslate2": "random-1b.ctranslate2"},
    ),
    "q4_0": Model(
        "Random Mistral of 1.1 B weights, Q4_0", "random-1b.q4_0.gguf", "int4", ["auto"], 16, 1,
        {"ctranslate2": "[four bits on a CPU are not among its ways to compute]"},
    ),
}  # fmt: skip


def main():
    asked = parse()
    say("environments")
    versions, missing = {}, {}
    for name in asked.peers:
        try:
            versions[name] = ensure(asked.venvs, name)
        except Failed as why:
            missing[name] = str(why)
    say("models")
    for name in asked.models:
        make_model(asked, MODELS[name])
    say("bounds of the machine")
    start, watch = datetime.datetime.now(), Watch()
    bounds = measure_bounds()
    results = {}

    def write():
        report = "\n".join(told(asked, start, watch, bounds, results))
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(report)
        return report

    for name in asked.models:
        results[name] = {"figures": {}, "titles": {}, "failed": {}}
        run_model(asked, MODELS[name], results[name], versions, missing)
        write()  # whoever has no more time has this much
    say("bounds of the machine, again")
    for threads, again in measure_bounds().items():
        for key, value in again.items():
            if not isinstance(value, str):
                bounds[threads][key] = max(value, bounds[threads][key])
    print(write())
    say(f"written to {asked.out}")


def parse():
    numbers = lambda text: [int(x) for x in text.split(",")]
    words = lambda text: [x for x in text.split(",") if x]
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=words, default=list(MODELS))
    parser.add_argument("--peers", type=words, default=PEERS, help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, help="else 2 of SmolLM2, 1 of the large models")
    parser.add_argument("--threads", type=numbers, default=sorted({1, cores}))
    parser.add_argument("--batches", type=numbers, default=[1, 8, 16, 32])
    parser.add_argument("--steps", type=int, help="of decoding; else 64 of SmolLM2, 16 of the large models")
    parser.add_argument("--venvs", type=Path, default=TARGET / "peers")
    parser.add_argument("--out", type=Path, default=TARGET / "peers" / "table.md")
    asked = parser.parse_args()
    for given, known in ((asked.models, MODELS), (asked.peers, ENGINES)):
        for name in given:
            if name not in known:
                parser.error(f"{name} is none of {', '.join(known)}")
    return asked


def say(what):
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)


def model_path(model, engine=None):
    """The file or folder that this engine reads. Failed, if there is none."""
    form = model.other.get(engine, model.file)
    if form.startswith("["):
        raise Failed(form.strip("[]"))
    return form if os.path.isabs(form) else str(TARGET / "peers" / "models" / form)


def make_model(asked, model):
    """Makes the forms of a random model that are missing."""
    if not DEMO.exists():
        subprocess.run([ROOT / ".ci/setup", "demo"], check=True)

    def make(path, engine, *arguments):
        if os.path.exists(path):
            return
        print(f"  {Path(path).name}: making it, a minute or two …", flush=True)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        ensure(asked.venvs, engine)
        command = [python(asked.venvs, engine), HERE / "models.py", *arguments]
        if subprocess.run(command, env=clean_environment()).returncode:
            raise Failed(f"{Path(path).name} could not be made")

    path = model_path(model)
    if path == str(DEMO):
        return
    try:
        bf16 = model_path(MODELS["bf16"])
        make(bf16, "llama.cpp", "gguf", bf16, DEMO)
        if path != bf16:
            make(path, "llama.cpp", "quantize", bf16, path, path.split(".")[-2])
        if "ctranslate2" in asked.peers and not model.other["ctranslate2"].startswith("["):
            folder = model_path(model, "ctranslate2")
            make(folder, "ctranslate2", "ctranslate2", folder)
    except Failed as why:
        print(f"  {why}", flush=True)


def run_model(asked, model, result, versions, missing):
    """Every engine once a round, with each number of threads; result takes the best of each figure."""
    result["titles"] = {f"galerne {way}": f"Galerne, {way}" for way in model.ways}
    result["titles"] |= {
        name: ENGINES[name].title.format(versions.get(name, "")) for name in asked.peers
    }
    result["failed"] |= missing
    rounds = asked.rounds or model.rounds
    for number in range(rounds):
        for engine in result["titles"]:
            for threads in asked.threads:
                if engine in result["failed"]:
                    continue
                what = f"{model.title}: round {number + 1} of {rounds}, {engine}, {threads} threads"
                warm(model_path(model))
                try:
                    found = run_one(asked, model, engine, threads)
                except Failed as why:
                    result["failed"][engine] = str(why)
                    say(f"{what}: {why}")
                    continue
                say(f"{what}: " + ", ".join(f"{c} {table.figure(c, found.get(c))}" for c in table.COLUMNS))
                keep_best(result["figures"].setdefault(engine, {}).setdefault(threads, {}), found)
                if "how" in found:
                    way = found["how"].split(" on ")[0]
                    asked_way = engine.split(" ")[1]
                    result["titles"][engine] = f"Galerne, {asked_way}" + f" ({way})" * (asked_way != way)


def warm(path):
    """Brings a file into the system's memory, and has as much again ready twice: no engine shall wait for the disk, or for a
    host that takes back what its guests leave idle, instead of the others."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass
    with mmap.mmap(-1, 2 * os.path.getsize(path)) as idle:
        idle.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(idle), mmap.PAGESIZE):
            idle[at] = 1


def keep_best(kept, found):
    for column, value in found.items():
        kept[column] = table.best(column, [kept.get(column), value]) if column in table.COLUMNS else value


def run_one(asked, model, engine, threads):
    """One process: its figures, or Failed."""
    steps = asked.steps or model.steps
    more = ["--threads", threads, "--batches", ",".join(map(str, asked.batches)), "--steps", steps]
    if engine.startswith("galerne"):
        command = [TARGET / "release/examples/speed", model_path(model), engine.split(" ")[1], 1, "--json", *more]
    else:
        path = model_path(model, engine)
        if not os.path.exists(path):
            raise Failed(f"{Path(path).name} could not be made")
        command = [python(asked.venvs, engine), HERE / "measure.py", engine, path, *more]
    found = {}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), env=clean_environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        timer = threading.Timer(PROCESS_SECONDS_MAX, process.kill)
        timer.start()
        for line in process.stdout:
            if line.strip() == "first token":
                found["first token"] = time.perf_counter() - start
            elif line.startswith("{"):
                found |= json.loads(line)
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        if code:
            raise Failed(f"no figures: {last_line(errors.read())} (exit status {code})")
    return found


def measure_bounds():
    """{threads: figures}; shares are told for the numbers of threads that are among them."""
    output = subprocess.run(
        [TARGET / "release/examples/bounds", "--json"], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for line in output.splitlines():
        bound = json.loads(line)
        found[bound.pop("threads")] = bound
    return found


class Watch:
    """What else the machine did meanwhile."""

    def __init__(self):
        self.first = self.now()

    @staticmethod
    def now():
        """Seconds of processors: all, those not idle, ours."""
        with open("/proc/stat", encoding="utf-8") as file:
            ticks = [int(x) / os.sysconf("SC_CLK_TCK") for x in file.readline().split()[1:9]]
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], sum(use.ru_utime + use.ru_stime for use in own)

    def others(self):
        """The share of the processors' time that others took."""
        total, busy, own = (b - a for a, b in zip(self.first, self.now()))
        return max(0.0, busy - own) / total


def processor():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    known = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"]
    with_ = ", ".join(flag for flag in known if flag in flags) or "none of the known vector instructions"
    return f"{fields.get('model name', 'an unknown processor')} ({with_}), {os.cpu_count()} cores"


def told(asked, start, watch, bounds, results):
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    minutes = (datetime.datetime.now() - start).total_seconds() / 60
    threads = " / ".join(map(str, asked.threads))
    yield f"# The engine beside its peers, {start:%Y-%m-%d}"
    yield ""
    yield f"{processor()}; Galerne at {git('rev-parse', '--short', 'HEAD')}; {start:%H:%M}, {minutes:.0f} minutes."
    yield (
        f"Others took {100 * watch.others():.0f}% of the processors' time meanwhile; load average at the end "
        f"{', '.join(f'{x:.1f}' for x in os.getloadavg())}."
    )
    yield ""
    yield "```sh"
    yield f"python3 benches/peers/run.py {re.sub(r' ?--(out|venvs)[ =][^ ]+', '', shlex.join(sys.argv[1:]))}".rstrip()
    yield "```"
    yield ""
    yield (
        f"Tokens a second with {threads} threads, the best of the rounds in which the engines "
        "take turns; the same file for all that read it. Above 1× is better for us, also in seconds and MB. The "
        "bound of a step is the longer of reading the weights once and of its operations at the peak of the products "
        "that the format allows (of f32 where ours computes in f32, but for bf16 weights)."
    )
    yield ""
    yield from table.bounds_table(bounds)
    for name, result in results.items():
        rounds = asked.rounds or MODELS[name].rounds
        yield from table.model_table(MODELS[name], result, asked.threads, bounds, rounds)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bench: stopped")
