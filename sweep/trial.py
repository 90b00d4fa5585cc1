"""The work items of one trial: which are due, in what order, and how a worker does one.

A work item is one trial's `train`, one checkpoint's `layer_delta` or `evaluate`, or one `measure`. It fills one
or more units of the store; each unit is committed for itself, so a failure in the third benchmark keeps the first two.
"""

import errno
import logging
import os
import platform
import resource
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sweep import pins, tiny
from sweep.spec import EvalSpec, PlannedMeasure, PlannedTrial
from sweep.store import (
    STATE,
    WEIGHTS,
    Attempt,
    Result,
    Store,
    StoreError,
    layer_delta_unit,
    measure_unit,
    score_unit,
    train_unit,
    write_text,
)

STAGES = ("train", "layer_delta", "evaluate", "measure")

PROGRESS_SECONDS = 2.0
"""At most one progress message per item in this time: each costs the driver some 5 ms."""

Row = dict[str, Any]
Notify = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class WorkItem:
    """One stage of one trial, checkpoint or pair: the unit of scheduling."""

    owner: str
    """`trials/<trial_id>` or `measures/<key>`."""
    stage: str
    epoch: int | None = None
    """The checkpoint worked on; None for `train` and `measure`."""

    @property
    def key(self) -> str:
        """Its name in logs and tables, such as `trials/0123456789ab/evaluate/3`."""
        return "/".join(str(part) for part in (self.owner, self.stage, self.epoch) if part is not None)

    @classmethod
    def parse(cls, key: str) -> "WorkItem":
        """The item of a key."""
        group, name, stage, *epoch = key.split("/")
        return cls(f"{group}/{name}", stage, int(epoch[0]) if epoch else None)


@dataclass(frozen=True)
class Due:
    """The work items of a trial or measure, by what is to be done about them."""

    now: tuple[WorkItem, ...] = ()
    """Can start."""
    later: tuple[WorkItem, ...] = ()
    """Wait for one of those."""
    done: tuple[WorkItem, ...] = ()
    """Are committed."""
    retrain: tuple[WorkItem, ...] = ()
    """Need weights that are gone: the checkpoint would have to be trained again."""


def exported(planned: PlannedTrial, epoch: int, done: Mapping[str, Result]) -> Path | None:
    """Weights that evaluation reads: the float32 checkpoint, or its cast export. None if there are none."""
    units = [train_unit(planned.trial_id, epoch)]
    if _exports(planned):
        units = [layer_delta_unit(planned.trial_id, epoch)]
    return next((done[u].weights for u in units if u in done and done[u].weights is not None), None)


def _exports(planned: PlannedTrial) -> bool:
    """The layer-delta stage also casts: full weights, kept in another type than they were trained in."""
    assert planned.trial.train is not None
    return planned.export_dtype != "float32" and planned.layer_delta != "off" and planned.trial.train.method == "full"


def missing_evaluations(planned: PlannedTrial, epoch: int, done: Mapping[str, Result]) -> list[EvalSpec]:
    """Evaluations of a checkpoint that are not committed."""
    return [e for e in planned.evaluations if score_unit(planned.trial_id, epoch, e.eval_id) not in done]


def due(planned: PlannedTrial | PlannedMeasure, done: Mapping[str, Result]) -> Due:
    """What a trial or measure still lacks, from its committed units."""
    if isinstance(planned, PlannedMeasure):
        item = (WorkItem(f"measures/{planned.key}", "measure"),)
        return Due(done=item) if measure_unit(planned.key) in done else Due(now=item)
    owner = f"trials/{planned.trial_id}"
    now: list[WorkItem] = []
    later: list[WorkItem] = []
    finished: list[WorkItem] = []
    retrain: list[WorkItem] = []
    if not planned.trial.is_baseline:
        (now if epochs_to_train(planned, done) else finished).append(WorkItem(owner, "train"))
    for epoch in planned.epochs:
        delta, scores = WorkItem(owner, "layer_delta", epoch), WorkItem(owner, "evaluate", epoch)
        delta_missing = _wants_delta(planned) and layer_delta_unit(planned.trial_id, epoch) not in done
        if planned.trial.is_baseline:
            weights, export = True, True
        elif (checkpoint := done.get(train_unit(planned.trial_id, epoch))) is None:
            weights, export = None, None  # not trained yet
        else:
            weights = checkpoint.weights is not None
            export = exported(planned, epoch, done) is not None or (None if weights and delta_missing else False)
        if _wants_delta(planned):
            _place(delta, not delta_missing, weights, finished, now, later, retrain)
        if planned.evaluations:
            _place(scores, not missing_evaluations(planned, epoch, done), export, finished, now, later, retrain)
    return Due(tuple(now), tuple(later), tuple(finished), tuple(retrain))


