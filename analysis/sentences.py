"""The answers as sentences of HTML, generated from the findings."""

from collections.abc import Callable
from typing import Any

import polars as pl

from analysis import effects, layers, predictors, stats
from analysis.findings import Findings
from analysis.page import escape, p_equals, p_value, plain, plural, points, signed, span
from analysis.tables import SETTINGS

NO_SCORES = "No trained model has been scored yet. Run the sweep again: it goes on with what is missing."
NO_BASELINE = (
    "There is no gain to show: no base model was evaluated untrained under the same evaluations. "
    "Run the sweep again, so that it evaluates its baselines."
)


def summary(found: Findings) -> str:
    """One paragraph: what helped what, whether perplexity predicted it, which layers moved, and how sure."""
    if not len(found.gains.drop_nulls("score")):
        return NO_SCORES
    if not len(found.averaged.drop_nulls("estimate")):
        return NO_BASELINE
    parts = [_best(found), _worst(found), _beyond_items(found), perplexity(found, brief=True)]
    parts += [moved_layers(found, brief=True), methods(found), noise(found)]
    number = found.averaged.drop_nulls("estimate")["base_model"].n_unique()
    if number == 1:
        parts.append("There is one base model, so nothing says whether another would agree.")
    elif number < stats.MIN_CLUSTERS:
        parts.append(
            f"{number} base models are too few for intervals over them: ranges run from the lowest to the highest."
        )
    return " ".join(part for part in parts if part)


def _best(found: Findings) -> str:
    models = _shared_models(found)
    best = models.sort("estimate", "dataset", "benchmark", descending=[True, False, False]).row(0, named=True)
    if best["estimate"] <= 0:
        return "No dataset raised any benchmark on average."
    return (
        f"<strong>{escape(best['dataset'])}</strong> helped <strong>{escape(best['benchmark'])}</strong> "
        "most, by "
        f"{points(best['estimate'])} points over the untrained model {_over_cell(found, best)}; it is the "
        "largest of "
        f"{len(models)} cells, so expect less of it on new items."
    )


def _worst(found: Findings) -> str:
    worst = _shared_models(found).sort("estimate", "dataset", "benchmark").row(0, named=True)
    if worst["estimate"] > -0.0005:
        return "No cell lost on average."
    return (
        f"The largest loss is {points(worst['estimate'])} points on {escape(worst['benchmark'])} after "
        f"{escape(worst['dataset'])} {_over_cell(found, worst)}."
    )


def _shared_models(found: Findings) -> pl.DataFrame:
    return found.models.drop_nulls("estimate").filter(~pl.col("benchmark").is_in(found.left_out))


def _over_cell(found: Findings, row: dict[str, Any]) -> str:
    same = (pl.col("dataset") == row["dataset"]) & (pl.col("benchmark") == row["benchmark"])
    return _over(row, found.cells.filter(same)["estimate"].drop_nulls(), points)


def _over(row: dict[str, Any], values: pl.Series, show: Callable[[float], str]) -> str:
    """In brackets: the interval over base models, or the range of their values where they are too few."""
    if row["low"] is not None:
        return f"(95 % interval {show(row['low'])} to {show(row['high'])}, {plural(row['n'], 'base model')})"
    if row["n"] == 1:
        return "(one base model)"
    return f"({span(values, show)} in {plural(row['n'], 'base model')})"


def _beyond_items(found: Findings) -> str:
    tested = found.averaged.drop_nulls("low")
    if not len(tested):
        return ""
    above, below = int((tested["low"] > 0).sum()), int((tested["high"] < 0).sum())
    return (
        f"Of {len(tested)} single cells {above} rose and {below} fell by more than the 95 % interval over "
        "test items, "
        f"where chance would give about {max(1, round(0.025 * len(tested)))} either way."
    )


def perplexity(found: Findings, brief: bool = False) -> str:
    """Whether perplexity predicted the gain; with `brief` without the base models' own values."""
    row = main_correlation(found)
    if row is None or row["estimate"] is None:
        return "Whether perplexity predicts the gain cannot be said: " + why_no_correlation(found)
    p = row["p_permutation"]
    if p is not None and p < 0.05:
        lower = "lower" if row["estimate"] < 0 else "higher"
        verdict = f"Perplexity <strong>predicted</strong> the gain, the {lower} the better"
    else:
        verdict = "Perplexity <strong>did not predict</strong> the gain beyond chance"
    each = found.correlations.filter(
        (pl.col("measure") == row["measure"]) & pl.col("base_model").is_not_null() & pl.col("benchmark").is_null()
    ).drop_nulls("estimate")
    text = f"mean rank correlation {signed(row['estimate'])} {_over(row, each['estimate'], signed)}"
    number = found.points["dataset"].n_unique()
    if p is None:
        text += f"; {plural(number, 'dataset')}, too few for a test"
    else:
        text += f"; exchanging the {number} datasets gives p {p_equals(p)}"
        if row["p_smallest"] > 0.05:
            text += f", and could not give less than {p_value(row['p_smallest'])}"
    if not brief:
        values = ", ".join(f"{escape(m)} {signed(v)}" for m, v in each.select("base_model", "estimate").iter_rows())
        text += f". By base model: {values}"
    return f"{verdict}: {text}."


