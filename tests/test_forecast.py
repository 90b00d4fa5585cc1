"""What a sweep will cost, from headers and file sizes alone; what is not known is None."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweep import config
from sweep.forecast import CPU_FLOPS, FLOPS_PER_TOKEN, Forecast, count_parameters, forecast
from sweep.plan import Plan, expand
from sweep.spec import BaseModelSpec, Pins, Resources, StageResources
from sweep.store import Result

PARAMETERS = 64 * 100 + 10


def write_weights(folder: Path, **shapes: list[int]) -> Path:
    """A model folder whose safetensors header names these tensors."""
    folder.mkdir(exist_ok=True)
    header = json.dumps({n: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()})
    header = json.dumps(json.loads(header) | {"__metadata__": {"format": "pt"}})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_text("{}")
    return folder


def plan_of(folder: Path, lines: int = 100, **changes: Any) -> Plan:
    """One model of PARAMETERS, `lines` examples of 80 bytes (20 tokens), 3 epochs."""
    write_weights(folder / "model", matrix=[64, 100], vector=[10])
    (folder / "data.jsonl").write_text(("x" * 79 + "\n") * lines)
    settings = {
        "name": "test",
        "base_models": {"m": {"path": "model"}},
        "datasets": {"d": {"path": "data.jsonl"}},
        "train": {"epochs": 3},
    }
    sweep = config.parse(json.dumps(settings | changes), folder / "sweep.yaml")
    return expand(sweep, Pins(base_models={"m": "m"}, datasets={"d": "d"}, benchmarks={}, backend="lm_eval 0"))


def cost(plan: Plan, done: dict[str, dict[str, Result]] | None = None, slots: int = 1) -> Forecast:
    return forecast(plan, done or {}, Resources(train=StageResources(cpus=2)), slots)


def test_tokens_and_hours_follow_from_the_size_of_model_and_data(tmp_path):
    found = cost(plan_of(tmp_path))
    assert found.train_tokens == 100 * 20 * 3
    assert found.hours == pytest.approx(FLOPS_PER_TOKEN * PARAMETERS * 6000 / (2 * CPU_FLOPS) / 3600)
    assert "rule of thumb" in found.basis


def test_a_subset_costs_its_share_and_asking_for_more_than_there_is_costs_all(tmp_path):
    assert cost(plan_of(tmp_path, train={"epochs": 3, "num_examples": 10})).train_tokens == 10 * 20 * 3
    assert cost(plan_of(tmp_path, train={"epochs": 3, "num_examples": 9999})).train_tokens == 100 * 20 * 3


@pytest.mark.parametrize(
    ("changes", "kept", "in_flight"),
    [
        ({"eval_epochs": "all"}, 3 * 4, 4),
        ({"eval_epochs": "all", "keep": "last"}, 4, 4),
        ({"eval_epochs": "all", "keep": "none"}, 0, 4),
        ({"export_dtype": "bfloat16"}, 2, 4),
        ({"train": {"method": "lora"}}, 0.04, 0.04),
    ],
    ids=str,
)
def test_disk_counts_what_is_kept_and_the_float32_checkpoints_in_flight(tmp_path, changes, kept, in_flight):
    found = cost(plan_of(tmp_path, **changes), slots=5)
    assert found.disk_gib * 2**30 == pytest.approx(kept * PARAMETERS)
    assert found.peak_disk_gib * 2**30 == pytest.approx((kept + 5 * in_flight) * PARAMETERS)


def test_what_is_trained_costs_no_tokens_any_more_and_its_time_is_the_measure(tmp_path):
    plan = plan_of(tmp_path, axes={"seed": [1, 2]}, layer_delta="off", measure=False)
    first = plan.trials[0]
    unit = f"trials/{first.trial_id}/train/epoch-3"
    done = {f"trials/{first.trial_id}": {unit: Result(unit, 1, tmp_path, {"train_seconds": 90.0}, {})}}
    found = cost(plan, done)
    assert found.train_tokens == 100 * 20 * 3
    assert found.hours == pytest.approx(90 / 3600)
    assert found.basis == "mean time of finished work of this sweep"


@pytest.mark.parametrize("source", ["no weights", "a pointer", "half a header"])
def test_a_model_of_unknown_size_makes_the_cost_unknown(tmp_path, source):
    plan = plan_of(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    if source == "no weights":
        weights.unlink()
    elif source == "a pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    else:
        weights.write_bytes(weights.read_bytes()[:30])
    assert count_parameters(BaseModelSpec(path=str(tmp_path / "model"))) is None
    found = cost(plan)
    assert (found.train_tokens, found.hours, found.disk_gib, found.peak_disk_gib) == (None, None, None, None)


def test_an_empty_dataset_costs_nothing_and_breaks_nothing(tmp_path):
    assert cost(plan_of(tmp_path, lines=0)).train_tokens == 0


def test_embedded_models_and_data_are_known_before_they_are_built(tmp_path):
    plan = plan_of(tmp_path, base_models={"m": {"tiny": "llama-code"}}, datasets={"d": {"tiny": "code_output"}})
    assert cost(plan).train_tokens > 0
