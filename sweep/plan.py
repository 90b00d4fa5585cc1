"""`SweepSpec` -> trials: axes, zips, exclusions, baselines, shared trajectories, no duplicates.

Pure: it does not know whether anything ran, and reads no files.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sweep.config import ConfigError
from sweep.spec import (
    DatasetSpec,
    EvalSpec,
    GridSpec,
    Pins,
    PlannedMeasure,
    PlannedTrial,
    SweepSpec,
    TrainSpec,
    TrialSpec,
)


@dataclass(frozen=True)
class Plan:
    """Everything a sweep asks for; no trial and no measure twice."""

    trials: tuple[PlannedTrial, ...]
    """Trained ones in the order of the YAML, then the baselines."""
    measures: tuple[PlannedMeasure, ...]
    """(base model, dataset) pairs to measure."""

    @property
    def by_id(self) -> dict[str, PlannedTrial]:
        """Trials by id."""
        return {planned.trial_id: planned for planned in self.trials}


def expand(sweep: SweepSpec, pins: Pins, measure_version: int = 1) -> Plan:
    """All trials, evaluations and measures of a sweep.

    Cells that share a trajectory (a constant schedule with other `epochs`) become one trial with the union of their
    checkpoints.

    Raises:
        ConfigError: a combination of settings is impossible, or a trial has no epoch to evaluate.
    """
    trials: dict[str, PlannedTrial] = {}
    evaluations = _Evaluations(sweep, pins)
    for base_name, dataset_name, train in _cells(sweep):
        trial = _trial(sweep, pins, base_name, dataset_name, train)
        epochs = _eval_epochs(sweep, train)
        known = trials.get(trial.trial_id)
        if known is not None:  # the longest of the trajectories that share this id
            longest = max(known.trial, trial, key=lambda t: t.train.epochs)  # type: ignore[union-attr]
            epochs = tuple(sorted({*known.epochs, *epochs}))
            trials[trial.trial_id] = known.model_copy(update={"trial": longest, "epochs": epochs})
            continue
        trials[trial.trial_id] = PlannedTrial(
            trial=trial,
            base_model=base_name,
            dataset=dataset_name,
            dataset_kind=sweep.datasets[dataset_name].kind,
            epochs=epochs,
            evaluations=evaluations.of(train.template),
            layer_delta=sweep.layer_delta,
            keep=sweep.keep,
            keep_state=sweep.keep_state,
            export_dtype=sweep.export_dtype,
            execution=sweep.execution,
        )
    if not trials:
        raise ConfigError("the sweep has no trial: every cell is excluded")
    _check_eval_epochs(sweep, trials.values())
    baselines = _baselines(sweep, trials.values(), evaluations) if sweep.baselines and sweep.benchmarks else []
    return Plan((*trials.values(), *baselines), tuple(_measures(sweep, pins, trials, measure_version)))


def _cells(sweep: SweepSpec) -> Iterator[tuple[str, str, TrainSpec]]:
    """(base model, dataset, settings) of every grid, row-major: the last axis varies fastest."""
    cache: dict[str, TrainSpec] = {}
    for grid in (GridSpec(axes=sweep.axes, zip=sweep.zip, exclude=sweep.exclude), *sweep.also):
        for cell in _product(sweep, grid):
            base_name, dataset_name = cell.pop("base_model"), cell.pop("dataset")
            key = json.dumps(cell, sort_keys=True)
            if key not in cache:
                try:
                    cache[key] = sweep.train.replace(cell)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ConfigError(f"the settings {key} do not go together: {reason}") from error
            train = cache[key]
            if not any(_matches(rule, base_name, dataset_name, train) for rule in grid.exclude):
                yield base_name, dataset_name, train


def _product(sweep: SweepSpec, grid: GridSpec) -> Iterator[dict[str, Any]]:
    groups: list[list[dict[str, Any]]] = []
    named = {key for axes in (grid.axes, *grid.zip) for key in axes}
    if "base_model" not in named:
        groups.append([{"base_model": name} for name in sweep.base_models])
    if "dataset" not in named:
        groups.append([{"dataset": name} for name in sweep.datasets])
    groups += [[{key: value} for value in values] for key, values in grid.axes.items()]
    groups += [
        [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)] for axes in grid.zip
    ]
    for parts in itertools.product(*groups):
        yield {key: value for part in parts for key, value in part.items()}


def _matches(rule: Mapping[str, Any], base_name: str, dataset_name: str, train: TrainSpec) -> bool:
    """Whether a cell has one of the rule's values for every key of the rule."""
    for key, wanted in rule.items():
        value = {"base_model": base_name, "dataset": dataset_name}.get(key) or train.value(key)
        value = list(value) if isinstance(value, tuple) else value  # as YAML gives it
        if value not in (wanted if isinstance(wanted, list | tuple) else (wanted,)):
            return False
    return True


