"""Every mistake a YAML can hold is one sentence that names file, key, value and way out."""

import json
from pathlib import Path

import pytest

from sweep import config
from sweep.config import ConfigError
from sweep.spec import SweepSpec

TOP = "name: test\nbase_models: {m: {tiny: llama-code}}\ndatasets: {d: {tiny: code_output}}\n"


def parse(more: str, top: str = TOP) -> SweepSpec:
    return config.parse(top + more + "\n", Path("sweep.yaml"))


def refusal(more: str, top: str = TOP) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(more, top)
    text = str(refused.value)
    assert text.startswith("sweep.yaml: ")
    assert "\n" not in text
    return text.removeprefix("sweep.yaml: ")


def model_folder(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    return folder


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("datasts: 1", "unknown key 'datasts' in the top level; did you mean 'datasets'?"),
        ("train: {learning_rte: 1}", "unknown key 'learning_rte' in train; did you mean 'learning_rate'?"),
        ("train: {lora: {rnk: 4}}", "unknown key 'rnk' in train.lora; did you mean 'rank'?"),
        ("train: {micro_batch_size: 4}", "unknown key 'micro_batch_size' in train; did you mean"),
        ("axes: {learning_rte: [1]}", "unknown key 'learning_rte' in axes; did you mean 'learning_rate'?"),
        ("axes: {lora.rnk: [4]}", "unknown key 'lora.rnk' in axes; did you mean 'lora.rank'?"),
        ("zip: [{sed: [1]}]", "unknown key 'sed' in zip[0]; did you mean 'seed'?"),
        ("exclude: [{seed: 1}, {metod: full}]", "unknown key 'metod' in exclude[1]; did you mean 'method'?"),
        ("also: [{axis: {}}]", "unknown key 'axis' in also.0; did you mean 'axes'?"),
        ("also: [{axes: {sed: [1]}}]", "unknown key 'sed' in also[0].axes; did you mean 'seed'?"),
        ("also: [{exclude: [{sed: 1}]}]", "unknown key 'sed' in also[0].exclude[0]; did you mean 'seed'?"),
        ("resources: {trian: {}}", "unknown key 'trian' in resources; did you mean 'train'?"),
        ("resources: {train: {cpu: 1}}", "unknown key 'cpu' in resources.train; did you mean 'cpus'?"),
        ("execution: {xyz: 1}", "unknown key 'xyz' in execution; known: attention, eval_batch_size, "),
        ("benchmarks: {b: {taks: x}}", "unknown key 'taks' in benchmarks.b; did you mean 'task'?"),
        ("measure_only: [{base_model: m}]", "key 'dataset' is missing in measure_only.0"),
    ],
)
def test_an_unknown_or_missing_key_is_named_with_the_key_that_was_meant(yaml, text):
    assert refusal(yaml).startswith(text)


