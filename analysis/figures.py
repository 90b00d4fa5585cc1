"""A table in, an Altair chart out; the only module that knows the plotting library.

Every figure is a function of one DataFrame. One with a column `panel` becomes one panel per value of it, in
order of appearance. Gains and scores come as shares of items (0..1) and are drawn in points (0..100).
"""

import json
from collections.abc import Callable
from typing import Any

import altair as alt
import polars as pl
import vl_convert

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

PALETTE = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999999"]
"""Names; told apart by the colour-blind. Source: Paul Tol, "bright"."""

SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]

# The middle is transparent, so that zero is the paper's own colour, light or dark.
LOSS, NOTHING, GAIN = "rgba(206,95,0,1)", "rgba(150,150,150,0)", "rgba(15,98,168,1)"

PANEL_WIDTH, PANEL_HEIGHT = 380, 210

alt.data_transformers.enable("default", max_rows=None)  # the frames are aggregates; none may be cut or refused


def gain_heatmap(frame: pl.DataFrame) -> alt.ConcatChart:
    """Gain of dataset (row) x benchmark (column): blue helped, orange hurt, an en dash is missing.

    Args:
        frame: `panel`, `dataset`, `benchmark`, `estimate`, `low`, `high`, `n`, `score`, `baseline`, `note`;
            rows and columns
            are drawn in order of appearance.
    """
    points = frame.with_columns(
        pl.col("estimate", "low", "high", "score", "baseline") * 100, label=_label("estimate", "+")
    )
    limit = max(float(points["estimate"].abs().max() or 0), 1.0)
    color = alt.Color(
        "estimate:Q",
        title="gain, points",
        scale=alt.Scale(domain=[-limit, 0, limit], range=[LOSS, NOTHING, GAIN], clamp=True),
    )
    tooltip = [
        *_tips("dataset", "benchmark"),
        *_tips("score", "baseline", format=".1f"),
        alt.Tooltip("estimate:Q", title="gain, points", format="+.1f"),
        alt.Tooltip("low:Q", title="95 % from", format="+.1f"),
        alt.Tooltip("high:Q", title="95 % to", format="+.1f"),
        *_tips("n", "note"),
    ]
    strong = f"abs(datum.estimate) > {0.6 * limit}"
    return _panels(points, lambda part: _cells(part, color, strong, tooltip), width=None)


def score_heatmap(frame: pl.DataFrame) -> alt.ConcatChart:
    """Score of dataset (row, the untrained model first) x benchmark (column).

    Args:
        frame: `panel`, `dataset`, `benchmark`, `score`, `n`, `num_items`.
    """
    points = frame.with_columns(pl.col("score") * 100, label=_label("score", ""))
    color = alt.Color(
        "score:Q",
        title="score, points",
        scale=alt.Scale(domain=[0, 100], range=["rgba(34,120,80,0)", "rgba(20,110,72,1)"]),
    )
    tooltip = [*_tips("dataset", "benchmark"), *_tips("score", format=".1f"), *_tips("n", "num_items")]
    return _panels(points, lambda part: _cells(part, color, "datum.score > 60", tooltip), width=None)


