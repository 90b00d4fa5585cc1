"""What exact content each name of a YAML stands for: file digests, hub commits, recipe ids.

Pinned in the store's `sweep.lock`. A source that has changed since is refused until `--update` accepts it, so that one
sweep never mixes two versions of its data unnoticed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sweep import evaluate, tiny
from sweep.config import ConfigError, matching_files
from sweep.spec import BaseModelSpec, BenchmarkSpec, DatasetSpec, EvalSpec, Pins, SweepSpec, TrialSpec
from sweep.store import write_text

GROUPS = ("base_models", "datasets", "benchmarks")

NOT_CONTENT = (".md", ".png", ".lock")
"""Endings of files in a model directory that do not shape what the model computes."""


def resolve(sweep: SweepSpec, lock_path: Path | None = None, update: bool = False, *, write: bool = True) -> Pins:
    """The content of every source, checked against `sweep.lock` and written there.

    Args:
        sweep: the sweep.
        lock_path: the store's lock file; None neither checks nor pins.
        update: accept changed sources and move hub commits to what their revision is now.
        write: pin what was found; only the holder of the lease may.

    Raises:
        ConfigError: a source is not there, not readable, or not what the lock pinned.
    """
    locked = _read_lock(lock_path) if lock_path is not None and not update else {}
    found: dict[str, dict[str, dict[str, str]]] = {group: {} for group in GROUPS}
    for name, model in sweep.base_models.items():
        found["base_models"][name] = _pin(f"base_models.{name}", model, locked)
    for name, dataset in sweep.datasets.items():
        if dataset.mixture is None:
            found["datasets"][name] = _pin(f"datasets.{name}", dataset, locked)
    for name, benchmark in sweep.benchmarks.items():
        found["benchmarks"][name] = _pin(f"benchmarks.{name}", benchmark, locked)
    _digests.save()
    if lock_path is not None and write:
        kept = {group: {**locked.get(group, {}), **found[group]} for group in GROUPS}
        text = json.dumps(kept, indent=1, sort_keys=True) + "\n"
        if not lock_path.exists() or lock_path.read_text() != text:
            write_text(lock_path, text)
    digests = {group: {name: pin["digest"] for name, pin in found[group].items()} for group in GROUPS}
    return Pins(**digests, backend=evaluate.BACKEND)


def pinned(sweep: SweepSpec, lock_path: Path) -> Pins:
    """The content as the lock has it, whatever became of the sources: to look at results that are there.

    Raises:
        ConfigError: the lock is not there or lacks a source.
    """
    locked = _read_lock(lock_path)
    try:
        digests = {
            group: {
                name: str(locked[group][name]["digest"])
                for name, source in getattr(sweep, group).items()
                if getattr(source, "mixture", None) is None
            }
            for group in GROUPS
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{lock_path} does not pin {error}; run the sweep again from its YAML") from error
    return Pins(**digests, backend=evaluate.BACKEND)


class SourceChanged(ValueError):
    """A source is not what was pinned: it changed while the sweep ran."""

    kind = "data"


def verify(trial: TrialSpec, evaluations: Sequence[EvalSpec] = ()) -> None:
    """Refuse local sources that are not what they were when the sweep was planned.

    A worker asks before it reads and again before it finishes a result; it costs a stat of each file.

    Raises:
        SourceChanged: one is not.
    """
    sources: dict[str, tuple[BaseModelSpec | DatasetSpec | BenchmarkSpec, str]] = {}
    if trial.base_model.path is not None:
        sources["the base model"] = (trial.base_model, trial.base_digest)
    for name, dataset in trial.datasets.items():
        if dataset.path is not None:
            sources[f"datasets.{name}"] = (dataset, trial.data_digests[name])
    for evaluation in evaluations:
        if evaluation.benchmark.path is not None:
            sources[f"benchmarks.{evaluation.name}"] = (evaluation.benchmark, evaluation.digest)

    for key, (source, digest) in sources.items():
        if _digest(key, source) != digest:
            raise SourceChanged(
                f"{key} has changed since this run began; restore it, or start the run again with --update"
            )


def _read_lock(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not readable ({error}); make it anew with --update") from error


def _pin(key: str, source: BaseModelSpec | DatasetSpec | BenchmarkSpec, locked: dict[str, Any]) -> dict[str, str]:
    group, name = key.split(".", 1)
    said = source.model_dump_json(include={"hub", "subset", "revision", "tiny", "task"}, exclude_defaults=True)
    before = locked.get(group, {}).get(name)
    if before is not None and before["source"] != said:
        before = None  # the YAML itself names another source now
    if before is not None and getattr(source, "hub", None) is not None:
        return dict(before)  # a hub commit stays pinned without asking the hub
    digest = _digest(key, source)
    if before is not None and before["digest"] != digest:
        raise ConfigError(
            f"{key} has changed since it was pinned in sweep.lock ({before['digest'][:12]} -> {digest[:12]}): its "
            "trials or scores would be new ones beside the old; accept that with --update, or restore the files"
        )
    return {"source": said, "digest": digest}


def _digest(key: str, source: BaseModelSpec | DatasetSpec | BenchmarkSpec) -> str:
    if isinstance(source, BenchmarkSpec):
        try:
            return evaluate.digest(key.split(".", 1)[1], source, tiny.default_cache_dir().parent)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    kind = "base_model" if isinstance(source, BaseModelSpec) else "dataset"
    if source.tiny is not None:
        return tiny.recipe_id(kind, source.tiny)
    if source.hub is not None:
        return _hub_commit(key, source)
    if isinstance(source, BaseModelSpec):
        assert source.path is not None
        folder = Path(source.path)
        return _files_digest({str(p.relative_to(folder)): p for p in folder.rglob("*") if _is_content(p, folder)})
    paths = (source.path,) if isinstance(source.path, str) else source.path or ()
    files = sorted({Path(file) for path in paths for file in matching_files(path) if Path(file).is_file()})
    if not files:
        raise ConfigError(f"{key}.path matches no file: {', '.join(paths)}")
    return _files_digest({f"{index:06d}": path for index, path in enumerate(files)})


def _is_content(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden and not path.name.endswith(NOT_CONTENT) and not path.name.startswith("LICENSE")


def _hub_commit(key: str, source: BaseModelSpec | DatasetSpec) -> str:
    from huggingface_hub import HfApi  # 1 s of imports

    kind = "model" if isinstance(source, BaseModelSpec) else "dataset"
    try:
        return str(HfApi().repo_info(source.hub, repo_type=kind, revision=source.revision).sha)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{key}.hub is '{source.hub}' at '{source.revision}': the hub does not give it ({reason}); check the id, "
            "your network and your token, or use path: with a local copy"
        ) from error


def _files_digest(files: dict[str, Path]) -> str:
    """Digest of names and contents, the same wherever the files lie. 0.9 GB/s; cached by path, size and mtime."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name}\0{_digests.of(files[name])}\n".encode())
    return whole.hexdigest()


