"""Sources, formats, their errors, and which examples a trial sees."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweep.data import DataError, Example, Turn, load, measured_examples, training_split
from sweep.spec import BaseModelSpec, DatasetSpec, TrainSpec, TrialSpec


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(name: str, num: int) -> list[dict]:
    return [{"prompt": f"{name} {i}", "completion": f"answer {i}"} for i in range(num)]


def pair(prompt: str, completion: str) -> Example:
    return Example((Turn(prompt, completion),))


def trial(datasets: dict[str, DatasetSpec], weights: dict[str, float] | None = None, **train) -> TrialSpec:
    # the digest is the path: each test has its own files
    digests = {name: str(dataset.path) for name, dataset in datasets.items()}
    return TrialSpec(
        base_model=BaseModelSpec(tiny="x"),
        base_digest="x",
        datasets=datasets,
        data_digests=digests,
        weights=weights,
        train=TrainSpec(**train),
    )


# Reading


PAIR_FORMATS = {
    "prompt_completion": {"prompt": "2 + 3", "completion": "5"},
    "instruction": {"instruction": "2 + 3", "output": "5"},
    "instruction, response": {"instruction": "2 + 3", "response": "5"},
    "instruction, input": {"instruction": "2", "input": "+ 3", "output": "5"},
    "instruction, null input": {"instruction": "2 + 3", "input": None, "output": "5"},
    "messages": {"messages": [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5"}]},
}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("form", PAIR_FORMATS)
def test_every_format_is_found_from_its_columns_in_every_kind_of_file(tmp_path, form, ending):
    row = PAIR_FORMATS[form]
    path = tmp_path / f"data.{ending}"
    match ending:
        case "jsonl":
            write_jsonl(path, [row])
        case "json":
            path.write_text(json.dumps([row], indent=2))
        case "parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
    expected = pair("2\n+ 3" if form == "instruction, input" else "2 + 3", "5")
    assert load("sums", DatasetSpec(path=str(path))) == [expected]


def test_conversation_keeps_its_turns_and_system_message(tmp_path):
    roles = ["system", "user", "assistant", "user", "assistant"]
    row = {"messages": [{"role": role, "content": str(i)} for i, role in enumerate(roles)]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert load("a", DatasetSpec(path=path)) == [Example((Turn("1", "2"), Turn("3", "4")), system="0")]


def test_columns_are_mapped(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "reply": "r"}])
    columns = {"instruction": "question", "response": "reply"}
    assert load("a", DatasetSpec(path=path, columns=columns)) == [pair("q", "r")]


def test_globs_and_lists_of_files_are_joined_and_read_once_each(tmp_path):
    for name in "cab":
        write_jsonl(tmp_path / f"{name}.jsonl", pairs(name, 2))
    paths = (str(tmp_path / "[ab].jsonl"), str(tmp_path / "*.jsonl"))
    prompts = [example.turns[0].prompt for example in load("all", DatasetSpec(path=paths))]
    assert prompts == ["a 0", "a 1", "b 0", "b 1", "c 0", "c 1"]


def test_line_separators_inside_text_do_not_split_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b", "completion": "c"}\r\n\n', encoding="utf-8")
    assert load("a", DatasetSpec(path=str(path))) == [pair("a\u2028b", "c")]


def test_empty_completion_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": ""}])
    assert load("a", DatasetSpec(path=path)) == [pair("q", "")]


def test_hub_dataset_is_read_at_a_revision(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository"  # the library takes a folder for a repository
    repository.mkdir()
    write_jsonl(repository / "train.jsonl", [row | {"other": 1} for row in pairs("q", 3)])
    examples = load("hub", DatasetSpec(hub=str(repository)), digest="a" * 40)
    assert examples == [pair(f"q {i}", f"answer {i}") for i in range(3)]
    with pytest.raises(DataError, match="split no.*cannot be loaded"):
        load("hub", DatasetSpec(hub=str(repository), split="no"))


def test_embedded_dataset_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path))
    examples = load("sums", DatasetSpec(tiny="arithmetic"))
    assert len(examples) == 1000 and all(example.turns[0].completion for example in examples)


def test_source_is_read_once_per_digest(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pairs("a", 2))
    dataset = DatasetSpec(path=path)
    assert len(load("a", dataset, "one")) == 2
    write_jsonl(tmp_path / "a.jsonl", pairs("a", 3))
    assert [len(load("a", dataset, digest)) for digest in ("one", "two", None)] == [2, 3, 3]


# Bad data


def message(role: str, content="x") -> dict:
    return {"role": role, "content": content}


BAD_ROWS = {
    "no column 'completion'; did you mean 'completions'": {"prompt": "a", "completions": "b"},
    "column 'completion' is of type int, not text": {"prompt": "a", "completion": 4},
    "column 'prompt' is null, not text": {"prompt": None, "completion": "4"},
    "column 'prompt' is not valid Unicode": {"prompt": "\ud83d", "completion": "4"},
    "is of type list, not an object": ["a", "b"],
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_row_is_named_with_its_line(tmp_path, reason):
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs("a", 2), BAD_ROWS[reason]])
    with pytest.raises(DataError, match=f"a.jsonl, line 3: .*{reason}"):
        load("a", DatasetSpec(path=path, format="prompt_completion"))


BAD_MESSAGES = {
    "the roles are none": [],
    "the roles are assistant": [message("assistant")],
    "the roles are user;": [message("user")],
    "the roles are user, user": [message("user"), message("user")],
    "the roles are user, system": [message("user"), message("system")],
    "the roles are user, tool": [message("user"), message("tool")],
    "the content of message 2 is null": [message("user"), message("assistant", None)],
    "the messages are no list": "hello",
}


@pytest.mark.parametrize("reason", BAD_MESSAGES)
def test_bad_conversation_is_named_with_its_line(tmp_path, reason):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": BAD_MESSAGES[reason]}])
    with pytest.raises(DataError, match=f"line 1: {reason}"):
        load("a", DatasetSpec(path=path))


def test_broken_json_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp')
    with pytest.raises(DataError, match="a.jsonl, line 2 is not valid JSON"):
        load("a", DatasetSpec(path=str(path)))


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "emptied"])
def test_damaged_parquet_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(pairs("a", 1000)), path)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes({"truncated": content[:half], "overwritten": b"x" * half + content[half:], "emptied": b""}[damage])
    with pytest.raises(DataError, match="a.parquet cannot be read as Parquet"):
        load("a", DatasetSpec(path=str(path)))


def test_missing_column_of_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"promt": ["a"], "completion": ["b"]}), path)
    with pytest.raises(DataError, match="no column 'prompt'; did you mean 'promt'"):
        load("a", DatasetSpec(path=str(path), format="prompt_completion"))
    with pytest.raises(DataError, match="no known format in the columns promt, completion"):
        load("a", DatasetSpec(path=str(path)))


def test_errors_of_the_settings_name_the_way_out(tmp_path):
    both = write_jsonl(tmp_path / "both.jsonl", [PAIR_FORMATS["instruction"] | PAIR_FORMATS["messages"]])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    for reason, dataset in {
        "no file matches": DatasetSpec(path=str(tmp_path / "no*.jsonl")),
        "has the ending .csv": DatasetSpec(path=str(tmp_path / "a.csv")),
        "has no ending; .*jsonl": DatasetSpec(path=str(tmp_path)),
        "has no examples": DatasetSpec(path=empty),
        "the columns fit messages and instruction; give": DatasetSpec(path=both),
        "no column 'mesages'; did you mean 'messages'": DatasetSpec(
            path=both, format="messages", columns={"mesages": "x"}
        ),
        "no column 'y'": DatasetSpec(path=both, format="messages", columns={"messages": "y"}),
    }.items():
        with pytest.raises(DataError, match=reason):
            load("a", dataset)


# Choosing


@pytest.fixture
def source(tmp_path) -> DatasetSpec:
    return DatasetSpec(path=write_jsonl(tmp_path / "a.jsonl", pairs("a", 400)))


def test_held_out_examples_are_the_same_for_every_seed_and_size_and_never_trained_on(source):
    splits = [
        training_split(trial({"a": source}, seed=seed, num_examples=num)) for seed in (0, 1) for num in (10, 350, None)
    ]
    assert len({tuple(split.held_out) for split in splits}) == 1
    for split in splits:
        assert len(split.held_out) == 50
        assert not set(split.held_out) & set(split.train)
    assert [split.requested for split in splits] == [10, 350, 350] * 2
    assert [len(split.train) for split in splits] == [10, 350, 350] * 2


def test_small_training_set_lies_inside_the_large_one_and_seeds_differ(source):
    small, large, other = (
        training_split(trial({"a": source}, num_examples=num, data_seed=seed)).train
        for num, seed in ((20, 3), (200, 3), (20, 4))
    )
    assert small == large[:20]
    assert set(small) != set(other)


def test_choice_depends_on_content_and_not_on_the_order_of_rows(tmp_path, source):
    rows = pairs("a", 400)
    random.Random(0).shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shuffled.parquet")
    shuffled = DatasetSpec(path=str(tmp_path / "shuffled.parquet"))
    assert training_split(trial({"a": source})) == training_split(trial({"b": shuffled}))


def test_golden_choice(source):  # an accidental change of every subset fails here
    split = training_split(trial({"a": source}, num_examples=3, held_out_examples=2))
    prompts = [example.turns[0].prompt for example in split.train + split.held_out]
    assert prompts == ["a 292", "a 204", "a 132", "a 337", "a 74"]


def test_copies_of_a_held_out_example_are_not_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pairs("a", 30) * 3)
    split = training_split(trial({"a": DatasetSpec(path=path)}, held_out_examples=10))
    assert len(set(split.held_out)) == 10
    rest = {pair(f"a {i}", f"answer {i}") for i in range(30)} - set(split.held_out)
    assert Counter(split.train) == dict.fromkeys(rest, 3)


def test_more_examples_than_there_are(source):
    with pytest.raises(DataError, match="num_examples is 351, .* a can give only 350 besides 50 held-out"):
        training_split(trial({"a": source}, num_examples=351))
    with pytest.raises(DataError, match="held_out_examples is 500, .* only 400 different"):
        training_split(trial({"a": source}, held_out_examples=500))
    with pytest.raises(DataError, match="num_examples is all, .* only 0 besides 400"):
        training_split(trial({"a": source}, held_out_examples=400))


@pytest.fixture
def mixture(tmp_path) -> dict[str, DatasetSpec]:
    sizes = {"a": 500, "b": 300, "c": 200}
    return {
        name: DatasetSpec(path=write_jsonl(tmp_path / f"{name}.jsonl", pairs(name, num))) for name, num in sizes.items()
    }


def shares(examples: list[Example]) -> Counter[str]:
    return Counter(example.turns[0].prompt[0] for example in examples)


def test_mixture_has_its_shares_in_every_size_and_nests(mixture):
    weights = {"a": 2.0, "b": 1.0, "c": 1.0}
    large = training_split(trial(mixture, weights, num_examples=400, held_out_examples=40))
    assert shares(large.train) == {"a": 200, "b": 100, "c": 100}
    assert shares(large.held_out) == {"a": 20, "b": 10, "c": 10}
    for num in (1, 7, 100, 399):
        small = training_split(trial(mixture, weights, num_examples=num, held_out_examples=40))
        assert small.train == large.train[:num]
        assert small.held_out == large.held_out
        assert all(abs(shares(small.train)[name] - num * weights[name] / 4) < 1 for name in weights)


def test_mixture_without_a_number_takes_the_largest_total_whose_shares_fit(mixture):
    split = training_split(trial(mixture, {"a": 1.0, "b": 1.0, "c": 1.0}, held_out_examples=30))
    assert shares(split.train) == {"a": 191, "b": 191, "c": 190}  # all 190 of c that are not held out
    assert split.requested == len(split.train)
    with pytest.raises(DataError, match="num_examples is 600, .* in these shares"):
        training_split(trial(mixture, {"a": 1.0, "b": 1.0, "c": 1.0}, num_examples=600))


def test_mixture_depends_neither_on_names_nor_on_their_order(mixture):
    weights = {"a": 3.0, "b": 1.0, "c": 2.0}
    names = {"a": "z", "b": "y", "c": "x"}
    renamed = {names[name]: mixture[name] for name in "cba"}
    one = trial(mixture, weights, num_examples=100)
    two = trial(renamed, {names[name]: weight for name, weight in weights.items()}, num_examples=100)
    assert one.trial_id == two.trial_id
    assert training_split(one) == training_split(two)


def test_held_out_example_of_one_source_is_not_trained_on_from_another(tmp_path):
    both = {
        name: DatasetSpec(path=write_jsonl(tmp_path / f"{name}.jsonl", pairs("same", 60) + pairs(name, 60)))
        for name in "ab"
    }
    split = training_split(trial(both, {"a": 1.0, "b": 1.0}, held_out_examples=40))
    assert len(set(split.held_out)) == 40
    assert not set(split.held_out) & set(split.train)


def test_measured_examples_are_a_fixed_part_of_the_data(mixture):
    digests = {name: str(dataset.path) for name, dataset in mixture.items()}
    alone = {"a": mixture["a"]}
    measured = measured_examples(alone, digests, None, 100)
    assert measured == measured_examples(alone, digests, None, 200)[:100]
    assert len(measured_examples(alone, digests, None, 9999)) == 500
    weights = {"a": 2.0, "b": 1.0, "c": 1.0}
    assert shares(measured_examples(mixture, digests, weights, 100)) == {"a": 50, "b": 25, "c": 25}
