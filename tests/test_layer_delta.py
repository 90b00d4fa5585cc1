"""Layer deltas: known changes give known numbers, LoRA by its factors as by merging."""

import math
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sweep import layer_delta, models, schema
from sweep.layer_delta import layer_deltas
from sweep.spec import LoraSpec, TrainSpec


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny_models.save_base(tmp_path_factory.mktemp(name), name) for name in tiny_models.CONFIGS}


def by_name(rows) -> dict[str, dict]:
    rows = list(rows)
    schema.build("layer_deltas", [{"trial_id": "t", "epoch": 1, **row} for row in rows])
    return {row["parameter"]: row for row in rows}


def checkpoint_with(base: Path, folder: Path, changes: dict[str, torch.Tensor]) -> Path:
    """A full checkpoint: the base plus some changes."""
    model = models.load_base(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].add_(change)
    models.save_checkpoint(model, folder, None, "base")
    return folder


def adapter(base: Path, folder: Path, **flags: bool) -> Path:
    """A LoRA checkpoint whose update is not zero."""
    torch.manual_seed(0)
    settings = TrainSpec(method="lora", trained_layers="1-2", lora=LoraSpec(rank=4, alpha=6.0, **flags))
    model = models.prepare(models.load_base(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    models.save_checkpoint(model, folder, None, "base")
    return folder


def test_a_known_delta_gives_the_known_numbers(bases, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    before = load_file(bases["llama"] / "model.safetensors")[name]
    left, right = torch.zeros(32), torch.zeros(32)
    left[3], right[:2] = 2.0, torch.tensor([0.3, 0.4])
    change = torch.outer(left, right)  # one singular value: 2 * 0.5
    row = by_name(
        layer_deltas(bases["llama"], checkpoint_with(bases["llama"], tmp_path, {name: change}), spectral=True)
    )[name]
    assert row["delta_norm"] == pytest.approx(1.0, rel=1e-6)
    assert row["base_norm"] == pytest.approx(before.norm().item(), rel=1e-6)
    assert row["relative_norm"] == pytest.approx(1.0 / before.norm().item(), rel=1e-6)
    assert row["max_abs"] == pytest.approx(0.8, rel=1e-6)
    assert row["frac_changed"] == 2 / 1024
    assert row["spectral_norm"] == pytest.approx(1.0, rel=1e-5)
    assert row["stable_rank"] == pytest.approx(1.0, rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), (before + change).flatten(), dim=0)
    assert row["cosine"] == pytest.approx(cosine.item(), rel=1e-5)
    assert (row["layer"], row["depth"], row["module"], row["kind"]) == (1, 0.5, "self_attn.q_proj", "matrix")
    assert (row["num_parameters"], row["source"]) == (1024, "float32_checkpoint")


def test_an_untouched_tensor_is_exactly_zero(bases, tmp_path):
    rows = by_name(layer_deltas(bases["llama"], checkpoint_with(bases["llama"], tmp_path, {}), spectral=True))
    assert len(rows) == len(list(models.load_base(bases["llama"]).parameters()))
    for row in rows.values():
        zeros = ("delta_norm", "relative_norm", "max_abs", "frac_changed")
        assert [row[key] for key in zeros] == [0.0] * 4 and row["cosine"] == 1.0
        assert row["stable_rank"] is None
        assert row["spectral_norm"] == (0.0 if row["kind"] == "matrix" else None)


def test_a_base_of_zeros_has_no_relative_norm(bases, tmp_path):
    base = tiny_models.save_base(tmp_path / "base", "gpt_neox")
    weights = load_file(base / "model.safetensors")
    weights["gpt_neox.layers.0.attention.dense.bias"].zero_()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    changes = {"gpt_neox.layers.0.attention.dense.bias": torch.ones(32)}
    rows = by_name(layer_deltas(base, checkpoint_with(base, tmp_path / "tuned", changes), spectral=True))
    row = rows["gpt_neox.layers.0.attention.dense.bias"]
    assert row["delta_norm"] == pytest.approx(math.sqrt(32))
    assert row["relative_norm"] is None and row["cosine"] is None
    assert (row["kind"], row["spectral_norm"], row["stable_rank"]) == ("vector", None, None)


def test_tensors_say_what_they_are(bases, tmp_path):
    def kinds(name):
        tuned = checkpoint_with(bases[name], tmp_path / name, {})
        return {row["module"]: row["kind"] for row in layer_deltas(bases[name], tuned, spectral=False)}

    assert kinds("qwen3")["embed_tokens"] == "tied" and "lm_head" not in kinds("qwen3")
    assert kinds("llama")["embed_tokens"] == kinds("llama")["lm_head"] == "matrix"
    neox = kinds("gpt_neox")
    assert neox["attention.query_key_value"] == "fused"
    assert neox["attention.query_key_value.bias"] == neox["input_layernorm"] == "vector"
    assert neox["attention.dense"] == "matrix"


def test_without_spectral_the_rest_is_the_same(bases, tmp_path):
    change = {"model.layers.0.mlp.up_proj.weight": torch.full((48, 32), 0.01)}
    tuned = checkpoint_with(bases["llama"], tmp_path, change)
    full, norms = (by_name(layer_deltas(bases["llama"], tuned, spectral=flag)) for flag in (True, False))
    for name, row in full.items():
        assert norms[name] == row | {"spectral_norm": None, "stable_rank": None}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("kind", ["plain", "rslora", "dora"])
def test_a_lora_delta_is_the_merged_difference(bases, tmp_path, name, kind):
    tuned = adapter(bases[name], tmp_path, **({} if kind == "plain" else {kind: True}))
    base = AutoModelForCausalLM.from_pretrained(bases[name])
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    merged = dict(PeftModel.from_pretrained(base, tuned).merge_and_unload().named_parameters())
    rows = by_name(layer_deltas(bases[name], tuned, spectral=True))
    renamed = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's head, in the file and in the model
    assert {renamed.get(n, n) for n in rows} == before.keys()
    touched = 0
    for parameter, row in rows.items():
        parameter = renamed.get(parameter, parameter)
        difference = (merged[parameter] - before[parameter]).double()
        assert row["source"] == ("dora_merge" if kind == "dora" else "lora")
        if difference.norm() == 0:
            assert row["delta_norm"] == 0.0 and row["relative_norm"] == 0.0
            continue
        touched += 1
        assert row["delta_norm"] == pytest.approx(difference.norm().item(), rel=1e-4)
        assert row["relative_norm"] == pytest.approx((difference.norm() / before[parameter].norm()).item(), rel=1e-4)
        assert row["max_abs"] == pytest.approx(difference.abs().max().item(), rel=1e-3)
        if row["kind"] == "matrix":
            largest = torch.linalg.matrix_norm(difference, 2).item()
            assert row["spectral_norm"] == pytest.approx(largest, rel=1e-3)
            assert kind == "dora" or row["stable_rank"] <= 4
    assert touched == 2 * {"gpt_neox": 4, "gpt2": 4}.get(name, 7)


def test_full_and_lora_have_rows_for_the_same_tensors(bases, tmp_path):
    full = by_name(layer_deltas(bases["qwen3"], checkpoint_with(bases["qwen3"], tmp_path / "full", {}), spectral=False))
    lora = by_name(layer_deltas(bases["qwen3"], adapter(bases["qwen3"], tmp_path / "lora"), spectral=False))
    assert list(full) == list(lora)
    assert lora["model.layers.0.self_attn.q_proj.weight"]["relative_norm"] == 0.0


def test_sharded_and_bfloat16_bases_are_read(bases, tmp_path):
    sharded = tiny_models.save_base(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tuned = checkpoint_with(bases["llama"], tmp_path / "tuned", {"model.norm.weight": torch.ones(32)})
    whole = by_name(layer_deltas(bases["llama"], tuned, spectral=True))
    assert by_name(layer_deltas(sharded, tuned, spectral=True)) == whole

    models.cast_checkpoint(bases["llama"], tmp_path / "half", "bfloat16")
    model = models.load_base(tmp_path / "half", "bfloat16")
    models.save_checkpoint(models.prepare(model, TrainSpec()), tmp_path / "kept", None, "base")
    rows = layer_deltas(tmp_path / "half", tmp_path / "kept", spectral=False)
    assert all(row["delta_norm"] == 0.0 for row in rows)
    rows = layer_deltas(bases["llama"], tmp_path / "kept", spectral=False, base_dtype="bfloat16")
    assert all(row["delta_norm"] == 0.0 for row in rows), "a float32 file that training loaded in bfloat16"


def test_files_without_the_model_s_prefix_are_matched(bases, tmp_path):
    """As in the files of the original GPT-2."""
    base = tiny_models.save_base(tmp_path / "base", "gpt2")
    tuned = checkpoint_with(base, tmp_path / "tuned", {"transformer.h.1.mlp.c_fc.weight": torch.full((32, 128), 0.01)})
    lora = adapter(base, tmp_path / "lora")
    weights = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a buffer that old files hold
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    rows = by_name(layer_deltas(base, tuned, spectral=True))
    assert [name for name, row in rows.items() if row["delta_norm"]] == ["h.1.mlp.c_fc.weight"]
    touched = {row["layer"] for row in layer_deltas(base, lora, spectral=True) if row["delta_norm"]}
    assert touched == {1, 2}


def test_a_checkpoint_of_another_model_is_refused(bases, tmp_path):
    with pytest.raises(ValueError, match="has no tensor 'gpt_neox.embed_in.weight'"):
        list(layer_deltas(bases["gpt_neox"], bases["llama"], spectral=False))
    with pytest.raises(ValueError, match="the adapter changes 'model.layers.1.mlp.down_proj.weight'"):
        list(layer_deltas(bases["gpt_neox"], adapter(bases["llama"], tmp_path), spectral=False))


def test_an_adapter_on_a_renamed_head_is_found(bases, tmp_path):
    settings = TrainSpec(method="lora", lora=LoraSpec(target_modules=("lm_head",)))
    model = models.prepare(models.load_base(bases["gpt_neox"]), settings)
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.fill_(0.1)
    models.save_checkpoint(model, tmp_path, None, "base")
    rows = by_name(layer_deltas(bases["gpt_neox"], tmp_path, spectral=True))
    assert [name for name, row in rows.items() if row["delta_norm"]] == ["embed_out.weight"]


@pytest.mark.parametrize("shape", [(40, 30), (1500, 1200)])
def test_the_spectral_norm_is_accurate(shape):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    update = torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, shape[1], generator=generator)
    for matrix, tolerance in [(noise, 1e-3), (update, 1e-5), (update + noise, 1e-5)]:
        exact = torch.linalg.matrix_norm(matrix.double(), 2).item()
        assert layer_delta.spectral_norm(matrix) == pytest.approx(exact, rel=tolerance)
