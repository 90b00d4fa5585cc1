"""All results of one sweep that its page shows, computed together."""

from dataclasses import dataclass

import polars as pl

from analysis import effects, layers, predictors, tables
from analysis.tables import Tables


@dataclass
class Findings:
    """All results that the page shows, as tables."""

    tables: Tables
    trials: pl.DataFrame
    gains: pl.DataFrame
    """Primary scores of the trials in the plan, every epoch."""
    cells: pl.DataFrame
    """Gain per base model x dataset x benchmark in the reference setting, last epoch."""
    averaged: pl.DataFrame
    """Of `cells`, those whose benchmark may be averaged with others."""
    left_out: list[str]
    """Benchmarks that may not."""
    models: pl.DataFrame
    """Mean of `cells` over base models."""
    correlations: pl.DataFrame
    """Data measures against gain."""
    points: pl.DataFrame
    """Main measure and mean gain per base model x dataset."""
    layers: pl.DataFrame
    """Relative change of each block of each trial of the reference settings."""
    layer_correlations: pl.DataFrame
    pairs: pl.DataFrame
    """LoRA beside full tuning."""
    tied: list[str]
    """Settings that differ with the method."""
    by_epoch: pl.DataFrame
    held_out: pl.DataFrame
    noise: pl.DataFrame
    reference: pl.DataFrame
    """The trials of the reference setting."""


def find(sweep: Tables) -> Findings:
    """Compute every result of the page; a part that the tables do not support is an empty table."""
    trials = sweep.trials.collect()
    gains = tables.gains(sweep).filter(pl.col("in_plan"))
    reference = effects.reference(trials)
    methods = [trials.filter(pl.col("method") == m) for m in trials["method"].drop_nulls().unique().sort()]
    per_method = pl.concat([effects.reference(part) for part in methods]) if methods else reference
    last = effects.last_epoch(gains)
    cells = effects.by_cell(last.join(reference.select("trial_id"), on="trial_id", how="semi"))
    shares, left_out = effects.comparable(gains)
    averaged = cells.filter(~pl.col("benchmark").is_in(left_out))
    in_method = shares.join(per_method.select("trial_id"), on="trial_id", how="semi")
    measures = sweep.data_measures.collect()
    blocks = layers.by_layer(sweep.layer_deltas, per_method)
    pairs, tied = effects.lora_pairs(effects.last_epoch(shares))
    return Findings(
        tables=sweep,
        trials=trials,
        gains=gains,
        cells=cells,
        averaged=averaged,
        left_out=left_out,
        models=effects.over_models(cells),
        correlations=predictors.correlations(averaged, measures),
        points=predictors.points(averaged, measures),
        layers=blocks,
        layer_correlations=layers.correlations(blocks, effects.last_epoch(in_method)),
        pairs=pairs,
        tied=tied,
        by_epoch=effects.gain_by_epoch(in_method),
        held_out=effects.held_out_by_epoch(sweep.steps, per_method),
        noise=effects.noise(effects.last_epoch(shares)),
        reference=reference,
    )
