"""Training: the same result whatever the layout and whatever ran before, and failures that have names."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from sweep import models, schema
from sweep import train as training
from sweep.spec import BaseModelSpec, DatasetSpec, ExecutionSpec, LoraSpec, TrainSpec, TrialSpec
from sweep.tokenization import Counts, TokenizedExample, TokenizedSet, TokenizedSplit


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny_models.save_base(tmp_path_factory.mktemp(name), name) for name in tiny_models.CONFIGS}


def tokenized(num_examples: int, seed: int = 0, **limits: int) -> TokenizedSet:
    examples = [
        TokenizedExample(np.array(ids, np.int32), np.array(labels, np.int32))
        for ids, labels in tiny_models.token_examples(num_examples, seed, **limits)
    ]
    return TokenizedSet(examples, Counts(num_examples, num_examples, 0, 0))


DATA = TokenizedSplit(tokenized(43), tokenized(7, seed=1))
"""43 does not divide by the batch sizes used here."""


class Collected:
    """A reporter that keeps what it gets."""

    def __init__(self):
        self.rows, self.records = [], {}

    def step(self, row):
        self.rows.append(row)

    def checkpoint(self, epoch, record):
        self.records[epoch] = record

    @property
    def losses(self) -> list[float]:
        return [row["loss_nats"] for row in self.rows]


def run(base: Path, folder: Path, *, keep=(2,), execution=None, data=DATA, how=None, **settings) -> Collected:
    """Train a trial with these settings; its checkpoints go to folder/<epoch>."""
    defaults = {"learning_rate": 3e-3, "global_batch_size": 8, "epochs": 2, "held_out_examples": 7}
    trial = TrialSpec(
        base_model=BaseModelSpec(path=str(base)), base_digest="0", train=TrainSpec(**(defaults | settings))
    )
    reporter = Collected()
    training.train(
        trial,
        ExecutionSpec(**(execution or {})),
        epochs_to_keep=keep,
        folder=lambda epoch: folder / str(epoch),
        reporter=reporter,
        data=data,
        threads=1,
        **(how or {}),
    )
    return reporter


def weights(folder: Path, epoch: int = 2) -> dict[str, torch.Tensor]:
    return load_file(next((folder / str(epoch) / "weights").glob("*.safetensors")))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative, over all weights."""
    assert one.keys() == other.keys()
    difference = sum((one[n] - other[n]).double().square().sum().item() for n in one)
    return math.sqrt(difference / sum(one[n].double().square().sum().item() for n in one))


# What training does


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_full_and_lora_lower_the_loss(bases, tmp_path, name, method):
    """Random weights whose embeddings and head stay as they are leave LoRA little to gain."""
    rate, at_most = {"full": (3e-3, 0.9), "lora": (2e-2, 0.99)}[method]
    reporter = run(bases[name], tmp_path, method=method, learning_rate=rate, epochs=3, keep=(3,))
    assert len(reporter.rows) == 3 * 6
    assert sum(reporter.losses[-6:]) < at_most * sum(reporter.losses[:6])


def test_lora_leaves_the_base_weights_bit_equal(bases, tmp_path, monkeypatch):
    trained = []
    prepare = models.prepare
    monkeypatch.setattr(models, "prepare", lambda *args: trained.append(prepare(*args)) or trained[0])
    run(bases["llama"], tmp_path, method="lora", lora=LoraSpec(rank=4, dropout=0.1), weight_decay=0.1)
    base = dict(models.load_base(bases["llama"]).named_parameters())
    after = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in trained[0].named_parameters()
    }
    assert all(torch.equal(base[name], after[name]) for name in base)


def test_chosen_layers_change_and_no_others(bases, tmp_path):
    run(bases["llama"], tmp_path, trained_layers="1-1", weight_decay=0.1)
    before = load_file(bases["llama"] / "model.safetensors")
    after = weights(tmp_path)
    changed = {models.place(name, 3).layer for name in before if not torch.equal(before[name], after[name])}
    assert changed == {1}


