"""The pieces of an HTML page: escaped text, numbers, tables, figures with their files, the document."""

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from analysis import figures

MAX_ROWS = 200
"""Rows of a table shown on the page; the files beside it have all."""

WIDE = 28
"""Characters from which a table's text may wrap."""


def escape(text: Any) -> str:
    """Text as HTML: a name can never become markup."""
    return html.escape(str(text))


def minus(text: str) -> str:
    """A number's text with a true minus sign; a rounded zero has none, nor a plus."""
    return text.lstrip("+-") if not text.strip("+-0.") else text.replace("-", "−")


def points(value: float | None) -> str:
    """A difference of shares as signed points."""
    return "" if value is None else minus(f"{100 * value:+.1f}")


def plain(value: float | None) -> str:
    """A share as points."""
    return "" if value is None else minus(f"{100 * value:.1f}")


def signed(value: float | None) -> str:
    """A correlation."""
    return "" if value is None else minus(f"{value:+.2f}")


def number(value: float | None) -> str:
    """Three significant digits."""
    return "" if value is None else minus(f"{value:.3g}")


def p_value(value: float | None) -> str:
    """A p-value with the digits that matter."""
    return "" if value is None else "&lt; 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def p_equals(value: float) -> str:
    """A p-value in a sentence, with its sign."""
    text = p_value(value)
    return text if text.startswith("&lt;") else f"= {text}"


def yes_no(value: bool | None) -> str:
    """A flag."""
    return "yes" if value else "no"


def count(value: int | None) -> str:
    """A large count."""
    return "" if value is None else f"{value:,}"


def short(value: str | None) -> str:
    """The start of a digest."""
    return "" if value is None else escape(value if len(value) <= 24 else value[:16] + "…")


def duration(seconds: float | None) -> str:
    """Seconds in the two units that matter."""
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def values_text(text: str | None) -> str:
    """The values of single base models, with true minus signs before numbers only."""
    return "" if text is None else escape(text).replace(" -", " −")


def plural(amount: int, word: str) -> str:
    """A count with its noun."""
    return f"{amount:,} {word}" + ("" if amount == 1 else "s")


def span(values: pl.Series, show: Callable[[float], str] = str) -> str:
    """The smallest and largest value, or the one value."""
    low, high = show(values.min()), show(values.max())
    return low if low == high else f"{low} to {high}"


def missing(text: str) -> str:
    """A sentence that says what could not be answered, and why."""
    return f'<p class="missing">{text}</p>'


