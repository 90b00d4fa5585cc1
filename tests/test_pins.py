"""Names of a YAML stand for exact content: digests, the lock, the digest cache, the hub out of reach."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweep import config, pins
from sweep.config import ConfigError
from sweep.plan import expand
from sweep.spec import Pins


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty digest cache of this test's own."""
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "cache" / "tiny"))
    new_process(monkeypatch)
    return tmp_path / "cache" / "digests.json"


def new_process(monkeypatch) -> None:
    """Forget what this process remembers of the digest cache."""
    monkeypatch.setattr(pins, "_digests", pins._DigestCache())


def write_sources(folder: Path) -> Path:
    """A sweep's YAML with a model folder, data and a benchmark beside it."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").write_text("{}")
    (model / "merges.txt").write_text("a b")
    (model / "model.safetensors").write_bytes(bytes(1000))
    (model / "README.md").write_text("about")
    (model / "LICENSE.txt").write_text("free")
    (folder / "first.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "second.jsonl").write_text('{"prompt": "c", "completion": "d"}\n')
    (folder / "items.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (folder / "task.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    )
    yaml = folder / "sweep.yaml"
    yaml.write_text(
        "name: test\nbase_models: {m: {path: model}}\n"
        "datasets: {d: {path: '*st.jsonl'}, e: {path: [first.jsonl, second.jsonl]}, mix: {mixture: {d: 1}}}\n"
        "benchmarks: {b: {path: task.yaml}}\n"
    )
    return yaml


def resolve(yaml: Path, *, locked: bool = False, update: bool = False) -> Pins:
    return pins.resolve(config.load(yaml), yaml.with_name("sweep.lock") if locked else None, update)


# ---------------------------------------------------------------------- content


def test_a_moved_folder_keeps_every_digest(tmp_path):
    before = resolve(write_sources(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    task = tmp_path / "there" / "task.yaml"
    task.write_text(task.read_text().replace("/here/", "/there/"))  # lm-eval wants an absolute path there
    assert resolve(tmp_path / "there" / "sweep.yaml") == before


@pytest.mark.parametrize("file", ["README.md", "LICENSE.txt", "picture.png", ".cache/x", ".gitattributes"])
def test_files_that_shape_nothing_do_not_count(tmp_path, file):
    yaml = write_sources(tmp_path)
    before = resolve(yaml)
    (tmp_path / "model" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / file).write_text("other text")
    assert resolve(yaml) == before


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("model/model.safetensors", {"base_models.m"}),
        ("model/config.json", {"base_models.m"}),
        ("model/merges.txt", {"base_models.m"}),
        ("model/extra/weights.bin", {"base_models.m"}),
        ("first.jsonl", {"datasets.d", "datasets.e"}),
        ("second.jsonl", {"datasets.e"}),
        ("items.jsonl", {"benchmarks.b"}),
        ("task.yaml", {"benchmarks.b"}),
    ],
)
def test_a_changed_byte_changes_the_digest_of_its_source_alone(tmp_path, file, changed):
    yaml = write_sources(tmp_path)
    before = resolve(yaml).model_dump()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("a") as opened:
        opened.write("\nnum_fewshot: 3\n")
    after = resolve(yaml).model_dump()
    differing = {f"{g}.{n}" for g in pins.GROUPS for n in before[g] if before[g][n] != after[g][n]}
    assert differing == changed


def test_a_renamed_weight_file_is_another_model(tmp_path):
    yaml = write_sources(tmp_path)
    before = resolve(yaml)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "other.safetensors")
    assert resolve(yaml).base_models != before.base_models


def test_data_behind_a_recursive_glob_count_at_every_depth(tmp_path):
    yaml = write_sources(tmp_path)
    yaml.write_text(yaml.read_text().replace("*st.jsonl", "**/deep*.jsonl"))
    (tmp_path / "a" / "b").mkdir(parents=True)
    deep = tmp_path / "a" / "b" / "deep.jsonl"
    deep.write_text("1")
    before = resolve(yaml).datasets["d"]
    deep.write_text("22")
    assert resolve(yaml).datasets["d"] != before


def test_a_mixture_has_no_content_of_its_own(tmp_path):
    assert set(resolve(write_sources(tmp_path)).datasets) == {"d", "e"}


def test_embedded_sources_are_known_by_their_recipes(tmp_path):
    yaml = tmp_path / "sweep.yaml"
    yaml.write_text(
        "name: test\nbase_models: {m: {tiny: llama-code}, n: {tiny: llama-maths}}\n"
        "datasets: {d: {tiny: code_output}, e: {tiny: arithmetic}}\n"
    )
    found = resolve(yaml)
    assert len({*found.base_models.values(), *found.datasets.values()}) == 4
    assert not (tmp_path / "cache" / "tiny").exists()  # nothing was built


# ---------------------------------------------------------------------- the lock


def test_without_a_lock_nothing_is_written(tmp_path):
    yaml = write_sources(tmp_path)
    resolve(yaml)
    assert not yaml.with_name("sweep.lock").exists()


def test_the_lock_refuses_a_changed_source_until_it_is_accepted(tmp_path):
    yaml = write_sources(tmp_path)
    before = resolve(yaml, locked=True)
    assert resolve(yaml, locked=True) == before
    (tmp_path / "second.jsonl").write_text("other")
    with pytest.raises(ConfigError, match=r"datasets\.e has changed since it was pinned .* --update") as refused:
        resolve(yaml, locked=True)
    assert "\n" not in str(refused.value)
    accepted = resolve(yaml, locked=True, update=True)
    assert accepted.datasets["e"] != before.datasets["e"]
    assert resolve(yaml, locked=True) == accepted


def test_a_moved_source_is_no_changed_source(tmp_path):
    yaml = write_sources(tmp_path)
    before = resolve(yaml, locked=True)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    yaml.write_text(yaml.read_text().replace("path: model", "path: elsewhere"))
    assert resolve(yaml, locked=True) == before


def test_a_name_that_means_another_source_now_is_pinned_anew(tmp_path):
    yaml = write_sources(tmp_path)
    resolve(yaml, locked=True)
    yaml.write_text(yaml.read_text().replace("{path: model}", "{tiny: llama-code}"))
    found = resolve(yaml, locked=True)
    assert resolve(yaml, locked=True) == found


def test_sources_that_left_the_yaml_stay_pinned(tmp_path):
    yaml = write_sources(tmp_path)
    text, before = yaml.read_text(), resolve(yaml, locked=True)
    yaml.write_text(text.replace("benchmarks: {b: {path: task.yaml}}\n", ""))
    resolve(yaml, locked=True)
    (tmp_path / "items.jsonl").write_text("other")
    yaml.write_text(text)
    with pytest.raises(ConfigError, match=r"benchmarks\.b has changed"):
        resolve(yaml, locked=True)
    assert before.benchmarks


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_damaged_lock_is_one_sentence(tmp_path, text):
    yaml = write_sources(tmp_path)
    yaml.with_name("sweep.lock").write_text(text)
    with pytest.raises(ConfigError, match="sweep.lock is not readable .*make it anew with --update"):
        resolve(yaml, locked=True)
    resolve(yaml, locked=True, update=True)
    resolve(yaml, locked=True)


def test_a_pinned_hub_commit_is_taken_without_asking_the_hub(tmp_path):
    yaml = tmp_path / "sweep.yaml"
    yaml.write_text("name: test\nbase_models: {m: {hub: org/no-such}}\ndatasets: {d: {tiny: code_output}}\n")
    pinned = {"source": '{"hub":"org/no-such"}', "digest": "0123abc"}
    yaml.with_name("sweep.lock").write_text(json.dumps({"base_models": {"m": pinned}}))
    assert resolve(yaml, locked=True).base_models == {"m": "0123abc"}


def test_the_hub_out_of_reach_is_one_sentence(tmp_path):
    yaml = tmp_path / "sweep.yaml"
    yaml.write_text("name: test\nbase_models: {m: {hub: org/model}}\ndatasets: {d: {tiny: code_output}}\n")
    code = "import sys; from sweep import config, pins; pins.resolve(config.load(sys.argv[1]))"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(pins.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(yaml)], env=offline, capture_output=True, text=True, check=False
    )
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("sweep.config.ConfigError: base_models.m.hub is 'org/model' at 'main': the hub does not")
    assert "use path: with a local copy" in last


# ---------------------------------------------------------------------- the digest cache


def change_unseen(file: Path) -> None:
    """Other bytes under the same size and time: only a file that is read again shows it."""
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_of_the_same_size_and_time_is_not_read_again(tmp_path, monkeypatch):
    yaml = write_sources(tmp_path)
    before = resolve(yaml)
    weights = tmp_path / "model" / "model.safetensors"
    change_unseen(weights)
    assert resolve(yaml) == before
    new_process(monkeypatch)
    assert resolve(yaml) == before
    os.utime(weights)
    assert resolve(yaml) != before


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"FILE": 5}', '{"FILE": null}', '{"FILE": [1, 2]}'])
def test_a_damaged_cache_costs_time_and_nothing_else(tmp_path, monkeypatch, cache, text):
    yaml = write_sources(tmp_path)
    before = resolve(yaml)
    assert cache.exists()
    cache.write_text(text.replace("FILE", str(tmp_path / "model" / "model.safetensors")))
    new_process(monkeypatch)
    assert resolve(yaml) == before
    assert json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tmp_path):
    yaml = write_sources(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    yaml.write_text(yaml.read_text().replace("benchmarks: {b: {path: task.yaml}}\n", ""))
    assert resolve(yaml) == resolve(yaml)


def test_data_that_vanish_after_the_yaml_was_read_are_one_sentence(tmp_path):
    yaml = write_sources(tmp_path)
    sweep = config.load(yaml)
    (tmp_path / "first.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"datasets\.d\.path matches no file"):
        pins.resolve(sweep)


# ---------------------------------------------------------------------- between planning and reading


def trial_of(yaml: Path):
    """The first trial of the sweep, and its evaluations, as planned now."""
    sweep = config.load(yaml)
    planned = expand(sweep, pins.resolve(sweep)).trials[0]
    return planned.trial, planned.evaluations


@pytest.mark.parametrize(
    ("file", "named"),
    [("model/model.safetensors", "the base model"), ("first.jsonl", "datasets.d"), ("items.jsonl", "benchmarks.b")],
)
def test_a_source_that_changed_since_planning_is_refused_by_the_worker(tmp_path, file, named):
    trial, evaluations = trial_of(write_sources(tmp_path))
    pins.verify(trial, evaluations)
    with (tmp_path / file).open("ab") as stream:
        stream.write(b'{"prompt": "x", "completion": "y"}\n')
    with pytest.raises(pins.SourceChanged, match=f"{named} has changed since this run began") as caught:
        pins.verify(trial, evaluations)
    assert caught.value.kind == "data"


def test_looking_writes_no_lock_also_with_update(tmp_path):
    yaml = write_sources(tmp_path)
    lock = tmp_path / "sweep.lock"
    pins.resolve(config.load(yaml), lock, write=False)
    assert not lock.exists()
    resolve(yaml, locked=True)
    before = lock.read_text()
    (tmp_path / "first.jsonl").write_text('{"prompt": "e", "completion": "f"}\n')
    pins.resolve(config.load(yaml), lock, update=True, write=False)
    assert lock.read_text() == before


def test_the_lock_alone_tells_the_content_when_the_sources_are_gone(tmp_path):
    yaml = write_sources(tmp_path)
    found = resolve(yaml, locked=True)
    text = yaml.read_text()
    for path in ("first.jsonl", "second.jsonl", "task.yaml", "model/config.json"):
        (tmp_path / path).unlink()
    sweep = config.parse(text, yaml, check_files=False)
    assert pins.pinned(sweep, tmp_path / "sweep.lock") == found
    with pytest.raises(ConfigError, match="does not pin 'more'"):
        pins.pinned(
            config.parse(text.replace("b: {path", "more: {path"), yaml, check_files=False), tmp_path / "sweep.lock"
        )