def test_each_epoch_to_keep_leaves_a_checkpoint_and_a_record(bases, tmp_path):
    reporter = run(bases["llama"], tmp_path, keep=(1, 3), epochs=3)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["1", "3"]
    assert sorted(reporter.records) == [1, 3]
    assert reporter.records[3]["num_steps"] == 18
    record = json.loads(json.dumps(reporter.records[1]))
    parameters = sum(p.numel() for p in models.load_base(bases["llama"]).parameters())
    expected = {
        "num_parameters": parameters,
        "num_trained_parameters": parameters,
        "architecture": "LlamaForCausalLM",
        "num_layers": 3,
        "num_steps": 6,
        "examples_requested": 43,
        "examples_used": 43,
        "trained_tokens": DATA.train.trained_tokens,
        "total_tokens": DATA.train.total_tokens,
        "layout": "padded",
        "micro_batch_size": 8,
        "threads": 1,
        "device": "cpu",
        "target_modules": None,
    }
    assert {key: record[key] for key in expected} == expected
    assert record["train_seconds"] > 0 and record["peak_memory_gib"] > 0.01
    tokens = [row["trained_tokens"] for row in reporter.rows[:6]]
    mean = sum(t * loss for t, loss in zip(tokens, reporter.losses[:6], strict=True)) / sum(tokens)
    assert record["train_loss_nats"] == pytest.approx(mean)


def test_step_rows_are_the_schema_s(bases, tmp_path):
    reporter = run(bases["llama"], tmp_path, warmup_steps=3, lr_schedule="cosine")
    schema.build("steps", [{"trial_id": "t", **row} for row in reporter.rows])
    rows = reporter.rows
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[5]["epoch"] == 1.0 and rows[11]["epoch"] == 2.0
    assert [i for i, row in enumerate(rows) if row["held_out_loss_nats"] is not None] == [5, 11]
    assert sum(row["trained_tokens"] for row in rows[:6]) == DATA.train.trained_tokens
    rates = [row["learning_rate"] for row in rows]
    assert rates[:4] == pytest.approx([0, 1e-3, 2e-3, 3e-3]) and rates[4] > rates[5] > rates[11] > 0


def test_a_cosine_spans_the_plan_and_training_stops_at_the_last_epoch_to_keep(bases, tmp_path):
    short = run(bases["llama"], tmp_path / "a", keep=(1,), epochs=4)
    whole = run(bases["llama"], tmp_path / "b", keep=(1, 4), epochs=4)
    assert short.rows == whole.rows[:6]
    with pytest.raises(ValueError, match="beyond the 4 epochs"):
        run(bases["llama"], tmp_path / "c", keep=(5,), epochs=4)


