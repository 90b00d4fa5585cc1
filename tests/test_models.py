"""Base models and checkpoints: found, prepared, saved and loaded without loss."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweep import models
from sweep.spec import BaseModelSpec, LoraSpec, TrainSpec

IDS = torch.arange(1, 25).view(2, 12)
TEMPLATE = TrainSpec().template


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny_models.save_base(tmp_path_factory.mktemp(name), name) for name in tiny_models.CONFIGS}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def disturb(model: torch.nn.Module) -> None:
    """Change what is trainable, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_locate_takes_a_folder_and_names_what_a_bad_one_lacks(bases, tmp_path):
    assert models.locate(BaseModelSpec(path=str(bases["llama"]))) == bases["llama"]
    with pytest.raises(ValueError, match="does not exist"):
        models.locate(BaseModelSpec(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"no config\.json"):
        models.locate(BaseModelSpec(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer"):
        models.locate(BaseModelSpec(path=str(tmp_path)))
    with pytest.raises(ValueError, match="no tokenizer"):
        models.load_tokenizer(tmp_path)


def test_a_missing_pad_token_is_the_end_token_and_the_vocabulary_stays(bases):
    tokenizer = models.load_tokenizer(bases["llama"])
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == len(tiny_models.tokenizer())


def test_the_prompt_template_becomes_the_chat_template(bases):
    tokenizer = models.load_tokenizer(bases["llama"], TEMPLATE)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 plus 2"}], tokenize=False)
    assert text.startswith("###Question: 1 plus 2\n###Answer:")


def test_what_a_caller_does_to_a_base_model_stays_with_the_caller(bases):
    first = models.load_base(bases["qwen3"])
    before = logits(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    first.config.use_cache = False
    second = models.load_base(bases["qwen3"])
    assert torch.equal(logits(second), before)
    assert second.config.use_cache is True
    assert second.lm_head.weight is second.model.embed_tokens.weight, "tied weights stay tied in the copy"


def test_a_base_model_that_changed_on_disk_is_loaded_again(tmp_path):
    before = logits(models.load_base(tiny_models.save_base(tmp_path, seed=0)))
    after = logits(models.load_base(tiny_models.save_base(tmp_path, seed=1)))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_parameter_has_its_place(bases, name):
    model = models.load_base(bases[name])
    places = {parameter: models.place(parameter, model.config) for parameter, _ in model.named_parameters()}
    layers = {place.layer for place in places.values()}
    assert layers == {None, 0, 1, 2}
    assert all((place.depth is None) == (place.layer is None) for place in places.values())
    outside = {place.module for place in places.values() if place.layer is None}
    assert outside <= {
        *("embed_tokens", "norm", "lm_head"),
        *("embed_in", "final_layer_norm", "final_layer_norm.bias", "embed_out"),
        *("wte", "wpe", "ln_f", "ln_f.bias"),
    }
    keys = [(place.layer, place.module) for place in places.values()]
    assert len(set(keys)) == len(keys), "no two parameters share a place"


def test_place_by_name():
    assert models.place("model.layers.3.self_attn.q_proj.weight", 4) == (3, 0.875, "self_attn.q_proj")
    assert models.place("gpt_neox.layers.0.attention.query_key_value.bias", 2) == (
        0,
        0.25,
        "attention.query_key_value.bias",
    )
    assert models.place("h.1.mlp.c_fc.weight", 2) == (1, 0.75, "mlp.c_fc")
    assert models.place("model.norm.weight", 4) == (None, None, "norm")
    assert models.place("lm_head.weight", 4) == (None, None, "lm_head")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_prepare_trains_what_is_named_and_nothing_else(bases, name):
    def trained(**settings) -> set[int | None]:
        model = models.prepare(models.load_base(bases[name]), TrainSpec(**settings))
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        if settings["method"] == "lora":
            assert names and all("lora_" in n for n in names)
            assert not any("lm_head" in n or "embed" in n for n in names)
        return {models.place(n, model.config).layer for n in names}

    assert trained(method="full") == {None, 0, 1, 2}
    assert trained(method="full", trained_layers="1-2") == {1, 2}
    assert trained(method="lora") == {0, 1, 2}
    assert trained(method="lora", trained_layers="0-1") == {0, 1}


def test_blocks_beyond_the_model_are_refused(bases):
    for method in ("full", "lora"):
        with pytest.raises(ValueError, match=r"which has 3 blocks \(0-2\)"):
            models.prepare(models.load_base(bases["llama"]), TrainSpec(method=method, trained_layers="1-3"))


def test_lora_target_modules_can_be_named(bases):
    settings = TrainSpec(method="lora", lora=LoraSpec(target_modules=("q_proj", "mlp.up_proj")))
    model = models.prepare(models.load_base(bases["llama"]), settings)
    assert models.target_modules(model) == ["mlp.up_proj", "self_attn.q_proj"]
    with pytest.raises(ValueError, match=r"matches no linear layer; this model has .*self_attn\.q_proj"):
        wrong = TrainSpec(method="lora", lora=LoraSpec(target_modules=("query",)))
        models.prepare(models.load_base(bases["llama"]), wrong)


def test_a_bfloat16_base_is_trained_in_float32(bases):
    base = models.load_base(bases["llama"], "bfloat16")
    assert base.dtype == torch.bfloat16
    assert models.prepare(base, TrainSpec(method="full")).dtype == torch.float32
    lora = models.prepare(models.load_base(bases["llama"], "bfloat16"), TrainSpec(method="lora", precision="bf16"))
    kinds = {(p.requires_grad, p.dtype) for p in lora.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_a_full_checkpoint_loads_with_plain_transformers(bases, name, tmp_path):
    model = models.prepare(models.load_base(bases[name]), TrainSpec())
    disturb(model)
    models.save_checkpoint(model, tmp_path, models.load_tokenizer(bases[name], TEMPLATE), "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(models.load_checkpoint(bases[name], tmp_path)), logits(model))
    assert json.loads((tmp_path / "config.json").read_text()).get("use_cache", True), "what is saved generates fast"
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False
    )
    assert rendered.startswith("###Question: ?")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("kind", ["plain", "rslora", "dora"])
def test_an_adapter_loads_with_plain_peft_and_merges(bases, name, kind, tmp_path):
    flags = {} if kind == "plain" else {kind: True}
    settings = TrainSpec(method="lora", trained_layers="1-2", lora=LoraSpec(rank=4, alpha=6.0, **flags))
    model = models.prepare(models.load_base(bases[name]), settings)
    disturb(model)
    models.save_checkpoint(model, tmp_path, models.load_tokenizer(bases[name]), "some/base")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[name]), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    merged = models.load_checkpoint(bases[name], tmp_path)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(merged) - logits(models.load_base(bases[name]))).abs().max() > 0.01
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base", "no path of this machine"
    assert str(bases[name]) not in "".join(f.read_text(errors="ignore") for f in tmp_path.glob("*.json"))


def test_a_cast_checkpoint_holds_the_same_weights_rounded_once(bases, tmp_path):
    model = models.prepare(models.load_base(bases["llama"]), TrainSpec())
    disturb(model)
    models.save_checkpoint(model, tmp_path / "weights", models.load_tokenizer(bases["llama"]), "base")
    models.cast_checkpoint(tmp_path / "weights", tmp_path / "export", "bfloat16")
    wanted = {n: t.to(torch.bfloat16) for n, t in load_file(tmp_path / "weights/model.safetensors").items()}
    found = load_file(tmp_path / "export/model.safetensors")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16
    models.cast_in_place(tmp_path / "weights", "bfloat16")
    names = sorted(file.name for file in (tmp_path / "export").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "weights").iterdir())
    assert all((tmp_path / "weights" / n).read_bytes() == (tmp_path / "export" / n).read_bytes() for n in names)


def test_a_cast_leaves_an_adapter_in_float32(bases, tmp_path):
    model = models.prepare(models.load_base(bases["llama"]), TrainSpec(method="lora"))
    models.save_checkpoint(model, tmp_path, None, "base")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    models.cast_in_place(tmp_path, "bfloat16")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
