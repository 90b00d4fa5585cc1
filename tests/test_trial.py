"""Which work items of a trial are due, what may be removed, and what a failure is called."""

import errno
from pathlib import Path
from typing import Any

import pytest

from sweep.spec import (
    BaseModelSpec,
    BenchmarkSpec,
    DatasetSpec,
    EvalSpec,
    ExecutionSpec,
    PlannedMeasure,
    PlannedTrial,
    TrainSpec,
    TrialSpec,
)
from sweep.store import STATE, WEIGHTS, Result, Store, layer_delta_unit, measure_unit, score_unit, train_unit
from sweep.trial import (
    WorkItem,
    due,
    epochs_to_train,
    exported,
    failure_kind,
    missing_evaluations,
    removable,
    units_to_redo,
    with_paths,
    without_paths,
)

BENCHMARK = BenchmarkSpec(task="b")


def evaluation(name: str, benchmark: BenchmarkSpec = BENCHMARK) -> EvalSpec:
    return EvalSpec(name=name, benchmark=benchmark, digest=name, backend="lm_eval 0")


def plan(benchmarks: str = "b", baseline: bool = False, method: str = "full", **changes: Any) -> PlannedTrial:
    """A trial of epochs 1 and 2 that is evaluated on one benchmark per letter."""
    base = BaseModelSpec(tiny="llama-code")
    trial = TrialSpec(
        base_model=base,
        base_digest="base",
        datasets={"d": DatasetSpec(tiny="code_output")},
        data_digests={"d": "data"},
        train=TrainSpec(epochs=2, method=method),
    )
    settings = {
        "trial": TrialSpec(base_model=base, base_digest="base") if baseline else trial,
        "base_model": "m",
        "dataset": None if baseline else "d",
        "dataset_kind": None,
        "epochs": (0,) if baseline else (1, 2),
        "evaluations": tuple(evaluation(name) for name in benchmarks),
        "layer_delta": "off" if baseline else "full",
        "keep": "all",
        "keep_state": "none",
        "export_dtype": "float32",
        "execution": ExecutionSpec(),
    }
    return PlannedTrial(**settings | changes)


class Done:
    """A trial's committed units, made by hand in a real store."""

    def __init__(self, root: Path, planned: PlannedTrial) -> None:
        self._store, self._planned = Store(root), planned

    def __call__(self, *steps: str) -> dict[str, Result]:
        """Take steps such as `train 1`, `delta 1`, `export 1`, `score 1 b`, `drop 1` (trained weights),
        `drop export 1`; what is committed then."""
        for step in steps:
            self._take(*step.split())
        return self._store.committed(f"trials/{self._planned.trial_id}")

    def _take(self, what: str, *arguments: str) -> None:
        trial_id, epoch = self._planned.trial_id, int(arguments[-1] if what != "score" else arguments[0])
        if what == "drop":
            unit = layer_delta_unit if arguments[0] == "export" else train_unit
            self._store.remove_weights(self._store.result(unit(trial_id, epoch)))
            return
        unit = {
            "train": train_unit(trial_id, epoch),
            "delta": layer_delta_unit(trial_id, epoch),
            "export": layer_delta_unit(trial_id, epoch),
            "score": score_unit(trial_id, epoch, evaluation(arguments[-1]).eval_id),
        }[what]
        attempt = self._store.attempt(unit, self._store.next_attempt(f"trials/{trial_id}"))
        folders = {"train": (WEIGHTS, STATE), "export": (WEIGHTS,)}.get(what, ())
        for folder in folders:
            (attempt.folder / folder).mkdir()
            (attempt.folder / folder / "file").write_bytes(b"x")
        attempt.finish({})
        self._store.commit(unit, attempt.number)


def short(items: tuple[WorkItem, ...]) -> str:
    return " ".join(f"{item.stage}{item.epoch or ''}" for item in items)


