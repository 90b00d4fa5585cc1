"""Sweeps over tiny local models, JSONL data and lm-eval tasks, and the commands as a user types them."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import tiny_models
import yaml

ROOT = Path(__file__).parents[1]
MARK = "SWEEP_TEST"
"""Environment variable that every process of a test inherits, also those that Ray starts."""

TRAIN = {
    "num_examples": 32,
    "held_out_examples": 4,
    "max_length": 48,
    "global_batch_size": 8,
    "learning_rate": 1e-2,
    "epochs": 1,
}
"""A training of four steps."""


class World:
    """A folder with base models, datasets and benchmarks, and the processes started over it."""

    def __init__(self, folder: Path):
        """Make the files: two architectures, two datasets, two benchmarks."""
        self.folder = folder
        self._mark = uuid.uuid4().hex
        tiny_models.save_base(folder / "models" / "llama", "llama")
        tiny_models.save_base(folder / "models" / "neox", "gpt_neox", seed=1)
        write_jsonl(folder / "plus.jsonl", [_question(a, "plus", b) for a in range(8) for b in range(8)])
        write_jsonl(folder / "times.jsonl", [_question(a, "times", b) for a in range(8) for b in range(8)])
        write_choice_task(folder / "plus_test.yaml", [_question(a, "plus", 9) for a in range(8)])
        write_choice_task(folder / "times_test.yaml", [_question(a, "times", 9) for a in range(8)])

    def write(self, name: str = "sweep.yaml", *, train: dict[str, Any] | None = None, **settings: Any) -> Path:
        """A sweep's YAML: one base model, one dataset, one benchmark, unless `settings` say otherwise."""
        sweep = {
            "name": "tiny",
            "base_models": {"llama": {"path": "models/llama"}},
            "datasets": {"plus": {"path": "plus.jsonl", "kind": "maths"}},
            "benchmarks": {"plus_test": {"path": "plus_test.yaml", "kind": "maths", "chance": 0.25}},
            "train": TRAIN | (train or {}),
            "measure_examples": 16,
        }
        path = self.folder / name
        path.write_text(yaml.safe_dump(sweep | settings, sort_keys=False))
        return path

    def environment(self) -> dict[str, str]:
        """This process's, with the mark and with caches of the test's own."""
        caches = {
            "SWEEP_CACHE": str(self.folder / "cache" / "tiny"),
            "HF_HOME": str(self.folder / "cache" / "hf"),
        }
        return os.environ | caches | {MARK: self._mark}

    def sweep(self, *words: object, timeout: float = 200, **options: Any) -> subprocess.CompletedProcess[str]:
        """`python -m sweep WORDS` in the repository root, to its end."""
        command = [sys.executable, "-m", "sweep", *map(str, words)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )

    def json(self, *words: object) -> dict[str, Any]:
        """What a command answers with `--json`: one object on standard output and nothing else."""
        done = self.sweep(*words, "--json")
        assert done.returncode in (0, 1), done.stderr
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout)

    def start(self, *words: object) -> subprocess.Popen[str]:
        """`python -m sweep WORDS` in the background."""
        command = [sys.executable, "-m", "sweep", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # a session of its own, as a terminal gives it: Ctrl-C goes to all of the session's foreground processes
        return subprocess.Popen(command, cwd=ROOT, env=self.environment(), start_new_session=True, **pipes)

    def processes(self) -> list[psutil.Process]:
        """Every living process that was started over this folder, children of children included."""
        return [p for p in psutil.process_iter() if _mark_of(p) == self._mark]

    def workers(self) -> list[psutil.Process]:
        """Ray workers that hold a work item."""
        return [p for p in self.processes() if command_line(p).startswith("ray::") and "IDLE" not in command_line(p)]


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """A world that must leave no process behind; those it leaves are ended."""
    made = World(folder)
    yield made
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not made.processes(), seconds=20)
    left = made.processes()
    names = [command_line(process) for process in left]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not names, f"left running: {names}"


def wait_for(
    condition: Callable[[], Any], run: subprocess.Popen[str] | None = None, seconds: float = 90, every: float = 0.02
) -> Any:
    """The first true value of `condition()`.

    Raises:
        AssertionError: there was none in time, or before `run` ended.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        assert run is None or run.poll() is None, f"the run ended early: {run.communicate()}"
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s")


def trial_ids(out: Path) -> list[str]:
    """Ids of the trained trials in a folder of results."""
    specs = {p.parent.name: json.loads(p.read_text()) for p in out.glob("trials/*/spec.json")}
    return sorted(trial_id for trial_id, spec in specs.items() if spec["dataset"] is not None)


def attempts(out: Path) -> list[dict[str, Any]]:
    """Every try of every work item, as `attempts.jsonl` has it at last."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for file in sorted(out.glob("*/*/attempts.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            last[entry["item"], entry["attempt"]] = entry
    return list(last.values())


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_choice_task(path: Path, questions: list[dict[str, str]]) -> Path:
    """An lm-eval task of multiple choice named like its file, its items beside it."""
    items = []
    for index, question in enumerate(questions):
        right = int(question["completion"])
        choices = [f" {right + shift}" for shift in range(4)]
        order = choices[-index % 4 :] + choices[: -index % 4]
        items.append({"prompt": question["prompt"], "choices": order, "label": order.index(f" {right}")})
    data = write_jsonl(path.with_suffix(".items.jsonl"), items)
    task = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path.write_text(yaml.safe_dump(task, sort_keys=False))
    return path


def _question(a: int, word: str, b: int) -> dict[str, str]:
    return {"prompt": f"{a} {word} {b}", "completion": str(a + b if word == "plus" else a * b)}


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK) if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def command_line(process: psutil.Process) -> str:
    """How a process was called; a Ray worker calls itself `ray::<what it does>`."""
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""