def details(title: str, inside: str) -> str:
    """A part that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def table(frame: pl.DataFrame, columns: dict[str, str | tuple[str, Callable[[Any], str]]]) -> str:
    """The frame's columns under their headings, at most MAX_ROWS rows, in a box that scrolls by itself.

    Args:
        frame: the rows.
        columns: column -> heading, or (heading, function to HTML); without a function a value is escaped.
    """
    parts = []
    for name, heading in columns.items():
        label, show = (heading, None) if isinstance(heading, str) else heading
        texts = [
            ("" if value is None else escape(value)) if show is None else show(value)
            for value in frame[name].head(MAX_ROWS)
        ]
        wide = max((len(text) for text in texts), default=0) > WIDE
        kind = ' class="number"' if frame.schema[name].is_numeric() else ' class="wide"' if wide else ""
        parts.append([f"<th{kind}>{escape(label)}</th>", *(f"<td{kind}>{text}</td>" for text in texts)])
    head, *body = ("".join(cells) for cells in zip(*parts, strict=True))
    rows = "".join(f"<tr>{cells}</tr>" for cells in body)
    more = ""
    if len(frame) > MAX_ROWS:
        text = f"The first {MAX_ROWS} of {len(frame):,} rows; the files beside the page have all."
        more = f'<p class="note">{text}</p>'
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{inside}</div>{more}'


_SHAPES = {
    "circle": '<circle cx="6" cy="6" r="5"/>',
    "square": '<path d="M1.5 1.5h9v9h-9z"/>',
    "triangle-up": '<path d="M6 1l5.5 10h-11z"/>',
    "diamond": '<path d="M6 .5L11 6l-5 5.5L1 6z"/>',
    "cross": '<path d="M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z"/>',
    "triangle-down": '<path d="M6 11L.5 1h11z"/>',
    "triangle-right": '<path d="M11 6L1 .5v11z"/>',
}


@dataclass
class Page:
    """Collects the charts of one page and writes the files beside it."""

    folder: Path
    specs: list[tuple[str, dict]] = field(default_factory=list)

    def csv(self, name: str, frame: pl.DataFrame) -> None:
        """Write `<folder>/<name>.csv`."""
        frame.write_csv(self.folder / f"{name}.csv")

    def figure(
        self, name: str, chart: Any, frame: pl.DataFrame, caption: str, *, columns: int = 3, least: int = 0
    ) -> str:
        """Write the figure's CSV and PNG.

        Args:
            name: of its files.
            chart: made by `figures` from the frame.
            frame: what the chart shows.
            caption: HTML.
            columns: panels side by side on a wide screen.
            least: pixels that a panel's chart needs; a narrower box scrolls by itself.

        Returns:
            Its HTML: one box per panel, one legend for all, caption, links to the files.
        """
        whole = figures.specification(chart)
        self.csv(name, frame)
        (self.folder / f"{name}.png").write_bytes(figures.png(whole))
        parts, boxes = figures.panels(whole), []
        for place, (title, spec) in enumerate(parts):
            box = f"chart-{name}-{place}"
            self.specs.append((box, spec))
            heading = f"<h3>{escape(title)}</h3>" if title else ""
            boxes.append(
                f'<div class="panel">{heading}<div class="scroll"><div class="chart" id="{box}"></div></div></div>'
            )
        keys = "".join(
            f'<li><svg viewBox="0 0 12 12" fill="{color}" aria-hidden="true">{_SHAPES.get(shape, "")}</svg>'
            f"{escape(label)}</li>"
            for label, color, shape in figures.legend(whole)
        )
        legend = f'<ul class="legend">{keys}</ul>' if keys else ""
        fitting = min(columns, len(parts), 3 if least <= 330 else 2 if least <= 520 else 1)
        if len(parts) == 4 and fitting == 3:
            fitting = 2  # two rows of two, not three and one
        files = f'<span class="files"><a href="{name}.csv">CSV</a> · <a href="{name}.png">PNG</a></span>'
        return (
            f'<figure id="figure-{name}">{legend}<div class="panels" '
            f'style="--columns:{fitting};--least:{least}px">'
            f"{''.join(boxes)}</div><figcaption>{caption} {files}</figcaption></figure>"
        )


def document(title: str, header: str, sections: list[tuple[str, str, str]], footer: str, page: Page) -> str:
    """The whole page, with style, scripts and data inside: it fetches nothing.

    Args:
        title: plain text.
        header: HTML above the sections.
        sections: (anchor, heading, HTML) in order.
        footer: HTML.
        page: whose charts are drawn.
    """
    here = Path(__file__)
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(f'<section id="{a}"><h2>{escape(heading)}</h2>{inside}</section>' for a, heading, inside in sections)
    text = f'<header class="top">{header}<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
    text = f"{text}<footer>{footer}</footer>".replace(" %", "\u00a0%")
    scripts = ""
    if page.specs:
        # "<" as an escape: a name that holds "</script>" must not end the script.
        scripts = "".join(
            f'<script type="application/json" data-chart="{box}">'
            + json.dumps(spec, ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")
            + "</script>"
            for box, spec in page.specs
        )
        bundle = figures.javascript().replace("</script", "<\\/script").replace("<!--", "<\\!--")
        scripts += f"<script>{bundle}</script><script>{here.with_name('page.js').read_text()}</script>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{here.with_name('page.css').read_text()}</style></head><body>{text}{scripts}</body></html>\n"
    )