def predictor_scatter(frame: pl.DataFrame) -> alt.ConcatChart:
    """A measure of the data against the mean gain, one named point per dataset.

    Args:
        frame: `panel`, `dataset`, `dataset_kind`, `x`, `estimate`, `n`, `measure`.
    """
    points = frame.with_columns(pl.col("estimate") * 100, pl.col("dataset_kind").fill_null("no kind given"))
    title = points["measure"][0].replace("_", " ") + " (log scale)"
    positive = bool((points["x"] > 0).all())
    low, high = float(points["x"].min()), float(points["x"].max())
    # Names are written to the right of their points, so the axis ends later than the data.
    domain = [low / 1.1, high * (high / low) ** 0.35 * 1.1] if positive else [low, high + 0.35 * (high - low)]
    x = alt.X(
        "x:Q",
        title=title if positive else title.removesuffix(" (log scale)"),
        scale=alt.Scale(type="log" if positive else "linear", domain=domain, nice=False),
        axis=alt.Axis(tickCount=4, format="~r", grid=False),
    )
    y = alt.Y("estimate:Q", title="mean gain, points", scale=_span(points["estimate"]))
    color, shape = _names(points["dataset_kind"], "dataset_kind", "kind of dataset")
    tooltip = [
        *_tips("dataset", "dataset_kind"),
        *_tips("x", format=".3~r"),
        *_tips("estimate", format="+.1f"),
    ]

    def draw(part: pl.DataFrame) -> alt.LayerChart:
        base = alt.Chart(part).encode(x=x, y=y, tooltip=tooltip)
        marks = base.mark_point(filled=True, size=90, opacity=0.95).encode(color=color, shape=shape)
        names = base.mark_text(align="left", dx=8, fontSize=11, fill="currentColor").encode(text="dataset:N")
        return alt.layer(_zero(), marks, names)

    return _panels(points, draw)


def predictor_strip(frame: pl.DataFrame) -> alt.ConcatChart:
    """Rank correlation of every data measure with the gain: a point per base model, a bar at their mean.

    Args:
        frame: `measure`, `base_model`, `estimate`, `n`.
    """
    known = frame.drop_nulls("estimate").with_columns(pl.col("measure").str.replace_all("_", " "))
    color, shape = _names(known["base_model"], "base_model", "base model")
    y = alt.Y("measure:N", title=None, sort=known["measure"].unique().sort().to_list())
    x = alt.X("estimate:Q", title="rank correlation with the gain", scale=alt.Scale(domain=[-1, 1]), axis=_sparse())
    base = alt.Chart(known)
    marks = base.mark_point(filled=True, size=80, opacity=0.9).encode(
        x=x,
        y=y,
        color=color,
        shape=shape,
        tooltip=[*_tips("measure", "base_model", "n"), *_tips("estimate", format="+.2f")],
    )
    means = base.mark_tick(thickness=2, size=20, color="#888888").encode(x="mean(estimate):Q", y=y)
    rows = known["measure"].n_unique()
    return _one(alt.layer(_zero("x"), means, marks), height=34 * rows + 10)


def layer_profile(frame: pl.DataFrame) -> alt.ConcatChart:
    """Relative change of the weights by depth: mean over trials, with their smallest and largest.

    Args:
        frame: `panel`, `method`, `layer`, `depth`, `estimate`, `smallest`, `largest`, `n`.
    """
    points = frame.with_columns(pl.col("estimate", "smallest", "largest") * 100)
    least, most = float(points["smallest"].min()), float(points["largest"].max())
    log = least > 0 and most / least > 20
    scale = alt.Scale(type="log", nice=True) if log else alt.Scale(domain=[0, most * 1.05], nice=False)
    title = "relative change, %" + (" (log scale)" if log else "")
    color, shape = _names(points["method"], "method", "method")
    tooltip = [
        *_tips("method", "layer", "n"),
        *_tips("depth", format=".2f"),
        *_tips("estimate", format=".3~r"),
    ]

    def draw(part: pl.DataFrame) -> alt.LayerChart:
        base = alt.Chart(part).encode(x=_depth(), color=color)
        band = base.mark_area(opacity=0.18).encode(
            y=alt.Y("smallest:Q", scale=scale, title=title), y2="largest:Q", tooltip=tooltip
        )
        line = base.mark_line(strokeWidth=2).encode(y=alt.Y("estimate:Q", scale=scale, title=title))
        marks = base.mark_point(filled=True, size=50, opacity=1).encode(
            y=alt.Y("estimate:Q", scale=scale, title=title), shape=shape, tooltip=tooltip
        )
        return alt.layer(band, line, marks)

    return _panels(points, draw)