BFLOAT16 = {"export_dtype": "bfloat16"}
ALL = ("train 1", "train 2", "delta 1", "delta 2", "score 1 b", "score 2 b")
ALL_EXPORTED = tuple(step.replace("delta", "export") for step in ALL)
NO_WEIGHTS = ("drop 1", "drop 2")


@pytest.mark.parametrize(
    ("changes", "steps", "now", "later", "done", "retrain"),
    [
        ({}, (), "train", "layer_delta1 evaluate1 layer_delta2 evaluate2", "", ""),
        ({}, ("train 1",), "train layer_delta1 evaluate1", "layer_delta2 evaluate2", "", ""),
        ({}, ("train 1", "train 2"), "layer_delta1 evaluate1 layer_delta2 evaluate2", "", "train", ""),
        ({}, ALL[:3], "evaluate1 layer_delta2 evaluate2", "", "train layer_delta1", ""),
        ({}, ALL[:5], "evaluate2", "", "train layer_delta1 evaluate1 layer_delta2", ""),
        ({}, ALL, "", "", "train layer_delta1 evaluate1 layer_delta2 evaluate2", ""),
        ({}, (*ALL, *NO_WEIGHTS), "", "", "train layer_delta1 evaluate1 layer_delta2 evaluate2", ""),
        ({"benchmarks": "bc"}, ALL, "evaluate1 evaluate2", "", "train layer_delta1 layer_delta2", ""),
        (
            {"benchmarks": "bc"},
            (*ALL, "drop 1"),
            "evaluate2",
            "",
            "train layer_delta1 layer_delta2",
            "evaluate1",
        ),
        ({}, (*ALL[:2], *NO_WEIGHTS), "", "", "train", "layer_delta1 evaluate1 layer_delta2 evaluate2"),
        ({"layer_delta": "off"}, ALL[:2], "evaluate1 evaluate2", "", "train", ""),
        ({"benchmarks": ""}, ALL[:2], "layer_delta1 layer_delta2", "", "train", ""),
        ({"epochs": (1, 2, 5)}, ALL, "train", "layer_delta5 evaluate5", "layer_delta1 evaluate1", ""),
        # evaluation reads the cast export, which the layer-delta stage makes
        (BFLOAT16, ALL[:2], "layer_delta1 layer_delta2", "evaluate1 evaluate2", "train", ""),
        (
            BFLOAT16,
            (*ALL[:2], "export 1", "drop 1"),
            "evaluate1 layer_delta2",
            "evaluate2",
            "train layer_delta1",
            "",
        ),
        (
            BFLOAT16 | {"benchmarks": "bc"},
            (*ALL_EXPORTED, *NO_WEIGHTS),
            "evaluate1 evaluate2",
            "",
            "train",
            "",
        ),
        (
            BFLOAT16 | {"benchmarks": "bc"},
            (*ALL_EXPORTED, *NO_WEIGHTS, "drop export 1"),
            "evaluate2",
            "",
            "train layer_delta1 layer_delta2",
            "evaluate1",
        ),
        (BFLOAT16 | {"layer_delta": "off"}, ALL[:2], "evaluate1 evaluate2", "", "train", ""),
        (
            BFLOAT16 | {"method": "lora"},
            ALL[:4],
            "evaluate1 evaluate2",
            "",
            "train layer_delta1 layer_delta2",
            "",
        ),
        ({"baseline": True}, (), "evaluate", "", "", ""),
        ({"baseline": True}, ("score 0 b",), "", "", "evaluate", ""),
        ({"baseline": True, "benchmarks": "bc"}, ("score 0 b",), "evaluate", "", "", ""),
    ],
)
def test_what_is_due_follows_from_what_is_committed(tmp_path, changes, steps, now, later, done, retrain):
    planned = plan(**changes)
    state = due(planned, Done(tmp_path, planned)(*steps))
    assert (short(state.now), short(state.later), short(state.retrain)) == (now, later, retrain)
    assert short(state.done).startswith(done)
    everything = (*state.now, *state.later, *state.done, *state.retrain)
    assert len(set(everything)) == len(everything) == len(_all_items(planned))


