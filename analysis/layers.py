"""How much each layer moved, and whether the layers that moved go with the gain."""

import numpy as np
import polars as pl

from analysis import stats
from analysis.tables import DIGITS

NUM_BINS = 5
"""Fifths of the depth, to set base models with different numbers of layers side by side."""


def by_layer(layer_deltas: pl.LazyFrame, trials: pl.DataFrame) -> pl.DataFrame:
    """Relative change of each block of each given trial at its last measured checkpoint.

    The tensors of a block are taken as one long vector: the norm of all changes over the norm of all weights.

    Returns:
        `trial_id`, `base_model`, `dataset`, `dataset_kind`, `method`, `epoch`, `layer`, `depth` (0 input .. 1
        output), `relative_norm`.
    """
    about = ["trial_id", "base_model", "dataset", "dataset_kind", "method"]
    blocks = layer_deltas.filter(
        pl.col("layer").is_not_null() & pl.col("delta_norm").is_not_null() & pl.col("base_norm").is_not_null()
    )
    size = (pl.col("delta_norm") ** 2).sum().sqrt(), (pl.col("base_norm") ** 2).sum().sqrt()
    return (
        blocks.filter(pl.col("epoch") == pl.col("epoch").max().over("trial_id"))
        .join(trials.lazy().select(about), on="trial_id")
        .group_by(*about, "epoch", "layer")
        .agg(
            depth=pl.col("depth").first(),
            relative_norm=pl.when(size[1] > 0).then((size[0] / size[1]).round_sig_figs(DIGITS)),
        )
        .sort("base_model", "method", "dataset", "trial_id", "layer", nulls_last=True)
        .collect()
    )


def profile(layers: pl.DataFrame) -> pl.DataFrame:
    """Mean relative change per base model, method and block, over trials.

    Returns:
        `base_model`, `method`, `layer`, `depth`, `estimate`, `smallest`, `largest`, `n` (trials).
    """
    group = ["base_model", "method", "layer", "depth"]
    value = pl.col("relative_norm")
    return (
        layers.drop_nulls("relative_norm")
        .group_by(group)
        .agg(
            estimate=value.mean().round_sig_figs(DIGITS),
            smallest=value.min(),
            largest=value.max(),
            n=pl.len().cast(pl.Int64),
        )
        .sort(group, nulls_last=True)
    )


def correlations(layers: pl.DataFrame, gains: pl.DataFrame) -> pl.DataFrame:
    """Rank correlation of a block's relative change with the gain, by depth, within base model and method.

    Within one base model, method and benchmark the datasets (mean over seeds) are ranked by change and by
    gain; the value of a block is the mean of these correlations over benchmarks.

    Returns:
        `base_model`, `method`, `layer`, `depth`, `estimate`, `n` (datasets), `note`.
    """
    group = ["base_model", "method", "dataset"]
    change = layers.group_by(*group, "layer", "depth").agg(pl.col("relative_norm").mean().round_sig_figs(DIGITS))
    gain = gains.group_by(*group, "benchmark").agg(pl.col("gain").mean().round(DIGITS))
    joined = change.join(gain, on=group).drop_nulls(["relative_norm", "gain"])
    joined = joined.sort("base_model", "method", "layer", "benchmark", "dataset", nulls_last=True)
    keys = list(joined.select("base_model", "method", "layer", "depth", "benchmark").iter_rows())
    found = stats.spearman_within(joined["relative_norm"].to_list(), joined["gain"].to_list(), keys)
    blocks: dict[tuple, list[stats.Estimate]] = {}
    for key, estimate in found.items():
        blocks.setdefault(key[:4], []).append(estimate)
    rows = []
    for (model, method, layer, depth), parts in blocks.items():
        known = [e.value for e in parts if e.value is not None]
        rows.append(
            {"base_model": model, "method": method, "layer": layer, "depth": depth}
            | {"estimate": float(np.mean(known)) if known else None, "n": max(e.n for e in parts)}
            | {"note": None if known else parts[0].note}
        )
    schema = {"base_model": pl.String, "method": pl.String, "layer": pl.Int64, "depth": pl.Float64}
    return pl.DataFrame(rows, schema=schema | {"estimate": pl.Float64, "n": pl.Int64, "note": pl.String})


def by_depth(frame: pl.DataFrame) -> pl.DataFrame:
    """A profile or correlations over base models, in fifths of the depth, per method; t interval from 4 on.

    Returns:
        `method`, `depth_from`, `depth_to`, `estimate`, `low`, `high`, `n` (base models), `note`.
    """
    known = frame.drop_nulls(["estimate", "depth"]).with_columns(
        part=(pl.col("depth") * NUM_BINS).floor().clip(0, NUM_BINS - 1).cast(pl.Int64)
    )
    rows = []
    for (method, part), cell in known.sort("method", "part").group_by("method", "part", maintain_order=True):
        mean = stats.mean_interval(cell["estimate"].to_list(), cell["base_model"].to_list(), unit="base models")
        rows.append(
            {"method": method, "depth_from": part / NUM_BINS, "depth_to": (part + 1) / NUM_BINS}
            | {"estimate": mean.value, "low": mean.low, "high": mean.high, "n": mean.n, "note": mean.note}
        )
    floats = {name: pl.Float64 for name in ("depth_from", "depth_to", "estimate", "low", "high")}
    return pl.DataFrame(rows, schema={"method": pl.String} | floats | {"n": pl.Int64, "note": pl.String})