def layer_correlation(frame: pl.DataFrame) -> alt.ConcatChart:
    """Rank correlation of a block's relative change with the gain, by depth, a line per base model.

    Args:
        frame: `panel`, `base_model`, `layer`, `depth`, `estimate`, `n`.
    """
    known = frame.drop_nulls("estimate")
    color, shape = _names(known["base_model"], "base_model", "base model")
    tooltip = [
        *_tips("base_model", "layer", "n"),
        *_tips("depth", format=".2f"),
        *_tips("estimate", format="+.2f"),
    ]
    y = alt.Y(
        "estimate:Q",
        title="rank correlation with gain",
        scale=alt.Scale(domain=[-1, 1]),
        axis=alt.Axis(tickCount=5),
    )

    def draw(part: pl.DataFrame) -> alt.LayerChart:
        base = alt.Chart(part).encode(x=_depth(), y=y, color=color)
        marks = base.mark_point(filled=True, size=50, opacity=1).encode(shape=shape, tooltip=tooltip)
        return alt.layer(_zero(), base.mark_line(strokeWidth=2), marks)

    return _panels(known, draw)


def method_difference(frame: pl.DataFrame) -> alt.ConcatChart:
    """Gain of LoRA minus that of full tuning: a tick per pair, a point per base model's mean.

    Args:
        frame: `benchmark`, `base_model`, `dataset`, `full`, `lora`, `difference`.
    """
    points = frame.with_columns(pl.col("full", "lora", "difference") * 100)
    order = points["benchmark"].unique(maintain_order=True).to_list()
    color, shape = _names(points["base_model"], "base_model", "base model")
    y = alt.Y("benchmark:N", title=None, sort=order)
    title, scale = "LoRA − full, points", _span(points["difference"])
    ticks = (
        alt.Chart(points)
        .mark_tick(size=16, thickness=1.5, opacity=0.45)
        .encode(
            x=alt.X("difference:Q", title=title, scale=scale, axis=_sparse()),
            y=y,
            color=color,
            tooltip=[
                *_tips("benchmark", "base_model", "dataset"),
                *_tips("full", "lora", "difference", format="+.1f"),
            ],
        )
    )
    means = points.group_by("benchmark", "base_model", maintain_order=True).agg(
        pl.col("difference").mean(), pairs=pl.len()
    )
    marks = (
        alt.Chart(means)
        .mark_point(filled=True, size=90, opacity=1)
        .encode(
            x=alt.X("difference:Q", title=title, scale=scale, axis=_sparse()),
            y=y,
            color=color,
            shape=shape,
            tooltip=[*_tips("benchmark", "base_model", "pairs"), *_tips("difference", format="+.1f")],
        )
    )
    return _one(alt.layer(_zero("x"), ticks, marks), height=34 * len(order) + 10)


def gain_by_epoch(frame: pl.DataFrame) -> alt.ConcatChart:
    """Mean gain over benchmarks after each epoch, a line per dataset.

    Args:
        frame: `panel`, `dataset`, `epoch`, `estimate`, `n`.
    """
    points = frame.with_columns(pl.col("estimate") * 100)
    return _by_epoch(points, "estimate", "mean gain, points", "+.1f", zero=True)


def held_out_by_epoch(frame: pl.DataFrame) -> alt.ConcatChart:
    """Held-out loss after each epoch, a line per dataset.

    Args:
        frame: `panel`, `dataset`, `epoch`, `held_out_loss_nats`, `n`.
    """
    return _by_epoch(frame, "held_out_loss_nats", "held-out loss, nats per token", ".3f", zero=False)


def _by_epoch(frame: pl.DataFrame, value: str, title: str, format: str, zero: bool) -> alt.ConcatChart:
    color, shape = _names(frame["dataset"], "dataset", "dataset")
    epochs = frame["epoch"].unique().sort().to_list()
    first, last = min(epochs), max(epochs)
    x = alt.X(
        "epoch:Q",
        title="epoch",
        scale=alt.Scale(domain=[first - 0.1, last + 0.1], nice=False),
        axis=alt.Axis(values=epochs if len(epochs) <= 12 else alt.Undefined, format="d", grid=False),
    )
    y = alt.Y(f"{value}:Q", title=title, scale=_span(frame[value], zero=zero), axis=alt.Axis(tickCount=5))
    tooltip = [*_tips("dataset", "epoch", "n"), *_tips(value, format=format)]

    def draw(part: pl.DataFrame) -> alt.LayerChart:
        base = alt.Chart(part).encode(x=x, y=y, color=color)
        marks = base.mark_point(filled=True, size=50, opacity=1).encode(shape=shape, tooltip=tooltip)
        return alt.layer(*([_zero()] if zero else []), base.mark_line(strokeWidth=2), marks)

    return _panels(frame, draw)


