"""The page: what a sweep found, in sentences, figures and tables, in one file that works offline."""

from pathlib import Path
from typing import Any

import polars as pl

from analysis import effects, figures, layers, predictors, sentences, stats, tables
from analysis.findings import Findings, find
from analysis.page import (
    Page,
    count,
    details,
    document,
    duration,
    escape,
    missing,
    number,
    p_value,
    plain,
    plural,
    points,
    short,
    signed,
    span,
    table,
    values_text,
    yes_no,
)
from analysis.tables import SETTINGS

FOOTER = (
    "<p>A point is a hundredth of the items right. Intervals are 95 %. A missing value is missing, never "
    "zero. Beside this page "
    "lie each figure's data as CSV and its picture as PNG; the tables themselves are Parquet files.</p>"
)


def build(folder: Path | str) -> Path:
    """Write `folder/report/index.html` and each figure's CSV and PNG beside it.

    Returns:
        Where the page is.

    Raises:
        SchemaError: there are no tables, or they are of another version.
    """
    folder = Path(folder)
    found = find(tables.load(folder))
    out = folder / "report"
    out.mkdir(exist_ok=True)
    page = Page(out)
    sections = [
        ("ran", "What ran", _ran(found)),
        ("gains", "Which dataset helped which benchmark", _gains(found, page)),
        ("perplexity", "Did perplexity predict the gain?", _perplexity(found, page)),
        ("layers", "Which layers moved", _layers(found, page)),
        ("methods", "LoRA against full tuning", _methods(found, page)),
        ("epochs", "Epoch by epoch", _epochs(found, page)),
        ("noise", "How much is noise", _noise(found, page)),
        ("settings", "Settings and provenance", _settings(found)),
    ]
    path = out / "index.html"
    beside = path.with_name(".index.html")  # a reader always finds a whole page
    header = (
        f'<h1>{escape(found.tables.name)}</h1><p class="note">What fine-tuning changed, and what went with '
        "it</p>"
        f'<div class="opening"><p class="lead">{sentences.summary(found)}</p>{_numbers(found)}</div>'
    )
    title = f"{found.tables.name}: what fine-tuning changed"
    beside.write_text(document(title, header, sections, FOOTER, page), encoding="utf-8")
    beside.replace(path)
    return path


# Sections


def _ran(found: Findings) -> str:
    trained = found.trials.filter(pl.col("in_plan"))
    count = (
        trained.group_by("base_model")
        .agg(
            (pl.col("is_baseline") & (pl.col("status") == "succeeded")).any().alias("baseline"),
            (~pl.col("is_baseline")).sum().alias("trials"),
            *(
                (~pl.col("is_baseline") & (pl.col("status") == status)).sum().alias(status)
                for status in ("succeeded", "failed", "running", "pending")
            ),
            pl.col("train_seconds").sum().alias("train_seconds"),
        )
        .sort("base_model")
    )
    out = table(
        count,
        {
            "base_model": "base model",
            "trials": "trials",
            "succeeded": "succeeded",
            "failed": "failed",
            "running": "running",
            "pending": "pending",
            "baseline": ("baseline done", yes_no),
            "train_seconds": ("training", duration),
        },
    )
    failed = trained.filter(pl.col("status") == "failed").sort("base_model", "dataset", "method", "trial_id")
    if len(failed):
        out += f"<h3>Failed trials</h3>{table(failed, _FAILED)}"
    else:
        out += "<p>No trial has failed.</p>"
    attempts = found.tables.attempts.filter(pl.col("outcome").is_in(["failed", "lost"])).collect()
    own = set(failed["trial_id"])
    recovered = attempts.filter(~pl.col("trial_id").is_in(own) | pl.col("trial_id").is_null())
    if len(recovered):
        kinds = recovered.group_by("stage", "failure_kind").len().sort("stage", "failure_kind")
        listed = "; ".join(f"{n} × {escape(s)}, {escape(k or 'cut off')}" for s, k, n in kinds.iter_rows())
        out += f"<p>Attempts that failed or were lost in trials that have not failed: {listed}.</p>"
    gone = found.trials.filter(~pl.col("in_plan")).height
    if gone:
        out += f"<p>{plural(gone, 'trial')} in the store no longer asked for by the YAML: not on this page.</p>"
    return out


_FAILED = {
    "trial_id": "trial",
    "base_model": "base model",
    "dataset": "dataset",
    "method": "method",
    "seed": "seed",
    "failure_kind": "kind",
    "failure_message": "message",
}


