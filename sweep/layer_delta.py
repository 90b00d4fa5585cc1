"""Trained minus base weights, tensor by tensor: how far each module moved, and in how many dimensions.

Expects float32 checkpoints: one stored in bfloat16 has lost small changes (a true 1e-4 reads as 3e-5).
Files are read lazily, so that two tensors and what is computed from them are all the memory it takes.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from sweep import models

EXACT_UP_TO = 512
"""Shorter side up to which the spectral norm is a full decomposition, exact to float32 rounding."""

SPECTRAL_TOLERANCE = 1e-5
"""Above it, subspace iteration ends when the estimate grows by less than this share in a round. It is a lower
bound: within 1e-3 of the truth on random matrices, the hardest case (4e-5 at 2,048 x 2,048), and within 1e-5
on updates whose leading singular values stand apart."""

_FUSED = re.compile(r"(?:^|\.)(?:query_key_value|qkv_proj|qkv|Wqkv|c_attn|gate_up_proj|in_proj)$")
_RENAMED = {"embed_out.weight": "lm_head.weight"}
"""Tensors that files call otherwise than the modules are called (GPT-NeoX)."""

_NOT_WEIGHTS = re.compile(r"\.(?:inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""Buffers that older versions of the library wrote among the weights."""


def layer_deltas(
    base_path: Path, checkpoint_weights: Path, *, spectral: bool, base_dtype: str = "float32"
) -> Iterator[dict[str, Any]]:
    """A row of the table `layer_deltas`, without trial_id and epoch, for every weight tensor of the base.

    Tensors that training did not touch have rows too, with 0: every checkpoint of a base has the same rows.

    Args:
        base_path: folder of the base model.
        checkpoint_weights: folder of a full checkpoint or of a LoRA adapter.
        spectral: take spectral norm and stable rank as well, most of the time on large models.
        base_dtype: type the base was loaded in for training.

    Raises:
        ValueError: the checkpoint lacks a tensor of the base, has it in another shape, or changes one that
            the base lacks.
    """
    config = AutoConfig.from_pretrained(base_path)
    with contextlib.ExitStack() as stack:
        base = _Weights(base_path, stack)
        trained = _Weights(checkpoint_weights, stack)
        adapter = models.adapter_config(checkpoint_weights)
        names = [name for name in base.names if not _NOT_WEIGHTS.search(name)]
        tied = config.get_text_config().tie_word_embeddings
        if tied and len(names) > 1:
            names = [name for name in names if name != "lm_head.weight"]  # some files hold the same matrix twice
        change = _full_change(trained) if adapter is None else _lora_change(trained, adapter, names)
        for name in names:
            before = base.tensor(name).to(getattr(torch, base_dtype)).float()
            delta, norm, source = change(name, before)
            place = models.place(name, config)
            kind = _kind(place, before, tied)
            row = {
                "parameter": name,
                "layer": place.layer,
                "depth": place.depth,
                "module": place.module,
                "kind": kind,
                "num_parameters": before.numel(),
            }
            norm = norm if spectral and kind == "matrix" else None
            yield row | _measures(before, delta, norm) | {"source": source}


