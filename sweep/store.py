"""A sweep's folder: every path in it, attempts, commits, the lease, and what is done.

Files are the truth. A *unit* is the smallest thing that is committed: the training up to one checkpoint, its layer
deltas, one evaluation of it, one measure. A worker writes only into `attempts/<n>/` of a unit, files first and the
manifest last; the driver that holds the lease commits by renaming `result.json` into place. So a worker that was
cut off and comes back can neither overwrite nor double a result.

    sweep.yaml  sweep.lock  lease.json
    trials/<trial_id>/
      spec.json  attempts.jsonl  log.txt
      train/epoch-N/{attempts/<n>/, result.json}
      layer_delta/epoch-N/{attempts/<n>/, result.json}
      scores/<eval_id>/epoch-N/{attempts/<n>/, result.json}
    measures/<key>/{spec.json, attempts.jsonl, log.txt, attempts/<n>/, result.json}
    tables/*.parquet
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORE_VERSION = 1
"""Raised when the files' meaning changes; another version is refused."""

WEIGHTS = "weights"
"""Subfolder of an attempt with model weights: all of it may be removed once nothing needs it."""

STATE = "state"
"""Subfolder of an attempt with the optimizer's state, from which more epochs can continue."""

HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 60.0
"""A lease without a heartbeat for this long is free to take; one whose process is dead on this host at once."""

STARTED = "started"
"""First file of an attempt. A worker whose attempt was removed writes into a folder without it: never whole."""


class StoreError(RuntimeError):
    """A sweep's folder cannot be used as it is; the text says why and what to do."""


class LeaseLost(StoreError):
    """Another driver has taken the sweep over: this one may commit nothing more."""


def train_unit(trial_id: str, epoch: int) -> str:
    """Training up to one checkpoint."""
    return f"trials/{trial_id}/train/epoch-{epoch}"


def layer_delta_unit(trial_id: str, epoch: int) -> str:
    """Weight changes of one checkpoint."""
    return f"trials/{trial_id}/layer_delta/epoch-{epoch}"


def score_unit(trial_id: str, epoch: int, eval_id: str) -> str:
    """One evaluation of one checkpoint. Without the benchmark's name: renaming it re-runs nothing."""
    return f"trials/{trial_id}/scores/{eval_id}/epoch-{epoch}"


def measure_unit(key: str) -> str:
    """Data measures of one (base model, dataset) pair."""
    return f"measures/{key}"


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_folder(folder: Path) -> int:
    """Remove a folder and all in it. Returns the bytes freed."""
    freed = folder_size(folder)
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)  # of a removal that was cut off
    folder.rename(gone)  # first out of sight, whole: half a folder would read as damage
    shutil.rmtree(gone, ignore_errors=True)
    return freed


@dataclass(frozen=True)
class Result:
    """A committed unit."""

    unit: str
    attempt: int
    folder: Path
    """The attempt's files."""
    record: dict[str, Any]
    """What the stage said of it."""
    files: dict[str, tuple[int, str]]
    """File -> (bytes, sha256), weights included even where they have been removed."""

    @property
    def weights(self) -> Path | None:
        """Folder of the model's weights; None if there are none any more."""
        folder = self.folder / WEIGHTS
        return folder if folder.is_dir() else None

    @property
    def state(self) -> Path | None:
        """Folder of the optimizer's state; None if it was not kept."""
        folder = self.folder / STATE
        return folder if folder.is_dir() else None