@pytest.mark.parametrize(
    ("yaml", "key", "line"),
    [
        ("name: again", "name", 4),
        ("train:\n  seed: 1\n  epochs: 2\n  seed: 3", "seed", 7),
        ("benchmarks:\n  b: {task: x}\n  b: {task: y}", "b", 6),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(yaml, key, line):
    assert refusal(yaml) == f"key '{key}' is given twice (line {line}); keep one of them"


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("yaml", "setting", "value"),
    [
        ("train: {learning_rate: 1e-5}", "learning_rate", 1e-5),
        ("train: {learning_rate: 2E-4}", "learning_rate", 2e-4),
        ("train: {learning_rate: .5}", "learning_rate", 0.5),
        ("train: {learning_rate: 1}", "learning_rate", 1.0),
        ("train: {num_examples: 2e4}", "num_examples", 20_000),
        ("train: {num_examples: 20_000}", "num_examples", 20_000),
        ("train: {num_examples: null}", "num_examples", None),
        ("train: {num_examples: ~}", "num_examples", None),
        ("train: {lora: {rslora: true}}", "lora.rslora", True),
        ("train: {lora: {alpha: 8}}", "lora.alpha", 8.0),
        ("train: {trained_layers: 0-3}", "trained_layers", "0-3"),
    ],
)
def test_numbers_are_read_as_the_numbers_they_are(yaml, setting, value):
    read = parse(yaml).train.value(setting)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("word", ["no", "off", "012", "1e", "yes", "2024-01-01", "0x10", "1:30", ".nan"])
def test_words_that_only_look_like_values_stay_text(word):
    sweep = parse(f"benchmarks: {{b: {{task: {word}}}}}\naxes: {{template: ['{{prompt}}{word}{{completion}}']}}")
    assert sweep.benchmarks["b"].task == word


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("train: {learning_rate: fast}", 'train.learning_rate is "fast": Input should be a valid number'),
        ("train: {learning_rate: '1e-5'}", 'train.learning_rate is "1e-5": Input should be a valid number'),
        (
            "train: {global_batch_size: 012}",
            'train.global_batch_size is "012": Input should be a valid integer',
        ),
        ("train: {epochs: 2.5}", "train.epochs is 2.5: Input should be a valid integer"),
        ("train: {epochs: true}", "train.epochs is true: Input should be a valid integer"),
        ("train: {seed: -1}", "train.seed is -1: Input should be greater than or equal to 0"),
        ("train: {learning_rate: 1e999}", "train.learning_rate is Infinity: Input should be a finite number"),
        ("train: 5", "train is 5: Input should be an object"),
        ("measure: no", 'measure is "no": Input should be a valid boolean'),
        ("keep: some", "keep is \"some\": Input should be 'all', 'last' or 'none'"),
        ("eval_epochs: lst", "eval_epochs is \"lst\": Input should be 'last' or 'all', or: "),
        (
            "resources: {train: {gpus: -1}}",
            "resources.train.gpus is -1: Input should be greater than or equal",
        ),
        ("benchmarks: {b: {}}", "benchmarks.b is {}: give exactly one of task, path, tiny (given: none)"),
        ("benchmarks: {b: {path: 5}}", "benchmarks.b.path is 5: Input should be a valid string"),
        (
            "train: {template: hello}",
            'train is {"template": "hello"}: template must contain {prompt} exactly',
        ),
        ("train: {trained_layers: all}", 'train.trained_layers is "all": String should match pattern'),
        ("axes: {seed: 3}", "axes.seed is 3: must be a list"),
        ("axes: {seed: []}", "axes.seed is []: must be a list"),
        ("axes: [seed]", 'axes is ["seed"]: must be a mapping of settings'),
        ("axes: {seed: [1, x]}", 'axes.seed: seed is "x": Input should be a valid integer'),
        (
            "axes: {lora.rank: [0]}",
            "axes.lora.rank: lora.rank is 0: Input should be greater than or equal to 1",
        ),
        ("exclude: [{seed: x}]", 'exclude[0].seed: seed is "x": Input should be a valid integer'),
        ("also: [{axes: {seed: [x]}}]", 'also[0].axes.seed: seed is "x": Input should be a valid integer'),
        (
            "zip: [{seed: [1, 2], epochs: [1]}]",
            "zip[0] zips lists of different lengths [1, 2]; make them equal",
        ),
        ("axes: {seed: [1]}\nzip: [{seed: [1]}]", "axes and zip vary 'seed' twice; keep one of them"),
        ("zip: 5", "zip is 5: Input should be a valid array"),
        ("exclude: {seed: 1}", 'exclude is {"seed": 1}: Input should be a valid array'),
        ("also: [3]", "also.0 is 3: Input should be an object"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_it_should_be(yaml, text):
    assert refusal(yaml).startswith(text)


# ---------------------------------------------------------------------- names and paths


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        (
            "axes: {base_model: [mm]}",
            "axes.base_model has 'mm', which is not in this YAML; did you mean 'm'?",
        ),
        ("axes: {base_model: [[m]]}", "axes.base_model has '['m']', which is not in this YAML"),
        (
            "exclude: [{dataset: other}]",
            "exclude[0].dataset has 'other', which is not in this YAML; known: d",
        ),
        (
            "measure_only: [{base_model: m, dataset: other}]",
            "measure_only[0].dataset is 'other': not in this YAML; known: d",
        ),
        (
            "benchmarks: {b: {tiny: code_outpt_test}}",
            "benchmarks.b.tiny is 'code_outpt_test': no such embedded one; did you mean 'code_output_test'?",
        ),
    ],
)
def test_a_name_that_is_nowhere_is_refused_with_the_names_there_are(yaml, text):
    assert refusal(yaml).startswith(text)


def test_unknown_embedded_models_and_datasets_are_refused():
    top = "name: test\nbase_models: {m: {tiny: llama-cod}}\ndatasets: {d: {tiny: code_output}}\n"
    assert refusal("", top) == ("base_models.m.tiny is 'llama-cod': no such embedded one; did you mean 'llama-code'?")
    top = "name: test\nbase_models: {m: {tiny: llama-code}}\ndatasets: {d: {tiny: code_outputs}}\n"
    assert "datasets.d.tiny is 'code_outputs': no such embedded one; did you mean 'code_output'?" in refusal("", top)