def test_the_loss_is_the_plain_one(bases, tmp_path):
    """First step, held-out loss and gradient norm against a direct computation, example by example."""
    reporter = run(bases["llama"], tmp_path, keep=(1,), epochs=1, learning_rate=1e-30)
    model = models.load_base(bases["llama"])

    def sum_of_losses(examples):
        total = 0
        for ids, labels in examples:
            logits = model(input_ids=torch.tensor(ids, dtype=torch.long)[None], use_cache=False).logits[0, :-1]
            wanted = torch.tensor(labels[1:], dtype=torch.long)
            total += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        return total

    order = np.random.default_rng((0, 0)).permutation(43)[:8]
    step = [DATA.train.examples[index] for index in order]
    loss = sum_of_losses(step) / sum((e.labels != -100).sum() for e in step)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert reporter.rows[0]["loss_nats"] == pytest.approx(loss.item(), rel=1e-6)
    assert reporter.rows[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    with torch.no_grad():
        held_out = sum_of_losses(DATA.held_out.examples) / DATA.held_out.trained_tokens
    assert reporter.rows[-1]["held_out_loss_nats"] == pytest.approx(held_out.item(), rel=1e-5)


def test_weight_decay_is_on_matrices_only(bases, tmp_path):
    """Six steps of 3e-3 * 0.5 shrink a decayed tensor by 0.9 %."""
    run(bases["llama"], tmp_path / "a", keep=(1,), weight_decay=0.0)
    run(bases["llama"], tmp_path / "b", keep=(1,), weight_decay=0.5)
    plain, decayed = weights(tmp_path / "a", 1), weights(tmp_path / "b", 1)
    shrunk = {name for name in plain if plain[name].ndim == 2 and decayed[name].norm() < 0.997 * plain[name].norm()}
    assert shrunk == {name for name in plain if plain[name].ndim == 2}


# What equal means


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_trial_gives_the_same_bits_whatever_ran_before(bases, tmp_path, method):
    settings = {"method": method, "lora": LoraSpec(dropout=0.1)}
    alone = run(bases["llama"], tmp_path / "alone", **settings)
    run(bases["llama"], tmp_path / "other", method=method, seed=5, learning_rate=1e-2, precision="bf16")
    run(bases["qwen3"], tmp_path / "third", method="full")
    random.random(), torch.rand(3), np.random.rand()
    after = run(bases["llama"], tmp_path / "after", **settings)
    assert equal(weights(tmp_path / "alone"), weights(tmp_path / "after"))
    assert alone.rows == after.rows
    assert not equal(weights(tmp_path / "alone"), weights(tmp_path / "other"))


LAYOUTS = {
    "packed": {"layout": "packed"},
    "packed in rows": {"layout": "packed", "pack_length": 60},
    "micro-batches of 3": {"micro_batch_size": 3},
    "one by one": {"micro_batch_size": 1},
    "packed in micro-batches of 3": {"layout": "packed", "micro_batch_size": 3},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def padded(bases, tmp_path_factory):
    """Weights of the plain run per (architecture, method), each trained once."""
    done = {}

    def of(name: str, method: str) -> tuple[Collected, dict[str, torch.Tensor]]:
        if (name, method) not in done:
            folder = tmp_path_factory.mktemp("padded")
            reporter = run(bases[name], folder, method=method, execution={"layout": "padded"}, learning_rate=1e-3)
            done[name, method] = reporter, weights(folder)
        return done[name, method]

    return of


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "method"), [("llama", "full"), ("llama", "lora"), ("qwen3", "full"), ("gpt_neox", "full")]
)
def test_another_layout_gives_the_same_weights(bases, tmp_path, padded, name, method, how):
    """Tier 2 of the design: float32, no dropout, at most 1e-5."""
    plain, expected = padded(name, method)
    other = run(bases[name], tmp_path, method=method, execution=LAYOUTS[how], learning_rate=1e-3)
    assert distance(expected, weights(tmp_path)) <= 1e-5
    assert other.records[2]["layout"] == LAYOUTS[how].get("layout", "padded")
    for one, two in zip(plain.rows, other.rows, strict=True):
        assert two["loss_nats"] == pytest.approx(one["loss_nats"], rel=1e-5)
        assert two["trained_tokens"] == one["trained_tokens"]


@pytest.mark.parametrize("name", ["mistral", "olmo2", "gemma2", "gpt2"])
def test_packing_keeps_examples_apart_in_other_families(bases, tmp_path, padded, name):
    _, expected = padded(name, "full")
    reporter = run(bases[name], tmp_path, execution={"layout": "packed"}, learning_rate=1e-3)
    assert reporter.records[2]["layout"] == "packed"
    assert distance(expected, weights(tmp_path)) <= 1e-5


