"""Planted effects come back exactly; what is missing stays missing; wrong input is refused in a sentence."""

import ast
import subprocess
import sys
from pathlib import Path

import analysis_tables as planted
import polars as pl
import pyarrow.parquet as pq
import pytest

from analysis import effects, findings, layers, predictors, tables
from sweep.schema import SchemaError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> tables.Tables:
    return tables.load(planted.write(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(scope="module")
def gains(sweep) -> pl.DataFrame:
    return tables.gains(sweep)


@pytest.fixture(scope="module")
def found(sweep) -> findings.Findings:
    return findings.find(sweep)


def test_every_gain_is_the_planted_one(gains):
    assert len(gains) == (3 * 6 * 2 + 2 - 1) * 3 * 6  # cells x methods, two more seeds, one failed; epochs; benchmarks
    for row in gains.drop_nulls("gain").iter_rows(named=True):
        expected = planted.gained(
            row["base_model"], row["dataset"], row["benchmark"], row["method"], row["epoch"], row["seed"]
        )
        assert row["gain"] == pytest.approx(expected / planted.NUM_ITEMS)
        assert row["baseline"] == pytest.approx(planted.baseline_correct(row["base_model"], row["benchmark"]) / 50)


def test_missing_score_stays_null_and_never_becomes_zero(gains, found):
    model, dataset, method, benchmark = planted.UNSCORED
    here = (pl.col("base_model") == model) & (pl.col("dataset") == dataset) & (pl.col("benchmark") == benchmark)
    row = gains.filter(here & (pl.col("method") == method) & (pl.col("epoch") == planted.EPOCHS)).row(0, named=True)
    assert (row["score"], row["gain"], row["stderr"], row["stderr_kind"]) == (None, None, None, None)
    assert row["baseline"] is not None
    cell = found.cells.filter(here).row(0, named=True)
    assert (cell["score"], cell["estimate"], cell["low"], cell["n"]) == (None, None, None, 0)
    mean = found.models.filter((pl.col("dataset") == dataset) & (pl.col("benchmark") == benchmark)).row(0, named=True)
    assert mean["n"] == 2
    assert mean["estimate"] == pytest.approx((0.08 + 0.10) / 2)


def test_error_of_a_gain_is_paired_item_by_item(gains):
    # 14 more items right and none lost, of 50: the differences are 14 ones and 36 zeros.
    row = gains.filter(
        (pl.col("trial_id") == "llama-code-functions-full-0")
        & (pl.col("epoch") == 3)
        & (pl.col("benchmark") == "code-exact")
    ).row(0, named=True)
    assert row["gain"] == pytest.approx(14 / 50)
    assert row["stderr"] == pytest.approx((0.28 * 0.72 / 49) ** 0.5)
    assert (row["stderr_kind"], row["paired_items"]) == ("paired", 50)


def test_error_without_items_is_unpaired_and_says_so(gains):
    row = gains.filter(pl.col("epoch") == 1).drop_nulls("gain").row(0, named=True)
    errors = [share * (1 - share) / 50 for share in (row["score"], row["baseline"])]
    assert row["stderr"] == pytest.approx(sum(errors) ** 0.5)
    assert row["stderr_kind"] == "unpaired"


def test_gain_joins_only_the_same_evaluation_and_base_content(tmp_path):
    def change(rows):
        for score in rows["scores"]:
            if score["trial_id"] == "base-llama-code" and score["benchmark"] == "recall":
                score["eval_id"] = "another-id"  # the baseline was evaluated in another way
        for trial in rows["trials"]:
            if trial["trial_id"] == "base-neox-general":
                trial["base_digest"] = "older-weights"

    frame = tables.gains(tables.load(planted.write(tmp_path, change)))
    llama = frame.filter(pl.col("base_model") == "llama-code")
    assert llama.filter(pl.col("benchmark") == "recall")["gain"].null_count() == 8 * 3 + 6 * 3
    assert llama.filter(pl.col("benchmark") != "recall")["gain"].null_count() == 0
    assert frame.filter(pl.col("base_model") == "neox-general")["gain"].drop_nulls().is_empty()


def test_two_evaluations_of_a_benchmark_are_told_apart(tmp_path):
    def change(rows):
        more = [s | {"eval_id": "four-shots", "num_fewshot": 4} for s in rows["scores"] if s["benchmark"] == "recall"]
        rows["scores"] += more

    frame = tables.gains(tables.load(planted.write(tmp_path, change)))
    names = set(frame["benchmark"])
    assert {"recall (0-shot)", "recall (4-shot)"} < names
    assert "recall" not in names


def test_reference_setting_covers_most_and_a_failure_leaves_a_hole(tmp_path, sweep):
    chosen = effects.reference(sweep.trials.collect())
    assert set(chosen["method"]) == {"full"}
    assert len(chosen) == 3 * 6 + 2

    def change(rows):
        for trial in rows["trials"]:
            if trial["trial_id"] == "llama-code-sums-full-0":
                trial["status"] = "failed"
        rows["scores"] = [s for s in rows["scores"] if s["trial_id"] != "llama-code-sums-full-0"]

    cells = findings.find(tables.load(planted.write(tmp_path, change))).cells
    assert cells.filter((pl.col("base_model") == "llama-code") & (pl.col("dataset") == "sums")).is_empty()


def test_trials_no_longer_in_the_plan_are_left_out(tmp_path):
    def change(rows):
        for trial in rows["trials"]:
            trial["in_plan"] = trial["dataset"] != "sums"

    assert "sums" not in set(findings.find(tables.load(planted.write(tmp_path, change))).cells["dataset"])


def test_lora_is_compared_in_pairs_and_untied_settings_are_named(found):
    assert found.tied == ["learning_rate"]
    assert found.pairs["difference"].to_list() == pytest.approx([-planted.LORA_COST / 50] * len(found.pairs))
    overall = effects.lora_against_full(found.pairs).filter(pl.col("benchmark").is_null()).row(0, named=True)
    assert overall["estimate"] == pytest.approx(-0.04)
    assert (overall["n"], overall["low"], overall["pairs"]) == (3, None, 17 * 6 - 1)
    assert overall["note"].startswith("too few: 3 base models")


def test_lora_pairs_hold_shared_settings_equal(tmp_path):
    def change(rows):
        for trial in rows["trials"]:
            if trial["method"] == "lora":
                trial["weight_decay"] = 0.1 if trial["dataset"] == "sums" else 0.0

    pairs = findings.find(tables.load(planted.write(tmp_path, change))).pairs
    assert "sums" not in set(pairs["dataset"])  # no full tuning with this weight decay
    assert "facts" in set(pairs["dataset"])


def test_gain_by_epoch_and_held_out_loss(found):
    line = found.by_epoch.filter(
        (pl.col("base_model") == "qwen-maths") & (pl.col("dataset") == "sums") & (pl.col("method") == "full")
    )
    mean = sum(planted.gained("qwen-maths", "sums", b) for b in planted.BENCHMARKS) / 6
    assert line["epoch"].to_list() == [1, 2, 3]
    assert line["estimate"].to_list() == pytest.approx([(mean - 4) / 50, (mean - 2) / 50, mean / 50])
    assert found.held_out["epoch"].unique().sort().to_list() == [1, 2, 3]
    assert found.held_out.filter(pl.col("epoch") == 1)["held_out_loss_nats"].min() == pytest.approx(1.39788, abs=1e-4)


def test_spread_of_seeds_is_the_noise(found):
    assert found.noise.select("base_model", "dataset").unique().rows() == [planted.REPEATED]
    assert found.noise["n"].to_list() == [3] * 6
    assert found.noise["seed_sd"].to_list() == pytest.approx([2 / 50] * 6)
    assert effects.pooled_noise(found.noise) == pytest.approx(2 / 50)
    uneven = pl.DataFrame({"n": [2, 3], "seed_sd": [3.0, 0.0]})  # 1 and 2 degrees of freedom
    assert effects.pooled_noise(uneven) == pytest.approx((9 / 3) ** 0.5)
    assert effects.pooled_noise(uneven.clear()) is None


def test_perplexity_ranks_against_gain_within_base_models(found):
    own = found.correlations.filter(pl.col("measure") == predictors.MAIN_MEASURE)
    assert own.filter(pl.col("benchmark") == "code-exact")["estimate"].to_list() == pytest.approx([-1] * 3)
    over = own.filter(pl.col("base_model").is_null()).row(0, named=True)
    assert over["estimate"] < -0.3
    assert (over["n"], over["low"]) == (3, None)
    assert over["note"].startswith("too few")
    assert over["p_smallest"] == pytest.approx(2 / 720)
    constant = found.correlations.filter((pl.col("measure") == "num_examples") & pl.col("base_model").is_not_null())
    assert constant["estimate"].null_count() == len(constant)
    assert set(constant["note"]) == {"one side does not vary"}


def test_permutation_test_agrees_with_the_mean_it_tests(found):
    # Without holes, the statistic under the identity is the reported mean; extreme planted ranks give the
    # least p.
    cells = found.averaged.filter(pl.col("benchmark") == "code-exact").with_columns(
        estimate=-pl.col("dataset").replace_strict(
            {d: float(i) for i, d in enumerate(planted.DATASETS)}, return_dtype=pl.Float64
        )
    )
    table = predictors.correlations(cells, found.tables.data_measures.collect())
    row = table.filter((pl.col("measure") == predictors.MAIN_MEASURE) & pl.col("base_model").is_null()).row(
        0, named=True
    )
    assert row["estimate"] == pytest.approx(-1)
    assert row["p_permutation"] == pytest.approx(row["p_smallest"])


def test_relative_change_of_a_block_and_its_correlation_by_depth(found):
    profile = layers.profile(found.layers).filter(
        (pl.col("base_model") == "neox-general") & (pl.col("method") == "full")
    )
    expected = [
        sum(planted.relative_norm("neox-general", d, "full", layer) for d in planted.DATASETS) / 6 for layer in range(6)
    ]
    assert profile["estimate"].to_list() == pytest.approx(expected)
    assert profile["estimate"].is_sorted()
    bins = layers.by_depth(found.layer_correlations.filter(pl.col("method") == "full"))
    assert bins.sort("estimate")["depth_from"][-1] in (0.2, 0.4, 0.6)  # planted: in the middle
    assert bins["low"].null_count() == len(bins)


def test_stacked_tensors_of_a_block_count_by_their_size(tmp_path):
    def change(rows):
        for delta in rows["layer_deltas"]:
            small = delta["module"] == "mlp.up_proj"
            delta["base_norm"], delta["delta_norm"] = (3.0, 0.0) if small else (4.0, 1.0)

    blocks = findings.find(tables.load(planted.write(tmp_path, change))).layers
    assert blocks["relative_norm"].to_list() == pytest.approx([0.2] * len(blocks))  # sqrt(0 + 1) / sqrt(9 + 16)


def test_benchmarks_on_other_scales_are_not_averaged(tmp_path):
    def change(rows):
        for score in rows["scores"]:
            if score["benchmark"] == "recall" and score["value"] is not None:
                score["value"] *= 10
            if score["benchmark"] == "reading":
                score["higher_is_better"] = False

    found = findings.find(tables.load(planted.write(tmp_path, change)))
    assert found.left_out == ["reading", "recall"]
    assert not set(found.averaged["benchmark"]) & {"reading", "recall"}
    assert "recall" in set(found.cells["benchmark"])


# Wrong input


def test_wrong_schema_version_is_refused_in_a_sentence(tmp_path):
    path = planted.write(tmp_path) / "tables" / "scores.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"sweep_schema_version": b"99"}), path)
    with pytest.raises(SchemaError, match=r"scores.parquet has sweep schema version 99, this code reads \d+; rebuild"):
        tables.load(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "trials.parquet").unlink(), "no tables in .*; write them with"),
        (
            lambda folder: (folder / "items.parquet").write_bytes(b"PAR1 cut off"),
            "not a readable Parquet file; rebuild",
        ),
        (
            lambda folder: (folder / "items.parquet").write_bytes((folder / "scores.parquet").read_bytes()),
            "items.parquet has sweep table scores, this code reads items",
        ),
    ],
)
def test_bad_tables_are_refused_in_a_sentence(tmp_path, spoil, message):
    spoil(planted.write(tmp_path) / "tables")
    with pytest.raises(SchemaError, match=message):
        tables.load(tmp_path)


def test_no_folder_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(SchemaError, match="no folder .*nowhere"):
        tables.load(tmp_path / "nowhere")


def test_a_table_that_is_not_written_yet_has_no_rows(tmp_path):
    planted.write(tmp_path, lambda rows: rows.update(items=None, steps=None))
    sweep = tables.load(tmp_path / "tables")  # the folder of the tables themselves will do
    assert sweep.items.collect().is_empty()
    assert sweep.name == tmp_path.name
    assert set(tables.gains(sweep).drop_nulls("gain")["stderr_kind"]) == {"unpaired"}


# The house


def test_analysis_imports_nothing_of_sweep_but_its_schema():
    for path in (ROOT / "analysis").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                assert not name.startswith("sweep") or name.startswith("sweep.schema"), f"{path.name}: {name}"
                assert not name.startswith(("altair", "vl_convert")) or path.name == "figures.py", path.name
                assert not name.startswith(("torch", "ray", "transformers")), path.name


def test_importing_the_analysis_does_not_import_what_trains():
    code = "import sys, analysis.report; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
