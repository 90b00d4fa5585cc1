"""A small simulated store of tables whose effects are known, because they are planted here."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sweep import schema

BASE_MODELS = {"llama-code": 4, "neox-general": 6, "qwen-maths": 8}
"""Base model -> number of blocks."""

DATASETS = {
    "functions": "code",
    "repairs": "code",
    "sums": "maths",
    "word-problems": "maths",
    "facts": "general",
    "letters": "general",
}
"""Dataset -> kind, from the lowest perplexity to the highest."""

BENCHMARKS = {
    "code-exact": "code",
    "code-choice": "code",
    "maths-exact": "maths",
    "maths-choice": "maths",
    "reading": "general",
    "recall": "general",
}
"""Benchmark -> kind; the exact ones are generative."""

NUM_ITEMS = 50
EPOCHS = 3
OWN_KIND = 10
"""Items (of 50) that a dataset adds to a benchmark of its own kind, after the last epoch."""
LORA_COST = 2
"""Items that LoRA gains less than full tuning, everywhere."""
SEED_SHIFTS = {0: 0, 1: 2, 2: -2}
"""Items by which a seed moves every gain of the cell trained three times."""
REPEATED = ("llama-code", "facts")
FAILED = ("neox-general", "letters", "lora")
UNSCORED = ("qwen-maths", "functions", "full", "reading")
"""The trial and benchmark whose score is missing at the last epoch."""


def baseline_correct(model: str, benchmark: str) -> int:
    """Items that the untrained model gets right."""
    return 8 + 2 * list(BASE_MODELS).index(model) + list(BENCHMARKS).index(benchmark)


def gained(model: str, dataset: str, benchmark: str, method: str = "full", epoch: int = EPOCHS, seed: int = 0) -> int:
    """Items gained over the baseline; falls with the dataset's place in DATASETS, hence with perplexity."""
    items = OWN_KIND * (DATASETS[dataset] == BENCHMARKS[benchmark]) + 4 - list(DATASETS).index(dataset)
    items += list(BASE_MODELS).index(model) - (LORA_COST if method == "lora" else 0)
    return items + (SEED_SHIFTS[seed] if (model, dataset) == REPEATED else 0) - 2 * (EPOCHS - epoch)


def perplexity(model: str, dataset: str) -> float:
    """Perplexity of the dataset's completions under the base model."""
    return round(2.5 * (1 + 0.3 * list(BASE_MODELS).index(model)) * 1.25 ** list(DATASETS).index(dataset), 4)


def relative_norm(model: str, dataset: str, method: str, layer: int) -> float:
    """Relative change of a block: grows towards the top; in the middle it falls with the dataset's place."""
    layers = BASE_MODELS[model]
    depth, place = (layer + 0.5) / layers, list(DATASETS).index(dataset)
    signal = math.exp(-8 * (depth - 0.55) ** 2)
    other = (place * 5 + layer * 3) % 7  # an order that has nothing to do with the gain
    return (0.3 if method == "lora" else 1.0) * 0.01 * (1 + depth) * (1 - 0.06 * signal * place + 0.02 * other)


def _row(table: str, **values) -> dict:
    return {name: None for name in schema.TABLES[table].names} | values


def _trial(name: str, model: str, dataset: str | None, method: str | None, seed: int, status: str) -> dict:
    trained = {}
    if dataset is not None:
        lora = {"lora_rank": 8, "lora_alpha": 16.0} if method == "lora" else {}
        trained = dict(
            dataset=dataset,
            dataset_kind=DATASETS[dataset],
            data_digest=f"{dataset}-digest",
            num_examples=400,
            method=method,
            learning_rate=5e-3 if lora else 1e-3,
            lr_schedule="constant",
            warmup_steps=10,
            weight_decay=0.0,
            max_grad_norm=1.0,
            global_batch_size=32,
            epochs=EPOCHS,
            seed=seed,
            data_seed=seed,
            train_seed=seed,
            precision="float32",
            max_length=128,
            template="###Question: {prompt}\n###Answer: ",
            recipe_version=1,
            num_trained_parameters=20_000 if lora else 600_000,
            **lora,
        )
        if status == "succeeded":
            trained |= dict(
                examples_requested=400,
                examples_used=398,
                examples_truncated=3,
                examples_dropped=2,
                trained_tokens=9_000,
                total_tokens=21_000,
                layout="padded",
                micro_batch_size=32,
                num_steps=39,
                train_loss_nats=1.1,
                train_seconds=14.5,
                device="cpu",
            )
    if status == "failed":
        trained |= dict(failure_kind="nan", failure_message="loss is nan at step 12; lower the learning rate <5e-3>")
    return _row(
        "trials",
        trial_id=name,
        status=status,
        in_plan=True,
        is_baseline=dataset is None,
        base_model=model,
        base_digest=f"{model}-digest",
        architecture=model.split("-")[0].title() + "ForCausalLM",
        num_layers=BASE_MODELS[model],
        num_parameters=600_000,
        **trained,
    )


def rows() -> dict[str, list[dict]]:
    """All rows, table by table."""
    out: dict[str, list[dict]] = {name: [] for name in schema.TABLES}
    for model in BASE_MODELS:
        out["trials"].append(_trial(f"base-{model}", model, None, None, 0, "succeeded"))
        _evaluate(out, f"base-{model}", 0, lambda benchmark, model=model: baseline_correct(model, benchmark))
        for dataset in DATASETS:
            _measure(out, model, dataset)
            for method in ("full", "lora"):
                repeated = (model, dataset) == REPEATED and method == "full"
                for seed in (0, 1, 2) if repeated else (0,):
                    _train(out, model, dataset, method, seed)
    return out


