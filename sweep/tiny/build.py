"""Builds what is missing of the tiny world into a cache, each thing once, and names it by its recipe."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sweep.identity import content_id
from sweep.tiny import text
from sweep.tiny.base_models import BASE_MODELS, write_base_model
from sweep.tiny.benchmarks import BENCHMARKS, write_benchmark
from sweep.tiny.datasets import DATASETS, write_dataset

Kind = Literal["base_model", "dataset", "benchmark"]
RECIPES: dict[str, dict[str, Any]] = {"base_model": BASE_MODELS, "dataset": DATASETS, "benchmark": BENCHMARKS}


def default_cache_dir() -> Path:
    """`$SWEEP_CACHE`, or `~/.cache/massive-sft-sweeps/tiny`."""
    return Path(os.environ.get("SWEEP_CACHE") or "~/.cache/massive-sft-sweeps/tiny").expanduser()


def recipe_id(kind: Kind, name: str) -> str:
    """Content id of everything that defines the thing, the same on every machine.

    Raises:
        ValueError: no such name.
    """
    return content_id({"kind": kind, "world": text.WORLD_VERSION, "recipe": asdict(_recipe(kind, name))})


def build_base_model(
    name: str, cache_dir: Path, report: Callable[[int, float], None] = lambda step, loss_nats: None
) -> Path:
    """Folder of the pretrained model and its tokenizer; `report(step, loss_nats)` follows the pretraining.

    Raises:
        ValueError: no such name.
    """
    folder = _folder("base_model", name, cache_dir)
    if not folder.exists():
        with _new_folder(folder) as temporary:
            write_base_model(_recipe("base_model", name), temporary, report)
    return folder


def build_dataset(name: str, cache_dir: Path) -> Path:
    """JSONL file of the dataset's instructions and responses.

    Raises:
        ValueError: no such name.
    """
    folder = _folder("dataset", name, cache_dir)
    if not folder.exists():
        with _new_folder(folder) as temporary:
            write_dataset(_recipe("dataset", name), temporary / f"{name}.jsonl")
    return folder / f"{name}.jsonl"


def build_benchmark(name: str, cache_dir: Path) -> Path:
    """YAML file of the lm-eval task `name`; its items lie beside it, named there by their absolute path.

    Raises:
        ValueError: no such name.
    """
    folder = _folder("benchmark", name, cache_dir)
    if not folder.exists():
        with _new_folder(folder) as temporary:
            write_benchmark(_recipe("benchmark", name), temporary, name, home=folder)
    return folder / f"{name}.yaml"


def build_all(
    base_models: Sequence[str],
    datasets: Sequence[str],
    benchmarks: Sequence[str],
    cache_dir: Path,
    workers: int = 2,
) -> None:
    """Build what is missing, base models in up to `workers` processes of one thread, and show the progress.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a build failed; its output is in the message.
    """
    missing = [name for name in dict.fromkeys(base_models) if not _folder("base_model", name, cache_dir).exists()]
    for name in datasets:
        build_dataset(name, cache_dir)
    for name in benchmarks:
        build_benchmark(name, cache_dir)
    if missing:
        _run_builders(missing, cache_dir, workers)


def _run_builders(names: list[str], cache_dir: Path, workers: int) -> None:
    """Each model in a fresh interpreter: one thread from its start, no main guard needed in the caller."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    waiting, running = list(names), {}
    with (
        tempfile.TemporaryDirectory() as logs,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = waiting.pop(0)
                    log = Path(logs, name)
                    bar = progress.add_task(f"pretrain {name}", total=BASE_MODELS[name].steps)
                    running[name] = (_start_builder(name, cache_dir, log), log, bar)
                    if not console.is_terminal:
                        console.print(f"pretrain {name}: {BASE_MODELS[name].steps} steps, about 80 core-seconds")
                time.sleep(0.2)
                for name, (process, log, bar) in list(running.items()):
                    code, output = process.poll(), log.read_text()
                    for step, loss_nats in STEP_LINE.findall(output)[-1:]:
                        progress.update(bar, completed=int(step), description=f"pretrain {name}, loss {loss_nats}")
                    if code is None:
                        continue
                    del running[name]
                    if code != 0:
                        raise RuntimeError(f"building base model {name!r} failed:\n{output[-3000:]}")
                    if not console.is_terminal:
                        console.print(f"pretrain {name}: done")
        finally:
            for process, _, _ in running.values():
                process.send_signal(signal.SIGINT)  # as from the keyboard: it removes what it began
                process.wait()


STEP_LINE = re.compile(r"^step (\d+) loss (\S+)\n", re.MULTILINE)
"""What `python -m sweep.tiny` prints."""


def _start_builder(name: str, cache_dir: Path, log: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sweep.tiny", name, "--cache-dir", str(cache_dir)]
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=env)


def _recipe(kind: Kind, name: str) -> Any:
    recipes = RECIPES[kind]
    if name not in recipes:
        raise ValueError(f"unknown tiny {kind.replace('_', ' ')} {name!r}; known: {', '.join(sorted(recipes))}")
    return recipes[name]


def _folder(kind: Kind, name: str, cache_dir: Path) -> Path:
    return Path(cache_dir).absolute() / f"{kind}s" / f"{name}-{recipe_id(kind, name)}"


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner may read
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
