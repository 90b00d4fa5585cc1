"""Which measure of the data, known before training, goes with the gain after it."""

import numpy as np
import polars as pl
from scipy.stats import rankdata

from analysis import stats
from analysis.tables import DIGITS

MAIN_MEASURE = "perplexity_completion"
"""The study's predictor: perplexity of the completions, given the prompts, under the base model."""


def with_measure(cells: pl.DataFrame, data_measures: pl.DataFrame, measure: str) -> pl.DataFrame:
    """The cells with `x`, the measure of their dataset under their base model; null if not measured."""
    values = data_measures.filter(pl.col("measure") == measure).select("base_model", "dataset", x="value")
    return cells.join(values, on=["base_model", "dataset"], how="left")


def points(cells: pl.DataFrame, data_measures: pl.DataFrame, measure: str = MAIN_MEASURE) -> pl.DataFrame:
    """One point per base model x dataset: the measure `x` and the mean gain over benchmarks, `estimate`."""
    known = with_measure(cells, data_measures, measure).drop_nulls(["x", "estimate"])
    group = ["base_model", "dataset", "dataset_kind"]
    return (
        known.group_by(group)
        .agg(x=pl.col("x").first(), estimate=pl.col("estimate").mean().round(DIGITS), n=pl.len().cast(pl.Int64))
        .with_columns(measure=pl.lit(measure))
        .sort(group, nulls_last=True)
    )


def correlations(cells: pl.DataFrame, data_measures: pl.DataFrame) -> pl.DataFrame:
    """Rank correlation of every data measure with the gain.

    Within one base model and benchmark the datasets are ranked by measure and by gain. A base model's value
    is the mean of these correlations over benchmarks; over base models there is a mean, with a t interval
    from 4 base models on. That interval speaks of other base models on *these* datasets. The permutation p
    speaks of the datasets: it exchanges their measures, the same way in all base models (which share the
    datasets and so are not independent of each other in them).

    Returns:
        `measure`, `base_model` (null: over base models), `benchmark` (null: mean over benchmarks),
        `estimate`, `low`, `high`, `n` (datasets; base models where over them), `p_permutation`, `p_smallest`,
        `note`.
    """
    rows: list[dict] = []
    for measure in data_measures["measure"].unique().sort().to_list():
        joined = with_measure(cells, data_measures, measure).drop_nulls(["x", "estimate"])
        if not len(joined):
            continue
        groups = list(joined.select("base_model", "benchmark").iter_rows())
        found = stats.spearman_within(joined["x"].to_list(), joined["estimate"].to_list(), groups)
        for (model, benchmark), e in found.items():
            rows.append(_row(measure, model, benchmark, e))
        each: list[float] = []
        for model in joined["base_model"].unique().sort().to_list():
            own = [e.value for (m, _), e in found.items() if m == model and e.value is not None]
            sizes = [e.n for (m, _), e in found.items() if m == model]
            reasons = [e.note for (m, _), e in found.items() if m == model]
            mean = float(np.mean(own)) if own else None
            note = "mean over benchmarks that share their datasets: no interval" if own else reasons[0]
            rows.append(_row(measure, model, None, stats.Estimate(mean, None, None, max(sizes), note)))
            each += own and [mean]
        over = stats.mean_interval(each, unit="base models")
        p, smallest = _permutation(joined)
        rows.append(_row(measure, None, None, over) | {"p_permutation": p, "p_smallest": smallest})
    floats = ("estimate", "low", "high", "p_permutation", "p_smallest")
    names = ("measure", "base_model", "benchmark", *floats[:3], "n", *floats[3:], "note")
    schema = {c: pl.Float64 if c in floats else pl.Int64 if c == "n" else pl.String for c in names}
    return pl.DataFrame(rows, schema=schema).sort(
        "measure", "base_model", "benchmark", nulls_last=False, maintain_order=True
    )


def _row(measure: str, model: str | None, benchmark: str | None, e: stats.Estimate) -> dict:
    return {
        "measure": measure,
        "base_model": model,
        "benchmark": benchmark,
        "estimate": e.value,
        "low": e.low,
        "high": e.high,
        "n": e.n,
        "p_permutation": None,
        "p_smallest": None,
        "note": e.note,
    }


def _permutation(joined: pl.DataFrame) -> tuple[float | None, float | None]:
    """p-value of the mean correlation when datasets exchange their measures; None below 4 datasets.

    The statistic is the reported mean over base models of the means over benchmarks. Only datasets measured
    under every base model can be exchanged.
    """
    models = joined["base_model"].unique().sort().to_list()
    measured = joined.group_by("dataset").agg(pl.col("base_model").n_unique())
    datasets = measured.filter(pl.col("base_model") == len(models))["dataset"].sort().to_list()
    if len(datasets) < stats.MIN_RANKED:
        return None, None
    kept = joined.filter(pl.col("dataset").is_in(datasets))
    measures = {(m, d): x for m, d, x in kept.select("base_model", "dataset", "x").iter_rows()}
    place = {dataset: index for index, dataset in enumerate(datasets)}
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (model, _), part in kept.group_by("base_model", "benchmark", maintain_order=True):
        y = part["estimate"].to_numpy()
        if len(y) >= stats.MIN_RANKED and np.ptp(y) > 0:
            groups.setdefault(model, []).append((np.array([place[d] for d in part["dataset"]]), _unit_ranks(y)))
    if not groups:
        return None, None

    def mean_correlation(orders: np.ndarray) -> np.ndarray:
        of_models = []
        for model, parts in groups.items():
            x = np.array([measures[model, d] for d in datasets])[orders]
            whole = _unit_ranks(x)
            of_models.append(
                np.mean(
                    [(whole[:, at] if len(at) == len(datasets) else _unit_ranks(x[:, at])) @ y for at, y in parts],
                    axis=0,
                )
            )
        return np.mean(of_models, axis=0)

    return stats.permutation_p(mean_correlation, len(datasets))


def _unit_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, centred and of unit length, so that their product is Spearman's rho."""
    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(ranks, axis=-1, keepdims=True)
    return ranks / np.where(norm == 0, 1, norm)