def _all_items(planned: PlannedTrial) -> list[str]:
    stages = ["train"] if not planned.trial.is_baseline else []
    for _ in planned.epochs:
        stages += ["layer_delta"] if planned.layer_delta != "off" else []
        stages += ["evaluate"] if planned.evaluations else []
    return stages


def test_a_measure_is_due_until_it_is_committed(tmp_path):
    measure = PlannedMeasure(
        base_model="m",
        dataset="d",
        dataset_kind=None,
        pair=plan().trial,
        max_examples=5,
        version=1,
        execution=ExecutionSpec(),
    )
    item = WorkItem(f"measures/{measure.key}", "measure")
    assert due(measure, {}).now == (item,)
    store = Store(tmp_path)
    store.attempt(measure_unit(measure.key), 1).finish({})
    done = {measure_unit(measure.key): store.commit(measure_unit(measure.key), 1)}
    assert due(measure, done).done == (item,)


def test_only_the_missing_epochs_and_evaluations_are_worked_on(tmp_path):
    planned = plan("bc")
    done = Done(tmp_path, planned)("train 1", "score 1 c")
    assert epochs_to_train(planned, done) == [2]
    assert [e.name for e in missing_evaluations(planned, 1, done)] == ["b"]


# ---------------------------------------------------------------------- what may be removed


def removed(planned: PlannedTrial, done: dict[str, Result]) -> set[str]:
    return {f"{'/'.join(result.unit.split('/')[2:])} {what}" for result, what in removable(planned, done)}


TRAINED_1, TRAINED_2 = "train/epoch-1 weights", "train/epoch-2 weights"
EXPORT_1, EXPORT_2 = "layer_delta/epoch-1 weights", "layer_delta/epoch-2 weights"
STATES = {"train/epoch-1 state", "train/epoch-2 state"}


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        ({}, ALL, STATES),
        ({"keep_state": "last"}, ALL, {"train/epoch-1 state"}),
        ({"keep": "last"}, ALL, {TRAINED_1} | STATES),
        ({"keep": "none"}, ALL, {TRAINED_1, TRAINED_2} | STATES),
        ({"keep": "none"}, (*ALL, "drop 1"), {TRAINED_2} | STATES),
        ({"keep": "none"}, ALL[:5], {TRAINED_1} | STATES),  # epoch 2 is not evaluated yet
        ({"keep": "none"}, ("train 1", "score 1 b"), {"train/epoch-1 state"}),  # its layer delta is missing
        (
            {"keep": "none", "layer_delta": "off"},
            ("train 1", "score 1 b"),
            {TRAINED_1, "train/epoch-1 state"},
        ),
        ({"keep": "none", "benchmarks": "bc"}, ALL, STATES),
        ({"keep": "none"}, (), set()),
        (BFLOAT16, ALL_EXPORTED[:3], {TRAINED_1} | STATES),  # the export is there, float32 has served
        (BFLOAT16, ALL_EXPORTED, {TRAINED_1, TRAINED_2} | STATES),
        (BFLOAT16, ALL[:4], STATES),  # layer deltas of before the cast was wanted: there is no export
        (BFLOAT16 | {"keep": "last"}, ALL_EXPORTED, {TRAINED_1, TRAINED_2, EXPORT_1} | STATES),
        (BFLOAT16 | {"keep": "none"}, ALL_EXPORTED, {TRAINED_1, TRAINED_2, EXPORT_1, EXPORT_2} | STATES),
        (BFLOAT16 | {"method": "lora"}, ALL, STATES),
        ({"baseline": True, "keep": "none"}, ("score 0 b",), set()),
    ],
)
def test_weights_go_when_nothing_needs_them_any_more(tmp_path, changes, steps, expected):
    planned = plan(**changes)
    assert removed(planned, Done(tmp_path, planned)(*steps)) == expected


