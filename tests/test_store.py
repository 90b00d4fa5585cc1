"""Files are the truth: what reads as committed is whole, whoever is killed, cut off or doubled."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweep import store as store_module
from sweep.store import (
    STATE,
    WEIGHTS,
    LeaseLost,
    Result,
    Store,
    StoreError,
    layer_delta_unit,
    measure_unit,
    score_unit,
    train_unit,
    write_text,
)

UNIT = train_unit("abc", 1)
OWNER = "trials/abc"

processes = multiprocessing.get_context("fork")


def finish(store: Store, unit: str = UNIT, number: int = 1, **record: Any) -> Path:
    """An attempt with steps, weights and a state, finished but not committed."""
    attempt = store.attempt(unit, number)
    for name in ("steps.parquet", f"{WEIGHTS}/a.bin", f"{WEIGHTS}/b.bin", f"{STATE}/optimizer.bin"):
        path = attempt.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{name} of try {number}".encode() * 50)
    attempt.finish({"number": number, **record})
    return attempt.folder


def commit(store: Store, unit: str = UNIT, number: int = 1, **record: Any) -> Result:
    finish(store, unit, number, **record)
    return store.commit(unit, number)


def assert_whole(result: Result) -> None:
    """Every file of a result has the bytes its manifest says."""
    for name, (size, digest) in result.files.items():
        content = (result.folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


# ---------------------------------------------------------------------- a result


def test_a_committed_unit_reads_back_with_its_record_and_its_files(store):
    folder = finish(store, loss=0.5)
    assert store.result(UNIT) is None
    store.commit(UNIT, 1)
    result = Store(store.root).result(UNIT)
    assert result.record == {"number": 1, "loss": 0.5}
    assert result.folder == folder
    assert {"steps.parquet", "weights/a.bin", "weights/b.bin", "state/optimizer.bin"} <= set(result.files)
    assert (result.weights, result.state) == (folder / WEIGHTS, folder / STATE)
    assert_whole(result)


def test_an_attempt_that_is_not_finished_cannot_be_committed(store):
    store.attempt(UNIT, 1).folder.joinpath("steps.parquet").write_bytes(b"x")
    with pytest.raises(StoreError, match=f"attempt 1 of {UNIT} is not whole"):
        store.commit(UNIT, 1)
    with pytest.raises(StoreError, match="attempt 7 .* is not whole"):
        store.commit(UNIT, 7)
    assert store.result(UNIT) is None


def test_the_first_commit_wins_and_committing_again_changes_nothing(store):
    finish(store, number=1)
    finish(store, number=2)
    assert store.commit(UNIT, 2).attempt == 2
    before = (store.root / UNIT / "result.json").read_bytes()
    assert store.commit(UNIT, 1).attempt == 2
    assert store.commit(UNIT, 2).attempt == 2
    assert (store.root / UNIT / "result.json").read_bytes() == before


def test_units_of_a_trial_and_of_a_measure_are_found(store):
    units = [UNIT, train_unit("abc", 3), layer_delta_unit("abc", 1), score_unit("abc", 1, "e1")]
    for number, unit in enumerate(units, start=1):
        commit(store, unit, number)
    commit(store, measure_unit("key"))
    assert sorted(store.units(OWNER)) == sorted(units)
    assert store.committed(OWNER).keys() == set(units)
    assert store.units("measures/key") == ["measures/key"]
    assert store.units("measures/other") == store.units("trials/other") == []
    assert store.owners() == []  # none has a spec yet
    write_text(store.spec_path(UNIT), "{}")
    write_text(store.spec_path("measures/key"), "{}")
    assert store.owners() == ["measures/key", OWNER]


def test_a_try_has_a_number_that_no_other_try_of_the_trial_has_had(store):
    assert store.next_attempt(OWNER) == 1
    commit(store, number=4)
    assert store.next_attempt(OWNER) == 5
    store.log_attempt(OWNER, {"item": "x", "attempt": 9, "outcome": "lost"})
    assert store.next_attempt(OWNER) == 10


def test_another_store_version_is_refused_in_a_sentence(store):
    commit(store)
    path = store.root / UNIT / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(StoreError, match=r"written by store version 99, this code reads \d+; use the version"):
        store.result(UNIT)


def test_a_unit_set_aside_is_done_again_under_a_new_number(store):
    commit(store, number=1)
    store.reopen(UNIT)
    assert store.result(UNIT) is None
    store.repair(OWNER)
    assert store.result(UNIT) is None
    assert commit(store, number=2).attempt == 2
    store.reopen(train_unit("abc", 8))  # nothing there: nothing happens


# ---------------------------------------------------------------------- damage


def test_a_truncated_result_is_noticed_taken_again_from_its_attempt_and_said(store):
    commit(store)
    truncate(store.root / UNIT / "result.json")
    assert store.result(UNIT) is None
    store.repair(OWNER)
    assert_whole(store.result(UNIT))
    assert store.notes == [
        f"{UNIT}: the result on disk is damaged; taken again from its finished attempt",
    ]


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"attempt": "1"}', '{"attempt": 1, "version": 1}'])
def test_a_result_that_says_nothing_is_damage(store, content):
    commit(store)
    (store.root / UNIT / "result.json").write_text(content)
    if '"version": 1' not in content:
        assert store.result(UNIT) is None
    store.repair(OWNER)
    assert_whole(store.result(UNIT))
    assert len(store.notes) == 1


def test_a_truncated_file_of_an_attempt_is_noticed_removed_and_said(store):
    folder = commit(store).folder
    truncate(folder / "steps.parquet")
    assert store.result(UNIT) is None
    store.repair(OWNER)
    assert store.result(UNIT) is None
    assert not folder.exists()
    assert store.notes == [f"{UNIT}: the result on disk is damaged; it will be done again"]
    assert_whole(commit(store, number=store.next_attempt(OWNER)))


def test_a_damaged_attempt_is_replaced_by_another_finished_one(store):
    folder = commit(store, number=1).folder
    finish(store, number=2)
    (folder / "steps.parquet").unlink()
    store.repair(OWNER)
    assert store.result(UNIT).attempt == 2


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "a short file", "a missing file"])
def test_repair_adopts_finished_attempts_and_leaves_unfinished_ones(store, damage):
    other = train_unit("abc", 2)
    finish(store)
    folder = finish(store, other, 2)
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "half a manifest":
        truncate(folder / "manifest.json")
    elif damage == "a short file":
        truncate(folder / "steps.parquet")
    else:
        (folder / "steps.parquet").unlink()
    store.repair(OWNER)
    assert store.committed(OWNER).keys() == {UNIT}
    assert store.notes == []  # nothing that was finished is damaged


def test_repair_finds_nothing_to_say_about_a_sound_store(store):
    before = commit(store)
    store.repair(OWNER)
    assert store.result(UNIT) == before
    assert store.notes == []


def test_weights_that_were_removed_leave_the_result_whole(store):
    result = commit(store)
    size = sum(path.stat().st_size for path in result.weights.iterdir())
    assert store.remove_weights(result) == size
    assert store.remove_weights(result) == 0
    kept = store.result(UNIT)
    assert kept.weights is None and kept.state is not None
    assert "weights/a.bin" in kept.files
    store.remove_weights(result, STATE)
    assert store.result(UNIT).state is None
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "manifest.json",
        "started",
        "steps.parquet",
    ]


@pytest.mark.parametrize("folder", [WEIGHTS, STATE])
def test_half_removed_weights_are_damage(store, folder):
    result = commit(store)
    next((result.folder / folder).iterdir()).unlink()
    assert store.result(UNIT) is None
    store.repair(OWNER)
    assert "it will be done again" in store.notes[0]


def test_a_removal_that_was_cut_off_is_completed(store):
    result = commit(store)
    left = result.folder / f".{WEIGHTS}.removed"
    result.weights.rename(left)  # killed here
    assert store.result(UNIT).weights is None
    store.repair(OWNER)
    assert not left.exists()
    assert store.result(UNIT) is not None


# ---------------------------------------------------------------------- workers that come back


def test_a_later_try_removes_what_is_left_of_unfinished_ones_and_keeps_finished_ones(store):
    finished = finish(store, number=1)
    left = store.attempt(UNIT, 2).folder
    store.attempt(UNIT, 3)
    assert finished.exists() and not left.exists()


def test_a_worker_whose_try_was_given_up_cannot_finish_it(store):
    zombie = store.attempt(UNIT, 1)
    (zombie.folder / "steps.parquet").write_bytes(b"early")
    later = commit(store, number=2)

    (zombie.folder / WEIGHTS).mkdir(parents=True)  # as libraries do when they save
    (zombie.folder / WEIGHTS / "a.bin").write_bytes(b"late")
    with pytest.raises(StoreError, match="attempt 1 of .* was taken away: a later try has begun"):
        zombie.finish({})
    zombie.discard()
    store.repair(OWNER)
    assert store.result(UNIT) == later
    assert_whole(later)


def test_half_an_attempt_of_a_worker_that_came_back_is_never_adopted(store):
    zombie = store.attempt(UNIT, 1)
    (zombie.folder / "steps.parquet").write_bytes(b"x")
    zombie.finish({})
    manifest = (zombie.folder / "manifest.json").read_text()
    (zombie.folder / "manifest.json").unlink()
    store.attempt(UNIT, 2)  # removes the first try while its worker is about to write the manifest
    write_text(zombie.folder / "manifest.json", manifest)
    (zombie.folder / "steps.parquet").write_bytes(b"x")
    store.repair(OWNER)
    assert store.result(UNIT) is None


def test_a_late_worker_adds_an_attempt_and_not_a_second_result(store):
    zombie = store.attempt(UNIT, 1)
    (zombie.folder / "steps.parquet").write_bytes(b"x")
    zombie.finish({"late": True})
    later = commit(store, number=2)
    assert store.commit(UNIT, 1) == later
    store.repair(OWNER)
    assert store.result(UNIT) == later


def test_two_tries_cannot_share_a_number(store):
    store.attempt(UNIT, 1)
    with pytest.raises(FileExistsError):
        store.attempt(UNIT, 1)


# ---------------------------------------------------------------------- processes that are killed


def killed_after(seconds: float, work: Callable[..., None], *args: Any) -> None:
    process = processes.Process(target=work, args=args)
    process.start()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def finish_and_commit_for_ever(root: Path, first: int) -> None:
    store = Store(root)
    for epoch in range(first, first + 1_000_000):
        commit(store, train_unit("abc", epoch), number=epoch)


def test_a_process_killed_at_any_moment_leaves_only_whole_results(store):
    chance = random.Random(0)
    for round_ in range(25):
        killed_after(chance.uniform(0.02, 0.1), finish_and_commit_for_ever, store.root, 1 + 1000 * round_)
    before = store.committed(OWNER)
    assert before
    for result in before.values():
        assert_whole(result)

    store.repair(OWNER)
    after = store.committed(OWNER)
    assert before.items() <= after.items()
    for result in after.values():
        assert_whole(result)
    assert store.notes == []  # a kill damages nothing
    unfinished = set(store.units(OWNER)) - after.keys()
    assert len(unfinished) <= 25
    for unit in unfinished:
        assert_whole(commit(store, unit, store.next_attempt(OWNER)))


def rewrite_for_ever(path: Path) -> None:
    for number in range(1_000_000):
        write_text(path, json.dumps([number] * 5000))


def test_a_file_being_replaced_is_whole_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, json.dumps(["first"] * 5000))
    chance = random.Random(1)
    for _ in range(15):
        killed_after(chance.uniform(0.002, 0.02), rewrite_for_ever, path)
        assert len(json.loads(path.read_text())) == 5000


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


# ---------------------------------------------------------------------- the log of attempts


def test_the_last_word_on_a_try_counts_and_keeps_what_was_said_before(store):
    store.log_attempt(OWNER, {"item": "a", "attempt": 1, "outcome": "running", "host": "here"})
    store.log_attempt(OWNER, {"item": "a", "attempt": 2, "outcome": "running"})
    store.log_attempt(OWNER, {"item": "a", "attempt": 1, "outcome": "succeeded"})
    assert store.attempts(OWNER) == [
        {"item": "a", "attempt": 1, "outcome": "succeeded", "host": "here"},
        {"item": "a", "attempt": 2, "outcome": "running"},
    ]
    assert store.attempts("trials/other") == []


def test_a_torn_last_line_is_passed_over_and_swallows_no_later_one(store):
    for number in (1, 2):
        store.log_attempt(OWNER, {"item": "a", "attempt": number, "outcome": "running"})
    path = store.owner_folder(OWNER) / "attempts.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert [entry["attempt"] for entry in store.attempts(OWNER)] == [1]
    store.log_attempt(OWNER, {"item": "a", "attempt": 3, "outcome": "running"})
    store.log_attempt(OWNER, {"item": "a", "attempt": 4, "outcome": "running"})
    assert [entry["attempt"] for entry in store.attempts(OWNER)] == [1, 3, 4]


def test_a_line_that_cannot_be_written_is_noted_and_stops_nothing(store):
    (store.owner_folder(OWNER) / "attempts.jsonl").mkdir(parents=True)
    store.log_attempt(OWNER, {"item": "a", "attempt": 1})
    assert "a: attempt 1 could not be logged" in store.notes[0]


# ---------------------------------------------------------------------- the lease


def hold(root: Path, ready: Any) -> None:
    with Store(root).lease():
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(store):
    """Another process that holds the lease."""
    ready = processes.Event()
    process = processes.Process(target=hold, args=(store.root, ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_driver_is_refused_and_told_who_runs_the_sweep(store, holder):
    with (
        pytest.raises(StoreError, match=f"is being run by process {holder.pid} on .*; wait for it"),
        store.lease(),
    ):
        pass
    assert store.holder()["pid"] == holder.pid


def test_the_lease_of_a_driver_that_was_killed_is_free_at_once(store, holder):
    holder.kill()
    holder.join()
    assert store.holder() is None
    with store.lease():
        assert store.holder()["pid"] == os.getpid()


def test_a_lease_that_was_given_back_is_free(store):
    with store.lease():
        assert store.holder()["pid"] == os.getpid()
        with pytest.raises(StoreError, match="is being run by"), Store(store.root).lease():
            pass
    assert store.holder() is None
    with Store(store.root).lease():
        pass


def test_an_error_gives_the_lease_back(store):
    with pytest.raises(KeyError), store.lease():
        raise KeyError
    assert store.holder() is None


@pytest.mark.parametrize("seconds_ago", [store_module.LEASE_SECONDS / 2, store_module.LEASE_SECONDS * 2])
def test_the_lease_of_another_machine_is_free_when_its_heartbeat_has_stopped_long_enough(store, seconds_ago):
    lease = {"id": "x", "host": "another machine", "pid": 1, "beat": time.time() - seconds_ago}
    write_text(store.root / "lease.json", json.dumps(lease))
    if seconds_ago > store_module.LEASE_SECONDS:
        with store.lease():
            pass
    else:
        with pytest.raises(StoreError, match="process 1 on another machine"), store.lease():
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_lease_is_free(store, content):
    write_text(store.root / "lease.json", content)
    with store.lease():
        pass


def test_a_driver_that_lost_its_lease_commits_nothing_and_leaves_the_new_one_alone(store):
    finish(store)
    new = Store(store.root)
    with store.lease():
        lease = json.loads((store.root / "lease.json").read_text())
        write_text(store.root / "lease.json", json.dumps(lease | {"beat": 0}))  # it slept
        with new.lease():
            with pytest.raises(LeaseLost, match="another process has taken this sweep over"):
                store.commit(UNIT, 1)
            assert store.result(UNIT) is None
            assert new.commit(UNIT, 1).attempt == 1
            shutil.rmtree(store.root / "trials")
            finish(store)
            with pytest.raises(LeaseLost):
                store.repair(OWNER)
    with pytest.raises(LeaseLost):
        store.commit(UNIT, 1)
    with store.lease():  # taken again, it may commit again
        assert store.commit(UNIT, 1).attempt == 1


def test_a_heartbeat_keeps_the_lease_and_does_not_take_it_back_once_lost(store, monkeypatch):
    monkeypatch.setattr(store_module, "HEARTBEAT_SECONDS", 0.02)
    with store.lease():
        first = store.holder()["beat"]
        deadline = time.monotonic() + 10
        while store.holder()["beat"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.holder()["beat"] > first
        other = json.dumps({"id": "x", "host": "another machine", "pid": 1, "beat": time.time()})
        write_text(store.root / "lease.json", other)
        time.sleep(0.2)
        assert store.holder()["id"] == "x"
    assert store.holder()["id"] == "x"


def race(root: Path, start: Any, answers: Any) -> None:
    start.wait()
    try:
        with Store(root).lease():
            answers.put(os.getpid())
            time.sleep(60)
    except StoreError:
        answers.put(None)


def test_of_drivers_that_start_together_exactly_one_gets_the_lease(tmp_path):
    for round_ in range(8):
        start, queue = processes.Barrier(2), processes.SimpleQueue()
        arguments = (tmp_path / f"run{round_}", start, queue)
        drivers = [processes.Process(target=race, args=arguments) for _ in range(2)]
        for driver in drivers:
            driver.start()
        answers = [queue.get() for _ in drivers]
        for driver in drivers:
            driver.kill()
            driver.join()
        assert answers.count(None) == 1
        assert set(answers) - {None} < {driver.pid for driver in drivers}


@pytest.mark.parametrize("name", ["steps.parquet", f"{WEIGHTS}/a.bin"])
def test_an_edit_that_keeps_the_size_is_noticed_and_redone(store, name):
    path = commit(store).folder / name
    path.write_bytes(path.read_bytes().replace(b"try", b"TRY"))
    assert store.result(UNIT) is None
    store.repair(OWNER)
    assert store.notes == [f"{UNIT}: the result on disk is damaged; it will be done again"]


def test_a_copied_folder_is_as_whole_as_the_first(store, tmp_path):
    commit(store)
    shutil.copytree(store.root, tmp_path / "copy", copy_function=shutil.copyfile)  # every file is new there
    copied = Store(tmp_path / "copy").result(UNIT)
    assert copied is not None
    assert_whole(copied)


def test_a_lease_that_names_no_process_is_free(store):
    write_text(store.root / "lease.json", json.dumps({"host": store_module.socket.gethostname(), "pid": None}))
    with store.lease():
        assert store.holder() is not None