def test_an_architecture_that_mixes_packed_examples_is_padded(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_probed", {})
    monkeypatch.setattr(training, "PACKED_TOLERANCE", 0.0)  # no architecture passes
    reporter = run(bases["llama"], tmp_path, execution={"layout": "packed"})
    assert reporter.records[2]["layout"] == "padded"
    assert "LlamaForCausalLM does not keep packed examples apart" in reporter.records[2]["layout_reason"]


def test_packing_is_chosen_by_the_work_it_saves(bases):
    model = models.load_base(bases["llama"])
    settings = TrainSpec(global_batch_size=8)

    def chosen(lengths, **execution):
        examples = [TokenizedExample(np.ones(n, np.int32), np.ones(n, np.int32)) for n in lengths]
        return training.choose_layout(ExecutionSpec(**execution), settings, examples, model).name

    assert chosen([10, 11, 12, 13] * 4) == "padded"
    assert chosen([1] * 31 + [60]) == "packed", "seven in eight tokens would be padding"
    assert chosen([10, 40] * 8, attention="flash_attention_2") == "packed"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_constant_schedule_continued_is_the_same_as_at_once(bases, tmp_path, dropout):
    settings = {"method": "lora", "lora": LoraSpec(rank=4, dropout=dropout), "lr_schedule": "constant"}
    settings |= {"epochs": 4, "warmup_steps": 2}
    whole = run(bases["llama"], tmp_path / "whole", keep=(4,), **settings)
    first = run(bases["llama"], tmp_path / "first", keep=(2,), how={"keep_state": True}, **settings)
    run(bases["qwen3"], tmp_path / "other")
    state = tmp_path / "first/2/state"
    rest = run(bases["llama"], tmp_path / "rest", keep=(3, 4), how={"resume_from": state}, **settings)
    assert equal(weights(tmp_path / "whole", 4), weights(tmp_path / "rest", 4))
    assert first.rows + rest.rows == whole.rows
    assert rest.records[4]["num_steps"] == 24
    assert rest.records[3]["train_seconds"] > first.records[2]["train_seconds"]


def test_full_tuning_continues_bit_for_bit_in_its_frozen_layout(bases, tmp_path):
    settings = {"lr_schedule": "constant", "epochs": 3}
    packed = {"layout": "packed", "micro_batch_size": 3}
    run(bases["qwen3"], tmp_path / "whole", keep=(3,), execution=packed, **settings)
    run(bases["qwen3"], tmp_path / "first", keep=(1,), execution=packed, how={"keep_state": True}, **settings)
    how = {"resume_from": tmp_path / "first/1/state"}
    rest = run(bases["qwen3"], tmp_path / "rest", keep=(3,), how=how, **settings)
    assert equal(weights(tmp_path / "whole", 3), weights(tmp_path / "rest", 3))
    assert (rest.records[3]["layout"], rest.records[3]["micro_batch_size"]) == ("packed", 3)


def test_training_leaves_the_process_as_it_was(bases, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(bases["llama"], tmp_path, precision="bf16", how={})
        assert torch.get_num_threads() == 2
        assert torch.get_default_dtype() == torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_num_threads(before)


def test_bf16_is_close_to_float32_and_not_the_same(bases, tmp_path):
    exact = run(bases["llama"], tmp_path / "a")
    rounded = run(bases["llama"], tmp_path / "b", precision="bf16")
    assert exact.losses != rounded.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=0.05)
    assert {t.dtype for t in weights(tmp_path / "b").values()} == {torch.float32}


# Batches


def test_every_example_is_in_exactly_one_micro_batch_of_every_split():
    lengths = [random.Random(n).randint(1, 50) for n in range(43)]
    for batch_size, micro_batch_size, ranks in [
        (8, 8, 1),
        (8, 3, 1),
        (16, 4, 2),
        (16, 3, 4),
        (64, 5, 3),
        (1, 1, 1),
    ]:
        splits = [training.StepBatches(lengths, batch_size, micro_batch_size, 0, r, ranks) for r in range(ranks)]
        steps = []
        for split in splits:
            split.set_epoch(2)
            batches = list(split)
            assert len(batches) == len(split) and max(map(len, batches)) <= micro_batch_size
            size = split.micro_batches_per_step
            steps.append([sum(batches[i : i + size], []) for i in range(0, len(batches), size)])
            assert len(steps[-1]) == split.num_steps == math.ceil(43 / batch_size)
        order = np.random.default_rng((0, 2)).permutation(43).tolist()
        for index, parts in enumerate(zip(*steps, strict=True)):
            wanted = order[index * batch_size : (index + 1) * batch_size]
            assert sorted(sum(parts, [])) == sorted(wanted), "the step's examples do not depend on the split"


def test_a_rank_that_runs_short_gets_a_row_without_labels():
    batch = training.collate([], "packed", None, pad_id=0)
    assert batch["input_ids"].tolist() == [[0]] and batch["num_targets"] == 0


def test_collate_in_both_layouts():
    examples = [TokenizedExample(np.array([5, 6, 7]), np.array([-100, -100, 7]))]
    examples += [TokenizedExample(np.array([8, 9]), np.array([-100, 9]))]
    padded = {k: v.tolist() for k, v in training.collate(examples, "padded", None, pad_id=0).items()}
    assert padded == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "columns": [0, 1],
        "targets": [[-100, 7], [9, -100]],
        "num_targets": 2,
    }
    packed = {k: v.tolist() for k, v in training.collate(examples, "packed", None, pad_id=0).items()}
    assert packed == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "columns": [1, 3],
        "targets": [[7, 9]],
        "num_targets": 2,
    }


# Failures


def blank(num_examples: int) -> list[TokenizedExample]:
    return [TokenizedExample(np.ones(4, np.int32), np.full(4, -100, np.int32))] * num_examples