class _Weights:
    """The tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.exists():  # only the shards that it names: some folders hold the weights in two layouts
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        self._file_of = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            self._file_of |= dict.fromkeys(opened.keys(), opened)
        if not files:
            raise ValueError(f"{folder} has no safetensors file; convert its weights with save_pretrained")

        self.names = dict.fromkeys(sorted(self._file_of, key=_natural))

    def tensor(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


def _natural(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _find(name: str, names: Collection[str]) -> str | None:
    """Which of the names means the tensor that a base's file calls `name`.

    Some files leave out the model's prefix (`h.0.` for `transformer.h.0.`), some rename the head.
    """
    for candidate in (name, _RENAMED.get(name)):
        if candidate in names:
            return candidate
    shorter = name.partition(".")[2]
    return next((other for other in names if other == shorter or other.partition(".")[2] == name), None)


Change = Callable[[str, torch.Tensor], tuple[torch.Tensor | None, Callable[[torch.Tensor], float], str]]
"""(name, base tensor) -> delta, None where untouched; how to take its spectral norm; source of the row."""


def _full_change(trained: _Weights) -> Change:
    def change(name: str, before: torch.Tensor) -> tuple:
        found = _find(name, trained.names)
        if found is None:
            raise ValueError(f"the checkpoint has no tensor {name!r}; is it of another base model?")
        after = trained.tensor(found).float()
        if after.shape != before.shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(after.shape)}, the base's {tuple(before.shape)}")
        delta = after.sub_(before)
        return (delta if delta.any() else None), spectral_norm, "float32_checkpoint"

    return change


def _lora_change(adapter: _Weights, settings: dict[str, Any], base_names: list[str]) -> Change:
    rank = settings["r"]
    scaling = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    transposed = settings.get("fan_in_fan_out", False)
    parts: dict[str, dict[str, str]] = {}
    for name in adapter.names:
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[A-Za-z_]+?)(?:\.weight)?", name).groups()
        parts.setdefault(f"{module}.weight", {})[part] = name
    stored_parts = {name: parts.pop(found) for name in base_names if (found := _find(name, parts)) is not None}
    if parts:
        raise ValueError(f"the adapter changes {min(parts)!r}, which the base's files do not name")

    def change(name: str, before: torch.Tensor) -> tuple:
        source = "dora_merge" if settings.get("use_dora") else "lora"
        if name not in stored_parts:
            return None, spectral_norm, source
        tensors = {part: adapter.tensor(stored).float() for part, stored in stored_parts[name].items()}
        down, up = tensors["lora_A"], tensors["lora_B"]
        delta = scaling * (up @ down)
        if settings.get("use_dora"):
            # each row of the sum takes the learned length, arXiv 2402.09353, equation 5
            weight = (before.T if transposed else before) + delta
            length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
            delta = weight * (tensors["lora_magnitude_vector"][:, None] / length) - (weight - delta)
            norm = spectral_norm
        else:
            norm = lambda _: scaling * low_rank_spectral_norm(up, down)  # noqa: E731
        return (delta.T.contiguous() if transposed else delta), norm, source

    return change


def _kind(place: models.Place, tensor: torch.Tensor, tied: bool) -> str:
    if tensor.ndim == 1:
        return "vector"
    if tensor.ndim != 2:
        return "other"
    if tied and place.module in ("embed_tokens", "embed_in", "wte", "lm_head", "embed_out"):
        return "tied"
    return "fused" if _FUSED.search(place.module) else "matrix"


def _measures(
    before: torch.Tensor, delta: torch.Tensor | None, norm: Callable[[torch.Tensor], float] | None
) -> dict[str, float | None]:
    base_norm = _norm(before)
    measures = dict.fromkeys(("relative_norm", "cosine", "spectral_norm", "stable_rank"))
    measures |= {"base_norm": base_norm, "delta_norm": 0.0, "max_abs": 0.0, "frac_changed": 0.0}
    if delta is None:
        measures |= {"relative_norm": 0.0, "cosine": 1.0} if base_norm else {}
        measures |= {"spectral_norm": 0.0} if norm else {}
        return measures
    measures["delta_norm"] = delta_norm = _norm(delta)
    measures["max_abs"] = delta.abs().max().item()
    measures["frac_changed"] = torch.count_nonzero(delta).item() / delta.numel()
    if base_norm:
        measures["relative_norm"] = delta_norm / base_norm
        after_norm = _norm(before + delta)
        product = (before * delta).sum(dtype=torch.float64).item() + base_norm**2
        measures["cosine"] = product / (base_norm * after_norm) if after_norm else None
    if norm:
        measures["spectral_norm"] = largest = norm(delta)
        measures["stable_rank"] = (delta_norm / largest) ** 2 if largest else None
    return measures


def _norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def spectral_norm(matrix: torch.Tensor) -> float:
    """Largest singular value of a float32 matrix, as accurate as `SPECTRAL_TOLERANCE` says."""
    if min(matrix.shape) <= EXACT_UP_TO:
        return torch.linalg.matrix_norm(matrix, 2).item()
    generator = torch.Generator().manual_seed(0)  # the same estimate for the same matrix, and no global state
    block = torch.randn(matrix.shape[1], 32, generator=generator)
    estimate = 0.0
    for _ in range(100):
        block = torch.linalg.qr(block).Q
        image = matrix @ block
        previous, estimate = estimate, torch.linalg.matrix_norm(image, 2).item()
        if estimate - previous <= SPECTRAL_TOLERANCE * estimate:
            break
        block = matrix.T @ image
    return estimate


def low_rank_spectral_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """Largest singular value of `up @ down` from its factors, exact: [out, rank] and [rank, in]."""
    core = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T
    return torch.linalg.matrix_norm(core, 2).item()