def units_to_redo(planned: PlannedTrial, epoch: int, done: Mapping[str, Result]) -> list[str]:
    """Committed units to set aside, so that the work of a checkpoint that needs gone weights can be done again."""
    checkpoint = done[train_unit(planned.trial_id, epoch)]
    units = [] if checkpoint.weights is not None else [checkpoint.unit]
    delta = done.get(layer_delta_unit(planned.trial_id, epoch))
    return [*units, delta.unit] if _exports(planned) and delta is not None else units


def _place(item: WorkItem, is_done: bool, ready: bool | None, *lists: list[WorkItem]) -> None:
    """Put an item where it belongs; `ready`: its weights are there, gone for good (False), or to come (None)."""
    finished, now, later, retrain = lists
    chosen = finished if is_done else later if ready is None else now if ready else retrain
    chosen.append(item)


def _wants_delta(planned: PlannedTrial) -> bool:
    return planned.layer_delta != "off" and not planned.trial.is_baseline


def epochs_to_train(planned: PlannedTrial, done: Mapping[str, Result]) -> list[int]:
    """Epochs whose checkpoint is not committed."""
    return [epoch for epoch in planned.epochs if train_unit(planned.trial_id, epoch) not in done]


def kept_weights(planned: PlannedTrial, done: Mapping[str, Result]) -> dict[int, Path]:
    """Epoch -> weights that are still there: as evaluation reads them, or else as they were trained."""
    found = {}
    for epoch in trained_epochs(done):
        weights = exported(planned, epoch, done) or done[train_unit(planned.trial_id, epoch)].weights
        if weights is not None:
            found[epoch] = weights
    return found


def trained_epochs(done: Mapping[str, Result]) -> list[int]:
    """Epochs whose checkpoint is committed, also those the YAML asks for no more, ascending."""
    return sorted(int(unit.rsplit("-", 1)[1]) for unit in done if "/train/epoch-" in unit)


def removable(planned: PlannedTrial, done: Mapping[str, Result]) -> Iterator[tuple[Result, str]]:
    """(result, subfolder) of weights and states that nothing needs any more under the `keep` policies."""
    if planned.trial.is_baseline:
        return
    last = max(planned.epochs)
    for epoch in planned.epochs:
        checkpoint = done.get(train_unit(planned.trial_id, epoch))
        if checkpoint is None:
            continue
        delta = done.get(layer_delta_unit(planned.trial_id, epoch))
        delta_done = planned.layer_delta == "off" or delta is not None
        complete = delta_done and not missing_evaluations(planned, epoch, done)
        keep = planned.keep == "all" or (planned.keep == "last" and epoch == last)
        replaced = _exports(planned) and delta is not None and delta.weights is not None
        if checkpoint.weights is not None and ((complete and not keep) or replaced):
            yield checkpoint, WEIGHTS
        if delta is not None and delta.weights is not None and complete and not keep:
            yield delta, WEIGHTS
    trained = trained_epochs(done)
    for epoch in trained:  # of the states only the last is of use
        checkpoint = done[train_unit(planned.trial_id, epoch)]
        if checkpoint.state is not None and (planned.keep_state == "none" or epoch != trained[-1]):
            yield checkpoint, STATE


def write_spec(store: Store, owner: str, planned: PlannedTrial | PlannedMeasure) -> None:
    """What the trial or measure is, for the worker, for `show` and for `collect`."""
    path, text = store.spec_path(owner), planned.model_dump_json(indent=1)
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


def read_spec(store: Store, owner: str) -> PlannedTrial | PlannedMeasure:
    """What a trial or measure of the store is.

    Raises:
        StoreError: its spec.json is damaged.
    """
    path = store.spec_path(owner)
    kind = PlannedTrial if owner.startswith("trials/") else PlannedMeasure
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreError(f"{path} is damaged; `python -m sweep run` with the sweep's YAML writes it again") from error


