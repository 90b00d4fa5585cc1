"""From result files to tables: every column gets its own value, and only what changed is read again."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sweep import collect, schema
from sweep.collect import INDEX
from sweep.schema import TABLES, SchemaError
from sweep.spec import (
    BaseModelSpec,
    BenchmarkSpec,
    DatasetSpec,
    EvalSpec,
    ExecutionSpec,
    LoraSpec,
    PlannedMeasure,
    PlannedTrial,
    TrainSpec,
    TrialSpec,
)
from sweep.store import Store, layer_delta_unit, measure_unit, score_unit, train_unit
from sweep.trial import write_spec

TRAIN = TrainSpec(
    method="lora",
    lora=LoraSpec(rank=17, alpha=18.5),
    trained_layers="3-19",
    num_examples=2001,
    template="<{prompt}|{completion}>",
    max_length=222,
    learning_rate=0.023,
    lr_schedule="constant",
    warmup_steps=24,
    weight_decay=0.25,
    max_grad_norm=2.6,
    global_batch_size=27,
    epochs=28,
    seed=29,
    data_seed=30,
    train_seed=31,
    precision="bf16",
)
EVALUATION = EvalSpec(
    name="benchmark name",
    benchmark=BenchmarkSpec(task="task", kind="benchmark kind", chance=0.125),
    digest="items",
    backend="lm_eval 0",
)
TRIAL = PlannedTrial(
    trial=TrialSpec(
        base_model=BaseModelSpec(tiny="llama-code"),
        base_digest="base content",
        datasets={"d": DatasetSpec(tiny="code_output")},
        data_digests={"d": "data content"},
        train=TRAIN,
        recipe_version=32,
    ),
    base_model="base name",
    dataset="dataset name",
    dataset_kind="dataset kind",
    epochs=(28,),
    evaluations=(EVALUATION,),
    layer_delta="full",
    keep="all",
    keep_state="none",
    export_dtype="float32",
    execution=ExecutionSpec(),
)
ID = TRIAL.trial_id
OWNER = f"trials/{ID}"
MEASURE = PlannedMeasure(
    base_model="base name",
    dataset="dataset name",
    dataset_kind="dataset kind",
    pair=TRIAL.trial,
    max_examples=50,
    version=1,
    execution=ExecutionSpec(),
)

RECORD = {  # what training says; more than the tables take
    "architecture": "SomeForCausalLM",
    "num_layers": 101,
    "num_parameters": 102,
    "num_trained_parameters": 103,
    "examples_requested": 104,
    "examples_used": 105,
    "examples_truncated": 106,
    "examples_dropped": 107,
    "trained_tokens": 108,
    "total_tokens": 109,
    "layout": "packed",
    "micro_batch_size": 110,
    "num_steps": 111,
    "train_loss_nats": 1.12,
    "train_seconds": 113.5,
    "device": "training device",
    "threads": 114,
    "provenance": {"commit": "abc-dirty", "versions": {"torch": "1.15", "ray": "1.16", "peft": None}},
}
STEP = {
    "trial_id": ID,
    "step": 201,
    "epoch": 2.02,
    "loss_nats": 2.03,
    "held_out_loss_nats": 2.04,
    "learning_rate": 0.0205,
    "grad_norm": 2.06,
    "trained_tokens": 207,
}
SCORE = {
    "trial_id": ID,
    "epoch": 28,
    "eval_id": EVALUATION.eval_id,
    "metric": "accuracy",
    "benchmark": "its name when it was evaluated",
    "benchmark_kind": "its kind then",
    "is_primary": True,
    "value": 0.301,
    "stderr": 0.302,
    "num_items": 303,
    "num_fewshot": 304,
    "higher_is_better": False,
    "chance": None,
}
ITEM = {
    "trial_id": ID,
    "epoch": 28,
    "eval_id": EVALUATION.eval_id,
    "item": 401,
    "benchmark": "benchmark name",
    "item_digest": "item content",
    "value": 0.402,
    "extracted": True,
    "response": "the response",
    "target": "the target",
}
DELTA = {
    "trial_id": ID,
    "epoch": 28,
    "parameter": "model.layers.1.q_proj.weight",
    "layer": 501,
    "depth": 0.502,
    "module": "q_proj",
    "kind": "matrix",
    "num_parameters": 503,
    "delta_norm": 5.04,
    "base_norm": 5.05,
    "relative_norm": 5.06,
    "cosine": 0.507,
    "max_abs": 5.08,
    "frac_changed": 0.509,
    "spectral_norm": 5.1,
    "stable_rank": 5.11,
    "source": "lora",
}
ATTEMPT = {
    "item": f"{OWNER}/evaluate/28",
    "attempt": 601,
    "host": "the host",
    "device": "evaluation device",
    "started_at": "2025-01-01T00:00:00+00:00",
    "seconds": 60.2,
    "peak_memory_gib": 6.03,
    "outcome": "failed",
    "failure_kind": "oom",
    "message": "one line",
}


def put(store: Store, unit: str, record: dict[str, Any], **tables: list[dict[str, Any]]) -> None:
    """Commit a unit with some tables in its attempt."""
    attempt = store.attempt(unit, store.next_attempt("/".join(unit.split("/")[:2])))
    for name, rows in tables.items():
        schema.write(name, schema.build(name, rows), attempt.folder)
    attempt.finish(record)
    store.commit(unit, attempt.number)


def fill(store: Store, planned: PlannedTrial = TRIAL) -> None:
    """A trial that is trained, measured layer by layer and scored."""
    trial_id = planned.trial_id
    keyed = [row | {"trial_id": trial_id} for row in (STEP, DELTA, ITEM, SCORE)]
    write_spec(store, f"trials/{trial_id}", planned)
    put(store, train_unit(trial_id, 28), RECORD, steps=[keyed[0]])
    put(store, layer_delta_unit(trial_id, 28), {}, layer_deltas=[keyed[1]])
    put(store, score_unit(trial_id, 28, EVALUATION.eval_id), {"scores": [keyed[3]]}, items=[keyed[2]])


def another(seed: int) -> PlannedTrial:
    train = TRAIN.model_copy(update={"data_seed": seed})
    return TRIAL.model_copy(update={"trial": TRIAL.trial.model_copy(update={"train": train})})


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


def rows(store: Store, name: str) -> list[dict[str, Any]]:
    return schema.read(name, store.tables).to_pylist()


# ---------------------------------------------------------------------- every column its own value


def test_every_column_of_a_trial_gets_its_own_value(store):
    fill(store)
    store.log_attempt(OWNER, {"item": f"{OWNER}/train", "attempt": 1, "outcome": "succeeded"})
    collect.build(store)
    (row,) = rows(store, "trials")
    expected = {name: RECORD[name] for name in RECORD.keys() & row.keys()}
    expected |= {"commit": "abc-dirty", "versions": "torch 1.15, ray 1.16"}
    expected |= {
        "trial_id": ID,
        "status": "succeeded",
        "in_plan": True,
        "is_baseline": False,
        "base_model": "base name",
        "base_digest": "base content",
        "dataset": "dataset name",
        "dataset_kind": "dataset kind",
        "data_digest": "data content",
        "num_examples": 2001,
        "method": "lora",
        "trained_layers": "3-19",
        "lora_rank": 17,
        "lora_alpha": 18.5,
        "learning_rate": 0.023,
        "lr_schedule": "constant",
        "warmup_steps": 24,
        "weight_decay": 0.25,
        "max_grad_norm": 2.6,
        "global_batch_size": 27,
        "epochs": 28,
        "seed": 29,
        "data_seed": 30,
        "train_seed": 31,
        "precision": "bf16",
        "max_length": 222,
        "template": "<{prompt}|{completion}>",
        "recipe_version": 32,
        "failure_kind": None,
        "failure_message": None,
    }
    assert row == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("steps", STEP),
        ("items", ITEM),
        ("layer_deltas", DELTA),
        (
            "scores",
            SCORE | {"benchmark": "benchmark name", "benchmark_kind": "benchmark kind", "chance": 0.125},
        ),
    ],
)
def test_rows_of_a_checkpoint_arrive_whole(store, name, expected):
    fill(store)
    collect.build(store)
    assert rows(store, name) == [expected]
    values = [value for value in expected.values() if value is not None and not isinstance(value, bool)]
    assert len(set(map(str, values))) == len(values)  # or a swap of two columns would not show


def test_every_column_of_an_attempt_gets_its_own_value(store):
    fill(store)
    store.log_attempt(OWNER, ATTEMPT | {"traceback": "not in the table"})
    collect.build(store)
    assert rows(store, "attempts") == [ATTEMPT | {"trial_id": ID, "stage": "evaluate", "epoch": 28}]


def test_every_column_of_a_measure_gets_its_own_value(store):
    owner = f"measures/{MEASURE.key}"
    write_spec(store, owner, MEASURE)
    put(
        store,
        measure_unit(MEASURE.key),
        {"measures": {"num_examples": 7, "perplexity": 3.5, "distinct_2": None}},
    )
    store.log_attempt(owner, {"item": f"{owner}/measure", "attempt": 1, "outcome": "succeeded"})
    collect.build(store)
    shared = {
        "base_model": "base name",
        "dataset": "dataset name",
        "base_digest": "base content",
        "data_digest": "data content",
        "dataset_kind": "dataset kind",
        "num_examples": 7,
    }
    assert rows(store, "data_measures") == [
        shared | {"measure": "distinct_2", "value": None},
        shared | {"measure": "num_examples", "value": 7.0},
        shared | {"measure": "perplexity", "value": 3.5},
    ]
    (attempt,) = rows(store, "attempts")
    assert (attempt["trial_id"], attempt["stage"], attempt["epoch"]) == (None, "measure", None)


def test_what_was_not_measured_is_null(store):
    write_spec(store, OWNER, TRIAL)
    collect.build(store)
    (row,) = rows(store, "trials")
    assert row["status"] == "pending"
    assert not {name for name in RECORD if row.get(name) is not None}
    assert {name: len(rows(store, name)) for name in TABLES if name != "trials"} == dict.fromkeys(
        TABLES.keys() - {"trials"}, 0
    )


def test_a_baseline_has_no_training_settings(store):
    base = TrialSpec(base_model=TRIAL.trial.base_model, base_digest="base content")
    baseline = TRIAL.model_copy(
        update={"trial": base, "dataset": None, "dataset_kind": None, "epochs": (0,), "layer_delta": "off"}
    )
    write_spec(store, f"trials/{baseline.trial_id}", baseline)
    record = {"architecture": "SomeForCausalLM", "num_layers": 101, "num_parameters": 102}
    score = SCORE | {"trial_id": baseline.trial_id, "epoch": 0}
    item = ITEM | {"trial_id": baseline.trial_id, "epoch": 0}
    unit = score_unit(baseline.trial_id, 0, EVALUATION.eval_id)
    put(store, unit, record | {"scores": [score]}, items=[item])
    collect.build(store)
    (row,) = rows(store, "trials")
    known = {name: value for name, value in row.items() if value is not None}
    assert known == record | {
        "trial_id": baseline.trial_id,
        "status": "succeeded",
        "in_plan": True,
        "is_baseline": True,
        "base_model": "base name",
        "base_digest": "base content",
    }


def test_settings_of_an_adapter_are_null_under_full_tuning(store):
    train = TRAIN.model_copy(update={"method": "full"})
    full = TRIAL.model_copy(update={"trial": TRIAL.trial.model_copy(update={"train": train})})
    write_spec(store, f"trials/{full.trial_id}", full)
    collect.build(store)
    (row,) = rows(store, "trials")
    assert (row["method"], row["lora_rank"], row["lora_alpha"]) == ("full", None, None)


def test_a_renamed_benchmark_takes_its_scores_along(store):
    fill(store)
    collect.build(store)
    renamed = EVALUATION.model_copy(update={"name": "new name"})
    write_spec(store, OWNER, TRIAL.model_copy(update={"evaluations": (renamed,)}))
    collect.build(store)
    assert [row["benchmark"] for row in rows(store, "scores")] == ["new name"]


def test_a_step_that_two_tries_tell_is_there_once(store):
    both = TRIAL.model_copy(update={"epochs": (27, 28)})
    write_spec(store, OWNER, both)
    second = STEP | {"step": 202}
    put(store, train_unit(ID, 27), RECORD, steps=[STEP])
    put(store, train_unit(ID, 28), RECORD, steps=[STEP, second])
    collect.build(store)
    assert rows(store, "steps") == [STEP, second]


# ---------------------------------------------------------------------- status


@pytest.mark.parametrize(
    ("outcomes", "running", "status"),
    [
        ([], False, "pending"),
        (["running"], True, "running"),
        (["running"], False, "pending"),
        (["failed"], False, "failed"),
        (["failed", "running"], True, "running"),
        (["failed", "lost"], False, "pending"),
        (["lost"], False, "pending"),
    ],
)
def test_the_status_of_a_trial_follows_from_its_last_try(outcomes, running, status):
    attempts = [{"item": f"{OWNER}/train", "attempt": n, "outcome": o} for n, o in enumerate(outcomes, start=1)]
    assert collect.trial_status(TRIAL, {}, attempts, running) == status


def test_the_failure_that_still_stands_is_told(store):
    write_spec(store, OWNER, TRIAL)
    failed = {"item": f"{OWNER}/train", "outcome": "failed", "failure_kind": "nan", "message": "loss is NaN"}
    store.log_attempt(OWNER, failed | {"attempt": 1})
    collect.build(store)
    (row,) = rows(store, "trials")
    assert (row["status"], row["failure_kind"], row["failure_message"]) == ("failed", "nan", "loss is NaN")

    fill(store)
    collect.build(store)
    (row,) = rows(store, "trials")
    assert (row["status"], row["failure_kind"], row["failure_message"]) == ("succeeded", None, None)


# ---------------------------------------------------------------------- incremental


def test_unchanged_trials_keep_their_rows_and_changed_ones_are_read_again(store):
    fill(store)
    fill(store, other := another(77))
    collect.build(store)
    first = {name: rows(store, name) for name in TABLES}

    steps = store.root / train_unit(ID, 28) / "attempts" / "1" / "steps.parquet"
    steps.rename(steps.with_name("hidden"))  # whoever read this trial again would miss it
    store.log_attempt(f"trials/{other.trial_id}", ATTEMPT | {"item": f"trials/{other.trial_id}/train"})
    counts = collect.build(store)
    for name in TABLES.keys() - {"attempts"}:
        assert rows(store, name) == first[name]
        assert counts[name] == len(first[name])
    assert [row["trial_id"] for row in rows(store, "attempts")] == [other.trial_id]


def test_new_results_of_a_known_trial_replace_its_rows(store):
    write_spec(store, OWNER, TRIAL)
    collect.build(store)
    assert rows(store, "trials")[0]["status"] == "pending"
    fill(store)
    collect.build(store)
    assert rows(store, "trials")[0]["status"] == "succeeded"
    assert len(rows(store, "trials")) == len(rows(store, "steps")) == 1


def test_trials_that_are_gone_leave_the_tables(store):
    fill(store)
    fill(store, another(77))
    collect.build(store)
    store.spec_path(OWNER).unlink()
    collect.build(store)
    for name in ("trials", "steps", "scores", "items", "layer_deltas"):
        assert [row["trial_id"] for row in rows(store, name)] == [another(77).trial_id]


def test_a_trial_the_yaml_asks_for_no_more_stays_and_says_so(store):
    fill(store)
    write_spec(store, f"measures/{MEASURE.key}", MEASURE)
    put(store, measure_unit(MEASURE.key), {"measures": {"num_examples": 7}})
    for in_plan in ({OWNER, f"measures/{MEASURE.key}"}, set(), {OWNER}):
        collect.build(store, in_plan)
        assert [row["in_plan"] for row in rows(store, "trials")] == [OWNER in in_plan]
        assert len(rows(store, "scores")) == 1
        assert len(rows(store, "data_measures")) == (f"measures/{MEASURE.key}" in in_plan)


def test_a_trial_of_an_older_recipe_keeps_its_id_and_its_results(store):
    fill(store)
    newer = TRIAL.model_copy(update={"trial": TRIAL.trial.model_copy(update={"recipe_version": 33})})
    write_spec(store, f"trials/{newer.trial_id}", newer)
    collect.build(store, {f"trials/{newer.trial_id}"})
    found = {row["trial_id"]: (row["recipe_version"], row["status"]) for row in rows(store, "trials")}
    assert found == {ID: (32, "succeeded"), newer.trial_id: (33, "pending")}


@pytest.mark.parametrize("damage", ["another version", "half a table", "no table", "half an index"])
def test_tables_that_are_older_or_damaged_are_made_anew(store, damage):
    fill(store)
    collect.build(store)
    expected = {name: rows(store, name) for name in TABLES}
    path = store.tables / "steps.parquet"
    if damage == "another version":
        pq.write_table(pq.read_table(path).replace_schema_metadata({"sweep_schema_version": "0"}), path)
    elif damage == "half a table":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "no table":
        path.unlink()
    else:
        (store.tables / INDEX).write_text("{")
    collect.build(store)
    assert {name: rows(store, name) for name in TABLES} == expected


def test_results_of_other_columns_are_refused_in_a_sentence(store):
    fill(store)
    path = store.root / train_unit(ID, 28) / "attempts" / "1" / "steps.parquet"
    size = path.stat().st_size
    pq.write_table(pq.read_table(path).drop_columns(["grad_norm"]), path)  # as an older version wrote it
    result = store.root / train_unit(ID, 28) / "result.json"
    result.write_text(result.read_text().replace(f"[{size}, ", f"[{path.stat().st_size}, "))
    with pytest.raises(SchemaError, match=r"steps.parquet of .* does not have the columns of schema version \d+"):
        collect.build(store)


def test_an_empty_store_gives_empty_tables(store):
    assert collect.build(store) == dict.fromkeys(TABLES, 0)
    assert {path.stem for path in Path(store.tables).glob("*.parquet")} == set(TABLES)
