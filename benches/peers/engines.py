"""The engines of the comparison: how each gets an environment of its own, and which version it is."""
import os
import subprocess
from pathlib import Path
from typing import NamedTuple


class Engine(NamedTuple):
    """An engine that a user could pick instead."""

    packages: list
    # What says that the environment is ready.
    module: str
    # Name of the environment's folder; two ways to run an engine share one.
    folder: str
    # With a place for the version.
    title: str
    pip: list = []
    environment: dict = {}
    takes: str = "a minute"


_OPENVINO = (["openvino-genai==2026.4.1.0"], "openvino_genai", "openvino")
ENGINES = {
    "llama.cpp": Engine(
        ["llama-cpp-python==0.3.36"],
        "llama_cpp",
        "llama.cpp",
        "llama.cpp of llama-cpp-python {}",
        ["--no-binary", "llama-cpp-python"],
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        "10 minutes of two cores: it is compiled for this machine",
    ),
    "openvino": Engine(*_OPENVINO, "OpenVINO GenAI {}, a batch as one rectangle"),
    "openvino-paged": Engine(*_OPENVINO, "OpenVINO GenAI {}, continuous batching"),
    "ctranslate2": Engine(["ctranslate2==4.8.5"], "ctranslate2", "ctranslate2", "CTranslate2 {}, int8"),
    "transformers": Engine(
        ["torch==2.15.0", "transformers>=5,<6", "gguf", "accelerate"],
        "transformers",
        "transformers",
        "transformers with torch {}, bf16",
        takes="several minutes and more than 3 GB of disk: PyPI's torch brings what GPUs need",
    ),
}


class Failed(Exception):
    """A sentence for a cell of the table: why there is no figure."""


def clean_environment(more=()):
    """Environments see their own packages only."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(more)


def python(venvs: Path, name: str) -> str:
    return str(venvs / ENGINES[name].folder / "bin" / "python")


def ensure(venvs: Path, name: str) -> str:
    """Makes the engine's environment unless it is there. The version of its package, or Failed."""
    engine, interpreter = ENGINES[name], python(venvs, name)
    package = engine.packages[0].split("=")[0]
    ask = f"import importlib.metadata as m, {engine.module}; print(m.version({package!r}))"

    def version():
        try:
            return subprocess.run(
                [interpreter, "-c", ask], env=clean_environment(), capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return None

    if found := version():
        print(f"  {name:16} {package} {found}, ready", flush=True)
        return found
    print(f"  {name:16} installing {', '.join(engine.packages)}; takes {engine.takes} …", flush=True)
    log = venvs / f"{engine.folder}.log"
    venvs.mkdir(parents=True, exist_ok=True)
    install = [interpreter, "-m", "pip", "install", "--disable-pip-version-check", *engine.pip, *engine.packages]
    with log.open("w") as file:
        for command in (["python3", "-m", "venv", str(venvs / engine.folder)], install):
            done = subprocess.run(command, env=clean_environment(engine.environment), stdout=file, stderr=file)
            if done.returncode:
                raise Failed(f"it could not be installed: {last_line(log.read_text())}")
    if found := version():
        return found
    raise Failed("it was installed but does not start")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no word why"