# Pieces that the figures share


def _tips(*names: str, format: str | None = None) -> list[alt.Tooltip]:
    if format is None:
        return [alt.Tooltip(name, title=name.replace("_", " ")) for name in names]
    return [alt.Tooltip(f"{name}:Q", title=name.replace("_", " "), format=format) for name in names]


def _label(column: str, sign: str) -> pl.Expr:
    """Whole points as text with a true minus sign; an en dash where the value is missing."""
    rounded = (pl.col(column) * 100).round().cast(pl.Int64)
    text = (
        pl.when(rounded < 0)
        .then(pl.format("−{}", rounded.abs()))
        .otherwise(pl.format("{}{}", pl.when(rounded > 0).then(pl.lit(sign)).otherwise(pl.lit("")), rounded))
    )
    return pl.when(pl.col(column).is_null()).then(pl.lit("–")).otherwise(text)


def _cells(part: pl.DataFrame, color: alt.Color, strong: str, tooltip: list) -> alt.LayerChart:
    rows = part["dataset"].unique(maintain_order=True).to_list()
    columns = part["benchmark"].unique(maintain_order=True).to_list()
    base = alt.Chart(part).encode(
        x=alt.X(
            "benchmark:N",
            title=None,
            sort=columns,
            axis=alt.Axis(orient="top", labelAngle=-50, labelLimit=110, domain=False, ticks=False, labelPadding=4),
        ),
        y=alt.Y(
            "dataset:N",
            title=None,
            sort=rows,
            axis=alt.Axis(labelLimit=120, domain=False, ticks=False, labelPadding=6),
        ),
        tooltip=tooltip,
    )
    tiles = base.mark_rect(cornerRadius=3, stroke="#88888840", strokeWidth=1).encode(color=color)
    text = base.mark_text(fontSize=12).encode(
        text="label:N", fill=alt.condition(strong, alt.value("#ffffff"), alt.value("currentColor"))
    )
    return alt.layer(tiles, text).properties(width=48 * len(columns), height=30 * len(rows))


