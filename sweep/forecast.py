"""What a sweep will cost: tokens, hours and disk, before anything runs.

Parameters are read from the headers of the weight files, sizes of datasets from their first bytes; hours come from a
rule of thumb until trials of the same sweep have finished, and from their records after that. None is "not known".
"""

import json
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep import tiny
from sweep.config import matching_files
from sweep.plan import Plan
from sweep.spec import BaseModelSpec, DatasetSpec, PlannedTrial, Resources
from sweep.store import Result
from sweep.trial import due

CPU_FLOPS = 50e9
"""Per core and second: what a small model trains at in float32 (48-82 GFLOP/s measured)."""

GPU_FLOPS = 300e12
"""Per GPU and second: bf16 training of 7-8B models at 40 % of an H100's peak (published figures: 40-46 %)."""

FLOPS_PER_TOKEN = 6
"""Times parameters: forward and backward pass of one token."""

BYTES_PER_TOKEN = 4.0
"""Of English text under common tokenizers."""

SAMPLE_BYTES = 1 << 20

TINY_PARAMETERS, TINY_TOKENS = 600_000, 40.0
"""About what an embedded model and an embedded example have."""


@dataclass(frozen=True)
class Forecast:
    """Cost of what a plan still lacks."""

    train_tokens: float | None
    """Tokens to be trained on, all epochs."""
    hours: float | None
    """Device hours of what is due, one device per work item."""
    basis: str
    """Where the hours come from."""
    disk_gib: float | None
    """Weights that stay."""
    peak_disk_gib: float | None
    """The most at one time: kept weights and the float32 checkpoints of work in flight."""


def forecast(plan: Plan, done: Mapping[str, Mapping[str, Result]], resources: Resources, slots: int) -> Forecast:
    """The cost of a plan.

    Args:
        plan: the plan.
        done: committed units by owner (`trials/<id>`).
        resources: of the stages, for their device.
        slots: work items that run at the same time.
    """
    parameters: dict[str, int | None] = {}
    sizes: dict[str, tuple[float, float] | None] = {}
    tokens = flops = kept = largest = 0.0
    known = True
    for planned in plan.trials:
        if planned.trial.is_baseline:
            continue
        train = planned.trial.train
        assert train is not None
        if planned.base_model not in parameters:
            parameters[planned.base_model] = count_parameters(planned.trial.base_model)
        count, amount = parameters[planned.base_model], _examples(planned, sizes)
        if count is None or amount is None:
            known = False
            continue
        checkpoint = checkpoint_bytes(planned, count)
        kept += checkpoint * {"all": len(planned.epochs), "last": 1, "none": 0}[planned.keep]
        largest = max(largest, checkpoint * (2 if planned.export_dtype == "bfloat16" else 1))
        if any(item.stage == "train" for item in due(planned, done.get(f"trials/{planned.trial_id}", {})).now):
            num_tokens = amount * max(planned.epochs)
            tokens += num_tokens
            flops += FLOPS_PER_TOKEN * count * num_tokens
    hours, basis = _hours(plan, done, flops if known else None, resources)
    return Forecast(
        train_tokens=tokens if known else None,
        hours=hours,
        basis=basis,
        disk_gib=kept / 2**30 if known else None,
        peak_disk_gib=(kept + slots * largest) / 2**30 if known else None,
    )


def checkpoint_bytes(planned: PlannedTrial, num_parameters: int) -> float:
    """Size of one kept checkpoint. An adapter is counted as 1 % of the model, which rank 16 comes near."""
    assert planned.trial.train is not None
    if planned.trial.train.method == "lora":
        return 0.01 * num_parameters * 4
    return num_parameters * (4 if planned.export_dtype == "float32" else 2)


def _hours(
    plan: Plan, done: Mapping[str, Mapping[str, Result]], flops: float | None, resources: Resources
) -> tuple[float | None, str]:
    """From the mean duration of finished items by stage; before there are any, training by its operations alone."""
    seconds: dict[str, list[float]] = {"train": [], "evaluate": [], "layer_delta": [], "measure": []}
    for results in done.values():
        for unit, result in results.items():
            stage = "measure" if unit.startswith("measures/") else unit.split("/")[2]
            stage = "evaluate" if stage == "scores" else stage
            duration = result.record.get("train_seconds", result.record.get("seconds"))
            if duration is not None:
                seconds[stage].append(duration)
    missing = [item for p in (*plan.trials, *plan.measures) for item in _missing(p, done)]
    if seconds["train"] and all(seconds[stage] for stage in missing):
        total = sum(statistics.fmean(seconds[stage]) for stage in missing)
        return total / 3600, "mean time of finished work of this sweep"
    if flops is None:
        return None, "size of a model or dataset is not known"
    rate = GPU_FLOPS * resources.train.gpus if resources.train.gpus else CPU_FLOPS * resources.train.cpus
    return flops / rate / 3600, "training only, by a rule of thumb; evaluation is not known before the first results"


def _missing(planned: Any, done: Mapping[str, Mapping[str, Result]]) -> list[str]:
    owner = f"trials/{planned.trial_id}" if isinstance(planned, PlannedTrial) else f"measures/{planned.key}"
    state = due(planned, done.get(owner, {}))
    stages = []
    for item in (*state.now, *state.later):
        stages += [item.stage] * (len(planned.evaluations) if item.stage == "evaluate" else 1)
    return stages


def count_parameters(base: BaseModelSpec) -> int | None:
    """Parameters by the headers of its safetensors files; None if they are not on this machine, or not readable."""
    if base.tiny is not None:
        return TINY_PARAMETERS
    if base.path is None:
        return None
    total = 0
    for file in Path(base.path).glob("*.safetensors"):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:  # not safetensors: a pointer of git-lfs, half a download
                return None
            try:
                header = dict(json.loads(stream.read(length)))
            except (ValueError, TypeError):
                return None
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def _examples(planned: PlannedTrial, sizes: dict[str, tuple[float, float] | None]) -> float | None:
    """Tokens of one epoch of a trial, estimated from the size of its data."""
    assert planned.trial.train is not None
    totals = []
    for name, dataset in planned.trial.datasets.items():
        if name not in sizes:
            sizes[name] = _size(dataset)
        if sizes[name] is None:
            return None
        totals.append(sizes[name])
    count = sum(n for n, _ in totals)
    mean = sum(n * tokens for n, tokens in totals) / count if count else 0.0
    wanted = planned.trial.train.num_examples
    return min(wanted, count) * mean if wanted is not None else count * mean


def _size(dataset: DatasetSpec) -> tuple[float, float] | None:
    """(examples, mean tokens) of local line-wise data by a sample of its bytes; None if that does not tell."""
    if dataset.tiny is not None:
        return float(tiny.DATASETS[dataset.tiny].num_examples), TINY_TOKENS
    paths = (dataset.path,) if isinstance(dataset.path, str) else dataset.path or ()
    files = [file for path in paths for file in matching_files(path)]
    if not files or not all(file.endswith((".jsonl", ".json")) for file in files):
        return None
    size = sum(os.path.getsize(file) for file in files)
    with open(files[0], "rb") as stream:
        sample = stream.read(SAMPLE_BYTES)
    if not sample:
        return 0.0, 0.0
    lines = max(1, sample.count(b"\n"))
    return size / (len(sample) / lines), len(sample) / lines / BYTES_PER_TOKEN
