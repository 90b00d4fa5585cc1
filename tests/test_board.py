"""The driver's board: every due item exactly once, longest first, and no failure stops the others."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sweep import config
from sweep.board import Board
from sweep.plan import Plan, expand
from sweep.spec import Pins, PlannedTrial
from sweep.store import (
    STATE,
    WEIGHTS,
    LeaseLost,
    Store,
    layer_delta_unit,
    measure_unit,
    score_unit,
    train_unit,
)
from sweep.trial import WorkItem


def plan_of(**changes: Any) -> Plan:
    """One base model, one dataset, one benchmark, two epochs, unless `changes` say otherwise."""
    settings = {
        "name": "test",
        "base_models": {"m": {"tiny": "llama-code"}},
        "datasets": {"d": {"tiny": "code_output"}},
        "benchmarks": {"b": {"task": "hellaswag"}},
        "train": {"epochs": 2},
        "eval_epochs": "all",
    }
    sweep = config.parse(yaml.safe_dump(settings | changes), Path("sweep.yaml"))
    names = {group: {name: name for name in getattr(sweep, group)} for group in Pins.model_fields if group != "backend"}
    return expand(sweep, Pins(**names, backend="lm_eval 0"))


ITEMS = ["train", "layer_delta/1", "layer_delta/2", "evaluate/1", "evaluate/2"]
"""Of a trial of two epochs."""


class Worker:
    """Does items as a worker would: real attempts in the store, told to the board unit by unit."""

    def __init__(self, plan: Plan, store: Store, board: Board) -> None:
        self.planned = {f"trials/{t.trial_id}": t for t in plan.trials} | {
            f"measures/{m.key}": m for m in plan.measures
        }
        self.store, self.board = store, board

    def units(self, item: WorkItem) -> list[str]:
        planned = self.planned[item.owner]
        if not isinstance(planned, PlannedTrial):
            return [measure_unit(planned.key)]
        if item.stage == "train":
            return [train_unit(planned.trial_id, epoch) for epoch in planned.epochs]
        if item.stage == "layer_delta":
            return [layer_delta_unit(planned.trial_id, item.epoch)]
        return [score_unit(planned.trial_id, item.epoch, e.eval_id) for e in planned.evaluations]

    def write(self, unit: str, number: int) -> None:
        attempt = self.store.attempt(unit, number)
        for folder in (WEIGHTS, STATE) if "/train/" in unit else ():
            (attempt.folder / folder).mkdir()
            (attempt.folder / folder / "file").write_bytes(b"x")
        attempt.finish({})

    def do(self, item: WorkItem, number: int) -> None:
        for unit in self.units(item):
            if self.store.result(unit) is None:
                self.write(unit, number)
                self.board.progress(item.key, {"unit": unit})
        self.end(item, number)

    def end(self, item: WorkItem, number: int, outcome: str = "succeeded", **more: Any) -> None:
        entry = {"item": item.key, "attempt": number, "outcome": outcome, "seconds": 1.0, **more}
        self.board.complete(item.key, entry)

    def fail(self, item: WorkItem, number: int) -> None:
        self.end(item, number, "failed", failure_kind="nan", message="loss is NaN")

    def do_all(self) -> list[str]:
        """Every item there is until nothing is due, in the order handed out."""
        keys = []
        while (handed := self.board.next()) is not None:
            keys.append(handed[0].key)
            self.do(*handed)
        return keys


def open_board(root: Path, max_retries: int = 2, **changes: Any) -> tuple[Board, Worker, Store]:
    plan, store = plan_of(**changes), Store(root)
    board = Board(plan, store, max_retries)
    return board, Worker(plan, store, board), store


def stages(keys: list[str]) -> list[str]:
    return ["/".join(key.split("/")[2:]) for key in keys]


# ---------------------------------------------------------------------- exactly once, and in what order


@pytest.mark.parametrize("hands", [1, 2, 5])
def test_every_item_is_handed_out_exactly_once(tmp_path, hands):
    board, worker, store = open_board(tmp_path, axes={"seed": [1, 2]})
    held: list[tuple[WorkItem, int]] = []
    keys = []
    while not board.finished:
        while len(held) < hands and (handed := board.next()) is not None:
            held.append(handed)
            keys.append(handed[0].key)
        worker.do(*held.pop(0))
    assert len(set(keys)) == len(keys) == 2 * len(ITEMS) + 2  # a baseline and a measure
    assert board.done == {"train": 2, "layer_delta": 4, "evaluate": 5, "measure": 1}
    assert not board.failed and not board.running and not board.waiting.total()

    again, _, _ = open_board(tmp_path, axes={"seed": [1, 2]})
    assert again.finished and again.next() is None
    assert again.done == board.done


def test_the_work_on_a_checkpoint_can_start_while_its_training_goes_on(tmp_path):
    board, worker, _ = open_board(tmp_path, measure=False, baselines=False)
    training, number = board.next()
    assert board.next() is None
    assert board.waiting == {"later": 4}
    first = worker.units(training)[0]
    worker.write(first, number)
    board.progress(training.key, {"unit": first})
    assert sorted(stages([board.next()[0].key, board.next()[0].key])) == ["evaluate/1", "layer_delta/1"]
    assert board.next() is None
    assert board.waiting["later"] == 2


def test_the_longest_training_is_first_and_short_work_fills_the_end(tmp_path):
    board, worker, _ = open_board(
        tmp_path,
        axes={"num_examples": [100, 1000, 10]},
        zip=[{"epochs": [1, 2], "seed": [1, 2]}],
        eval_epochs="last",
        layer_delta="off",
    )
    sizes = []
    for key in worker.do_all():
        owner, stage = "/".join(key.split("/")[:2]), key.split("/")[2]
        planned = worker.planned[owner]
        if stage == "train":
            sizes.append(planned.trial.train.num_examples * max(planned.epochs))
    assert sizes == [2000, 1000, 200, 100, 20, 10]


def test_work_on_checkpoints_goes_before_training_and_baselines_and_measures_last(tmp_path):
    _, worker, _ = open_board(tmp_path, axes={"seed": [1, 2]}, eval_epochs="last", layer_delta="off")
    assert stages(worker.do_all()) == ["train", "evaluate/2", "train", "evaluate/2", "evaluate/0", "measure"]


def test_a_new_benchmark_is_evaluated_and_nothing_else_is_done_again(tmp_path):
    open_board(tmp_path)[1].do_all()
    more = {"benchmarks": {"b": {"task": "hellaswag"}, "c": {"task": "gsm8k"}}}
    _, worker, _ = open_board(tmp_path, **more)
    assert sorted(stages(worker.do_all())) == ["evaluate/0", "evaluate/1", "evaluate/2"]


def test_weights_go_as_soon_as_nothing_needs_them(tmp_path):
    _, worker, store = open_board(tmp_path, keep="none", baselines=False, measure=False)
    worker.do_all()
    (trial,) = worker.planned
    assert not any(result.weights or result.state for result in store.committed(trial).values())


def test_what_an_item_is_lies_in_the_store_before_it_starts(tmp_path):
    board, worker, store = open_board(tmp_path)
    item, _ = board.next()
    written = PlannedTrial.model_validate_json(store.spec_path(item.owner).read_bytes())
    assert written == worker.planned[item.owner]


# ---------------------------------------------------------------------- failures


def test_a_failing_item_does_not_stop_the_others_and_is_not_tried_again(tmp_path):
    board, worker, store = open_board(tmp_path, axes={"seed": [1, 2]}, measure=False, baselines=False)
    failing, number = board.next()
    worker.fail(failing, number)
    assert [key.split("/")[1] for key in worker.do_all()].count(failing.owner.split("/")[1]) == 0
    assert board.finished
    assert board.failed.keys() == {failing.key}
    assert board.failed[failing.key]["failure_kind"] == "nan"
    assert board.done == {"train": 1, "layer_delta": 2, "evaluate": 2}

    again, worker, _ = open_board(tmp_path, axes={"seed": [1, 2]}, measure=False, baselines=False)
    assert again.next() == (failing, number + 1)  # the next run tries it again


def test_what_a_failing_item_had_finished_is_kept_and_used(tmp_path):
    board, worker, store = open_board(tmp_path, measure=False, baselines=False)
    training, number = board.next()
    first = worker.units(training)[0]
    worker.write(first, number)
    board.progress(training.key, {"unit": first})
    worker.fail(training, number)
    assert sorted(stages(worker.do_all())) == ["evaluate/1", "layer_delta/1"]
    assert store.result(first) is not None


def test_a_worker_that_says_it_succeeded_but_left_no_result_has_a_bug(tmp_path):
    board, worker, store = open_board(tmp_path)
    item, number = board.next()
    worker.end(item, number)
    assert board.failed[item.key]["failure_kind"] == "bug"
    assert board.failed[item.key]["message"] == "it ended well but left no whole result"
    assert store.attempts(item.owner)[-1]["outcome"] == "failed"


def test_a_result_whose_notice_got_lost_is_found_when_the_item_ends(tmp_path):
    board, worker, _ = open_board(tmp_path)
    item, number = board.next()
    for unit in worker.units(item):
        worker.write(unit, number)
    worker.end(item, number)
    assert not board.failed
    assert board.done["train"] == 1


def test_a_notice_of_a_unit_that_is_not_whole_commits_nothing(tmp_path):
    board, worker, store = open_board(tmp_path)
    item, number = board.next()
    unit = worker.units(item)[0]
    store.attempt(unit, number)
    board.progress(item.key, {"unit": unit})
    assert store.result(unit) is None
    board.progress("trials/unknown/train", {"unit": unit})  # of an item that is not running any more


def test_a_driver_that_lost_its_lease_is_told_so(tmp_path):
    plan, store = plan_of(), Store(tmp_path)
    with store.lease():
        board = Board(plan, store, 2)
        worker = Worker(plan, store, board)
        item, number = board.next()
        unit = worker.units(item)[0]
        worker.write(unit, number)
        (tmp_path / "lease.json").write_text('{"id": "another"}')
        with pytest.raises(LeaseLost):
            board.progress(item.key, {"unit": unit})


# ---------------------------------------------------------------------- workers that are lost


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_an_item_whose_worker_is_lost_is_tried_again_and_then_failed(tmp_path, max_retries):
    board, _, store = open_board(tmp_path, max_retries, measure=False, baselines=False)
    numbers = []
    while (handed := board.next()) is not None:
        item, number = handed
        numbers.append(number)
        assert not board.failed
        board.lose(item.key, "it was killed")
    assert numbers == list(range(1, max_retries + 2))
    assert board.failed[item.key]["failure_kind"] == "lost_worker"
    assert board.finished
    assert [entry["outcome"] for entry in store.attempts(item.owner)] == ["lost"] * max_retries + ["failed"]


def test_what_a_lost_worker_had_finished_is_adopted(tmp_path):
    board, worker, store = open_board(tmp_path, measure=False, baselines=False)
    item, number = board.next()
    first, second = worker.units(item)
    worker.write(first, number)  # finished, but the notice never came
    store.attempt(second, number)
    board.lose(item.key, "it was killed")
    assert store.result(first).attempt == number
    again = [board.next(), board.next(), board.next()]
    assert sorted(stages([handed[0].key for handed in again])) == ["evaluate/1", "layer_delta/1", "train"]
    assert item in [handed[0] for handed in again]


def test_an_item_that_was_done_when_its_worker_died_is_done(tmp_path):
    board, worker, _ = open_board(tmp_path, max_retries=0, measure=False, baselines=False)
    item, number = board.next()
    for unit in worker.units(item):
        worker.write(unit, number)
    board.lose(item.key, "it was killed")
    assert not board.failed
    assert board.done["train"] == 1
    assert "train" not in stages(worker.do_all())
    assert not board.failed


def test_release_lets_go_of_what_runs_and_keeps_what_is_finished(tmp_path):
    board, worker, store = open_board(tmp_path)
    item, number = board.next()
    first = worker.units(item)[0]
    worker.write(first, number)
    board.release()
    assert not board.running
    assert store.result(first) is not None
    (entry,) = store.attempts(item.owner)
    assert (entry["outcome"], entry["failure_kind"]) == ("lost", "stopped")


def test_tries_that_a_killed_driver_left_running_are_known_to_be_lost(tmp_path):
    board, _, store = open_board(tmp_path)
    item, number = board.next()
    assert store.attempts(item.owner)[-1]["outcome"] == "running"
    open_board(tmp_path)
    (entry,) = store.attempts(item.owner)
    assert (entry["attempt"], entry["outcome"], entry["failure_kind"]) == (number, "lost", "lost_worker")


def test_progress_is_remembered_while_an_item_runs(tmp_path):
    board, worker, _ = open_board(tmp_path)
    item, number = board.next()
    board.progress(item.key, {"epoch": 0.5, "loss": 2.0})
    assert board.running[item.key].progress == {"epoch": 0.5, "loss": 2.0}
    worker.do(item, number)
    assert item.key not in board.running
    assert board.seconds["train"] == [1.0]
