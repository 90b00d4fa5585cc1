"""What changed the gain: dataset, method, epoch; and how far chance alone moves it (seeds)."""

import polars as pl

from analysis import stats
from analysis.tables import DIGITS, SETTINGS

CELL = ["base_model", "dataset", "dataset_kind", "benchmark", "benchmark_kind"]

Z95 = 1.959964
"""Half width of a 95 % normal interval, in standard errors."""


def reference(trials: pl.DataFrame) -> pl.DataFrame:
    """One setting for each (base model, dataset), so that a grid of cells compares like with like.

    It is the setting that covers most datasets of that base model in the plan, finished or not: a failed
    trial leaves a hole and does not bring in another setting. Ties go to full tuning, all layers, then to the
    first in order. Trials that the YAML no longer asks for are left out.

    Returns:
        The chosen rows of `trials`, all seeds of each chosen setting.
    """
    planned = trials.filter(pl.col("in_plan") & ~pl.col("is_baseline"))
    covered = pl.col("dataset").n_unique().over("base_model", *SETTINGS)
    order = planned.with_columns(
        _covered=covered, _full=pl.col("method") == "full", _all=pl.col("trained_layers").is_null()
    ).sort(
        "_covered",
        "_full",
        "_all",
        *SETTINGS,
        descending=[True, True, True, *[False] * len(SETTINGS)],
        nulls_last=True,
        maintain_order=True,
    )
    first = order.unique(["base_model", "dataset"], keep="first", maintain_order=True)
    return planned.join(
        first.select("base_model", "dataset", *SETTINGS),
        on=["base_model", "dataset", *SETTINGS],
        how="semi",
        nulls_equal=True,
    ).sort("base_model", "dataset", "seed", "trial_id")


def last_epoch(gains: pl.DataFrame) -> pl.DataFrame:
    """Only each trial's last evaluated checkpoint."""
    return gains.filter(pl.col("epoch") == pl.col("epoch").max().over("trial_id", "eval_id"))


