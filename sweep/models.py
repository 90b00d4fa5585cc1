"""Base models and checkpoints: find, load, prepare for training, save, and name their parameters' places.

Full tuning and LoRA, all blocks and chosen blocks differ in `prepare` and in the files that `save_checkpoint`
writes; everything between the two is the same for all of them.
"""

import contextlib
import copy
import json
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from sweep import tokenization
from sweep.spec import BaseModelSpec, TrainSpec

ADAPTER_CONFIG = "adapter_config.json"
"""Its presence makes a checkpoint folder a LoRA adapter; the name is PEFT's."""

WARM_BYTES = 2**30
"""Base models are kept in memory between trials up to this many bytes together."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
)

_warm: OrderedDict[tuple, PreTrainedModel] = OrderedDict()


class Place(NamedTuple):
    """Where in a model a parameter lives."""

    layer: int | None
    """Index of the block from 0; None outside the blocks."""
    depth: float | None
    """Middle of the block as a share of all blocks, (layer + 0.5) / num_layers; None outside the blocks."""
    module: str
    """Module within the block (`self_attn.q_proj`), or its own name outside (`embed_tokens`)."""


def locate(base: BaseModelSpec, digest: str | None = None) -> Path:
    """The local folder of a base model; hub models are downloaded, embedded ones are built.

    Args:
        base: where it comes from.
        digest: the pinned hub commit; None takes the revision of the settings.

    Raises:
        ValueError: a local folder is missing, or lacks its config or its tokenizer.
    """
    if base.tiny is not None:
        from sweep import tiny  # builds and its data: only where embedded models are used

        return tiny.build_base_model(base.tiny, tiny.default_cache_dir())
    if base.hub is not None:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(base.hub, revision=digest or base.revision))
    path = Path(base.path).expanduser()
    if not path.is_dir():
        raise ValueError(f"base model folder {base.path!r} does not exist; give a folder in the Hugging Face format")
    if not (path / "config.json").is_file():
        raise ValueError(f"base model folder {base.path!r} has no config.json; save it with save_pretrained")
    _require_tokenizer(path)
    return path


def load_tokenizer(path: Path, template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token and, where one is given, a trial's prompt template.

    A missing pad token becomes the end token: the vocabulary never grows, so the weights keep their shape.

    Args:
        path: model folder.
        template: text with {prompt} and {completion}, which becomes the chat template; None keeps the
            tokenizer's own.

    Raises:
        ValueError: the folder has no tokenizer.
    """
    _require_tokenizer(path)  # without files the library would invent an empty tokenizer from the config
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        tokenizer.chat_template = tokenization.chat_template(template, tokenizer)
    return tokenizer


def _require_tokenizer(path: Path) -> None:
    if not any(any(path.glob(name)) for name in _TOKENIZER_FILES):
        raise ValueError(f"model folder {str(path)!r} has no tokenizer; save it there with save_pretrained")


