"""A sweep's tables, opened lazily and joined; and each score's gain over its baseline."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.schema import TABLES, SchemaError

SETTINGS = (
    "num_examples",
    "method",
    "trained_layers",
    "lora_rank",
    "lora_alpha",
    "learning_rate",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "global_batch_size",
    "epochs",
    "precision",
    "max_length",
    "template",
)
"""Columns of `trials` that say how a model was trained, apart from base model, dataset and seeds."""


DIGITS = 12
"""Decimals kept of gains and their means: later ones differ from run to run and would break ties."""


@dataclass(frozen=True)
class Tables:
    """The tables of one sweep; one that has not been written yet is there without rows."""

    name: str
    """Name of the sweep's folder."""
    trials: pl.LazyFrame
    attempts: pl.LazyFrame
    steps: pl.LazyFrame
    scores: pl.LazyFrame
    items: pl.LazyFrame
    layer_deltas: pl.LazyFrame
    checkpoint_measures: pl.LazyFrame
    data_measures: pl.LazyFrame
    pair_measures: pl.LazyFrame


def load(folder: Path | str) -> Tables:
    """The tables in `folder/tables`, or in `folder` itself.

    Raises:
        SchemaError: there is no such folder, it holds no table of trials, or a table cannot be read or has
            another schema version; the text says how to get them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SchemaError(f"no folder {folder}; give the folder of a sweep, as printed by: python -m sweep run")
    inner = folder / "tables" if (folder / "tables").is_dir() else folder
    sweep = inner.parent if inner.name == "tables" else folder
    if not (inner / "trials.parquet").exists():
        raise SchemaError(f"no tables in {inner}; write them with: python -m sweep collect {sweep}")
    return Tables(name=sweep.resolve().name, **{name: _scan(name, inner, sweep) for name in TABLES})


def _scan(name: str, folder: Path, sweep: Path) -> pl.LazyFrame:
    path, expected = folder / f"{name}.parquet", TABLES[name].arrow()
    if not path.exists():
        return pl.DataFrame(pl.from_arrow(expected.empty_table())).lazy()
    rebuild = f"rebuild the tables with: python -m sweep collect {sweep}"
    try:
        found = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{path} is not a readable Parquet file; {rebuild}") from error
    for key, value in expected.metadata.items():  # the schema's version and the table's name
        text = (found.metadata or {}).get(key, b"none").decode()
        if text != value.decode():
            label = key.decode().replace("_", " ")
            raise SchemaError(f"{path} has {label} {text}, this code reads {value.decode()}; {rebuild}")
    if found.names != expected.names or found.types != expected.types:
        raise SchemaError(f"{path} does not have the schema's columns; {rebuild}")
    floats = [field.name for field in expected if field.type == pa.float64()]
    return pl.scan_parquet(path).with_columns(pl.col(floats).fill_nan(None))  # NaN would count as a value


def gains(tables: Tables) -> pl.DataFrame:
    """Every primary score of a trained checkpoint beside its baseline's: a row per (trial, epoch, eval_id).

    The baseline is the untrained model with the same content, under the same `eval_id`. Where it or
    the score is missing, `baseline`, `gain` or `score` is null. Where one benchmark was evaluated in several
    ways, its name says which ("gsm8k (4-shot)").

    Returns:
        The trial's settings, and `score`, `baseline`, `gain` (score - baseline), `stderr` of the gain over
        items, `stderr_kind` ("paired" where both have items, from the differences item by item; "unpaired"
        where only the two scores' own errors are known, which is too wide), `num_items`, `is_share` (all
        scores of this evaluation lie in 0..1), `higher_is_better`.
    """
    trials = tables.trials.select(
        "trial_id",
        "is_baseline",
        "in_plan",
        "base_model",
        "base_digest",
        "architecture",
        "num_layers",
        "dataset",
        "dataset_kind",
        *SETTINGS,
        "seed",
        "data_seed",
        "train_seed",
    )
    primary = tables.scores.filter(pl.col("is_primary")).join(trials, on="trial_id")
    same = ["base_digest", "eval_id"]
    base = (
        primary.filter("is_baseline")
        .sort("in_plan", "trial_id", descending=[True, False])
        .unique(same, keep="first", maintain_order=True)
        .select(
            *same,
            "metric",
            baseline_id="trial_id",
            baseline="value",
            baseline_stderr="stderr",
            baseline_epoch="epoch",
        )
    )
    in_unit = pl.col("score").is_between(0, 1).all() & pl.col("baseline").is_between(0, 1).all()
    joined = (
        primary.filter(~pl.col("is_baseline"))
        .rename({"value": "score", "stderr": "score_stderr"})
        .join(base, on=[*same, "metric"], how="left", nulls_equal=True)
        .with_columns(gain=(pl.col("score") - pl.col("baseline")).round(DIGITS))
    )
    paired = _paired_errors(tables.items, joined)
    unpaired = (pl.col("score_stderr") ** 2 + pl.col("baseline_stderr") ** 2).sqrt()
    frame = (
        joined.join(paired, on=["trial_id", "epoch", "eval_id"], how="left")
        .with_columns(
            stderr=pl.when(pl.col("gain").is_not_null()).then(pl.coalesce("paired_stderr", unpaired)).round(DIGITS),
            stderr_kind=pl.when(pl.col("gain").is_null())
            .then(None)
            .when(pl.col("paired_stderr").is_not_null())
            .then(pl.lit("paired"))
            .when(unpaired.is_not_null())
            .then(pl.lit("unpaired")),
            is_share=in_unit.over("eval_id"),
        )
        .drop("is_baseline", "baseline_epoch", "baseline_stderr", "score_stderr", "paired_stderr", "is_primary")
        .sort("base_model", "dataset", "method", "trial_id", "epoch", "benchmark", "eval_id")
        .collect()
    )
    return _name_evaluations(frame)


def _paired_errors(items: pl.LazyFrame, joined: pl.LazyFrame) -> pl.LazyFrame:
    """Standard error of the mean difference over the items that a checkpoint and its baseline share."""
    keys = joined.select("trial_id", "epoch", "eval_id", "baseline_id", "baseline_epoch")
    values = items.select("trial_id", "epoch", "eval_id", "item", "value")
    difference = pl.col("value") - pl.col("value_base")
    return (
        values.join(keys, on=["trial_id", "epoch", "eval_id"])
        .join(
            values,
            left_on=["baseline_id", "baseline_epoch", "eval_id", "item"],
            right_on=["trial_id", "epoch", "eval_id", "item"],
            suffix="_base",
        )
        .group_by("trial_id", "epoch", "eval_id")
        .agg(
            paired_stderr=pl.when(difference.count() > 1).then(difference.std() / difference.count().sqrt()),
            paired_items=difference.count(),
        )
    )


def _name_evaluations(frame: pl.DataFrame) -> pl.DataFrame:
    """Tell the evaluations of one benchmark apart by their shots, else by their id."""
    several = pl.col("eval_id").n_unique().over("benchmark") > 1
    same_shots = pl.col("eval_id").n_unique().over("benchmark", "num_fewshot") > 1
    shots = pl.format("{} ({}-shot)", "benchmark", "num_fewshot")
    by_id = pl.format("{} [{}]", "benchmark", pl.col("eval_id").str.slice(0, 6))
    unclear = same_shots | pl.col("num_fewshot").is_null()
    return frame.with_columns(
        benchmark=pl.when(several & unclear).then(by_id).when(several).then(shots).otherwise("benchmark")
    )
