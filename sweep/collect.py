"""All committed results of a sweep -> its tables, each row checked against the schema.

Incremental: a trial whose results, attempts and spec have not changed keeps its rows. May run at any time, also while
the sweep runs: tables are replaced whole, by rename.
"""

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sweep import schema
from sweep.spec import PlannedMeasure, PlannedTrial, TrialSpec
from sweep.store import Result, Store, layer_delta_unit, measure_unit, score_unit, train_unit, write_text
from sweep.trial import WorkItem, due, read_spec, trained_epochs

Row = dict[str, Any]
Rows = dict[str, list[Row]]

INDEX = ".collected.json"
"""Beside the tables: trial -> digest of what its rows were made from."""


def build(store: Store, in_plan: Container[str] | None = None) -> dict[str, int]:
    """Write every table; returns the number of rows by table.

    Args:
        store: the sweep's folder.
        in_plan: owners (`trials/<id>`, `measures/<key>`) the YAML asks for now; others stay in the tables and say so.
            None takes everything in the store as asked for.
    """
    with store.exclusive("tables"):
        return _build(store, in_plan)


def _build(store: Store, in_plan: Container[str] | None) -> dict[str, int]:
    index = _read_index(store)
    running = store.holder() is not None
    states: dict[str, str] = {}
    fresh: dict[str, list[pa.Table]] = {name: [] for name in schema.TABLES}
    for owner in store.owners():
        wanted = in_plan is None or owner in in_plan
        if owner.startswith("trials/"):
            trial_id = owner.removeprefix("trials/")
            states[trial_id] = _state(store, owner, wanted, running)
            if states[trial_id] == index.get(trial_id):
                continue
            tables = _trial_tables(store, owner, wanted, running)
        else:  # a few rows each: always made anew
            tables = _measure_tables(store, owner) if wanted else {}
        for name, table in tables.items():
            fresh[name].append(table)
    unchanged = pa.array([t for t, state in states.items() if index.get(t) == state], pa.string())
    counts = {}
    for name in schema.TABLES:
        parts = fresh[name] + ([_rows_of(store, name, unchanged)] if len(unchanged) else [])
        table = pa.concat_tables(parts) if parts else schema.build(name, [])
        keys = [(key, "ascending") for key in schema.TABLES[name].keys]
        schema.write(name, table.sort_by(keys).cast(schema.TABLES[name].arrow()), store.tables)
        counts[name] = table.num_rows
    write_text(store.tables / INDEX, json.dumps({"version": schema.SCHEMA_VERSION, "trials": states}))
    return counts


def trial_status(
    planned: PlannedTrial | PlannedMeasure, done: Mapping[str, Result], attempts: list[Row], running: bool
) -> str:
    """`pending`, `running`, `succeeded` or `failed`, from the files alone.

    Args:
        planned: the trial or measure.
        done: its committed units.
        attempts: its tries, oldest first.
        running: a driver holds the sweep.
    """
    state = due(planned, done)
    if not (state.now or state.later or state.retrain):
        return "succeeded"
    last = {attempt["item"]: attempt["outcome"] for attempt in attempts}
    if running and "running" in last.values():
        return "running"
    return "failed" if any(last.get(item.key) == "failed" for item in state.now) else "pending"


def last_failure(planned: PlannedTrial | PlannedMeasure, done: Mapping[str, Result], attempts: list[Row]) -> Row:
    """The last failed try of an item that is still due; empty if there is none."""
    waiting = {item.key for item in due(planned, done).now}
    failed = [a for a in attempts if a["item"] in waiting and a["outcome"] == "failed"]
    return failed[-1] if failed else {}