def _gains(found: Findings, page: Page) -> str:
    if not len(found.gains.drop_nulls("score")):
        return missing(sentences.NO_SCORES)
    out = f"<p>{_reference_text(found)}</p>"
    shown = found.averaged
    if found.left_out:
        names = ", ".join(escape(name) for name in found.left_out)
        out += missing(
            f"Not in the figures and means, because they are not a share of items or lower is better: "
            f"{names}. "
            "Their numbers are in the table below."
        )
    if not len(shown.drop_nulls("estimate")):
        out += missing(sentences.NO_BASELINE)
    else:
        without = sorted(set(shown["base_model"]) - set(shown.drop_nulls("baseline")["base_model"]))
        if without:
            out += missing(f"No baseline, so no gain: {', '.join(escape(name) for name in without)}.")
        out += _gain_figures(found, shown.filter(~pl.col("base_model").is_in(without)), page)
    if len(shown.drop_nulls("score")):
        out += page.figure(
            "scores",
            figures.score_heatmap(_with_baseline_rows(shown)),
            _with_baseline_rows(shown),
            "<b>Scores</b>, % of items right; the first row is the untrained model. An en dash is a score "
            "that is missing.",
            least=_heat_width(shown),
        )
    out += details(
        "All gains as a table",
        table(
            found.cells,
            {
                "base_model": "base model",
                "dataset": "dataset",
                "benchmark": "benchmark",
                "baseline": ("baseline", plain),
                "score": ("score", plain),
                "estimate": ("gain", points),
                "low": ("95 % from", points),
                "high": ("to", points),
                "num_items": "items",
                "n": "trials",
                "seed_sd": ("SD of seeds", plain),
                "stderr_kind": "error",
            },
        ),
    )
    return out


def _gain_figures(found: Findings, shown: pl.DataFrame, page: Page) -> str:
    out = ""
    models = found.models.filter(~pl.col("benchmark").is_in(found.left_out))
    number = shown["base_model"].n_unique()
    ramp = (
        ' <span class="ramp" style="background:linear-gradient(90deg,'
        f'{figures.LOSS},{figures.NOTHING},{figures.GAIN})"></span> orange lost, blue gained.'
    )
    if number > 1:
        mean = models.with_columns(panel=pl.lit(f"Mean over {number} base models"))
        note = (
            "95 % intervals over base models are in the table."
            if number >= stats.MIN_CLUSTERS
            else f"{number} base models are too few for an interval; each one's value is in the table."
        )
        out += page.figure(
            "gain_mean",
            figures.gain_heatmap(mean),
            mean,
            f"<b>Mean gain</b> over base models, points over the baseline.{ramp} {note}",
            least=_heat_width(shown),
            columns=2,
        )
        out += details(
            "Mean gains as a table",
            table(
                models.sort("estimate", descending=True, nulls_last=True),
                {
                    "dataset": "dataset",
                    "benchmark": "benchmark",
                    "estimate": ("mean gain", points),
                    "low": ("95 % from", points),
                    "high": ("to", points),
                    "n": "base models",
                    "values": ("each", values_text),
                    "note": "note",
                },
            ),
        )
    else:
        out += missing("Only one base model: no mean over base models, and nothing says whether another would agree.")
    each = shown.with_columns(
        panel=pl.col("base_model"),
        note=pl.format("error over items: {}", pl.col("stderr_kind").replace("", "unknown")),
    )
    out += page.figure(
        "gain",
        figures.gain_heatmap(each),
        each,
        f"<b>Gain of each base model</b>, points over its own baseline.{ramp} Intervals over test items are "
        "in the tooltips "
        "and the table; they do not hold the noise between seeds.",
        least=_heat_width(shown),
    )
    return out


def _reference_text(found: Findings) -> str:
    settings = found.reference.select(SETTINGS).unique()
    labels = [
        f"{escape(sentences.method_name(m))}, {plural(e, 'epoch')}"
        if e is not None
        else escape(sentences.method_name(m))
        for m, e in settings.select("method", "epochs").unique().sort("method", "epochs", nulls_last=True).iter_rows()
    ]
    seeds = found.cells["n"].max() or 0
    extra = f"; the mean over seeds where there are several (up to {seeds})" if seeds > 1 else ""
    one = " in one setting per base model and dataset, the one that covers most datasets" if len(settings) > 1 else ""
    return (
        f"Gain is the score minus the baseline's score, the untrained model under the same evaluation. Shown "
        "is "
        f"{' and '.join(labels)}, the last epoch evaluated{one}{extra}."
    )