@pytest.mark.parametrize("keep", ["all", "last", "none"])
@pytest.mark.parametrize("changes", [{}, BFLOAT16, {"layer_delta": "off"}], ids=str)
def test_removing_what_is_removable_makes_nothing_due(tmp_path, keep, changes):
    planned = plan(keep=keep, **changes)
    store = Store(tmp_path)
    done = Done(tmp_path, planned)
    steps = ALL_EXPORTED if changes == BFLOAT16 else ALL
    for count in range(len(steps)):
        committed = done(steps[count])
        for result, subfolder in list(removable(planned, committed)):
            store.remove_weights(result, subfolder)
        assert not due(planned, done()).retrain
    assert not (due(planned, done()).now or due(planned, done()).later)


def test_evaluation_reads_the_cast_export_where_there_is_one(tmp_path):
    planned = plan()
    done = Done(tmp_path / "float32", planned)("train 1", "delta 1")
    assert exported(planned, 1, done) == done[train_unit(planned.trial_id, 1)].weights
    planned = plan(**BFLOAT16)
    done = Done(tmp_path / "bfloat16", planned)("train 1", "train 2", "export 1")
    assert exported(planned, 1, done) == done[layer_delta_unit(planned.trial_id, 1)].weights
    assert exported(planned, 2, done) is None


@pytest.mark.parametrize(
    ("changes", "steps", "redone"),
    [
        ({}, (*ALL, "drop 1"), ["train"]),
        (BFLOAT16, (*ALL_EXPORTED, "drop 1", "drop export 1"), ["train", "layer_delta"]),
        (BFLOAT16, ALL, ["layer_delta"]),  # the cast is wanted since, and the float32 weights are there
    ],
)
def test_what_is_set_aside_for_gone_weights_is_what_makes_them(tmp_path, changes, steps, redone):
    planned = plan("bc", **changes)
    units = units_to_redo(planned, 1, Done(tmp_path, planned)(*steps))
    assert [unit.split("/")[2] for unit in units] == redone

    store = Store(tmp_path)
    for unit in units:
        store.reopen(unit)
    state = due(planned, store.committed(f"trials/{planned.trial_id}"))
    assert not any(item.epoch == 1 for item in state.retrain)


# ---------------------------------------------------------------------- items and failures


@pytest.mark.parametrize(
    "item",
    [
        WorkItem("trials/abc", "train"),
        WorkItem("trials/abc", "evaluate", 0),
        WorkItem("measures/k", "measure"),
    ],
    ids=lambda item: item.key,
)
def test_an_item_is_known_by_its_key(item):
    assert WorkItem.parse(item.key) == item


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class TypedError(ValueError):
    kind = "nan"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TypedError(), "nan"),
        (OSError(errno.ENOSPC, "full"), "disk"),
        (OSError(errno.EDQUOT, "over quota"), "disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk"),
        (MemoryError(), "oom"),
        (OutOfMemoryError("CUDA out of memory"), "oom"),
        (OSError(errno.ENOENT, "no file"), "bug"),
        (ValueError("anything"), "bug"),
    ],
    ids=repr,
)
def test_a_failure_has_a_kind(error, kind):
    assert failure_kind(error) == kind


def test_a_command_in_a_record_holds_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "tiny"))
    mine = evaluation("b", BenchmarkSpec(path=str(tmp_path / "tasks" / "b.yaml")))
    command = f"lm_eval --include_path {tmp_path}/tasks --model_args pretrained={{sweep}}/w,base={tmp_path}/tiny/m"
    recorded = without_paths(command, mine)
    assert str(tmp_path) not in recorded
    assert with_paths(recorded, mine, sweep="there") == command.replace("{sweep}", "there")