def comparable(gains: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Rows whose gains may be averaged: a share of items, higher is better; and the benchmarks left out."""
    keep = pl.col("is_share") & pl.col("higher_is_better").fill_null(True)
    left_out = gains.filter(~keep)["benchmark"].unique().sort().to_list()
    return gains.filter(keep), left_out


def by_cell(gains: pl.DataFrame) -> pl.DataFrame:
    """Gain of each base model x dataset x benchmark, mean over seeds.

    The interval is over items only (1.96 standard errors, paired where items are kept): it says what another
    draw of test items would give, not another seed; `seed_sd` says that where there are seeds.

    Returns:
        The cell, `score`, `baseline`, `estimate` (gain), `low`, `high`, `stderr`, `stderr_kind`, `n`
        (trials), `num_items`, `seed_sd` (null for one seed).
    """
    known = pl.col("gain").is_not_null()
    # The mean of the seeds' errors, not divided by sqrt(seeds): all seeds meet the same items.
    return (
        gains.group_by(CELL)
        .agg(
            score=pl.col("score").mean().round(DIGITS),
            baseline=pl.col("baseline").mean().round(DIGITS),
            estimate=pl.col("gain").mean().round(DIGITS),
            stderr=pl.col("stderr").mean().round(DIGITS),
            stderr_kind=pl.col("stderr_kind").drop_nulls().unique().sort().str.join(", "),
            n=known.sum().cast(pl.Int64),
            num_items=pl.col("num_items").max(),
            seed_sd=pl.when(known.sum() > 1).then(pl.col("gain").std().round(DIGITS)),
        )
        .with_columns(low=pl.col("estimate") - Z95 * pl.col("stderr"), high=pl.col("estimate") + Z95 * pl.col("stderr"))
        .sort("base_model", "dataset_kind", "dataset", "benchmark_kind", "benchmark", nulls_last=True)
    )


def over_models(cells: pl.DataFrame) -> pl.DataFrame:
    """Mean over base models of each dataset x benchmark; the interval is over base models.

    Returns:
        `dataset`, `benchmark`, kinds, `score`, `baseline`, `estimate`, `low`, `high`, `n` (base models),
        `values` (each base model's gain, as text), `note` (why there is no interval).
    """
    rows = []
    keys = ["dataset", "dataset_kind", "benchmark", "benchmark_kind"]
    for key, part in cells.group_by(keys, maintain_order=True):
        known = part.filter(pl.col("estimate").is_not_null()).sort("base_model")
        mean = stats.mean_interval(known["estimate"].to_list(), unit="base models")
        values = ", ".join(f"{m} {100 * g:+.1f}" for m, g in known.select("base_model", "estimate").iter_rows())
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"score": part["score"].mean(), "baseline": known["baseline"].mean()}
            | {"estimate": mean.value, "low": mean.low, "high": mean.high, "n": mean.n}
            | {"values": values, "note": mean.note}
        )
    floats = {name: pl.Float64 for name in ("score", "baseline", "estimate", "low", "high")}
    texts = {name: pl.String for name in (*keys, "values", "note")}
    schema = {k: texts[k] for k in keys} | floats | {"n": pl.Int64, "values": pl.String, "note": pl.String}
    return pl.DataFrame(rows, schema=schema).sort(
        "dataset_kind", "dataset", "benchmark_kind", "benchmark", nulls_last=True
    )


def lora_pairs(gains: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """LoRA beside full tuning of the same base model, dataset, seed, epoch and other settings.

    A setting whose values the two methods do not share at all (their learning rates, often) belongs to the
    method: it cannot be held equal and is named instead.

    Returns:
        One row per pair and benchmark with `full`, `lora` (gains) and `difference` (LoRA - full); and the
        names of the settings that differ with the method.
    """
    sides = {method: gains.filter(pl.col("method") == method) for method in ("full", "lora")}
    others = [s for s in SETTINGS if s not in ("method", "lora_rank", "lora_alpha")]
    shared = [s for s in others if set(sides["full"][s].to_list()) & set(sides["lora"][s].to_list())]
    key = [*CELL, "eval_id", *shared, "data_seed", "epoch"]
    means = {
        method: side.group_by(key).agg(
            pl.col("gain").mean().round(DIGITS).alias(method), pl.col("seed").min().alias("seed")
        )
        for method, side in sides.items()
    }
    pairs = means["full"].join(means["lora"].drop("seed"), on=key, how="inner", nulls_equal=True)
    pairs = pairs.with_columns(difference=(pl.col("lora") - pl.col("full")).round(DIGITS)).drop_nulls("difference")
    differ = [s for s in others if s not in shared] if len(sides["full"]) and len(sides["lora"]) else []
    return pairs.sort(*CELL, "data_seed", "epoch", nulls_last=True), differ


def lora_against_full(pairs: pl.DataFrame) -> pl.DataFrame:
    """LoRA minus full tuning per benchmark and over all: mean over base models of their means.

    Returns:
        `benchmark` (null: all), `estimate`, `low`, `high`, `n` (base models), `pairs`, `values`, `note`.
    """
    rows = []
    parts = [(name, part) for (name,), part in pairs.group_by("benchmark", maintain_order=True)]
    for name, part in [*sorted(parts, key=lambda p: p[0]), (None, pairs)]:
        mean = stats.mean_interval(part["difference"].to_list(), part["base_model"].to_list(), unit="base models")
        each = part.group_by("base_model").agg(pl.col("difference").mean()).sort("base_model")
        values = ", ".join(f"{m} {100 * d:+.1f}" for m, d in each.iter_rows())
        rows.append(
            {"benchmark": name, "estimate": mean.value, "low": mean.low, "high": mean.high, "n": mean.n}
            | {"pairs": len(part), "values": values, "note": mean.note}
        )
    floats = {"estimate": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    counts = {"n": pl.Int64, "pairs": pl.Int64}
    return pl.DataFrame(
        rows, schema={"benchmark": pl.String} | floats | counts | {"values": pl.String, "note": pl.String}
    )


def gain_by_epoch(gains: pl.DataFrame) -> pl.DataFrame:
    """Mean gain over benchmarks after each epoch of each base model x dataset x method, mean over seeds.

    Only evaluations that a trial has at all its evaluated epochs enter, so that a line compares like with
    like.

    Returns:
        `base_model`, `dataset`, `dataset_kind`, `method`, `epoch`, `estimate`, `n` (scores averaged).
    """
    known = gains.drop_nulls("gain")
    whole = pl.col("epoch").n_unique().over("trial_id", "eval_id") == pl.col("epoch").n_unique().over("trial_id")
    group = ["base_model", "dataset", "dataset_kind", "method", "epoch"]
    return (
        known.filter(whole)
        .group_by(group)
        .agg(estimate=pl.col("gain").mean().round(DIGITS), n=pl.len().cast(pl.Int64))
        .sort(group, nulls_last=True)
    )


def held_out_by_epoch(steps: pl.LazyFrame, trials: pl.DataFrame) -> pl.DataFrame:
    """Held-out loss at the end of each epoch, mean over seeds, of the given trials.

    Returns:
        `base_model`, `dataset`, `dataset_kind`, `method`, `epoch`, `held_out_loss_nats`, `n` (trials).
    """
    group = ["base_model", "dataset", "dataset_kind", "method", "epoch"]
    losses = steps.filter(pl.col("held_out_loss_nats").is_not_null()).select(
        "trial_id", pl.col("epoch").round().cast(pl.Int64), "held_out_loss_nats", "step"
    )
    return (
        losses.join(trials.lazy().select("trial_id", *group[:-1]), on="trial_id")
        .sort("step")
        .group_by("trial_id", *group)
        .agg(pl.col("held_out_loss_nats").last())
        .group_by(group)
        .agg(pl.col("held_out_loss_nats").mean().round(DIGITS), n=pl.len().cast(pl.Int64))
        .sort(group, nulls_last=True)
        .collect()
    )


def noise(gains: pl.DataFrame) -> pl.DataFrame:
    """How far the seed alone moves a gain: cells trained more than once with nothing else changed.

    Returns:
        One row per cell and setting with `n` (seeds), `estimate` (mean gain), `seed_sd`, `smallest`,
        `largest`.
    """
    key = [*CELL, "eval_id", *SETTINGS, "epoch"]
    return (
        gains.drop_nulls("gain")
        .group_by(key)
        .agg(
            n=pl.col("seed").n_unique().cast(pl.Int64),
            estimate=pl.col("gain").mean().round(DIGITS),
            seed_sd=pl.col("gain").std().round(DIGITS),
            smallest=pl.col("gain").min(),
            largest=pl.col("gain").max(),
        )
        .filter(pl.col("n") > 1)
        .sort(key, nulls_last=True)
    )


def pooled_noise(noise: pl.DataFrame) -> float | None:
    """SD of a gain between seeds, pooled over the rows of `noise`; None if there are none."""
    dof = (noise["n"] - 1).sum()
    return float(((noise["seed_sd"] ** 2 * (noise["n"] - 1)).sum() / dof) ** 0.5) if dof else None
