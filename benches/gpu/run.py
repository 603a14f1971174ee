#!/usr/bin/env python3
"""The GPU suite: whether our kernels are right on this machine's GPU, and how fast, beside what the GPU allows and what torch does.

    python3 run.py [--quick] [--only PART,PART…] [--seconds 520] [--out FOLDER] [--work FOLDER] [--dry-run]

It stands in the folder that `make gpu-suite` writes, and needs python3 with torch and transformers, and a driver; no network. Each
part is a process of its own with a time limit: one that fails, hangs or crashes is a sentence in the report, and the others run.
`gpu-suite.json` and `gpu-suite.md` are written anew after every part, into --out, else $OUT, else here. With `--dry-run` every
part runs in small on the CPU, with an emulated GPU.
"""
import argparse
import importlib.util
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import table

HERE = Path(__file__).resolve().parent
SCHEMA = "galerne.gpu-suite/1"
#: A random model of 7 B takes 15 GB.
WORK_BYTES_MIN = 20 << 30
#: What is told of a part that failed.
TAIL_CHARS = 1500
#: Ranks that share a GPU wait for each other in kernels; what loads a kernel waits for all of these, so none is loaded late.
NCCL_ENVIRONMENT = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "CUDA_MODULE_LOADING": "EAGER"}


class Suite:
    def __init__(self, asked):
        self.asked = asked
        self.end = time.monotonic() + asked.seconds
        self.out = asked.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="gpu-suite-", dir=asked.work or roomy()))
        self.log = (self.out / "gpu-suite.log").open("w")
        self.process = None
        self.found = {"schema": SCHEMA, "quick": asked.quick, "dry_run": asked.dry_run, "parts": {}}

    def say(self, text):
        left = self.end - time.monotonic()
        print(f"[{left:4.0f} s left] {text}", flush=True)

    def save(self):
        whole = self.out / "gpu-suite.json.part"
        whole.write_text(json.dumps(self.found, indent=1))
        whole.rename(self.out / "gpu-suite.json")
        try:
            (self.out / "gpu-suite.md").write_text(table.of(self.found))
        except Exception as error:  # the figures are what counts
            self.say(f"no table: {error!r}")

    def part(self, name, command, seconds, stdin=None, stdout=None, env=None):
        """Runs a command, and keeps each line of its output that is an object; whether it went well."""
        if self.asked.only and name not in self.asked.only:
            return False
        seconds = min(seconds, self.end - time.monotonic())
        told = self.found["parts"][name] = {"found": []}
        if seconds < 3:
            told["error"] = "left out: no time is left"
            self.save()
            return False
        self.say(f"{name} …")
        start = time.monotonic()
        try:
            self.run(told, command, seconds, stdin, stdout, env)
        except Exception as error:
            told["error"] = repr(error)
        told["seconds"] = round(time.monotonic() - start, 2)
        failed = [each.get("name") or each.get("part") for each in told["found"] if each.get("ok") is False]
        if failed:
            told.setdefault("error", f"not ok: {', '.join(map(str, failed[:8]))}")
        self.say(f"{name}: {told['seconds']} s, {len(told['found'])} figures{', ' + told['error'] if 'error' in told else ''}")
        self.save()
        return "error" not in told

    def run(self, told, command, seconds, stdin, stdout, env):
        command = [str(word) for word in command]
        errors = tempfile.TemporaryFile()
        process = self.process = subprocess.Popen(
            command, stdin=stdin or subprocess.DEVNULL, stdout=stdout or subprocess.PIPE, stderr=errors,
            env=dict(os.environ, PYTHONUNBUFFERED="1", **(env or {})), start_new_session=True,
        )  # fmt: skip

        def read():
            for line in process.stdout:
                try:
                    told["found"].append(json.loads(line))
                except ValueError:
                    self.log.write(line.decode(errors="replace"))

        reader = threading.Thread(target=read, daemon=True) if stdout is None else None
        if reader:
            reader.start()
        try:
            code = process.wait(seconds)
            if code:
                told["error"] = f"exit code {code}"
        except subprocess.TimeoutExpired:
            told["error"] = f"ended after {seconds:.0f} s, its limit"
        end_all_of(process)
        if reader:
            reader.join(5)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
        self.log.write(f"== {' '.join(command)}\n{text}\n")
        self.log.flush()
        if "error" in told:
            told["stderr"] = text[-TAIL_CHARS:]

    def close(self):
        if self.process:
            end_all_of(self.process)
        shutil.rmtree(self.work, ignore_errors=True)


