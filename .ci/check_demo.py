"""The demo has really run: every table filled, every trial done, base models differ as their pretraining says."""

import sys
from pathlib import Path

import polars as pl

folder = Path(sys.argv[1])
tables = {path.stem: pl.read_parquet(path) for path in (folder / "tables").glob("*.parquet")}
later = {"checkpoint_measures", "pair_measures"}  # filled by measures that do not exist yet
empty = {name for name, table in tables.items() if table.is_empty()} - later
assert not empty, f"empty tables: {empty}"
trials = tables["trials"]
assert (trials["status"] == "succeeded").all(), trials.filter(pl.col("status") != "succeeded")

scores = tables["scores"].filter("is_primary").join(trials, on="trial_id")
baseline = scores.filter("is_baseline").select("base_model", "eval_id", base="value")
last = scores.filter(~pl.col("is_baseline"), pl.col("epoch") == 3, pl.col("method") == "full")
gains = last.join(baseline, on=["base_model", "eval_id"]).with_columns(gain=pl.col("value") - pl.col("base"))
own = gains.filter(pl.col("dataset") == pl.col("benchmark"))
prepared = {"llama-code": ["code_output", "code_write"], "qwen3-maths": ["arithmetic", "sequences"]}
for base_model, datasets in prepared.items():
    for dataset in datasets:
        cell = own.filter(base_model=base_model, dataset=dataset)
        assert (cell["gain"] > 0.2).all(), cell.select("base_model", "dataset", "base", "value", "gain")
written = baseline.join(scores.select("eval_id", "benchmark", "chance").unique(), on="eval_id")
assert (written.filter(pl.col("chance").is_null())["base"] < 0.1).all(), written

page = folder / "report" / "index.html"
assert page.stat().st_size > 500_000, "the page is not whole"
figures = list((folder / "report").glob("*.png"))
assert len(figures) >= 8 and all(figure.with_suffix(".csv").exists() for figure in figures), figures
print(f"demo: {trials.height} trials, {scores.height} scores, {len(figures)} figures")