def _trial(sweep: SweepSpec, pins: Pins, base_name: str, dataset_name: str, train: TrainSpec) -> TrialSpec:
    dataset: DatasetSpec = sweep.datasets[dataset_name]
    names = tuple(dataset.mixture) if dataset.mixture is not None else (dataset_name,)
    return TrialSpec(
        base_model=sweep.base_models[base_name],
        base_digest=pins.base_models[base_name],
        datasets={name: sweep.datasets[name] for name in names},
        data_digests={name: pins.datasets[name] for name in names},
        weights=dataset.mixture,
        train=train,
    )


def _eval_epochs(sweep: SweepSpec, train: TrainSpec) -> tuple[int, ...]:
    if sweep.eval_epochs == "last":
        return (train.epochs,)
    if sweep.eval_epochs == "all":
        return tuple(range(1, train.epochs + 1))
    epochs = tuple(sorted({epoch for epoch in sweep.eval_epochs if epoch <= train.epochs}))
    if not epochs:
        raise ConfigError(f"eval_epochs is {list(sweep.eval_epochs)}, but a trial has only {train.epochs} epochs")
    return epochs


def _check_eval_epochs(sweep: SweepSpec, trials: Iterable[PlannedTrial]) -> None:
    """An epoch that no trial reaches is a mistake; one that only some reach is not."""
    if isinstance(sweep.eval_epochs, tuple):
        longest = max(planned.trial.train.epochs for planned in trials if planned.trial.train is not None)
        beyond = [epoch for epoch in sweep.eval_epochs if epoch > longest]
        if beyond:
            raise ConfigError(f"eval_epochs names {beyond}, but no trial has more than {longest} epochs")


class _Evaluations:
    """The evaluations of a sweep by prompt template; equal ones are one object."""

    def __init__(self, sweep: SweepSpec, pins: Pins) -> None:
        self._sweep, self._pins = sweep, pins
        self._made: dict[str | None, tuple[EvalSpec, ...]] = {}

    def of(self, template: str | None) -> tuple[EvalSpec, ...]:
        if template not in self._made:
            self._made[template] = _distinct(
                EvalSpec(
                    name=name,
                    benchmark=benchmark,
                    digest=self._pins.benchmarks[name],
                    template=template if benchmark.apply_template else None,
                    dtype=self._sweep.export_dtype,
                    backend=self._pins.backend,
                )
                for name, benchmark in self._sweep.benchmarks.items()
            )
        return self._made[template]


def _distinct(evaluations: Iterable[EvalSpec]) -> tuple[EvalSpec, ...]:
    """The same; two names of one evaluation would be one score under two names."""
    names: dict[str, str] = {}
    found = tuple(evaluations)
    for evaluation in found:
        other = names.setdefault(evaluation.eval_id, evaluation.name)
        if other != evaluation.name:
            raise ConfigError(f"benchmarks '{other}' and '{evaluation.name}' are the same evaluation; keep one of them")
    return found


def _baselines(sweep: SweepSpec, trials: Any, evaluations: _Evaluations) -> list[PlannedTrial]:
    """One per base model, evaluated under every template that its trials use."""
    bases: dict[str, tuple[str, TrialSpec]] = {}  # by content: a model may have two names
    templates: dict[str, dict[str | None, None]] = {}
    for planned in trials:
        trial = TrialSpec(base_model=planned.trial.base_model, base_digest=planned.trial.base_digest)
        bases.setdefault(trial.trial_id, (planned.base_model, trial))
        templates.setdefault(trial.trial_id, {})[planned.trial.train.template] = None
    baselines = []
    for trial_id, (base_name, trial) in bases.items():
        unique = {e.eval_id: e for template in templates[trial_id] for e in evaluations.of(template)}
        baselines.append(
            PlannedTrial(
                trial=trial,
                base_model=base_name,
                dataset=None,
                dataset_kind=None,
                epochs=(0,),
                evaluations=tuple(unique.values()),
                layer_delta="off",
                keep="all",
                keep_state="none",
                export_dtype=sweep.export_dtype,
                execution=sweep.execution,
            )
        )
    return baselines


def _measures(
    sweep: SweepSpec, pins: Pins, trials: Mapping[str, PlannedTrial], version: int
) -> Iterator[PlannedMeasure]:
    pairs: dict[tuple[str, str], TrainSpec] = {}
    if sweep.measure:
        for planned in trials.values():
            assert planned.dataset is not None and planned.trial.train is not None
            pairs.setdefault((planned.base_model, planned.dataset), planned.trial.train)
    for pair in sweep.measure_only:
        pairs.setdefault((pair.base_model, pair.dataset), sweep.train)
    known: set[str] = set()
    for (base_name, dataset_name), train in pairs.items():
        measure = PlannedMeasure(
            base_model=base_name,
            dataset=dataset_name,
            dataset_kind=sweep.datasets[dataset_name].kind,
            pair=_trial(sweep, pins, base_name, dataset_name, train),
            max_examples=sweep.measure_examples,
            version=version,
            execution=sweep.execution,
        )
        if measure.key not in known:  # two names of one dataset are one pair
            known.add(measure.key)
            yield measure
