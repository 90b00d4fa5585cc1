"""Ids come from content alone: equal settings agree, what has no stable text is refused."""

import math
from pathlib import Path

import pytest

from sweep.identity import canonical_json, content_id
from sweep.spec import BaseModelSpec, BenchmarkSpec, DatasetSpec, EvalSpec, LoraSpec, TrainSpec, TrialSpec

FULL = TrialSpec(
    base_model=BaseModelSpec(tiny="llama-code"),
    base_digest="base",
    datasets={"facts": DatasetSpec(path="facts.jsonl")},
    data_digests={"facts": "data"},
    train=TrainSpec(),
)
LORA_ON_A_MIXTURE = TrialSpec(
    base_model=BaseModelSpec(hub="some/model", dtype="bfloat16"),
    base_digest="commit",
    datasets={"a": DatasetSpec(hub="some/data"), "b": DatasetSpec(path="b.parquet", format="instruction")},
    data_digests={"a": "first", "b": "second"},
    weights={"a": 0.25, "b": 0.75},
    train=TrainSpec(method="lora", lora=LoraSpec(rank=8), lr_schedule="constant", seed=3),
)
BASELINE = TrialSpec(base_model=BaseModelSpec(tiny="llama-code"), base_digest="base")
EVALUATION = EvalSpec(
    name="facts",
    benchmark=BenchmarkSpec(tiny="facts_test", num_fewshot=2),
    digest="items",
    template="Q: {prompt}\nA: {completion}",
    backend="lm_eval 0.0 hf",
)


def test_key_order_does_not_matter():
    one = {"a": 1, "b": {"c": [1, 2], "d": None}}
    other = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert canonical_json(one) == canonical_json(other) == '{"a":1,"b":{"c":[1,2],"d":null}}'
    assert content_id(one) == content_id(other)


@pytest.mark.parametrize("other", [[2, 1], [1, 2, 3], [1, "2"], [True, 2], [1, 2.5], [], None])
def test_other_content_has_another_id(other):
    assert content_id([1, 2]) != content_id(other)


def test_tuples_and_lists_are_the_same_content():
    assert content_id((1, (2,))) == content_id([1, [2]])


def test_text_outside_ascii_has_one_id():
    assert content_id("Größe") == content_id("Gr\u00f6\u00dfe") != content_id("Grosse")


@pytest.mark.parametrize("value", [len, lambda: 1, {1, 2}, b"bytes", Path("x"), object(), 1j, TrainSpec()])
def test_what_has_no_stable_text_is_refused_and_its_place_is_named(value):
    with pytest.raises(TypeError, match=r"value\.settings\[1\] is a .* no stable text"):
        content_id({"settings": [0, value]})


def test_keys_that_are_no_text_are_refused():
    with pytest.raises(TypeError, match="key 1 of value is a int"):
        content_id({1: "a"})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number):
    with pytest.raises(ValueError, match=r"value\.x is .*only finite numbers"):
        content_id({"x": number})


def test_one_and_one_point_zero_agree_once_they_have_their_type():
    assert content_id(1) != content_id(1.0)
    settings = [TrainSpec(weight_decay=decay, warmup_steps=steps) for decay, steps in ((1, 20), (1.0, 2e1))]
    assert content_id(settings[0].identity()) == content_id(settings[1].identity())


def test_an_id_has_twelve_hex_digits():
    assert len(content_id("x")) == 12
    assert int(content_id("x"), 16) >= 0


@pytest.mark.parametrize(
    ("spec", "golden"),
    [
        pytest.param(FULL, "74ec4ba7d5c9", id="full"),
        pytest.param(LORA_ON_A_MIXTURE, "1a9941464932", id="lora_on_a_mixture"),
        pytest.param(BASELINE, "e0f161b14870", id="baseline"),
    ],
)
def test_trial_ids_are_those_of_the_sweeps_that_have_run(spec, golden):
    """If this fails, every finished trial would run again. Raise RECIPE_VERSION if the weights do change."""
    assert spec.trial_id == golden


def test_eval_ids_are_those_of_the_sweeps_that_have_run():
    """If this fails, every finished evaluation would run again."""
    assert EVALUATION.eval_id == "1e6ab672b555"
