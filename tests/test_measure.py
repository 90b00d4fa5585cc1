"""Data measures against direct computations, one example at a time."""

import math

import numpy as np
import pytest
import torch
from test_evaluate import TEMPLATE, make_model, make_tokenizer

from sweep import measure, schema, tokenization
from sweep.data import Example, Turn

EXAMPLES = [
    Example((Turn("what colour is thing 3?", "red"),)),
    Example((Turn("what colour is thing 10 of the long list?", "blue and blue and green"),)),
    Example((Turn("thing", "é ☃ white"),)),
    Example((Turn("first?", "one one"), Turn("second?", "two two two"))),
]


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no_bos"])
def world(request):
    tokenizer = make_tokenizer(request.param)
    return make_model(tokenizer, steps=5), tokenizer


def values(world, examples=EXAMPLES, batch_size=4, max_length=200) -> dict:
    model, tokenizer = world
    return measure.measure(model, tokenizer, examples, TEMPLATE, max_length, batch_size)


def test_perplexity_is_exp_of_the_training_loss(world):
    model, tokenizer = world
    rows = tokenization.tokenize(EXAMPLES, tokenizer, TEMPLATE, 200, "truncate").examples
    nats = tokens = 0
    for row in rows:
        ids, labels = (torch.tensor(array.tolist())[None] for array in row)
        count = int((labels != tokenization.IGNORE_INDEX).sum())
        with torch.no_grad():
            nats += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    assert values(world)["perplexity_completion"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_text_measures_equal_a_direct_computation(world):
    model, tokenizer = world
    bos = tokenizer.bos_token or ""
    nats = tokens = text_nats = num_bytes = 0.0
    for example in EXAMPLES[:3]:
        [turn] = example.turns
        text = f"###Question: {turn.prompt}\n###Answer: {turn.completion}"
        ids = tokenizer.encode(bos + text + tokenizer.eos_token, add_special_tokens=False)
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        costs = [-log_p[k, ids[k + 1]].item() for k in range(len(ids) - 1)]
        nats, tokens = nats + sum(costs), tokens + len(costs)
        text_nats += sum(costs[:-1])  # end-of-text has no bytes
        first = 0 if bos else len(tokenizer.decode(ids[:1]).encode())  # nothing predicts a first token
        num_bytes += len(text.encode()) - first
    found = values(world, EXAMPLES[:3])
    assert found["perplexity_text"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte_text"] == pytest.approx(text_nats / math.log(2) / num_bytes, rel=1e-5)


def test_completion_bytes_are_those_of_the_completions(world):
    model, tokenizer = world
    rows = tokenization.tokenize(EXAMPLES, tokenizer, TEMPLATE, 200, "truncate").examples
    learned = [row.labels[1:] != tokenization.IGNORE_INDEX for row in rows]
    found = [measure._num_bytes(tokenizer, row.ids, scored) for row, scored in zip(rows, learned, strict=True)]
    assert found == [sum(len(f" {turn.completion}".encode()) for turn in e.turns) for e in EXAMPLES]


def test_batch_size_shows_only_as_rounding(world):
    one, many = values(world, batch_size=1), values(world, batch_size=4)
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert many[name] == pytest.approx(value, rel=1e-5), name


def test_lengths_are_counted_in_tokens(world):
    _, tokenizer = world
    rows = tokenization.tokenize(EXAMPLES, tokenizer, TEMPLATE, 200, "truncate").examples
    lengths = [int((row.labels != tokenization.IGNORE_INDEX).sum()) for row in rows]
    found = values(world)
    assert found["completion_tokens_mean"] == pytest.approx(np.mean(lengths))
    assert found["completion_tokens_p50"] == pytest.approx(np.median(lengths))
    assert found["completion_tokens_p90"] == pytest.approx(np.percentile(lengths, 90))
    assert found["prompt_tokens_mean"] == pytest.approx(np.mean([len(r.ids) for r in rows]) - np.mean(lengths))
    assert found["num_examples"] == len(EXAMPLES)


def test_distinct_is_different_ngrams_over_all(world):
    found = values(world, [Example((Turn("q", "a b a b"),)), Example((Turn("q", "a c"),))])
    assert found["distinct_1"] == 3 / 6
    assert found["distinct_2"] == 3 / 4  # ab, ba, ab, ac


def test_nothing_to_measure_is_null(world):
    found = values(world, [])
    assert found.pop("num_examples") == 0
    assert set(found.values()) == {None}
    assert values(world, [Example((Turn("q", "a"),))])["distinct_2"] is None


def test_values_fit_the_table(world):
    found = values(world)
    place = {"base_model": "m", "dataset": "d", "base_digest": "x", "data_digest": "y", "dataset_kind": None}
    num_examples = found.pop("num_examples")
    rows = [place | {"measure": k, "value": v, "num_examples": num_examples} for k, v in found.items()]
    schema.build("data_measures", rows)


def test_model_is_left_as_it_was(world):
    model, _ = world
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    values(world)
    assert model.training
    model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
