"""The tiny world: the same bytes again, nothing asked in a test that training has seen, files that load."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from sweep.tiny import BASE_MODELS, BENCHMARKS, DATASETS, build, build_all, text
from sweep.tiny.base_models import SPECIAL_TOKENS, train_tokenizer, write_base_model
from sweep.tiny.datasets import draw_examples

KINDS = {"base_model": BASE_MODELS, "dataset": DATASETS, "benchmark": BENCHMARKS}


def training_examples(name):
    recipe = DATASETS[name]
    rng = text.seeded("dataset", recipe.source, recipe.seed)
    return draw_examples(recipe.source, recipe.num_examples, rng, test=False)


def test_items(name):
    recipe = BENCHMARKS[name]
    rng = text.seeded("benchmark", recipe.source, recipe.seed)
    return draw_examples(recipe.source, recipe.num_items, rng, test=True)


test_items.__test__ = False  # pytest would collect it by its name


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build_all([], list(DATASETS), list(BENCHMARKS), folder)
    return folder


def test_import_is_cheap():
    code = "import sys, sweep.tiny; assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_are_all_kinds():
    for recipes in (DATASETS, BENCHMARKS):
        assert {recipe.kind for recipe in recipes.values()} == {"code", "maths", "general"}
        assert len(recipes) >= 6
    assert {recipe.architecture for recipe in BASE_MODELS.values()} == set(SPECIAL_TOKENS)
    a, b = BASE_MODELS["llama-general-a"], BASE_MODELS["llama-general-b"]
    assert a != b and replace(a, seed=b.seed) == b  # the control differs in nothing else


def test_fresh_build_gives_the_same_bytes(cache, tmp_path):
    build_all([], list(DATASETS), list(BENCHMARKS), tmp_path)
    for kind in ("datasets", "benchmarks"):
        files = sorted(path.relative_to(cache) for path in (cache / kind).rglob("*.jsonl"))
        assert len(files) == 8
        for file in files:
            assert (cache / file).read_bytes() == (tmp_path / file).read_bytes()


def test_world_version_is_raised_when_the_content_changes(cache):
    """A recipe id covers the generator by `WORLD_VERSION`: raise it, then put the new digest here."""
    digest = hashlib.sha256()
    for path in sorted(cache.rglob("*.jsonl"), key=lambda path: path.name):
        digest.update(path.read_bytes())
    documents = text.documents({"code": 1, "maths": 1, "general": 1}, text.seeded("golden"))
    for _ in range(300):
        digest.update(next(documents).encode())
    assert (text.WORLD_VERSION, digest.hexdigest()[:16]) == (2, "84ddce62653f8171")


def test_build_is_cached_and_leaves_no_temporary_folder(cache):
    path = build.build_dataset("arithmetic", cache)
    before = path.stat().st_mtime_ns
    assert build.build_dataset("arithmetic", cache) == path
    assert path.stat().st_mtime_ns == before
    assert not list(cache.rglob(".*"))


def test_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "too_many", replace(DATASETS["facts"], num_examples=2000))
    with pytest.raises(ValueError, match="has only"):
        build.build_dataset("too_many", tmp_path)
    assert not any((tmp_path / "datasets").iterdir())


def test_no_test_item_is_in_any_training_set():
    trained = [example for name in DATASETS for example in training_examples(name)]
    instructions = {example.instruction for example in trained}
    questions = {example.question for example in trained}
    groups = {example.group for example in trained}
    for name in BENCHMARKS:
        items = test_items(name)
        assert len({item.question for item in items}) == len(items) >= 100
        for item in items:
            assert item.instruction not in instructions
            assert item.question not in questions
            assert item.group not in groups


def test_the_same_question_in_another_form_lies_on_the_same_side():
    assert text.Sum(7, "+", 5).key == text.Sum(5, "+", 7).key
    numbers = text.number_expression("sum", [7, 5, 1], text.seeded(0))
    assert numbers.key == text.Sum(5, "+", 7).key
    task = text.WordTask("capitals", ("red", "cup"))
    assert text.word_expression(task).key == task.key


def test_python_prints_what_the_world_says():
    rng = text.seeded("expressions")
    for _ in range(200):
        (expression,) = text.draw_expressions(rng, 1)
        assert str(eval(expression.code)) == expression.output


def test_facts_asked_are_told_in_the_raw_text():
    documents = text.documents({"general": 1}, text.seeded("told"))
    told = " ".join(next(documents) for _ in range(20_000))
    for item in test_items("facts_test"):
        name, town = item.question.split("/")
        statements = text.ATTRIBUTES[name].statements
        assert any(s.format(town=town, value=item.response) in told for s in statements)


def test_choices_hold_the_answer_once_and_in_every_place(cache):
    for name, recipe in BENCHMARKS.items():
        if recipe.metric != "acc":
            continue
        lines = build.build_benchmark(name, cache).with_suffix(".jsonl").read_text().splitlines()
        items = [json.loads(line) for line in lines]
        for item in items:
            assert len(set(item["choices"])) == len(item["choices"]) == recipe.num_choices
            assert item["choices"][item["label"]] == " " + item["response"]
        places = [item["label"] for item in items]
        assert min(places.count(place) for place in range(recipe.num_choices)) > 0.5 * recipe.chance * len(items)


@pytest.mark.parametrize("architecture", SPECIAL_TOKENS)
def test_tokenizer_has_the_special_tokens_of_its_family(architecture, tmp_path):
    from transformers import AutoTokenizer

    recipe = next(r for r in BASE_MODELS.values() if r.architecture == architecture)
    short = replace(recipe, steps=5, batch_size=2)
    write_base_model(short, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Anna has 12 cups.")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == (architecture == "llama")
    assert (tokenizer.bos_token is None) == (architecture != "llama")
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (architecture == "gpt_neox")
    assert ids == train_tokenizer(architecture, recipe.vocab_size)("Anna has 12 cups.")["input_ids"]
    for line in ("###Question: What is 7 + 5?\n###Answer: 12", 'print("é".upper())  # É', "  two  spaces"):
        assert tokenizer.decode(tokenizer(line, add_special_tokens=False)["input_ids"]) == line
    prompt, answer = "###Question: What is 7 + 5?\n###Answer:", " 12"
    whole = tokenizer(prompt + answer)["input_ids"]
    assert whole[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


def test_model_is_the_same_again_and_loads(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    short = replace(BASE_MODELS["llama-code"], steps=5, batch_size=4)
    losses = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(losses))  # the caller's generator must not matter
        write_base_model(short, tmp_path / name, lambda step, loss_nats: losses.append(loss_nats))
    for file in sorted(path.name for path in (tmp_path / "one").iterdir()):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.dtype == torch.float32
    assert 200_000 < model.num_parameters() < 1_000_000
    assert model.config.max_position_embeddings >= 256


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_id_changes_with_the_recipe_and_is_unknown_for_unknown_names(kind, monkeypatch):
    recipes = KINDS[kind]
    name = next(iter(recipes))
    ids = [build.recipe_id(kind, known) for known in recipes]
    assert len(set(ids)) == len(ids) and all(len(i) >= 12 for i in ids)
    before = build.recipe_id(kind, name)
    monkeypatch.setitem(recipes, name, replace(recipes[name], seed=99))
    changed = build.recipe_id(kind, name)
    monkeypatch.setattr(text, "WORLD_VERSION", 99)
    assert len({before, changed, build.recipe_id(kind, name)}) == 3
    with pytest.raises(ValueError, match=f"'nothing'.*{name}"):
        build.recipe_id(kind, "nothing")


def test_tasks_load_in_lm_eval(cache):
    from lm_eval.tasks import TaskManager

    for name, recipe in BENCHMARKS.items():
        yaml = build.build_benchmark(name, cache)
        assert yaml.stem == name
        manager = TaskManager(include_path=str(yaml.parent), include_defaults=False)
        task = manager.load([name])["tasks"][name]
        docs = list(task.test_docs())
        assert len(docs) == recipe.num_items
        assert task.doc_to_text(docs[0]) == docs[0]["instruction"]
        if recipe.metric == "acc":
            assert task.doc_to_choice(docs[0])[task.doc_to_target(docs[0])] == " " + docs[0]["response"]