def _with_baseline_rows(cells: pl.DataFrame) -> pl.DataFrame:
    columns = ["base_model", "dataset", "benchmark", "score", "n", "num_items"]
    base = (
        cells.sort("baseline", nulls_last=True)
        .unique(["base_model", "benchmark"], keep="first", maintain_order=True)
        .with_columns(score="baseline", dataset=pl.lit("untrained"), n=pl.lit(1, pl.Int64))
    )
    order = pl.DataFrame({"benchmark": cells["benchmark"].unique(maintain_order=True)}).with_row_index("_place")
    base = base.join(order, on="benchmark").sort("base_model", "_place").drop("_place")
    stacked = [
        part.select(columns)
        for model in cells["base_model"].unique(maintain_order=True)
        for part in (base.filter(pl.col("base_model") == model), cells.filter(pl.col("base_model") == model))
    ]
    return pl.concat(stacked).with_columns(panel="base_model")


def _perplexity(found: Findings, page: Page) -> str:
    row = sentences.main_correlation(found)
    out = ""
    if row is None or row["estimate"] is None:
        out += missing("No answer: " + sentences.why_no_correlation(found))
    else:
        out += (
            f"<p>{sentences.perplexity(found)} Within each base model and benchmark the datasets are ranked "
            "by perplexity "
            "of their completions and by gain; a base model's number is the mean over benchmarks. The "
            "datasets are the same in all "
            "base models, so more base models do not make more datasets.</p>"
        )
    if len(found.points):
        values = dict(
            found.correlations.filter((pl.col("measure") == predictors.MAIN_MEASURE) & pl.col("benchmark").is_null())
            .drop_nulls("base_model")
            .select("base_model", "estimate")
            .iter_rows()
        )
        panel = [
            f"{m}: ρ {signed(values[m])}" if values.get(m) is not None else f"{m}: too few datasets for ρ"
            for m in found.points["base_model"]
        ]
        points = found.points.with_columns(panel=pl.Series(panel, dtype=pl.String))
        out += page.figure(
            "perplexity",
            figures.predictor_scatter(points),
            points,
            "<b>Perplexity against mean gain</b> over benchmarks, one point per dataset. ρ is the mean over "
            "benchmarks of the "
            "rank correlation within each. Perplexities of different base models are not comparable: their "
            "tokenizers differ.",
        )
    each = found.correlations.filter(pl.col("base_model").is_not_null() & pl.col("benchmark").is_null())
    if len(each.drop_nulls("estimate")):
        out += page.figure(
            "predictors",
            figures.predictor_strip(each),
            each,
            "<b>Every measure of the data</b> against the gain; a point is a base model, the grey bar their mean.",
            columns=2,
        )
        over = found.correlations.filter(pl.col("base_model").is_null())
        out += details(
            "Correlations over base models as a table",
            table(
                over,
                {
                    "measure": "measure",
                    "estimate": ("mean ρ", signed),
                    "low": ("95 % from", signed),
                    "high": ("to", signed),
                    "n": "base models",
                    "p_permutation": ("p (datasets exchanged)", p_value),
                    "note": "note",
                },
            ),
        )
        per = found.correlations.filter(
            (pl.col("measure") == predictors.MAIN_MEASURE) & pl.col("benchmark").is_not_null()
        )
        out += details(
            "Perplexity against gain, benchmark by benchmark",
            table(
                per,
                {
                    "base_model": "base model",
                    "benchmark": "benchmark",
                    "estimate": ("ρ", signed),
                    "low": ("95 % from", signed),
                    "high": ("to", signed),
                    "n": "datasets",
                    "note": "note",
                },
            ),
        )
    return out


