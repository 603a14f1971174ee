#!/usr/bin/env python3
"""Writes all that the GPU suite needs into one folder: `make gpu-suite`.

    python3 benches/gpu/pack.py BINARY FOLDER [--sm 90]

The folder goes to a bare machine with a GPU, its driver, and python3 with torch and transformers, where `python3 FOLDER/run.py`
does the rest. What is not there (NCCL, the demo model) is left out with a sentence, and so is its part of the suite.
"""
import argparse
import lzma
import shutil
import subprocess
from pathlib import Path

import shrink

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NCCL = ROOT / ".cache/lib/libnccl.so.2"
DEMO = ROOT / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
GOLDENS = ["tiny-mistral", "bard-1m"]
#: The whole demo model would fill the folder by itself: a few of its layers, and the first tokens of its vocabulary.
DEMO_LAYERS, DEMO_VOCAB = 5, 4096
FOLDER_MIB_MAX = 60


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sm", type=int, default=90, help="the GPU's architecture, for NCCL")
    asked = parser.parse_args()
    folder = asked.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ["run.py", "torch_parts.py", "table.py"]:
        shutil.copy(HERE / name, folder)
    for name in GOLDENS:
        shutil.copytree(ROOT / "tests/golden" / name, folder / "golden" / name)
        for ending in ["json", "safetensors"]:
            shutil.copy(ROOT / "tests/golden" / f"{name}.{ending}", folder / "golden")
    binary = folder / "gpu"
    shutil.copy(asked.binary, binary)
    subprocess.run(["strip", binary], check=True)
    compress(binary)
    if NCCL.exists():
        shrink.slim_nccl(NCCL, folder / NCCL.name, asked.sm)
        compress(folder / NCCL.name)
    else:
        print(f"  {NCCL} is not there: the suite goes without NCCL")
    if DEMO.exists():
        cut = folder / "smollm2-135m-cut.gguf"
        shrink.cut_gguf(DEMO, cut, DEMO_LAYERS, DEMO_VOCAB)
        compress(cut)
    else:
        print(f"  {DEMO} is not there: the suite goes without it")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:6]:
        print(f"  {size / 2**20:6.1f} MiB  {name}")
    mib = sum(sizes.values()) / 2**20
    print(f"  {mib:6.1f} MiB  {folder}, of {FOLDER_MIB_MAX} at most")
    if mib > FOLDER_MIB_MAX:
        raise SystemExit("it is too large")


def compress(path):
    with path.open("rb") as source, lzma.open(f"{path}.xz", "wb", preset=6) as out:
        shutil.copyfileobj(source, out)
    path.unlink()


if __name__ == "__main__":
    main()