# ---------------------------------------------------------------------- on the worker


def failure_kind(error: BaseException) -> str:
    """The name of a failure: nan, data, oom, disk or bug."""
    kind = getattr(error, "kind", None)  # typed errors of the stages carry their own
    if isinstance(kind, str):
        return kind
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "oom"
    if type(error).__name__ == "SafetensorError":  # half a copy of a model, or a download cut off
        return "data"
    if "No space left on device" in str(error):  # libraries written in Rust or C++ wrap the error number
        return "disk"
    return "bug"


def perform(item: WorkItem, number: int, store: Store, threads: int, notify: Notify) -> dict[str, Any]:
    """Do one work item as its `number`-th try. Returns how it went; a failure is returned, not raised.

    Args:
        item: what to do.
        number: number of the try; files go to `attempts/<number>/` of each unit.
        store: the sweep's folder, shared with the driver.
        threads: threads for torch.
        notify: called with `{"unit": ...}` when a unit is finished and may be committed, and with
            `{"epoch": ..., "loss": ...}` now and then.
    """
    started = time.time()
    entry = {
        "item": item.key,
        "attempt": number,
        "host": socket.gethostname(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    open_attempts: list[Attempt] = []

    def attempt(unit: str) -> Attempt:
        opened = store.attempt(unit, number)
        open_attempts.append(opened)
        return opened

    def finish(finished: Attempt, record: dict[str, Any]) -> None:
        finished.finish({**record, "provenance": provenance()})
        open_attempts.remove(finished)
        notify({"unit": finished.unit})

    with _log_to(store.log_path(item.owner)):
        log = logging.getLogger("sweep")
        log.info("%s, attempt %d on %s", item.key, number, entry["host"])
        try:
            worker = _Worker(store, threads, attempt, finish, notify)
            device = getattr(worker, item.stage)(item)
            outcome: dict[str, Any] = {"outcome": "succeeded", "device": device}
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            log.error("%s failed:\n%s", item.key, text)
            message = " ".join(str(error).split())[:500] or type(error).__name__
            outcome = {
                "outcome": "failed",
                "failure_kind": failure_kind(error),
                "message": message,
                "traceback": text,
            }
            for left in open_attempts:
                left.discard()
        else:
            log.info("%s done in %.1f s", item.key, time.time() - started)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    peak = peak_kib / 2**20 if platform.system() != "Darwin" else peak_kib / 2**30
    return {**entry, **outcome, "seconds": time.time() - started, "peak_memory_gib": peak}


def without_paths(command_line: str, evaluation: EvalSpec) -> str:
    """A command with placeholders for the folders of this machine: records go to other machines."""
    for placeholder, folder in _folders(evaluation).items():
        command_line = command_line.replace(folder, placeholder)
    return command_line


def with_paths(command_line: str, evaluation: EvalSpec, **folders: str) -> str:
    """The command as this machine can run it; `folders` fills `{sweep}` and `{base_model}`."""
    for placeholder, folder in {**_folders(evaluation), **{f"{{{k}}}": v for k, v in folders.items()}}.items():
        command_line = command_line.replace(placeholder, folder)
    return command_line


def _folders(evaluation: EvalSpec) -> dict[str, str]:
    found = {"{tiny}": str(tiny.default_cache_dir())}
    if evaluation.benchmark.path is not None:
        found["{benchmark}"] = str(Path(evaluation.benchmark.path).parent)
    return found


def provenance() -> dict[str, Any]:
    """Where and with what a record was made. No paths, no environment."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "lm_eval", "ray")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except ModuleNotFoundError:
            versions[name] = None
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions,
        "commit": os.environ.get("SWEEP_COMMIT"),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Log lines of `sweep.*` go to the trial's own file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("sweep")
    handler: logging.Handler
    try:
        handler = logging.FileHandler(path)
    except OSError:  # a full disk: the failure itself is reported through the driver
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):  # a full disk, again
            handler.close()


class _Worker:
    """The stages as this process does them. Heavy imports are inside: the driver imports this module too."""

    def __init__(
        self,
        store: Store,
        threads: int,
        attempt: Callable[[str], Attempt],
        finish: Callable[[Attempt, dict[str, Any]], None],
        notify: Notify,
    ) -> None:
        self._store, self._threads = store, threads
        self._attempt, self._finish, self._notify = attempt, finish, notify

    def _planned(self, item: WorkItem) -> PlannedTrial:
        planned = read_spec(self._store, item.owner)
        assert isinstance(planned, PlannedTrial)
        return planned

    def train(self, item: WorkItem) -> str:
        """Train to every wanted epoch that has no checkpoint yet, continuing from a kept state."""
        from sweep import models
        from sweep.train import train

        planned = self._planned(item)
        done = self._store.committed(item.owner)
        wanted = epochs_to_train(planned, done)
        state = _latest_state(planned, done, before=min(wanted))
        if state is not None:
            logging.getLogger("sweep").info("goes on from %s", state.relative_to(self._store.root))
        pins.verify(planned.trial)
        reporter = _TrainReporter(self, planned, cast=planned.layer_delta == "off")
        train(
            planned.trial,
            planned.execution,
            base_path=models.locate(planned.trial.base_model, planned.trial.base_digest),
            epochs_to_keep=wanted,
            folder=reporter.folder,
            reporter=reporter,
            cache_dir=self._store.cache,
            threads=self._threads,
            resume_from=state,
            keep_state=planned.keep_state == "last",
        )
        return reporter.device

    def layer_delta(self, item: WorkItem) -> str:
        """Weight changes of one checkpoint, and its cast export where one is wanted."""
        from sweep import models
        from sweep.layer_delta import layer_deltas

        planned = self._planned(item)
        assert item.epoch is not None
        weights = self._store.committed(item.owner)[train_unit(planned.trial_id, item.epoch)].weights
        assert weights is not None
        attempt = self._attempt(layer_delta_unit(planned.trial_id, item.epoch))
        started = time.time()
        base_path = models.locate(planned.trial.base_model, planned.trial.base_digest)
        spectral, dtype = planned.layer_delta == "full", planned.trial.base_model.dtype
        rows = list(layer_deltas(base_path, weights, spectral=spectral, base_dtype=dtype))
        _write_rows("layer_deltas", _keyed(rows, planned, item.epoch), attempt.folder)
        if _exports(planned):
            models.cast_checkpoint(weights, attempt.folder / WEIGHTS, planned.export_dtype)
        self._finish(attempt, {"seconds": time.time() - started, "num_tensors": len(rows)})
        return "cpu"

    def evaluate(self, item: WorkItem) -> str:
        """Every missing evaluation of one checkpoint, or of the base model."""
        from sweep import models

        planned = self._planned(item)
        assert item.epoch is not None
        epoch, done = item.epoch, self._store.committed(item.owner)
        base = planned.trial.base_model
        base_path = models.locate(base, planned.trial.base_digest)
        weights = None if planned.trial.is_baseline else exported(planned, epoch, done)
        missing = missing_evaluations(planned, epoch, done)
        pins.verify(planned.trial.model_copy(update={"datasets": {}}), missing)
        for template in dict.fromkeys(e.template for e in missing):  # a baseline may have several
            self._score(planned, epoch, base_path, weights, [e for e in missing if e.template == template])
        return models.device()

    def _score(
        self, planned: PlannedTrial, epoch: int, base_path: Path, weights: Path | None, evaluations: list[EvalSpec]
    ) -> None:
        """Evaluations that share a prompt template, on one loaded model; each is finished as it comes."""
        from sweep import models
        from sweep.evaluate import command, evaluate

        base, first = planned.trial.base_model, evaluations[0]
        tokenizer = models.load_tokenizer(base_path, first.template)
        model = models.load_checkpoint(
            base_path, weights, first.dtype, base.trust_remote_code, base_dtype=base.dtype
        ).to(models.device())
        described = {
            "architecture": type(model).__name__,
            "num_layers": models.count_layers(model.config),
            "num_parameters": model.num_parameters(),
        }
        # placeholders: no path of this machine in a record; `show` fills them
        folder = weights and f"{{sweep}}/{weights.relative_to(self._store.root)}"

        def take(evaluation: EvalSpec, scores: list[Row], items: list[Row], record: Row) -> None:
            attempt = self._attempt(score_unit(planned.trial_id, epoch, evaluation.eval_id))
            _write_rows("items", _keyed(items, planned, epoch), attempt.folder)
            repeat = command(
                evaluation,
                tokenizer,
                base_path="{base_model}",
                checkpoint_path=folder,
                adapter=weights is not None and models.adapter_config(weights) is not None,
                tokenizer_path=folder,
                batch_size=planned.execution.eval_batch_size,
                device=models.device(),
                trust_remote_code=base.trust_remote_code,
            )
            said = {"command": without_paths(repeat, evaluation), "scores": _keyed(scores, planned, epoch)}
            self._finish(attempt, {**described, **record, **said})

        evaluate(model, tokenizer, evaluations, batch_size=planned.execution.eval_batch_size, on_result=take)

    def measure(self, item: WorkItem) -> str:
        """Perplexity, lengths and diversity of a dataset under a base model."""
        from sweep import models
        from sweep.data import measured_examples
        from sweep.measure import measure

        planned = read_spec(self._store, item.owner)
        assert isinstance(planned, PlannedMeasure)
        pair = planned.pair
        assert pair.train is not None
        pins.verify(pair)
        attempt = self._attempt(measure_unit(planned.key))
        started = time.time()
        base_path = models.locate(pair.base_model, pair.base_digest)
        examples = measured_examples(pair.datasets, pair.data_digests, pair.weights, planned.max_examples)
        values = measure(
            models.load_checkpoint(base_path, None, pair.base_model.dtype, pair.base_model.trust_remote_code).to(
                models.device()
            ),
            models.load_tokenizer(base_path, pair.train.template),
            examples,
            pair.train.template,
            pair.train.max_length,
            planned.execution.eval_batch_size,
        )
        self._finish(attempt, {"seconds": time.time() - started, "measures": values})
        return models.device()


class _TrainReporter:
    """Takes what training reports, and makes units of it: one per checkpoint, with the steps since the last."""

    device = "cpu"

    def __init__(self, worker: _Worker, planned: PlannedTrial, cast: bool) -> None:
        self._worker, self._planned, self._cast = worker, planned, cast
        self._rows: list[dict[str, Any]] = []
        self._attempts: dict[int, Attempt] = {}
        self._last_notice = time.monotonic()

    def folder(self, epoch: int) -> Path:
        """Where the checkpoint of an epoch is written."""
        attempt = self._worker._attempt(train_unit(self._planned.trial_id, epoch))
        self._attempts[epoch] = attempt
        return attempt.folder

    def step(self, row: dict[str, Any]) -> None:
        """One optimizer step."""
        self._rows.append({"trial_id": self._planned.trial_id, **row})
        now = time.monotonic()
        if now - self._last_notice >= PROGRESS_SECONDS:
            self._last_notice = now
            self._worker._notify({"epoch": row["epoch"], "loss": row["loss_nats"]})

    def checkpoint(self, epoch: int, record: dict[str, Any]) -> None:
        """The files of an epoch's checkpoint are written."""
        pins.verify(self._planned.trial)
        attempt = self._attempts.pop(epoch)
        self.device = record["device"]
        if self._cast and self._planned.export_dtype != "float32":
            from sweep import models

            models.cast_in_place(attempt.folder / WEIGHTS, self._planned.export_dtype)
        _write_rows("steps", self._rows, attempt.folder)
        self._rows = []
        self._worker._finish(attempt, record)


def _latest_state(planned: PlannedTrial, done: Mapping[str, Result], before: int) -> Path | None:
    """State of the last trained epoch before the first wanted one, if it was kept."""
    results = [done[train_unit(planned.trial_id, epoch)] for epoch in trained_epochs(done) if epoch < before]
    states = [result.state for result in results if result.state is not None]
    return states[-1] if states else None


def _keyed(rows: list[dict[str, Any]], planned: PlannedTrial, epoch: int) -> list[dict[str, Any]]:
    return [{"trial_id": planned.trial_id, "epoch": epoch, **row} for row in rows]


def _write_rows(table: str, rows: list[dict[str, Any]], folder: Path) -> None:
    from sweep import schema

    schema.write(table, schema.build(table, rows), folder)