def _layers(found: Findings, page: Page) -> str:
    if not len(found.layers):
        return missing("No weight changes have been measured yet (no layer deltas in the tables).")
    profile = layers.profile(found.layers).with_columns(panel="base_model")
    out = f"<p>{sentences.moved_layers(found)}</p>"
    out += page.figure(
        "layer_change",
        figures.layer_profile(profile),
        profile,
        "<b>Relative change</b> of each block: norm of trained minus base weights over the norm of the base "
        "weights, at the last "
        "measured epoch. Line: mean over trials; band: smallest to largest.",
    )
    known = found.layer_correlations.drop_nulls("estimate")
    if not len(known):
        reason = "there is no gain to hold it against"
        if len(found.averaged.drop_nulls("estimate")):
            reason = f"fewer than {stats.MIN_RANKED} datasets have both, or one side does not vary"
        return out + missing(f"Whether change goes with gain cannot be said: {reason}.")
    shown = known.with_columns(panel=pl.col("method"))
    out += page.figure(
        "layer_gain",
        figures.layer_correlation(shown),
        shown,
        "<b>Does change go with gain?</b> Rank correlation over datasets of a block's relative change with "
        "the gain, mean over "
        f"benchmarks, {span(known['n'])} datasets each. With so few datasets single points swing widely; "
        "look for what the base "
        "models share.",
    )
    bins = layers.by_depth(found.layer_correlations)
    out += details(
        "By depth, over base models",
        table(
            bins,
            {
                "method": "method",
                "depth_from": ("depth from", number),
                "depth_to": ("to", number),
                "estimate": ("mean ρ", signed),
                "low": ("95 % from", signed),
                "high": ("to", signed),
                "n": "base models",
                "note": "note",
            },
        ),
    )
    return out


def _methods(found: Findings, page: Page) -> str:
    methods = set(found.gains["method"].drop_nulls())
    if not len(found.gains.drop_nulls("gain")):
        return missing("No gains yet, so nothing to compare.")
    if len(methods & {"full", "lora"}) < 2:
        only = escape(sentences.method_name(methods.pop())) if methods else "one method"
        return missing(f"Only {only} was trained and scored, so there is nothing to compare.")
    if not len(found.pairs):
        return missing("No LoRA trial shares base model, dataset, seed and other settings with a trial of full tuning.")
    out = f"<p>{sentences.methods(found)} A pair shares base model, dataset, seed, epoch and other settings."
    if found.tied:
        names = ", ".join(escape(name.replace("_", " ")) for name in found.tied)
        out += f" Not held equal, because the two methods share no value of it: {names}."
    out += "</p>"
    out += page.figure(
        "methods",
        figures.method_difference(found.pairs),
        found.pairs,
        "<b>LoRA minus full tuning</b>, points of gain. A tick is a pair, a large point a base model's mean.",
        columns=2,
    )
    out += details(
        "By benchmark as a table",
        table(
            effects.lora_against_full(found.pairs).with_columns(pl.col("benchmark").fill_null("all")),
            {
                "benchmark": "benchmark",
                "estimate": ("LoRA − full", points),
                "low": ("95 % from", points),
                "high": ("to", points),
                "n": "base models",
                "pairs": "pairs",
                "values": ("each", values_text),
                "note": "note",
            },
        ),
    )
    return out


def _epochs(found: Findings, page: Page) -> str:
    out = ""
    several = found.by_epoch.filter(pl.col("epoch").n_unique().over("base_model", "dataset", "method") > 1)
    if len(several):
        shown = _method_panels(several)
        out += page.figure(
            "gain_by_epoch",
            figures.gain_by_epoch(shown),
            shown,
            "<b>Mean gain over benchmarks after each epoch</b>, a line per dataset.",
        )
    else:
        out += missing("No trial has gains after more than one epoch, so there is no course over epochs to show.")
    if len(found.held_out):
        shown = _method_panels(found.held_out)
        out += page.figure(
            "held_out_by_epoch",
            figures.held_out_by_epoch(shown),
            shown,
            "<b>Loss on each dataset's own held-out examples</b> after each epoch. Where it rises again, the "
            "model learns its "
            "examples by heart.",
        )
    else:
        out += missing("No held-out loss was logged.")
    return out


def _method_panels(frame: pl.DataFrame) -> pl.DataFrame:
    several = frame["method"].n_unique() > 1
    panel = pl.format("{}, {}", "base_model", "method") if several else pl.col("base_model")
    return frame.with_columns(panel=panel).sort("method", "base_model", "dataset", "epoch", nulls_last=True)


def _noise(found: Findings, page: Page) -> str:
    if not len(found.gains.drop_nulls("gain")):
        return missing("No gains yet, so their noise is not known either.")
    if not len(found.noise):
        return missing("No cell was trained with two seeds: how far chance alone moves a gain is not known.")
    page.csv("noise", found.noise)
    return (
        f"<p>{sentences.noise(found)} That holds for the other cells only if they are alike.</p>"
        + table(
            found.noise,
            {
                "base_model": "base model",
                "dataset": "dataset",
                "method": "method",
                "benchmark": "benchmark",
                "n": "seeds",
                "estimate": ("mean gain", points),
                "seed_sd": ("SD", plain),
                "smallest": ("smallest", points),
                "largest": ("largest", points),
            },
        )
        + '<p class="note">As a file: <a href="noise.csv">CSV</a></p>'
    )


