"""The page says what the tables hold, and where they hold nothing, why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import analysis_tables as planted
import pytest

from analysis import report

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return report.build(planted.write(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Pictures and the script bundle are made once, by `built`; the other pages are read for their text."""
    if "built" not in request.fixturenames:
        monkeypatch.setattr("analysis.figures.png", lambda whole: b"")
        monkeypatch.setattr("analysis.figures.javascript", lambda: "")


def text_of(path: Path) -> str:
    """What a reader sees, without markup, style and scripts."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", path.read_text(), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ").split())


def page_of(folder: Path, change=lambda rows: None) -> str:
    return text_of(report.build(planted.write(folder, change)))


def test_summary_names_the_planted_effects(built):
    text = text_of(built)
    assert "functions helped code-exact most, by +30.0 points" in text or (
        "functions helped code-choice most, by +30.0 points" in text
    )
    assert "Perplexity predicted the gain, the lower the better: mean rank correlation −0.38" in text
    assert "LoRA gained 4.0 points less than full tuning" in text
    assert "A change of seed alone moves a gain by 4.0 points (SD, from 3 trainings of 1 cell)" in text
    assert "3 base models are too few for intervals" in text


def test_failed_trials_are_listed_with_their_message(built):
    assert "loss is nan at step 12; lower the learning rate &lt;5e-3&gt;" in text_of(built)


def test_each_figure_has_its_csv_and_png_beside_the_page(built):
    names = set(re.findall(r'id="figure-(\w+)"', built.read_text()))
    assert names == {
        "gain_mean", "gain", "scores", "perplexity", "predictors", "layer_change", "layer_gain", "methods",
        "gain_by_epoch", "held_out_by_epoch",
    }  # fmt: skip
    for name in names:
        assert (built.parent / f"{name}.csv").read_text().count("\n") > 1
        assert (built.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_page_holds_its_scripts_once_and_names_no_outside_address_to_load(built):
    page = built.read_text()
    assert page.count("window.vegaEmbed=") == 1
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.S)  # inside, there is HTML that makes tooltips
    assert not re.findall(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="(?!data:)', page)


def test_same_tables_give_the_same_page(tmp_path):
    first = report.build(planted.write(tmp_path)).read_bytes()
    assert report.build(tmp_path).read_bytes() == first


def test_names_never_become_markup(tmp_path):
    evil = "</script><b>x</b>"

    def change(rows):
        for table in rows.values():
            for row in table:
                if row.get("dataset") == "facts":
                    row["dataset"] = evil

    path = report.build(planted.write(tmp_path, change))
    page = path.read_text()
    assert evil not in page
    pattern = r'<script type="application/json" data-chart="[^"]+">(.*?)</script>'
    specs = re.findall(pattern, page, flags=re.S)
    assert len(specs) > 10
    assert any(evil in json.dumps(json.loads(spec)) for spec in specs)


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        pytest.param(
            lambda rows: [rows[name].clear() for name in ("scores", "items")],
            ["No trained model has been scored yet", "there is no gain to hold it against"],
            id="no scores",
        ),
        pytest.param(
            lambda rows: rows.update(
                scores=[s for s in rows["scores"] if not s["trial_id"].startswith("base-")],
                trials=[t for t in rows["trials"] if not t["is_baseline"]],
            ),
            ["no base model was evaluated untrained", "there is no gain to hold it against", "No gains yet"],
            id="no baseline",
        ),
        pytest.param(
            lambda rows: rows.update(
                scores=[s for s in rows["scores"] if s["trial_id"] != "base-qwen-maths"]
            ),
            ["No baseline, so no gain: qwen-maths", "Only one base model"],
            id="one baseline missing",
        ),
        pytest.param(
            lambda rows: rows.update(
                trials=[t for t in rows["trials"] if t["base_model"] == "llama-code"],
                data_measures=[m for m in rows["data_measures"] if m["base_model"] == "llama-code"],
            ),
            ["Only one base model", "nothing says whether another would agree"],
            id="one base model",
        ),
        pytest.param(
            lambda rows: rows.update(
                trials=[t for t in rows["trials"] if t["dataset"] in (None, "facts", "sums")]
            ),
            ["2 datasets per base model, and a rank correlation needs 4", "fewer than 4 datasets have both"],
            id="two datasets",
        ),
        pytest.param(
            lambda rows: rows.update(trials=[t for t in rows["trials"] if t["method"] != "lora"]),
            ["Only full tuning was trained and scored, so there is nothing to compare"],
            id="one method",
        ),
        pytest.param(
            lambda rows: rows.update(trials=[t for t in rows["trials"] if not t["seed"]]),
            ["No cell was trained with two seeds"],
            id="one seed",
        ),
        pytest.param(
            lambda rows: rows.update(
                data_measures=None, layer_deltas=None, steps=None, attempts=None, items=None
            ),
            ["the perplexity of the datasets was not measured", "No weight changes have been measured yet",
             "No held-out loss was logged"],
            id="only trials and scores",
        ),
        pytest.param(
            lambda rows: [table.clear() for table in rows.values()],
            ["No trained model has been scored yet", "No trials"],
            id="empty tables",
        ),
        pytest.param(
            lambda rows: rows.update(scores=[s for s in rows["scores"] if s["epoch"] in (0, 3)]),
            ["No trial has gains after more than one epoch"],
            id="one epoch",
        ),
        pytest.param(
            lambda rows: [t.update(dataset_kind=None) for t in rows["trials"]]
            and [s.update(benchmark_kind=None, num_items=None, stderr=None) for s in rows["scores"]],
            ["functions helped", "Mean gain"],
            id="no kinds",
        ),
        pytest.param(
            lambda rows: [
                s.update(value=s["value"] * 10) for s in rows["scores"] if s["benchmark"] == "recall"
            ],
            ["not a share of items or lower is better: recall"],
            id="another scale",
        ),
    ],
)  # fmt: skip
def test_a_part_that_is_missing_says_why(tmp_path, monkeypatch, change, sentences):
    two = {name: planted.BASE_MODELS[name] for name in ("llama-code", "qwen-maths")}
    monkeypatch.setattr(planted, "BASE_MODELS", two)
    text = page_of(tmp_path, change)
    for sentence in sentences:
        assert sentence in text
    assert "None" not in text and "nan points" not in text


def test_four_base_models_get_an_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "BASE_MODELS", planted.BASE_MODELS | {"olmo-general": 4})
    text = page_of(tmp_path)
    # +28, +30, +32, +34: a t interval with 3 degrees of freedom.
    assert "functions helped code-choice most, by +31.0 points" in text
    assert "(95 % interval +26.9 to +35.1, 4 base models)" in text
    assert "too few for intervals" not in text


# The command


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "analysis", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_command_prints_where_the_page_is(tmp_path):
    def small(rows):
        rows["trials"] = [t for t in rows["trials"] if t["is_baseline"]]

    done = command("report", str(planted.write(tmp_path, small)))
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()) == tmp_path / "report" / "index.html"


def test_command_refuses_a_folder_without_tables(tmp_path):
    done = command("report", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no tables in ") and done.stderr.count("\n") == 1
    assert "python -m sweep collect" in done.stderr
