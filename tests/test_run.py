"""Whole runs: `python -m sweep run` with a real Ray, real tiny models and real files."""

import json
import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import tiny_sweeps
from safetensors.torch import load_file

from sweep import schema

BOTH_MODELS = {"llama": {"path": "models/llama"}, "neox": {"path": "models/neox"}}
BOTH_DATASETS = {"plus": {"path": "plus.jsonl", "kind": "maths"}, "times": {"path": "times.jsonl"}}
PLUS_TEST = {"plus_test": {"path": "plus_test.yaml", "kind": "maths", "chance": 0.25}}
BOTH_TESTS = PLUS_TEST | {"times_test": {"path": "times_test.yaml"}}


def table(out: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(out / "tables" / f"{name}.parquet")


def handed_out(out: Path) -> Counter[str]:
    """How often each work item was tried."""
    return Counter(entry["item"] for entry in tiny_sweeps.attempts(out))


def modified(out: Path) -> dict[str, int]:
    """When each file was written; tables are written anew, with the same content."""
    return {name: (out / name).stat().st_mtime_ns for name in tiny_sweeps.files(out) if "tables/" not in name}


# ---------------------------------------------------------------------- a grid, and what is added to it


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """(world, its YAML's settings, results) of 2 base models x 2 datasets x 2 methods."""
    with tiny_sweeps.world(tmp_path_factory.mktemp("grid")) as world:
        settings = {
            "base_models": BOTH_MODELS,
            "datasets": BOTH_DATASETS,
            "axes": {"method": ["full", "lora"]},
            "export_dtype": "bfloat16",
        }
        out = world.folder / "out"
        done = world.sweep("run", world.write(**settings), "--out", out)
        assert done.returncode == 0, done.stderr
        yield world, settings, out


def test_every_item_of_a_grid_ran_exactly_once(grid):
    _, _, out = grid
    stages = Counter(item.split("/")[2] for item in handed_out(out))
    assert stages == {"train": 8, "layer_delta": 8, "evaluate": 8 + 2, "measure": 4}
    assert set(handed_out(out).values()) == {1}
    assert {entry["outcome"] for entry in tiny_sweeps.attempts(out)} == {"succeeded"}


def test_a_grid_fills_every_table(grid):
    _, _, out = grid
    rows = {name: table(out, name).height for name in schema.TABLES}
    assert rows["trials"] == 8 + 2
    assert rows["attempts"] == 8 * 3 + 2 + 4
    assert rows["steps"] == 8 * 4
    assert rows["items"] == (8 + 2) * 8
    trials = table(out, "trials")
    assert trials["status"].to_list() == ["succeeded"] * 10
    assert trials["in_plan"].all()
    assert trials["num_parameters"].null_count() == trials["architecture"].null_count() == 0
    trained = trials.filter(~pl.col("is_baseline"))
    assert sorted(trained["examples_used"].to_list()) == [32] * 8
    deltas = table(out, "layer_deltas").filter(pl.col("layer").is_not_null() & (pl.col("delta_norm") > 0))
    assert set(deltas["trial_id"]) == set(trained["trial_id"])
    measures = table(out, "data_measures")
    assert measures.select("base_model", "dataset").unique().height == 4
    perplexity = measures.filter(pl.col("measure") == "perplexity_completion")["value"]
    assert perplexity.len() == 4 and (perplexity > 1).all()


def test_every_checkpoint_has_a_gain_over_its_base_model(grid):
    _, _, out = grid
    scores = table(out, "scores").filter("is_primary")
    trials = table(out, "trials").select("trial_id", "base_model", "is_baseline")
    named = scores.join(trials, on="trial_id")
    tuned, base = named.filter(~pl.col("is_baseline")), named.filter("is_baseline")
    gains = tuned.join(base, on=["base_model", "eval_id", "metric"], suffix="_base")
    assert gains.height == 8
    assert (gains["value"] - gains["value_base"]).null_count() == 0
    assert gains["benchmark"].to_list() == ["plus_test"] * 8


def test_full_weights_are_kept_in_the_export_dtype_and_once(grid):
    _, _, out = grid
    kept = Counter(
        (path.name, path.relative_to(out).parts[2], str({str(t.dtype) for t in load_file(path).values()}))
        for path in out.glob("trials/**/*.safetensors")
    )
    assert kept == {
        ("model.safetensors", "layer_delta", "{'torch.bfloat16'}"): 4,
        ("adapter_model.safetensors", "train", "{'torch.float32'}"): 4,  # small, and merged in float32
    }


def test_weights_kept_in_another_dtype_are_exported(grid):
    world, _, out = grid
    kept = next(path.parent for path in out.glob("trials/*/layer_delta/**/model.safetensors"))
    done = world.sweep("export", out, kept.relative_to(out).parts[1], world.folder / "model", "--epoch", 1)
    assert done.returncode == 0, done.stderr
    assert tiny_sweeps.files(world.folder / "model") == tiny_sweeps.files(kept)


def test_run_again_changes_no_file_and_starts_no_ray(grid):
    world, _, out = grid
    before, times = tiny_sweeps.files(out), modified(out)
    again = world.start("run", world.folder / "sweep.yaml", "--out", out)
    seen = set()
    while again.poll() is None:
        seen |= {tiny_sweeps.command_line(process) for process in world.processes()}
    said, noise = again.communicate()
    assert (again.returncode, noise) == (0, "")
    assert "nothing to do" in said
    assert seen  # it was looked at while it ran
    assert not [words for words in seen if "ray" in words.split("sweep run")[0]]
    assert tiny_sweeps.files(out) == before
    assert modified(out) == times


def test_what_is_added_to_the_yaml_runs_and_nothing_else(grid):
    world, settings, out = grid
    copy = world.folder / "extended"
    shutil.copytree(out, copy)
    before = handed_out(copy)
    more = settings | {"benchmarks": BOTH_TESTS, "also": [{"axes": {"dataset": ["plus"], "seed": [1]}}]}
    yaml = world.write("extended.yaml", **more)
    plan = world.json("plan", yaml, "--out", copy)
    done = world.sweep("run", yaml, "--out", copy)
    assert done.returncode == 0, done.stderr
    new = handed_out(copy) - before
    stages = Counter(item.split("/")[2] for item in new)
    assert stages == {"train": 2, "layer_delta": 2, "evaluate": 8 + 2 + 2}  # the pair was measured before
    assert plan["work_items"]["to_do"]["all"] == stages.total()
    old = [item for item in new if item in before]
    assert {item.split("/")[2] for item in old} == {"evaluate"}  # for the new benchmark
    per_benchmark = table(copy, "scores").filter("is_primary").group_by("benchmark").len()
    assert dict(per_benchmark.iter_rows()) == {"plus_test": 12, "times_test": 12}
    assert table(copy, "items").height == 2 * 12 * 8


# ---------------------------------------------------------------------- equal weights, however they came about


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Results in two folders, plans and tries: 3 seeds on one core, first 2 epochs and then a third; and 5 seeds in
    the other order on two cores, 3 epochs at once."""
    short = {"measure": False, "baselines": False, "keep_state": "last"}
    with tiny_sweeps.world(tmp_path_factory.mktemp("trajectories")) as world:
        grown, whole = world.folder / "grown", world.folder / "whole"
        plans, tries = {}, {}
        for name, out, epochs, wanted, seeds, cpus in (
            ("two epochs", grown, 2, "last", [0, 1, 2], 1),
            ("a third", grown, 3, "last", [0, 1, 2], 1),
            ("at once", whole, 3, "all", [4, 3, 2, 1, 0], 2),
        ):
            train = {"lr_schedule": "constant", "epochs": epochs}
            yaml = world.write(train=train, axes={"seed": seeds}, eval_epochs=wanted, **short)
            plans[name] = world.json("plan", yaml, "--out", out)
            done = world.sweep("run", yaml, "--out", out, "--cpus", cpus)
            assert done.returncode == 0, done.stderr
            tries[name] = handed_out(out)
        yield grown, whole, plans, tries


def weights(out: Path, trial_id: str, epoch: int) -> dict[str, bytes]:
    unit = out / "trials" / trial_id / "train" / f"epoch-{epoch}"
    attempt = json.loads((unit / "result.json").read_text())["attempt"]
    return tiny_sweeps.files(unit / "attempts" / str(attempt) / "weights")


@pytest.mark.slow
@pytest.mark.parametrize(("run", "trials", "epochs"), [("two epochs", 3, 1), ("at once", 5, 3)])
def test_every_item_runs_exactly_once_on_one_worker_and_on_two(trajectories, run, trials, epochs):
    *_, tries = trajectories
    assert set(tries[run].values()) == {1}
    stages = Counter(item.split("/")[2] for item in tries[run])
    assert stages == {"train": trials, "layer_delta": trials * epochs, "evaluate": trials * epochs}


@pytest.mark.slow
def test_a_trial_in_a_fresh_worker_equals_the_same_trial_after_others(trajectories):
    grown, whole, *_ = trajectories
    ids = tiny_sweeps.trial_ids(grown)
    assert len(ids) == 3
    for trial_id in ids:  # first in its worker in one of the stores, or after other trials than in the other
        assert weights(grown, trial_id, 2) == weights(whole, trial_id, 2)
    assert len({weights(grown, trial_id, 2)["model.safetensors"] for trial_id in ids}) == 3


@pytest.mark.slow
def test_more_epochs_of_a_constant_schedule_continue_and_equal_those_run_at_once(trajectories):
    grown, whole, plans, tries = trajectories
    assert plans["a third"]["trials_that_continue"] == 3
    assert plans["a third"]["trials_that_start_again"] == 0
    ids = tiny_sweeps.trial_ids(grown)
    for trial_id in ids:
        assert weights(grown, trial_id, 3) == weights(whole, trial_id, 3)
        assert tries["a third"][f"trials/{trial_id}/train"] == 2
        assert "goes on from" in (grown / "trials" / trial_id / "log.txt").read_text()
        states = [path for path in (grown / "trials" / trial_id).rglob("state") if path.is_dir()]
        assert ["epoch-3" in path.parts for path in states] == [True]  # the one of epoch 2 is used up
    steps = {out: table(out, "steps").filter(pl.col("trial_id").is_in(ids)) for out in (grown, whole)}
    assert steps[grown].height == 3 * 3 * 4
    assert steps[grown]["loss_nats"].equals(steps[whole]["loss_nats"])


@pytest.mark.slow
def test_new_work_on_removed_weights_waits_for_retrain(tmp_path):
    with tiny_sweeps.world(tmp_path) as world:
        out = tmp_path / "out"
        frugal = {"keep": "none", "export_dtype": "bfloat16", "measure": False}
        assert world.sweep("run", world.write(**frugal), "--out", out).returncode == 0
        assert not list(out.glob("trials/**/*.safetensors"))
        before = table(out, "scores").filter("is_primary")

        more = world.write(**frugal, benchmarks=BOTH_TESTS)
        assert world.json("plan", more, "--out", out)["checkpoints_to_retrain"] == 1
        refused = world.sweep("run", more, "--out", out)
        assert refused.returncode == 2
        assert "1 checkpoint would be retrained" in refused.stderr
        assert "--retrain" in refused.stderr

        allowed = world.sweep("run", more, "--out", out, "--retrain")
        assert allowed.returncode == 0, allowed.stderr
        [trial_id] = tiny_sweeps.trial_ids(out)
        assert handed_out(out)[f"trials/{trial_id}/train"] == 2
        after = table(out, "scores").filter("is_primary")
        assert sorted(after["benchmark"]) == ["plus_test"] * 2 + ["times_test"] * 2
        old = after.filter(pl.col("benchmark") == "plus_test")
        assert old.sort("trial_id")["value"].equals(before.sort("trial_id")["value"])
        assert not list(out.glob("trials/**/*.safetensors"))
        assert "nothing to do" in world.sweep("run", more, "--out", out).stdout


# ---------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A sweep in which one trial is sound and every other one has something wrong with it."""
    with tiny_sweeps.world(tmp_path_factory.mktemp("failing")) as world:
        folder = world.folder
        sound = [json.loads(line) for line in (folder / "plus.jsonl").read_text().splitlines()]
        tiny_sweeps.write_jsonl(folder / "long.jsonl", [*sound, {"prompt": "1 plus " * 40, "completion": "1"}])
        tiny_sweeps.write_jsonl(folder / "silent.jsonl", [row | {"completion": ""} for row in sound])
        (folder / "empty.jsonl").touch()
        (folder / "corrupt.parquet").write_bytes(b"PAR1 this is no Parquet PAR1")
        broken = shutil.copytree(folder / "models" / "neox", folder / "models" / "broken") / "model.safetensors"
        broken.write_bytes(broken.read_bytes()[:20_000])
        names = {
            "long": "long.jsonl",
            "silent": "silent.jsonl",
            "empty": "empty.jsonl",
            "corrupt": "corrupt.parquet",
        }
        yaml = world.write(
            base_models={"llama": {"path": "models/llama"}, "broken": {"path": "models/broken"}},
            datasets={"plus": {"path": "plus.jsonl"}} | {name: {"path": path} for name, path in names.items()},
            train={"overlong": "error", "num_examples": 60},
            exclude=[{"base_model": "broken", "dataset": list(names)}],
            measure=False,
            baselines=False,
        )
        out = folder / "out"
        yield world, out, world.sweep("run", yaml, "--out", out)


def test_a_failing_trial_does_not_stop_the_others(failing):
    world, out, done = failing
    assert done.returncode == 1
    trials = table(out, "trials").select("base_model", "dataset", "status", "failure_kind")
    sound = trials.filter((pl.col("base_model") == "llama") & (pl.col("dataset") == "plus"))
    assert sound["status"].to_list() == ["succeeded"]
    rest = trials.filter((pl.col("base_model") == "broken") | (pl.col("dataset") != "plus"))
    assert rest["status"].to_list() == ["failed"] * 5
    assert table(out, "scores").filter("is_primary").height == 1


def test_every_failure_is_typed_and_has_its_traceback(failing):
    _, out, _ = failing
    specs = {p.parent.name: json.loads(p.read_text()) for p in out.glob("trials/*/spec.json")}
    failed = [entry for entry in tiny_sweeps.attempts(out) if entry["outcome"] == "failed"]
    found = {}
    for entry in failed:
        spec = specs[entry["item"].split("/")[1]]
        found["broken" if spec["base_model"] == "broken" else spec["dataset"]] = entry
    assert {name: entry["failure_kind"] for name, entry in found.items()} == {
        "long": "data",
        "silent": "data",
        "empty": "data",
        "corrupt": "data",
        "broken": "data",
    }
    for name, entry in found.items():
        assert entry["traceback"].startswith("Traceback"), name
    assert "max_length" in found["long"]["message"]
    assert "no examples" in found["empty"]["message"]
    assert "corrupt.parquet" in found["corrupt"]["message"]


def test_run_and_status_name_each_failure_in_one_line(failing):
    world, out, done = failing
    status = world.sweep("status", out)
    assert status.returncode == 1
    for text in (done.stdout, done.stderr, status.stdout):
        assert "Traceback" not in text
        assert len([line for line in text.splitlines() if "/train (" in line or "/train (try" in line]) == 5
    assert len(world.json("status", out)["failures"]) == 5