@dataclass(frozen=True)
class Attempt:
    """One try of a unit, written by a worker."""

    unit: str
    number: int
    folder: Path

    def finish(self, record: dict[str, Any]) -> None:
        """Say that all files are written: the manifest with sizes and digests comes last.

        Raises:
            StoreError: a later try has begun and removed this one.
        """
        files = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            files[str(path.relative_to(self.folder))] = [path.stat().st_size, digest]
        if STARTED not in files:
            raise StoreError(f"attempt {self.number} of {self.unit} was taken away: a later try has begun")
        manifest = {"version": STORE_VERSION, "files": files, "record": record}
        write_text(self.folder / "manifest.json", json.dumps(manifest))

    def discard(self) -> None:
        """Remove what a failed try has written."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Store:
    """The folder of one sweep."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self.notes: list[str] = []
        """Damage found and repaired, in sentences, for the user."""
        self._mine: dict[str, Any] | None = None
        """This process's lease, held or lost; None if it never took one."""
        self._lost = False

    # ------------------------------------------------------------------ paths

    @property
    def config_path(self) -> Path:
        """Copy of the YAML, as it was last run."""
        return self.root / "sweep.yaml"

    @property
    def lock_path(self) -> Path:
        """Pinned digests and commits."""
        return self.root / "sweep.lock"

    @property
    def tables(self) -> Path:
        """Folder of the Parquet tables."""
        return self.root / "tables"

    @property
    def cache(self) -> Path:
        """Tokenised data; may be removed at any time."""
        return self.root / "cache"

    def owner_folder(self, unit_or_owner: str) -> Path:
        """`trials/<id>` or `measures/<key>`: where spec, log and attempts of a unit's owner lie."""
        return self.root.joinpath(*unit_or_owner.split("/")[:2])

    def log_path(self, unit_or_owner: str) -> Path:
        """Log of a trial or a measure."""
        return self.owner_folder(unit_or_owner) / "log.txt"

    def spec_path(self, unit_or_owner: str) -> Path:
        """What a trial or a measure is."""
        return self.owner_folder(unit_or_owner) / "spec.json"

    def owners(self) -> list[str]:
        """Every `trials/<id>` and `measures/<key>` that has a spec."""
        return sorted(
            f"{group}/{folder.name}"
            for group in ("trials", "measures")
            for folder in self._folders(self.root / group)
            if (folder / "spec.json").exists()
        )

    @staticmethod
    def _folders(folder: Path) -> list[Path]:
        try:
            with os.scandir(folder) as entries:
                visible = (Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))
                return sorted(visible, key=lambda path: path.name)
        except FileNotFoundError:
            return []

    # ------------------------------------------------------------------ attempts and commits

    def attempt(self, unit: str, number: int) -> Attempt:
        """A fresh folder for a try; what is left of earlier, unfinished tries is removed.

        A worker of such a try that is still alive can finish it no more, which harms nothing.
        """
        attempts = self.root / unit / "attempts"
        for earlier in self._numbers(unit):
            if earlier < number and not (attempts / str(earlier) / "manifest.json").exists():
                shutil.rmtree(attempts / str(earlier), ignore_errors=True)
        folder = attempts / str(number)
        folder.mkdir(parents=True)
        (folder / STARTED).touch()
        return Attempt(unit, number, folder)

    def commit(self, unit: str, number: int) -> Result:
        """Make a finished try the unit's result. The first one stays: a result is never replaced.

        Raises:
            LeaseLost: another driver has taken the sweep over.
            StoreError: the try is not finished, or its files are not those of its manifest.
        """
        if not self._holds():
            raise LeaseLost(f"{self.root}: another process has taken this sweep over; this one commits nothing more")
        committed = self.result(unit)
        if committed is not None:
            return committed
        manifest = self._manifest(unit, number)
        if manifest is None:
            raise StoreError(f"attempt {number} of {unit} is not whole: it cannot be committed")
        write_text(self.root / unit / "result.json", json.dumps({"attempt": number, **manifest}))
        result = self.result(unit)
        assert result is not None
        return result

    def _manifest(self, unit: str, number: int) -> dict[str, Any] | None:
        folder = self.root / unit / "attempts" / str(number)
        manifest = _read_json(folder / "manifest.json")
        since = _modified(folder / "manifest.json")
        return manifest if manifest is not None and _whole(folder, manifest, since) else None

    def result(self, unit: str) -> Result | None:
        """The committed result; None if there is none, or it is damaged (see `repair`)."""
        data = _read_json(self.root / unit / "result.json")
        if data is None or not isinstance(data.get("attempt"), int):
            return None
        if data.get("version") != STORE_VERSION:
            raise StoreError(
                f"{self.root / unit} was written by store version {data.get('version')}, this code reads "
                f"{STORE_VERSION}; use the version of the code that wrote it, or start in a new --out folder"
            )
        folder = self.root / unit / "attempts" / str(data["attempt"])
        if not _whole(folder, data, _modified(self.root / unit / "result.json")):
            return None
        files = {name: (size, digest) for name, (size, digest) in data["files"].items()}
        return Result(unit, data["attempt"], folder, data["record"], files)

    def units(self, owner: str) -> list[str]:
        """Every unit of a trial or measure that has attempts or a result."""
        folder = self.root / owner
        if owner.startswith("measures/"):
            return [owner] if (folder / "attempts").is_dir() or (folder / "result.json").exists() else []
        found = [e for stage in ("train", "layer_delta") for e in self._folders(folder / stage)]
        found += [epoch for scores in self._folders(folder / "scores") for epoch in self._folders(scores)]
        return [str(path.relative_to(self.root)) for path in found]

    def committed(self, owner: str) -> dict[str, Result]:
        """The committed units of a trial or measure."""
        results = {unit: self.result(unit) for unit in self.units(owner)}
        return {unit: result for unit, result in results.items() if result is not None}

    def repair(self, owner: str) -> None:
        """Adopt finished tries that nobody committed; take damaged results out of the way, and say so.

        Only the holder of the lease may call this.
        """
        for unit in self.units(owner):
            if (result := self.result(unit)) is not None:
                for subfolder in (WEIGHTS, STATE):  # left over from a removal that was cut off
                    shutil.rmtree(result.folder / f".{subfolder}.removed", ignore_errors=True)
                continue
            path = self.root / unit / "result.json"
            damaged = path.exists()
            numbers = self._numbers(unit)
            whole = [n for n in numbers if self._manifest(unit, n) is not None]
            if damaged:
                path.unlink()
                for number in set(numbers) - set(whole):
                    shutil.rmtree(self.root / unit / "attempts" / str(number), ignore_errors=True)
                cure = "taken again from its finished attempt" if whole else "it will be done again"
                self.notes.append(f"{unit}: the result on disk is damaged; {cure}")
            if whole:
                self.commit(unit, whole[0])

    def next_attempt(self, owner: str) -> int:
        """A number no earlier try of a trial's or measure's work items has had."""
        used = [number for unit in self.units(owner) for number in self._numbers(unit)]
        used += [entry["attempt"] for entry in self.attempts(owner)]
        return max(used, default=0) + 1

    def reopen(self, unit: str) -> None:
        """Set a result aside, so that its unit is done again: its weights are gone but wanted again."""
        result = self.result(unit)
        if result is not None:
            (self.root / unit / "result.json").unlink()
            result.folder.rename(result.folder.with_name(f"replaced-{result.attempt}"))

    def _numbers(self, unit: str) -> list[int]:
        folders = self._folders(self.root / unit / "attempts")
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())

    def remove_weights(self, result: Result, subfolder: str = WEIGHTS) -> int:
        """Remove a checkpoint's weights (or state), keep all else. Returns the bytes freed."""
        folder = result.folder / subfolder
        return remove_folder(folder) if folder.is_dir() else 0

    # ------------------------------------------------------------------ the attempts log

    def log_attempt(self, owner: str, entry: dict[str, Any]) -> None:
        """Append one line to `attempts.jsonl`; only the driver writes there.

        On a full disk the line is lost and noted: the work it tells of is what matters.
        """
        path = self.owner_folder(owner) / "attempts.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")  # a torn last line must not swallow this one
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            note = f"{entry['item']}: attempt {entry['attempt']} could not be logged ({error})"
            self.notes += [note] if note not in self.notes else []

    def attempts(self, owner: str) -> list[dict[str, Any]]:
        """Tries of a trial's or measure's work items: the last line of each; a torn line is passed over."""
        try:
            lines = (self.owner_folder(owner) / "attempts.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        last: dict[tuple[str, int], dict[str, Any]] = {}
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            last[entry["item"], entry["attempt"]] = last.get((entry["item"], entry["attempt"]), {}) | entry
        return list(last.values())

    # ------------------------------------------------------------------ the lease

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the sweep: only one driver at a time hands out and commits its work.

        Raises:
            StoreError: another driver holds it; the text names its host and process.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        with self.exclusive("lease"):
            holder = _read_json(self.root / "lease.json")
            if holder is not None and _alive(holder):
                raise StoreError(
                    f"{self.root} is being run by process {holder.get('pid')} on {holder.get('host')}; wait for it "
                    f"(python -m sweep status {self.root}) or stop it first"
                )
            self._mine, self._lost = mine, False
            self._beat()
        stop = threading.Event()
        beat = threading.Thread(target=self._keep_beating, args=(stop,), daemon=True, name="lease")
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            with self.exclusive("lease"):
                if self._holds():
                    (self.root / "lease.json").unlink(missing_ok=True)
                    self._mine = None

    def holder(self) -> dict[str, Any] | None:
        """Host and process of the driver that runs this sweep now; None if there is none."""
        lease = _read_json(self.root / "lease.json")
        return lease if lease is not None and _alive(lease) else None

    def _holds(self) -> bool:
        """No other driver has taken the lease: this process may have slept past it."""
        lease = _read_json(self.root / "lease.json")
        if self._mine is not None and lease is not None and lease.get("id") != self._mine["id"]:
            self._lost = True  # for good, also when the other one is done
        return not self._lost

    def _keep_beating(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            try:
                with self.exclusive("lease"):  # looking and beating are one: nobody takes the lease in between
                    if not self._holds():
                        return
                    self._beat()
            except OSError:  # a full disk must not end a running sweep: the next beat may succeed
                continue

    def _beat(self) -> None:
        assert self._mine is not None
        write_text(self.root / "lease.json", json.dumps({**self._mine, "beat": time.time()}))

    @contextmanager
    def exclusive(self, what: str) -> Iterator[None]:
        """One process after the other: drivers that look at the lease, collectors that replace the tables."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".{what}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _alive(lease: dict[str, Any]) -> bool:
    if lease.get("host") == socket.gethostname():
        try:
            os.kill(int(lease["pid"]), 0)
        except (ProcessLookupError, ValueError, KeyError, TypeError, OverflowError):
            return False
        except PermissionError:
            pass
    return time.time() - float(lease.get("beat", 0)) < LEASE_SECONDS


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if it is not there or not whole."""
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _modified(path: Path) -> int:
    """When a file was last written, in ns; 0 if it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


def _whole(folder: Path, manifest: dict[str, Any], since: int) -> bool:
    """Every file has its size, and its digest if it was written after `since`, when it should have been final.

    `weights/` and `state/` are whole or gone together.
    """
    try:
        for name, (size, digest) in manifest["files"].items():
            path = os.path.join(folder, name)
            found = os.stat(path)
            if found.st_size != size:
                return False
            if found.st_mtime_ns > since:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return False
    except FileNotFoundError:
        group = name.split("/")[0]
        if group not in (WEIGHTS, STATE) or (folder / group).is_dir():
            return False
        rest = {n: f for n, f in manifest["files"].items() if n.split("/")[0] != group}
        return _whole(folder, {**manifest, "files": rest}, since)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True