def end_all_of(process):
    """Ends a process with its children; one that has ended leaves none."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass  # a driver that does not let go of it


def roomy():
    """Memory, if it is enough for a model; a disk else."""
    for folder in ["/dev/shm", tempfile.gettempdir()]:
        if os.path.isdir(folder) and shutil.disk_usage(folder).free >= WORK_BYTES_MIN:
            return folder
    return None


def unpack(suite):
    """What travelled compressed, where it can be used; without one its part says so."""
    for packed in HERE.glob("*.xz"):
        with lzma.open(packed) as source, (suite.work / packed.stem).open("wb") as out:
            shutil.copyfileobj(source, out)
    gpu = suite.work / "gpu"
    gpu.chmod(0o755)
    return gpu


def torchs_libraries():
    """Where torch has its cuBLASLt."""
    try:
        found = importlib.util.find_spec("nvidia")
    except ValueError:
        found = None
    places = found.submodule_search_locations if found else []
    return sorted({library.parent for place in places for library in Path(place).glob("*/lib/libcublasLt.so.*")})


def machine(suite):
    query = "name,memory.total,driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        gpu = dict(zip(query.split(","), map(str.strip, told.stdout.splitlines()[0].split(","))))
    except Exception as error:
        gpu = {"name": f"unknown: {error!r}"}
    suite.found["machine"] = {"gpu": gpu, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    suite.save()


def everything(suite):
    asked = suite.asked
    machine(suite)
    gpu = unpack(suite)
    quick = ["--quick"] if asked.quick or asked.dry_run else []
    how = ["--emulate"] if asked.dry_run else []
    torch = [sys.executable, HERE / "torch_parts.py", *(["--tiny"] if asked.dry_run else [])]
    golden, tiny = HERE / "golden", HERE / "golden/tiny-mistral"
    demo = suite.work / "smollm2-135m-cut.gguf"
    near = ["--near", demo] if demo.exists() else []
    model, prompts, logits = suite.work / "model", suite.work / "prompts", suite.work / "logits"
    folders = [suite.work, *torchs_libraries(), os.environ.get("LD_LIBRARY_PATH", "")]
    libraries = {"LD_LIBRARY_PATH": ":".join(map(str, folders)), **NCCL_ENVIRONMENT}

    suite.part("goldens", [gpu, "check", "--goldens", golden, *near, *quick, *how], 60)
    suite.part("bits", [gpu, "check", "--same", tiny, "--same", golden / "bard-1m", *quick, *how], 60)
    suite.part("bits in FP8", [gpu, "check", "--same", tiny, "--fp8", *quick, *how], 40)
    suite.part("fast", [gpu, "check", "--prompts", tiny, "--prompts", golden / "bard-1m", *how], 40, env=libraries)
    suite.part("bounds", [gpu, "bounds", *how], 40)
    suite.part("product", [*torch, "product"], 60)
    suite.part("model", [*torch, "model", model, prompts], 90)
    if (model / "config.json").exists():
        suite.part("bench", [gpu, "bench", model, *quick, *how], 170)
        suite.part("bench in FP8", [gpu, "bench", model, "--fp8", "--quick", *how], 80)
        suite.part("bench, fast", [gpu, "bench", model, "--fast", *quick, *how], 40, env=libraries)
        suite.part("peer", [*torch, "peer", model], 110)
        with prompts.open("rb") as stdin, logits.open("wb") as stdout:
            had = suite.part("logits", [gpu, "logits", model, *how], 40, stdin, stdout)
        if had:
            suite.part("reference", [*torch, "reference", model, prompts, logits], 80)
        suite.part("model bits", [gpu, "check", "--same", model, *quick, *how], 80)
    suite.part("nccl", [gpu, "check", "--nccl", tiny, *quick, *how], 45, env=libraries)
    suite.part("stopped", [gpu, "check", "--stopped", tiny, *how], 45, env=libraries)
    suite.part("memory", [gpu, "check", "--memory", tiny, "--stopped-memory", tiny, *quick, *how], 45, env=libraries)
    suite.part("processes", [gpu, "check", "--processes", tiny, *quick, *how], 45, env=libraries)
    suite.part("sums", [gpu, "sums", tiny, *how], 30, env=libraries)
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    for tool in ["memcheck", "racecheck"]:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        suite.part(tool, [*command, gpu, "check", "--quick", "--same", tiny, *how], 60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases, a third of the time")
    parser.add_argument("--dry-run", action="store_true", help="in small, on the CPU")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these parts; `bench` and `peer` need `model`")
    parser.add_argument("--seconds", type=float, default=520, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE)))
    parser.add_argument("--work", type=Path, help="room for 20 GB")
    suite = Suite(parser.parse_args())
    # Whoever stops it gets what was found so far.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        everything(suite)
    finally:
        suite.save()
        suite.close()
    print((suite.out / "gpu-suite.md").read_text())


if __name__ == "__main__":
    main()