def _names(values: pl.Series, field: str, title: str) -> tuple[alt.Color, alt.Shape]:
    """The same name has the same colour and shape in every panel and figure that has the same names."""
    names = values.unique().sort().to_list()
    cycle = range(len(names))
    colors = [PALETTE[i % len(PALETTE)] for i in cycle]
    # The shapes move on by one with each round of colours, so that 49 names stay distinct.
    shapes = [SHAPES[(i + i // len(PALETTE)) % len(SHAPES)] for i in cycle]
    return (
        alt.Color(f"{field}:N", title=title, scale=alt.Scale(domain=names, range=colors)),
        alt.Shape(f"{field}:N", title=title, scale=alt.Scale(domain=names, range=shapes)),
    )


def _span(values: pl.Series, zero: bool = True) -> alt.Scale:
    """One scale for all panels: the values with a margin, and zero if wanted."""
    low, high = float(values.min()), float(values.max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.08 * (high - low) or 1.0
    return alt.Scale(domain=[low - margin, high + margin], nice=False)


def _zero(axis: str = "y") -> alt.Chart:
    rule = alt.Chart(pl.DataFrame({"zero": [0.0]})).mark_rule(color="#888888", strokeWidth=1)
    return rule.encode(y=alt.Y("zero:Q")) if axis == "y" else rule.encode(x=alt.X("zero:Q"))


def _sparse() -> alt.Axis:
    return alt.Axis(tickCount=5)


def _depth() -> alt.X:
    return alt.X(
        "depth:Q",
        title="depth: 0 input, 1 output",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(tickCount=5, grid=False),
    )


def _panels(
    frame: pl.DataFrame, draw: Callable[[pl.DataFrame], Any], width: int | None = PANEL_WIDTH
) -> alt.ConcatChart:
    charts = []
    for (name,), part in frame.group_by("panel", maintain_order=True):
        chart = draw(part).properties(title=name)
        charts.append(chart if width is None else chart.properties(width=width, height=PANEL_HEIGHT))
    return _finish(charts)


def _one(chart: alt.LayerChart, height: int) -> alt.ConcatChart:
    return _finish([chart.properties(width=560, height=height)])


def _finish(charts: list) -> alt.ConcatChart:
    return (
        alt.concat(*charts, columns=2)
        .configure(font=FONT, background="transparent")
        .configure_view(strokeWidth=0)
        .configure_axis(
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelColor="#555555",
            titleColor="#555555",
            gridColor="#88888833",
            domainColor="#88888899",
            tickColor="#88888899",
        )
        .configure_title(anchor="start", fontSize=14, fontWeight=600, offset=10)
        .configure_legend(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", orient="bottom")
    )


# What the page needs


def specification(chart: alt.ConcatChart) -> dict:
    """The chart as Vega-Lite, with its data."""
    return chart.to_dict(validate=False)  # a quarter of the time of a page; a browser test sees every chart


def panels(whole: dict) -> list[tuple[str | None, dict]]:
    """Each panel's title and its own Vega-Lite, as wide as its box and without legend (the page has one)."""
    shared = {key: whole[key] for key in ("$schema", "config", "data") if key in whole}  # data: of one panel alone
    out = []
    for panel in whole["concat"]:
        panel = _without_legends(panel)
        title = panel.pop("title", None)
        # On the right: the last of the slanted labels above a heat map reaches beyond its column.
        slanted = '"labelAngle"' in json.dumps(panel)
        padding = {"left": 4, "top": 4, "right": 26 if slanted else 4, "bottom": 4}
        panel = shared | panel | {"width": "container", "padding": padding}
        used = {name: rows for name, rows in whole.get("datasets", {}).items() if _uses(panel, name)}
        out.append((title, panel | {"datasets": used}))
    return out


def _without_legends(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_legends(part) for part in node]
    if not isinstance(node, dict):
        return node
    node = {key: _without_legends(part) for key, part in node.items()}
    for channel in ("color", "shape"):
        if isinstance(node.get("encoding"), dict) and "field" in node["encoding"].get(channel, {}):
            node["encoding"][channel]["legend"] = None
    return node


def _uses(node: Any, name: str) -> bool:
    if isinstance(node, dict):
        return node.get("data") == {"name": name} or any(_uses(part, name) for part in node.values())
    return isinstance(node, list) and any(_uses(part, name) for part in node)


def legend(whole: dict) -> list[tuple[str, str, str | None]]:
    """Name, colour and shape of every category that the chart tells apart by colour."""
    found: dict[str, dict] = {}

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            for channel in ("color", "shape"):
                encoding = node.get(channel)
                if isinstance(encoding, dict) and encoding.get("type") == "nominal":
                    found.setdefault(channel, encoding["scale"])
            for part in node.values():
                visit(part)
        elif isinstance(node, list):
            for part in node:
                visit(part)

    visit(whole["concat"])
    if "color" not in found:
        return []
    names, colors = found["color"]["domain"], found["color"]["range"]
    shapes = found.get("shape", {}).get("range", [None] * len(names))
    return list(zip(names, colors, shapes, strict=True))


def png(whole: dict) -> bytes:
    """The whole chart as a picture on white, at twice its size."""
    return vl_convert.vegalite_to_png(whole | {"background": "#ffffff"}, vl_version=_version(), scale=2)


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script that fetches nothing."""
    return vl_convert.javascript_bundle(vl_version=_version())


def _version() -> str:
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
