"""The commands around a finished sweep, and the same as Python calls: real processes over real files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_sweeps
import torch
from peft import PeftModel
from tiny_sweeps import World
from transformers import AutoModelForCausalLM, AutoTokenizer

NOTEBOOK = """
import json, sys
from sweep import Sweep

sweep = Sweep(sys.argv[1], out=sys.argv[2])
before, result, after = sweep.plan(), sweep.run(), sweep.status()
print(json.dumps([before, [result.ran, result.failed, result.interrupted, result.tables], after]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(world, results, what the Python calls said): a full and a LoRA trial of two epochs, run from a script."""
    with tiny_sweeps.world(tmp_path_factory.mktemp("commands")) as world:
        out = world.folder / "out"
        yaml = world.write(train={"epochs": 2}, eval_epochs="all", keep_state="last", axes={"method": ["full", "lora"]})
        done = subprocess.run(
            [sys.executable, "-c", NOTEBOOK, str(yaml), str(out)],
            cwd=tiny_sweeps.ROOT,
            env=world.environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        yield world, out, json.loads(done.stdout)


@pytest.fixture
def copy(finished, tmp_path) -> tuple[World, Path]:
    """The same with a copy of the results, to be changed."""
    world, out, _ = finished
    return world, shutil.copytree(out, tmp_path / "copy")


def trial(out: Path, method: str) -> str:
    """Id of the trial with this method."""
    specs = {path.parent.name: json.loads(path.read_text()) for path in out.glob("trials/*/spec.json")}
    return next(i for i, spec in specs.items() if (spec["trial"]["train"] or {}).get("method") == method)


def weights(out: Path, method: str, epoch: int) -> Path:
    return next((out / "trials" / trial(out, method) / "train" / f"epoch-{epoch}").glob("attempts/*/weights"))


# ---------------------------------------------------------------------- looking


def test_the_python_calls_plan_run_and_tell_the_status(finished):
    _, _, (before, (ran, failed, interrupted, tables), after) = finished
    assert before["work_items"]["to_do"] == {"train": 2, "layer_delta": 4, "evaluate": 5, "measure": 1, "all": 12}
    assert before["work_items"]["done"]["all"] == 0
    assert (ran, failed, interrupted) == (12, [], False)
    assert tables["trials"] == 3
    assert after["trials_and_measures"] == {"pending": 0, "running": 0, "succeeded": 4, "failed": 0}
    assert after["running_by"] is None


def test_json_is_one_object_and_nothing_else(finished):
    world, out, _ = finished
    yaml = world.folder / "sweep.yaml"
    plan = world.json("plan", yaml, "--out", out)
    assert plan["work_items"]["to_do"]["all"] == 0
    assert plan["work_items"]["done"]["all"] == 12
    assert plan["basis"] != world.json("plan", yaml, "--out", world.folder / "new")["basis"]
    assert world.json("run", yaml, "--out", out)["ran"] == 0
    assert world.json("status", out)["trials_and_measures"]["succeeded"] == 4
    assert world.json("collect", out)["rows"]["trials"] == 3
    shown = world.json("show", out, trial(out, "lora")[:6])
    assert shown["trial_id"] == trial(out, "lora")
    assert shown["settings"]["lora"]["rank"] == 16
    assert [score["epoch"] for score in shown["scores"] if score["is_primary"]] == [1, 2]


def test_show_gives_the_lm_eval_command_with_paths_that_are_there(finished):
    world, out, _ = finished
    for method, key in (("full", "pretrained"), ("lora", "peft")):
        score = world.json("show", out, trial(out, method))["scores"][0]
        words = score["command"].split("--model_args '")[1].split("'")
        assert Path(json.loads(words[0])[key]) == weights(out, method, 1)
        assert str(world.folder / "plus_test.yaml") in words[1]


def test_show_and_logs_work_for_baselines_and_measures(finished):
    world, out, _ = finished
    baseline = next(p.parent.name for p in out.glob("trials/*/spec.json") if '"dataset": null' in p.read_text())
    [measure] = [path.name for path in (out / "measures").iterdir()]
    assert world.json("show", out, baseline)["settings"] is None
    assert world.json("show", out, measure)["record"]["measures"]["perplexity_completion"] > 1
    assert "done in" in world.sweep("logs", out, measure).stdout


def test_words_for_people_are_short(finished):
    world, out, _ = finished
    plan = world.sweep("plan", world.folder / "sweep.yaml", "--out", out)
    assert "2 trials + 1 baselines, 4 checkpoints" in plan.stdout
    status = world.sweep("status", out)
    assert "0 pending, 0 running, 4 succeeded, 0 failed" in status.stdout
    log = world.sweep("logs", out, trial(out, "full"))
    assert "attempt 1" in log.stdout
    for done in (plan, status, log):
        assert (done.returncode, done.stderr) == (0, "")


def test_collect_makes_lost_tables_anew(copy):
    world, out = copy
    before = tiny_sweeps.files(out / "tables")
    shutil.rmtree(out / "tables")
    assert world.sweep("collect", out).returncode == 0
    assert tiny_sweeps.files(out / "tables") == before


# ---------------------------------------------------------------------- bad requests


def bad_requests(world: World, out: Path) -> dict[str, tuple[list[object], str]]:
    """Name -> the words of a command, and what its one sentence must say."""
    (world.folder / "full folder").mkdir(exist_ok=True)
    (world.folder / "full folder" / "file").touch()
    (world.folder / "bad.yaml").write_text("name: [unclosed")
    misspelt = world.write("misspelt.yaml", benchmark={})
    zero = trial(out, "full")
    [measure] = [path.name for path in (out / "measures").iterdir()]
    return {
        "unknown trial": (["show", out, "zzzz"], "no single trial 'zzzz'"),
        "ambiguous trial": (["logs", out, ""], "no single trial ''"),
        "no sweep": (["status", world.folder / "models"], "is not the folder of a sweep"),
        "no such file": (["run", world.folder / "absent.yaml"], "absent.yaml: cannot be read"),
        "bad YAML": (["plan", world.folder / "bad.yaml"], "bad.yaml: is not valid YAML"),
        "unknown key": (["run", misspelt], "did you mean 'benchmarks'?"),
        "no such epoch": (["export", out, zero, world.folder / "new", "--epoch", 9], "it has those of epochs [1, 2]"),
        "target in use": (["export", out, zero, world.folder / "full folder", "--epoch", 1], "is not an empty folder"),
        "target a file": (
            ["export", out, zero, world.folder / "bad.yaml", "--epoch", 1],
            "bad.yaml is not an empty folder",
        ),
        "a measure": (["export", out, measure, world.folder / "new", "--epoch", 1], "it has no weights"),
        "no cores": (["run", world.folder / "sweep.yaml", "--out", out, "--cpus", 0], "--cpus"),
        "unknown option": (["run", world.folder / "sweep.yaml", "--fast"], "No such option"),
        "unknown command": (["train", world.folder / "sweep.yaml"], "No such command"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "unknown trial",
        "ambiguous trial",
        "no sweep",
        "no such file",
        "bad YAML",
        "unknown key",
        "no such epoch",
        "target in use",
        "target a file",
        "a measure",
        "no cores",
        "unknown option",
        "unknown command",
    ],
)
def test_a_bad_request_is_one_sentence_and_status_2(finished, name):
    world, out, _ = finished
    words, sentence = bad_requests(world, out)[name]
    done = world.sweep(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    if "error: " in done.stderr:  # of options and commands the usage is shown too
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_id_that_begins_two_trials_is_refused(copy):
    world, out = copy
    full = trial(out, "full")
    shutil.copytree(out / "trials" / full, out / "trials" / (full[:8] + "zzzz"))
    done = world.sweep("show", out, full[:8])
    assert done.returncode == 2
    assert f"no single trial '{full[:8]}'" in done.stderr
    assert "2 begin with it" in done.stderr


# ---------------------------------------------------------------------- export


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)("###Question: 3 plus 4\n###Answer:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def base_model(world: World) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(world.folder / "models" / "llama", dtype=torch.float32)


def test_export_gives_a_model_that_transformers_loads(finished, tmp_path):
    world, out, _ = finished
    done = world.sweep("export", out, trial(out, "full"), tmp_path / "model", "--epoch", 2)
    assert (done.returncode, done.stderr) == (0, "")
    exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "model")
    kept = weights(out, "full", 2)
    assert torch.equal(exported, logits(AutoModelForCausalLM.from_pretrained(kept), kept))
    assert not torch.allclose(exported, logits(base_model(world), kept), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


def test_export_gives_an_adapter_that_peft_loads_or_merges_it(finished, tmp_path):
    world, out, _ = finished
    for name, options in (("adapter", []), ("merged", ["--merge"])):
        done = world.sweep("export", out, trial(out, "lora"), tmp_path / name, "--epoch", 2, *options)
        assert (done.returncode, done.stderr) == (0, "")
    adapter = logits(PeftModel.from_pretrained(base_model(world), tmp_path / "adapter"), tmp_path / "adapter")
    kept = weights(out, "lora", 2)
    assert torch.equal(adapter, logits(PeftModel.from_pretrained(base_model(world), kept), kept))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    assert torch.allclose(merged, adapter, atol=1e-5)
    assert not torch.allclose(merged, logits(base_model(world), kept), atol=1e-2)
    assert not list((tmp_path / "merged").glob("adapter*"))


# ---------------------------------------------------------------------- clean


def test_clean_asks_and_does_nothing_without_a_yes(copy):
    world, out = copy
    before = tiny_sweeps.files(out)
    asked = world.sweep("clean", out, "--weights", input="n\n")
    assert asked.returncode == 0
    assert "Remove?" in asked.stdout
    nobody = world.sweep("clean", out, "--weights", input="")
    assert nobody.returncode == 2
    assert "--yes" in nobody.stderr
    assert tiny_sweeps.files(out) == before


def test_clean_removes_what_was_said_and_keeps_results_and_tables(copy):
    world, out = copy

    def holds(name: str) -> int:
        return len([path for path in out.rglob(name) if path.is_dir()])

    results = tiny_sweeps.files(out / "tables")
    assert (holds("weights"), holds("state")) == (4, 2)
    left_over = out / "trials" / trial(out, "full") / "train" / "epoch-1" / "attempts" / "99"
    left_over.mkdir()
    (left_over / "half").write_text("written")

    assert world.sweep("clean", out, "--yes").returncode == 0
    assert (holds("weights"), holds("state")) == (4, 2)
    assert not left_over.exists()
    assert not (out / "cache").exists()
    assert world.sweep("clean", out, "--states", "--yes").returncode == 0
    assert (holds("weights"), holds("state")) == (4, 0)
    cleaned = world.sweep("clean", out, "--weights", "--yes")
    assert "freed" in cleaned.stdout
    assert holds("weights") == 0
    assert not list(out.rglob("*.removed"))

    assert world.sweep("collect", out).returncode == 0
    assert tiny_sweeps.files(out / "tables") == results
    plan = world.json("plan", world.folder / "sweep.yaml", "--out", out)
    assert plan["work_items"]["done"]["all"] == 12
    gone = world.sweep("export", out, trial(out, "full"), out / "model", "--epoch", 1)
    assert gone.returncode == 2
    assert "it has none" in gone.stderr


def test_clean_removes_trials_the_yaml_asks_for_no_more_only_when_told(copy):
    world, out = copy
    full, lora = trial(out, "full"), trial(out, "lora")
    (out / "sweep.yaml").write_text((out / "sweep.yaml").read_text().replace("- lora\n", ""))
    assert world.sweep("clean", out, "--weights", "--yes").returncode == 0
    assert (out / "trials" / lora).is_dir()
    assert weights(out, "lora", 2).is_dir()
    assert world.sweep("clean", out, "--orphans", "--yes").returncode == 0
    assert not (out / "trials" / lora).exists()
    assert (out / "trials" / full / "spec.json").exists()
    assert world.json("collect", out)["rows"]["trials"] == 2


def test_results_can_be_looked_at_where_their_sources_are_gone(copy):
    world, out = copy
    data = world.folder / "plus.jsonl"
    hidden = data.rename(world.folder / "hidden")
    try:
        assert world.json("status", out)["failures"] == []
        assert world.json("show", out, trial(out, "full"))["status"] == "succeeded"
        assert world.sweep("collect", out).returncode == 0
        assert world.sweep("clean", out, "--yes").returncode == 0
        refused = world.sweep("run", out)
        assert refused.returncode == 2
        assert "no such file" in refused.stderr
    finally:
        hidden.rename(data)


def test_clean_keeps_finished_work_that_nobody_has_committed_yet(copy):
    world, out = copy
    unit = out / "trials" / trial(out, "full") / "train" / "epoch-1"
    before = (unit / "result.json").read_text()
    (unit / "result.json").unlink()
    assert world.sweep("clean", out, "--yes").returncode == 0
    assert (unit / "result.json").read_text() == before