def main_correlation(found: Findings) -> dict[str, Any] | None:
    """The row of the main measure over base models and benchmarks; None if it was not measured."""
    over = found.correlations.filter(
        (pl.col("measure") == predictors.MAIN_MEASURE) & pl.col("base_model").is_null() & pl.col("benchmark").is_null()
    )
    return over.row(0, named=True) if len(over) else None


def why_no_correlation(found: Findings) -> str:
    """The reason why perplexity and gain have no correlation here."""
    if not len(found.averaged.drop_nulls("estimate")):
        return "there is no gain to hold it against."
    measured = found.tables.data_measures.filter(pl.col("measure") == predictors.MAIN_MEASURE).collect()
    if not len(measured.drop_nulls("value")):
        return "the perplexity of the datasets was not measured."
    if not len(found.points):
        return "no dataset has both a perplexity and a gain."
    most = found.points.group_by("base_model").len()["len"].max()
    if most < stats.MIN_RANKED:
        return f"{plural(most, 'dataset')} per base model, and a rank correlation needs {stats.MIN_RANKED}."
    return "perplexity or gain does not vary between the datasets."


def moved_layers(found: Findings, brief: bool = False) -> str:
    """Which blocks moved most, and where the change goes with the gain; with `brief` only the first."""
    method = main_method(found)
    profile = layers.profile(found.layers).filter((pl.col("method") == method) & (pl.col("estimate") > 0))
    if not len(profile):
        return ""
    tops = profile.sort("estimate", "layer", descending=[True, False]).unique(
        "base_model", keep="first", maintain_order=True
    )
    tops = tops.sort("base_model")
    text = (
        f"With {escape(method_name(method))} the block that moved most lies at depth "
        f"{span(tops['depth'], '{:.2f}'.format)} (0 is "
        f"the input, 1 the output) and changed by {span(100 * tops['estimate'], '{:.2g}'.format)} % of its "
        "weights' norm"
    )
    if brief:
        return f"{text}."
    where = ", ".join(f"{escape(m)} block {b + 1}" for m, b in tops.select("base_model", "layer").iter_rows())
    text += f": {where}."
    bins = layers.by_depth(found.layer_correlations).filter(pl.col("method") == method).drop_nulls("estimate")
    if len(bins):
        peak = bins.sort("estimate", "depth_from", descending=[True, False]).row(0, named=True)
        sure = (
            f"{plural(peak['n'], 'base model')}, no interval"
            if peak["low"] is None
            else f"95 % interval {signed(peak['low'])} to {signed(peak['high'])}, not corrected for choosing the peak"
        )
        text += (
            f" The change goes with the gain most at depth {peak['depth_from']:.1f} to "
            f"{peak['depth_to']:.1f} "
            f"(mean rank correlation {signed(peak['estimate'])}; {sure})."
        )
    return text


def methods(found: Findings) -> str:
    """LoRA against full tuning; empty if there are no pairs."""
    if not len(found.pairs):
        return ""
    row = effects.lora_against_full(found.pairs).filter(pl.col("benchmark").is_null()).row(0, named=True)
    each = found.pairs.group_by("base_model").agg(pl.col("difference").mean())["difference"]
    return (
        f"LoRA gained {plain(abs(row['estimate']))} points {'less' if row['estimate'] < 0 else 'more'} than "
        "full tuning on "
        f"average {_over(row, each, points)}."
    )


def noise(found: Findings) -> str:
    """How far a change of seed alone moves a gain."""
    sd = effects.pooled_noise(found.noise)
    if sd is None:
        return "No cell was trained with two seeds, so the chance between runs is not known."
    # Benchmarks of one training are not independent, so trainings are counted, not scores.
    cells = found.noise.group_by("base_model", "dataset", *SETTINGS).agg(pl.col("n").max())
    return (
        f"A change of seed alone moves a gain by {plain(sd)} points (SD, from "
        f"{plural(cells['n'].sum(), 'training')} "
        f"of {plural(len(cells), 'cell')})."
    )


def method_name(name: str | None) -> str:
    """A method in running text."""
    return {"full": "full tuning", "lora": "LoRA"}.get(name, name or "no method")


def main_method(found: Findings) -> str | None:
    """The method of most trials of the reference setting."""
    counts = found.reference.group_by("method").len().sort("len", "method", descending=[True, False])
    return counts["method"][0] if len(counts) else None