def _read_index(store: Store) -> dict[str, str]:
    """What the tables hold; empty if they must be made anew: none there, of another version, or damaged."""
    try:
        index = json.loads((store.tables / INDEX).read_text())
        if index["version"] != schema.SCHEMA_VERSION:
            return {}
        for name in schema.TABLES:
            schema.read(name, store.tables)
        return dict(index["trials"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _state(store: Store, owner: str, wanted: bool, running: bool) -> str:
    """Changes whenever a trial's rows would."""
    folder = store.owner_folder(owner)
    files = [store.spec_path(owner), folder / "attempts.jsonl"]
    files += [store.root / unit / "result.json" for unit in store.units(owner)]
    digest = hashlib.sha256(f"{wanted} {running}".encode())
    for path in files:
        digest.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()


def _rows_of(store: Store, name: str, trial_ids: pa.Array) -> pa.Table:
    """The rows a table already has of these trials; none in tables that are not about trials."""
    table = schema.read(name, store.tables)
    if "trial_id" not in table.column_names:
        return table.slice(0, 0)
    return table.filter(pc.is_in(table["trial_id"], value_set=trial_ids))


# ---------------------------------------------------------------------- rows of a trial


def _trial_tables(store: Store, owner: str, wanted: bool, running: bool) -> dict[str, pa.Table]:
    planned = read_spec(store, owner)
    assert isinstance(planned, PlannedTrial)
    done, attempts = store.committed(owner), store.attempts(owner)
    tables = {
        "trials": schema.build("trials", [_trial_row(planned, done, attempts, wanted, running)]),
        "attempts": schema.build("attempts", _attempt_rows(attempts, owner)),
        "scores": schema.build("scores", list(_score_rows(planned, done))),
    }
    files = {
        "steps": [train_unit(planned.trial_id, epoch) for epoch in trained_epochs(done)],
        "layer_deltas": [layer_delta_unit(planned.trial_id, epoch) for epoch in planned.epochs],
        "items": [score_unit(planned.trial_id, n, e.eval_id) for n in planned.epochs for e in planned.evaluations],
    }
    for name, units in files.items():
        parts = [_table_of(done[unit], name) for unit in units if unit in done]
        if parts:
            tables[name] = _first_of_each_key(name, pa.concat_tables(parts))
    return tables


def _table_of(result: Result, name: str) -> pa.Table:
    try:
        table = pq.read_table(result.folder / f"{name}.parquet").cast(schema.TABLES[name].arrow())
    except (pa.ArrowException, ValueError) as error:
        raise schema.SchemaError(
            f"{name}.parquet of {result.unit} does not have the columns of schema version {schema.SCHEMA_VERSION} "
            f"({error}); collect with the code that wrote it, or start in a new --out folder"
        ) from error
    return schema.check(name, table)


def _first_of_each_key(name: str, table: pa.Table) -> pa.Table:
    """Two tries of one trajectory may tell the same step: they are equal, one is kept."""
    keys = list(schema.TABLES[name].keys)
    numbered = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    first = numbered.group_by(keys).aggregate([("row", "min")])["row_min"]
    return table.take(first.sort()) if len(first) < table.num_rows else table


def _trial_row(
    planned: PlannedTrial, done: Mapping[str, Result], attempts: list[Row], wanted: bool, running: bool
) -> Row:
    trial, train = planned.trial, planned.trial.train
    records = [done[u].record for e in planned.epochs if (u := train_unit(planned.trial_id, e)) in done]
    record = records[-1] if records else {}
    described = record or next((r.record for u, r in done.items() if "/scores/" in u), {})
    failure = last_failure(planned, done, attempts)
    made = described.get("provenance", {})
    versions = {name: version for name, version in made.get("versions", {}).items() if version is not None}
    row: Row = dict.fromkeys(schema.TABLES["trials"].names)
    row |= {
        "trial_id": planned.trial_id,
        "status": trial_status(planned, done, attempts, running),
        "in_plan": wanted,
        "is_baseline": trial.is_baseline,
        "base_model": planned.base_model,
        "base_digest": content_of(trial),
        "dataset": planned.dataset,
        "dataset_kind": planned.dataset_kind,
        "commit": made.get("commit") or None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
        "failure_kind": failure.get("failure_kind"),
        "failure_message": failure.get("message"),
    }
    for name in ("architecture", "num_layers", "num_parameters"):
        row[name] = described.get(name)
    if train is not None:
        row |= {name: getattr(train, name) for name in row.keys() & type(train).model_fields.keys()}
        row |= {
            "data_digest": "+".join(digest for digest, *_ in trial.data_identity()),
            "data_seed": train.resolved_data_seed,
            "train_seed": train.resolved_train_seed,
            "lora_rank": train.lora.rank if train.method == "lora" else None,
            "lora_alpha": train.lora.alpha if train.method == "lora" else None,
            "recipe_version": trial.recipe_version,
        }
        for name in row.keys() & record.keys() - {"versions"}:  # those of its provenance are in text already
            row[name] = record[name]
    return row


def content_of(trial: TrialSpec) -> str:
    """Content of the base model as it was loaded: what a trial and its baseline have in common."""
    dtype = trial.base_model.dtype
    return trial.base_digest if dtype == "float32" else f"{trial.base_digest} {dtype}"


def _attempt_rows(attempts: list[Row], owner: str) -> list[Row]:
    rows = []
    for attempt in attempts:
        item = WorkItem.parse(attempt["item"])
        row = {name: attempt.get(name) for name in schema.TABLES["attempts"].names}
        row |= {
            "trial_id": owner.removeprefix("trials/") if owner.startswith("trials/") else None,
            "stage": item.stage,
            "epoch": item.epoch,
        }
        rows.append(row)
    return rows


def _score_rows(planned: PlannedTrial, done: Mapping[str, Result]) -> Iterator[Row]:
    """Rows as evaluated, under the benchmark's present name and kind."""
    for evaluation in planned.evaluations:
        for epoch in planned.epochs:
            result = done.get(score_unit(planned.trial_id, epoch, evaluation.eval_id))
            for row in result.record["scores"] if result is not None else ():
                yield {
                    **row,
                    "benchmark": evaluation.name,
                    "benchmark_kind": evaluation.benchmark.kind,
                    "chance": evaluation.benchmark.chance if row["is_primary"] else row["chance"],
                }


def _measure_tables(store: Store, owner: str) -> dict[str, pa.Table]:
    planned = read_spec(store, owner)
    assert isinstance(planned, PlannedMeasure)
    tables = {"attempts": schema.build("attempts", _attempt_rows(store.attempts(owner), owner))}
    result = store.result(measure_unit(planned.key))
    if result is not None:
        measures = result.record["measures"]
        rows = [
            {
                "base_model": planned.base_model,
                "dataset": planned.dataset,
                "measure": measure,
                "base_digest": content_of(planned.pair),
                "data_digest": "+".join(digest for digest, *_ in planned.pair.data_identity()),
                "dataset_kind": planned.dataset_kind,
                "value": value,
                "num_examples": int(measures["num_examples"]),
            }
            for measure, value in measures.items()
        ]
        tables["data_measures"] = schema.build("data_measures", rows)
    return tables