def _settings(found: Findings) -> str:
    trained = found.trials.filter(pl.col("in_plan") & ~pl.col("is_baseline"))
    rows = []
    for name in (*SETTINGS, "seed", "recipe_version", "layout", "device", "commit", "versions"):
        values = trained[name].unique().sort().to_list()
        if len(trained) and any(v is not None for v in values):
            full = "all" if name in ("trained_layers", "num_examples") else "none"
            rows.append(
                {
                    "setting": name,
                    "values": ", ".join(full if v is None else _setting(v) for v in values[:12])
                    + (f" and {len(values) - 12} more" if len(values) > 12 else ""),
                }
            )
    out = "<h3>Training settings</h3>"
    out += table(pl.DataFrame(rows), {"setting": "setting", "values": "values"}) if rows else missing("No trials.")
    models = found.trials.unique("base_model", maintain_order=True).sort("base_model")
    out += "<h3>Base models</h3>" + table(
        models,
        {
            "base_model": "base model",
            "architecture": "architecture",
            "num_layers": "blocks",
            "num_parameters": ("parameters", count),
            "base_digest": ("content", short),
        },
    )
    done = trained.drop_nulls("examples_requested").sort("dataset", "trial_id")
    if len(done):
        data = done.unique("dataset", maintain_order=True)
        out += "<h3>Datasets</h3>" + table(
            data,
            {
                "dataset": "dataset",
                "dataset_kind": "kind",
                "examples_requested": "examples",
                "examples_used": "used",
                "examples_truncated": "truncated",
                "examples_dropped": "dropped",
                "trained_tokens": ("tokens learned per epoch", count),
                "data_digest": ("content", short),
            },
        )
    evaluations = (
        found.tables.scores.filter("is_primary")
        .group_by("benchmark", "benchmark_kind", "eval_id", "metric", "num_fewshot", "chance")
        .agg(num_items=pl.col("num_items").max(), checkpoints=pl.len())
        .sort("benchmark_kind", "benchmark", "eval_id", nulls_last=True)
        .collect()
    )
    if len(evaluations):
        out += "<h3>Evaluations</h3>" + table(
            evaluations,
            {
                "benchmark": "benchmark",
                "benchmark_kind": "kind",
                "metric": "metric",
                "num_fewshot": "shots",
                "num_items": "items",
                "chance": ("chance", plain),
                "checkpoints": "checkpoints",
                "eval_id": "evaluation",
            },
        )
    work = (
        found.tables.attempts.group_by("stage", "host", "device")
        .agg(
            attempts=pl.len(),
            seconds=pl.col("seconds").sum(),
            peak_memory_gib=pl.col("peak_memory_gib").max(),
            first=pl.col("started_at").min(),
        )
        .sort("stage", "host", "device", nulls_last=True)
        .collect()
    )
    if len(work):
        out += "<h3>Where it ran</h3>" + table(
            work,
            {
                "stage": "stage",
                "host": "host",
                "device": "device",
                "attempts": "attempts",
                "seconds": ("time in all", duration),
                "peak_memory_gib": ("peak memory, GiB", number),
                "first": "first started (UTC)",
            },
        )
    return out


# Pieces


def _heat_width(cells: pl.DataFrame) -> int:
    """Least width in pixels at which every cell of a heat map still holds its number."""
    return 130 + 32 * cells["benchmark"].n_unique()


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value) if "\n" in str(value) else str(value)


def _numbers(found: Findings) -> str:
    trained = found.trials.filter(pl.col("in_plan") & ~pl.col("is_baseline"))
    failed = int((trained["status"] == "failed").sum())
    scored = found.gains.drop_nulls("score")
    values = {
        "base models": found.trials.filter("in_plan")["base_model"].n_unique(),
        "datasets": trained["dataset"].n_unique(),
        "benchmarks": scored["benchmark"].n_unique(),
        "trials done": f"{int((trained['status'] == 'succeeded').sum()):,} of {len(trained):,}",
        "checkpoints scored": scored.select("trial_id", "epoch").n_unique() if len(scored) else 0,
        "failed": failed,
    }
    cells = "".join(
        f"<div{' class=bad' if label == 'failed' and failed else ''}><dt>{label}</dt><dd>{escape(value)}</dd></div>"
        for label, value in values.items()
    )
    return f'<dl class="numbers">{cells}</dl>'