def load_base(
    path: Path, dtype: str = "float32", attention: str = "sdpa", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A base model of one's own to change, in evaluation mode on the CPU.

    Small models stay in memory, and callers get deep copies (12 ms for half a million parameters, against
    37 ms to load), so that what one trial does to its model never reaches the next. Where the architecture
    has no sdpa, it takes eager attention. `config.use_cache` is as in the files, so that what is saved
    generates fast; who trains passes `use_cache=False` to the model.
    """
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.iterdir())
    key = (str(path), dtype, attention, trust_remote_code, *files)
    model = _warm.get(key)
    if model is None:
        model = _load(path, dtype, attention, trust_remote_code)
        if _num_bytes(model) >= WARM_BYTES:
            return model
        _warm[key] = model
    _warm.move_to_end(key)
    while sum(map(_num_bytes, _warm.values())) > WARM_BYTES:
        _warm.popitem(last=False)
    return copy.deepcopy(model)


def _load(path: Path, dtype: str, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    options = {"config": config, "dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    with _quiet():
        try:
            return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, **options)
        except ValueError as error:
            if attention != "sdpa" or "does not support an attention implementation" not in str(error):
                raise
            # a default must not shut out families such as Gemma 2: it caps its scores, which sdpa cannot
            return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)


def _num_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars, no word on what PEFT calls in transformers: they would bury the sweep's progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def prepare(model: PreTrainedModel, train: TrainSpec) -> PreTrainedModel | PeftModel:
    """The model with exactly those parameters trainable that the settings name: where methods differ.

    Full tuning of chosen blocks freezes embeddings, head and final norm as well. LoRA puts adapters on every
    linear layer of the (chosen) blocks, which leaves out the head, unless `target_modules` names others.
    Trained weights are float32; frozen ones too, except under LoRA with bf16 autocast on a bfloat16 base.

    Adapters draw their initial weights from the global generator: seed it first.

    Raises:
        ValueError: `trained_layers` beyond the model, or `target_modules` that match nothing.
    """
    blocks = _chosen_blocks(model, train)
    if train.method == "full":
        model = model.float()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(blocks is None or place(name, model.config).layer in blocks)
        return model
    if train.precision == "float32":
        model = model.float()
    lora, targets = train.lora, _lora_targets(model, train.lora.target_modules, blocks)
    modules = dict(model.named_modules())
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=targets,  # full names, so that the adapter file says exactly what it changed
        fan_in_fan_out=isinstance(modules[targets[0]], Conv1D),
        task_type="CAUSAL_LM",
    )
    with _quiet():
        return get_peft_model(model, config)


def _chosen_blocks(model: PreTrainedModel, train: TrainSpec) -> range | None:
    if train.layer_range is None:
        return None
    first, last = train.layer_range
    num_layers = count_layers(model.config)
    if last >= num_layers:
        raise ValueError(
            f"trained_layers {train.trained_layers!r} goes beyond the model, which has {num_layers} blocks "
            f"(0-{num_layers - 1})"
        )
    return range(first, last + 1)


def _lora_targets(model: PreTrainedModel, wanted: tuple[str, ...] | None, blocks: range | None) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    layers = {name: place(name, model.config).layer for name in linear}
    if wanted is None:
        targets = [name for name in linear if layers[name] is not None]
    else:
        targets = [name for name in linear if any(f".{name}".endswith(f".{suffix}") for suffix in wanted)]
    if blocks is not None:
        targets = [name for name in targets if layers[name] in blocks]
    if not targets:
        known = sorted({place(name, model.config).module for name in linear})
        raise ValueError(f"lora.target_modules {wanted} matches no linear layer; this model has {', '.join(known)}")
    return targets


def target_modules(model: nn.Module) -> list[str] | None:
    """Modules that carry an adapter, named within their block; None without adapters."""
    if not isinstance(model, PeftModel):
        return None
    return sorted({place(name, model.config).module for name in model.targeted_module_names})


def count_layers(config: object) -> int:
    """Transformer blocks of a model with this config."""
    return config.get_text_config().num_hidden_layers


def place(parameter_name: str, config: object) -> Place:
    """Block, relative depth and module of a parameter, from its name alone.

    The first number in a name is the block's index in every family tried (Llama, Mistral, Qwen, Gemma, OLMo,
    Phi, GPT-NeoX, GPT-2).

    >>> place("model.layers.0.self_attn.q_proj.weight", 4)
    Place(layer=0, depth=0.125, module='self_attn.q_proj')
    >>> place("gpt_neox.embed_in.weight", 4)
    Place(layer=None, depth=None, module='embed_in')

    Args:
        parameter_name: as in `named_parameters` or in a safetensors file.
        config: the model's config, or its number of blocks.
    """
    num_layers = config if isinstance(config, int) else count_layers(config)
    name = parameter_name.removesuffix(".weight")
    block = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if block:
        layer = int(block[1])
        return Place(layer, (layer + 0.5) / num_layers, block[2])
    outside = re.search(r"[^.]+(?:\.bias)?$", name)
    return Place(None, None, outside[0])


def save_checkpoint(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    base_name: str,
) -> None:
    """Write float32 safetensors that `AutoModelForCausalLM` or `PeftModel` loads, and the tokenizer.

    Args:
        model: as `prepare` gave it.
        folder: made if it is not there.
        tokenizer: None writes the weights alone.
        base_name: what an adapter calls its base: a public name, never a path of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # PEFT's own save_pretrained adds a model card with the base's path, and may ask the hub about its
        # embeddings
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(model.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = base_name, True
        config.target_modules = sorted(config.target_modules)  # a set: its order changes between processes
        config.save_pretrained(folder)
    else:
        with _quiet():
            model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_checkpoint(
    base_path: Path,
    checkpoint: Path | None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    *,
    base_dtype: str = "float32",
    attention: str = "sdpa",
) -> PreTrainedModel:
    """A plain model to evaluate, in `dtype` and in evaluation mode on the CPU.

    Args:
        base_path: folder of the base model.
        checkpoint: folder of a full checkpoint or of an adapter; None takes the base itself.
        dtype: type of the weights evaluated. An adapter is merged in float32 and cast after that.
        trust_remote_code: run code that comes with the model.
        base_dtype: type the base was loaded in for training.
        attention: attention kernel.
    """
    if checkpoint is not None and adapter_config(checkpoint) is None:
        return _load(checkpoint, dtype, attention, trust_remote_code)
    model = load_base(base_path, dtype if checkpoint is None else base_dtype, attention, trust_remote_code)
    if checkpoint is not None:
        with _quiet():
            model = PeftModel.from_pretrained(model.float(), checkpoint).merge_and_unload()
    return model.to(getattr(torch, dtype)).eval()


def cast_checkpoint(source: Path, target: Path, dtype: str) -> None:
    """Write a checkpoint again with weights of another type; the rest of the folder is copied.

    An adapter stays float32: it is small, and it is merged in float32.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors" and adapter_config(source) is None:
            _cast_file(file, target / file.name, dtype)
        elif file.name == "config.json" and adapter_config(source) is None:
            config = json.loads(file.read_text()) | {"dtype": dtype}
            (target / file.name).write_text(json.dumps(config, indent=2))
        else:
            shutil.copyfile(file, target / file.name)


def cast_in_place(folder: Path, dtype: str) -> None:
    """Cast a checkpoint's weights, each file written beside and renamed."""
    if adapter_config(folder) is not None:
        return
    for file in folder.glob("*.safetensors"):
        beside = file.with_suffix(".cast")
        _cast_file(file, beside, dtype)
        beside.replace(file)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _cast_file(source: Path, target: Path, dtype: str) -> None:
    weights = load_file(source)
    weights = {name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in weights.items()}
    save_file(weights, target, metadata={"format": "pt"})


def device() -> str:
    """Where models run in this process: `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def adapter_config(checkpoint: Path) -> dict | None:
    """Settings of the adapter in a checkpoint folder; None for a full checkpoint."""
    file = checkpoint / ADAPTER_CONFIG
    return json.loads(file.read_text()) if file.exists() else None