def test_no_example_and_no_completion_token_are_data_errors(bases, tmp_path):
    for examples in ([], blank(3)):
        data = TokenizedSplit(TokenizedSet(examples, Counts(3, len(examples), 0, 0)), DATA.held_out)
        with pytest.raises(training.TrainingError, match="none of the 3 examples has a completion token") as caught:
            run(bases["llama"], tmp_path, data=data)
        assert caught.value.kind == "data"


def test_a_step_without_labels_is_a_data_error(bases, tmp_path):
    data = TokenizedSplit(TokenizedSet(blank(20) + DATA.train.examples[:1], Counts(21, 21, 0, 0)), DATA.held_out)
    with pytest.raises(training.TrainingError, match=r"no example of step \d+ has a completion token") as caught:
        run(bases["llama"], tmp_path, data=data, global_batch_size=2)
    assert caught.value.kind == "data"


def test_an_empty_data_file_is_a_data_error(bases, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    trial = TrialSpec(
        base_model=BaseModelSpec(path=str(bases["llama"])),
        base_digest="0",
        datasets={"d": DatasetSpec(path=str(tmp_path / "empty.jsonl"))},
        data_digests={"d": "0"},
        train=TrainSpec(),
    )
    with pytest.raises(training.TrainingError, match="no examples") as caught:
        training.train(
            trial,
            ExecutionSpec(),
            epochs_to_keep=[1],
            folder=lambda _: tmp_path / "out",
            reporter=Collected(),
        )
    assert caught.value.kind == "data"


def test_a_loss_that_is_not_finite_ends_the_trial_and_leaves_no_checkpoint(tmp_path):
    base = tiny_models.save_base(tmp_path / "base")
    file = base / "model.safetensors"
    broken = load_file(file)
    broken["model.norm.weight"][3] = math.nan
    from safetensors.torch import save_file

    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(training.TrainingError, match=r"the loss is nan at step 1 \(epoch 0\.\d+\)") as caught:
        run(base, tmp_path / "out")
    assert caught.value.kind == "nan"
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_ends_the_trial(bases, tmp_path):
    with pytest.raises(training.TrainingError, match="is (nan|inf) at step") as caught:
        run(bases["llama"], tmp_path, learning_rate=1e30, max_grad_norm=None)
    assert caught.value.kind == "nan"


def test_weights_that_the_last_step_broke_are_not_kept(bases, tmp_path):
    settings = {"learning_rate": 1e38, "weight_decay": 1.0, "global_batch_size": 64, "epochs": 1}
    with pytest.raises(training.TrainingError, match="the held-out loss is nan after step 1") as caught:
        run(bases["llama"], tmp_path / "out", keep=(1,), **settings)
    assert caught.value.kind == "nan"
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_has_a_name(bases, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(training.SweepTrainer, "compute_loss", full)
    with pytest.raises(training.TrainingError, match=r"out of memory: CUDA out of memory\. Tried") as caught:
        run(bases["llama"], tmp_path)
    assert caught.value.kind == "oom"


def test_a_typed_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(training.TrainingError("nan", "the loss is nan")))
    assert (error.kind, str(error)) == ("nan", "the loss is nan")


# From the trial's own data


def test_a_trial_is_trained_from_its_file(bases, tmp_path):
    lines = [json.dumps({"prompt": f"{a} plus {b}", "completion": str(a + b)}) for a in range(6) for b in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    trial = TrialSpec(
        base_model=BaseModelSpec(path=str(bases["llama"])),
        base_digest="0",
        datasets={"sums": DatasetSpec(path=str(tmp_path / "sums.jsonl"))},
        data_digests={"sums": "1"},
        train=TrainSpec(held_out_examples=4, global_batch_size=8, epochs=1, learning_rate=1e-3),
    )
    reporter = Collected()
    training.train(
        trial,
        ExecutionSpec(),
        epochs_to_keep=[1],
        folder=lambda epoch: tmp_path / "out",
        reporter=reporter,
        cache_dir=tmp_path / "cache",
        threads=1,
    )
    assert reporter.records[1]["examples_used"] == 32 and reporter.records[1]["held_out_loss_nats"] > 0
    assert "###Question" in (tmp_path / "out/weights/chat_template.jinja").read_text()