@pytest.mark.parametrize("part", ["other", "mix"])
def test_a_mixture_is_made_of_plain_datasets_of_the_same_yaml(part):
    top = "name: test\nbase_models: {m: {tiny: llama-code}}\n"
    text = refusal(f"datasets: {{d: {{tiny: code_output}}, mix: {{mixture: {{d: 1, {part}: 2}}}}}}", top)
    assert text == f"datasets.mix.mixture names '{part}', which is not a plain dataset here; known: d"


def test_relative_paths_start_at_the_yaml_and_become_absolute(tmp_path, monkeypatch):
    model_folder(tmp_path / "model", "config.json", "tokenizer.json")
    for name in ("a.jsonl", "b.jsonl", "task.yaml"):
        (tmp_path / name).write_text("")
    (tmp_path / "sweep.yaml").write_text(
        "name: test\nbase_models: {m: {path: model}}\nbenchmarks: {b: {path: task.yaml}}\n"
        "datasets: {d: {path: a.jsonl}, e: {path: ['*.jsonl', b.jsonl]}}\n"
    )
    monkeypatch.chdir("/")
    sweep = config.load(tmp_path / "sweep.yaml")
    assert sweep.base_models["m"].path == str(tmp_path / "model")
    assert sweep.datasets["d"].path == str(tmp_path / "a.jsonl")
    assert sweep.datasets["e"].path == (str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl"))
    assert sweep.benchmarks["b"].path == str(tmp_path / "task.yaml")


@pytest.mark.parametrize("name", ["d[1].jsonl", "deep/er/d.jsonl"])
def test_a_file_is_found_by_its_very_name_and_by_a_glob_through_folders(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    assert config.matching_files(str(tmp_path / name)) == [str(tmp_path / name)]
    assert config.matching_files(str(tmp_path / "**" / "*.jsonl")) == [str(tmp_path / name)]
    assert config.matching_files(str(tmp_path / "*.json")) == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            {"datasets": {"d": {"path": "no.jsonl"}}},
            "datasets.d.path is 'no.jsonl': no such file ({at}/no.jsonl)",
        ),
        ({"datasets": {"d": {"path": ["no*.jsonl"]}}}, "datasets.d.path is 'no*.jsonl': no such file"),
        (
            {"base_models": {"m": {"path": "nowhere"}}},
            "base_models.m.path is 'nowhere': no model directory there",
        ),
        (
            {"base_models": {"m": {"path": "without_config"}}},
            "base_models.m.path is 'without_config': no model directory there (no {at}/without_config/config",
        ),
        (
            {"base_models": {"m": {"path": "without_tokenizer"}}},
            "base_models.m.path is 'without_tokenizer': the directory has no tokenizer",
        ),
        ({"benchmarks": {"b": {"path": "no.yaml"}}}, "benchmarks.b.path is 'no.yaml': no such task YAML"),
    ],
    ids=str,
)
def test_a_path_that_is_not_there_is_refused(tmp_path, source, text):
    model_folder(tmp_path / "without_config", "tokenizer.json")
    model_folder(tmp_path / "without_tokenizer", "config.json", "model.safetensors")
    data = {
        "name": "test",
        "base_models": {"m": {"tiny": "llama-code"}},
        "datasets": {"d": {"tiny": "code_output"}},
    } | source
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    with pytest.raises(ConfigError) as refused:
        config.load(path)
    assert str(refused.value).startswith(f"{path}: {text.format(at=tmp_path)}")


# ---------------------------------------------------------------------- files that are no sweep


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a mapping; start with 'name:', 'base_models:' and 'datasets:'"),
        (b"# only a comment\n", "is not a mapping"),
        (b"- name: test\n", "is not a mapping"),
        (b"just text", "is not a mapping"),
        (b"name: test\n", "key 'base_models' is missing in the top level"),
        (b"name: [test", "is not valid YAML: while parsing a flow sequence"),
        (b"name: a: b", "is not valid YAML: mapping values are not allowed here"),
        (b"name: test\n---\nname: other\n", "is not valid YAML: expected a single document"),
        (b"name: \x00", "is not valid YAML: unacceptable character"),
        (b"\x89PNG\r\n\xff\xfe", "cannot be read ('utf-8' codec can't decode"),
        (b"name: &x [*x]", "has a value that no setting takes"),
        (b"name: !!int abc", "has a value that no setting takes"),
        (b"? [a, b]\n: 3", "has a value that no setting takes"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, content, text):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        config.load(path)
    assert str(refused.value).startswith(f"{path}: {text}")


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be read .*give the path of a sweep's YAML"):
        config.load(tmp_path / name)


@pytest.mark.parametrize("path", sorted(Path(config.__file__).parent.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_every_config_that_ships_is_whole(path):
    assert config.load(path).name