class _DigestCache:
    """sha256 of files, remembered by path, size and modification time, in the user's cache."""

    def __init__(self) -> None:
        self._known: dict[str, list[Any]] | None = None
        self._changed = False

    @property
    def _path(self) -> Path:
        return tiny.default_cache_dir().parent / "digests.json"

    def of(self, path: Path) -> str:
        if self._known is None:
            try:
                self._known = dict(json.loads(self._path.read_text()))
            except (OSError, ValueError, TypeError):
                self._known = {}
        stat = os.stat(path)
        key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(key)
        if not isinstance(known, list) or len(known) != 3 or known[:2] != stamp:
            with path.open("rb") as file:
                known = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
            self._known[key] = known
            self._changed = True
        return str(known[2])

    def save(self) -> None:
        if self._changed and self._known is not None:
            try:
                write_text(self._path, json.dumps(self._known))
            except OSError:  # a cache that cannot be written costs time, not results
                return
            self._changed = False


_digests = _DigestCache()


def tiny_names(sweep: SweepSpec) -> tuple[Iterable[str], Iterable[str], Iterable[str]]:
    """Embedded base models, datasets and benchmarks that a sweep uses, to be built before it runs."""
    groups = (sweep.base_models, sweep.datasets, sweep.benchmarks)
    base_models, datasets, benchmarks = ([s.tiny for s in g.values() if s.tiny is not None] for g in groups)
    return base_models, datasets, benchmarks