def _train(out: dict, model: str, dataset: str, method: str, seed: int) -> None:
    name = f"{model}-{dataset}-{method}-{seed}"
    failed = (model, dataset, method) == FAILED
    out["trials"].append(_trial(name, model, dataset, method, seed, "failed" if failed else "succeeded"))
    for attempt in (1, 2) if failed else (1,):
        message = "loss is nan at step 12; lower the learning rate <5e-3>" if failed else None
        out["attempts"].append(
            _row(
                "attempts",
                item=f"{name}/train",
                attempt=attempt,
                trial_id=name,
                stage="train",
                host="laptop",
                device="cpu",
                started_at="2025-06-01T10:00:00Z",
                seconds=14.5,
                peak_memory_gib=0.9,
                outcome="failed" if failed else "succeeded",
                failure_kind="nan" if failed else None,
                message=message,
            )
        )
    if failed:
        return
    for epoch in range(1, EPOCHS + 1):
        _evaluate(
            out,
            name,
            epoch,
            lambda b, epoch=epoch: baseline_correct(model, b) + gained(model, dataset, b, method, epoch, seed),
            unscored=UNSCORED[3] if (model, dataset, method) == UNSCORED[:3] and epoch == EPOCHS else None,
        )
        for part in (0.5, 1.0):
            at = epoch - 1 + part
            loss = 1 + math.exp(-at) + 0.05 * list(DATASETS).index(dataset)
            out["steps"].append(
                _row(
                    "steps",
                    trial_id=name,
                    step=round(13 * at),
                    epoch=at,
                    loss_nats=loss,
                    learning_rate=1e-3,
                    held_out_loss_nats=loss + 0.03 * epoch**2 if part == 1.0 else None,
                    grad_norm=1.0,
                    trained_tokens=700,
                )
            )
    for layer in range(BASE_MODELS[model]):
        for module in ("self_attn.q_proj", "mlp.up_proj"):
            relative = relative_norm(model, dataset, method, layer)
            out["layer_deltas"].append(
                _row(
                    "layer_deltas",
                    trial_id=name,
                    epoch=EPOCHS,
                    parameter=f"layers.{layer}.{module}",
                    layer=layer,
                    depth=(layer + 0.5) / BASE_MODELS[model],
                    module=module,
                    kind="matrix",
                    num_parameters=4096,
                    delta_norm=8.0 * relative,
                    base_norm=8.0,
                    relative_norm=relative,
                    source="float32_checkpoint",
                )
            )


def _measure(out: dict, model: str, dataset: str) -> None:
    place = list(DATASETS).index(dataset)
    value = perplexity(model, dataset)
    measures = {
        "perplexity_completion": value,
        "bits_per_byte_completion": math.log2(value) / 3,
        "completion_tokens_mean": 20.0 + 7 * ((place * 2 + 1) % 6),
        "num_examples": 400.0,
    }
    for measure, number in measures.items():
        out["data_measures"].append(
            _row(
                "data_measures",
                base_model=model,
                dataset=dataset,
                measure=measure,
                base_digest=f"{model}-digest",
                data_digest=f"{dataset}-digest",
                dataset_kind=DATASETS[dataset],
                value=number,
                num_examples=400,
            )
        )


def _evaluate(out: dict, trial: str, epoch: int, correct: Callable[[str], int], unscored: str | None = None) -> None:
    for place, (benchmark, kind) in enumerate(BENCHMARKS.items()):
        generative = benchmark.endswith("exact")
        right = min(max(correct(benchmark), 0), NUM_ITEMS)
        share = right / NUM_ITEMS
        about = dict(trial_id=trial, epoch=epoch, eval_id=f"eval{place:08x}", benchmark=benchmark)
        shared = dict(benchmark_kind=kind, num_items=NUM_ITEMS, num_fewshot=0, higher_is_better=True)
        error = math.sqrt(share * (1 - share) / NUM_ITEMS)
        value = None if benchmark == unscored else share
        out["scores"].append(
            _row(
                "scores",
                **about,
                **shared,
                metric="exact_match" if generative else "acc",
                is_primary=True,
                value=value,
                stderr=None if value is None else error,
                chance=None if generative else 0.25,
            )
        )
        if generative:
            out["scores"].append(_row("scores", **about, **shared, metric="extracted", is_primary=False, value=0.9))
        order = np.random.default_rng(place).permutation(NUM_ITEMS)  # the hard items are hard for all checkpoints
        for item in range(NUM_ITEMS) if value is not None and epoch in (0, EPOCHS) else ():
            out["items"].append(
                _row(
                    "items",
                    **about,
                    item=item,
                    item_digest=f"{benchmark}-{item}",
                    value=float(order[item] < right),
                    extracted=True if generative else None,
                    target="A",
                )
            )


def write(folder: Path, change: Callable[[dict[str, list[dict]]], None] = lambda rows: None) -> Path:
    """Write the store into `folder/tables` after `change` has edited the rows; a table of None is left out.

    Returns:
        The folder.
    """
    tables = rows()
    change(tables)
    for name, table in tables.items():
        if table is not None:
            schema.write(name, schema.build(name, table), folder / "tables")
    return folder
