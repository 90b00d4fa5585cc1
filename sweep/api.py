"""A sweep as a Python object: what the commands do, for notebooks and scripts.

from sweep import Sweep

sweep = Sweep("sweep/configs/demo.yaml", out="runs/demo")
sweep.plan()  # what would run
sweep.run()  # run what is missing
sweep.status()  # where it stands
"""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sweep import collect, config, pins, tiny
from sweep.board import Board
from sweep.config import ConfigError
from sweep.forecast import forecast
from sweep.measure import MEASURE_VERSION
from sweep.plan import Plan, expand
from sweep.progress import Display
from sweep.spec import RECIPE_VERSION, PlannedMeasure, PlannedTrial, SweepSpec
from sweep.store import STATE, Result, Store, StoreError, folder_size, remove_folder, train_unit, write_text
from sweep.trial import (
    STAGES,
    due,
    epochs_to_train,
    failure_kind,
    kept_weights,
    read_spec,
    trained_epochs,
    units_to_redo,
    with_paths,
    write_spec,
)

Row = dict[str, Any]


class UnknownTrial(ValueError):
    """No trial, or more than one, begins with the id given."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    failed: list[Row]
    """The failed work items: item, failure_kind, message."""
    interrupted: bool
    """It was stopped before it was done."""
    ran: int
    """Work items finished by this run."""
    tables: dict[str, int]
    """Rows by table."""


class Sweep:
    """One YAML and its folder of results."""

    def __init__(self, source: Path | str, out: Path | str | None = None, *, update: bool = False) -> None:
        """Open a sweep by its YAML or by its folder.

        Args:
            source: a sweep's YAML; or the folder of one that ran before.
            out: folder of the results; None takes runs/<name>.
            update: accept sources that changed since they were pinned in `sweep.lock`.

        Raises:
            ConfigError: the YAML, or a source it names, is wrong.
            StoreError: the folder is not one of a sweep.
        """
        source = Path(source)
        self._folder_only = source.is_dir()
        """Results are looked at where their sources may be gone: only `run` needs those."""
        if self._folder_only:
            if out is not None:
                raise StoreError(f"{source} is the folder of a sweep: its results lie there; leave --out away")
            if not (source / "sweep.yaml").exists():
                raise StoreError(f"{source} is not the folder of a sweep (no sweep.yaml); give its YAML instead")
            self.store = Store(source)
            self._text = self.store.config_path.read_text()
            origin = self.store.root / "sweep.yaml.origin"
            anchor = Path(origin.read_text().strip()) if origin.exists() else source / "sweep.yaml"
            self.spec: SweepSpec = config.parse(self._text, anchor, check_files=False)
            self._origin = anchor
        else:
            self.spec = config.load(source)
            self._text, self._origin = source.read_text(), source.absolute()
            self.store = Store(out if out is not None else Path("runs") / self.spec.name)
        self._update = update
        self._plan: Plan | None = None

    # ------------------------------------------------------------------ looking

    def planned(self) -> Plan:
        """Every trial and measure of the YAML."""
        if self._plan is None:
            lock = self.store.lock_path
            with self._named():
                if self._folder_only and lock.exists():
                    digests = pins.pinned(self.spec, lock)
                else:
                    digests = pins.resolve(self.spec, lock if lock.exists() else None, self._update, write=False)
                self._plan = expand(self.spec, digests, MEASURE_VERSION)
        return self._plan

    def plan(self) -> Row:
        """What would run: trials, checkpoints, work items, tokens, hours, disk. Starts nothing, writes nothing."""
        plan = self.planned()
        done = self._done(plan)
        items = {state: Counter({stage: 0 for stage in STAGES}) for state in ("done", "to_do", "to_retrain")}
        for owner, planned in _owners(plan).items():
            state = due(planned, done[owner])
            items["done"].update(item.stage for item in state.done)
            items["to_do"].update(item.stage for item in (*state.now, *state.later))
            items["to_retrain"].update(item.stage for item in state.retrain)
        trained = [p for p in plan.trials if not p.trial.is_baseline]
        again, onward = _longer(trained, done)
        orphans = set(self.store.owners()) - set(_owners(plan))
        slots = max(1, int((os.cpu_count() or 1) / self.spec.resources.train.cpus))
        return {
            "name": self.spec.name,
            "folder": str(self.store.root),
            "trials": len(trained),
            "baselines": len(plan.trials) - len(trained),
            "checkpoints": sum(len(p.epochs) for p in trained),
            "evaluations": sum(len(p.epochs) * len(p.evaluations) for p in plan.trials),
            "measures": len(plan.measures),
            "work_items": {state: {**counts, "all": counts.total()} for state, counts in items.items()},
            "checkpoints_to_retrain": sum("/train/" in unit for unit in _to_redo(plan, done)),
            "trials_that_continue": onward,
            "trials_that_start_again": again,
            "orphans": len(orphans),
            "orphans_of_other_recipes": dict(_other_recipes(self.store, orphans)),
            **asdict(forecast(plan, done, self.spec.resources, slots)),
        }

    def status(self) -> Row:
        """Where the sweep stands: trials and measures by status, failures, who runs it."""
        plan = self.planned()
        done = self._done(plan)
        holder = self.store.holder()
        trials: Counter[str] = Counter(dict.fromkeys(("pending", "running", "succeeded", "failed"), 0))
        failures = []
        for owner, planned in _owners(plan).items():
            attempts = self.store.attempts(owner)
            status = collect.trial_status(planned, done[owner], attempts, holder is not None)
            trials[status] += 1
            if failure := collect.last_failure(planned, done[owner], attempts):
                failures.append({key: failure.get(key) for key in ("item", "attempt", "failure_kind", "message")})
        return {
            "name": self.spec.name,
            "folder": str(self.store.root),
            "running_by": holder and {key: holder[key] for key in ("host", "pid")},
            "trials_and_measures": dict(trials),
            "failures": failures,
        }

    def show(self, trial_id: str) -> Row:
        """One trial: its settings, what training recorded, its scores, its tries. The id may be shortened."""
        owner = self.find(trial_id)
        if owner.startswith("measures/"):
            measured = read_spec(self.store, owner)
            result = self.store.result(owner)
            return {"spec": measured.model_dump(mode="json"), "record": result and result.record}
        planned = read_spec(self.store, owner)
        assert isinstance(planned, PlannedTrial)
        done = self.store.committed(owner)
        attempts = self.store.attempts(owner)
        records = {r.unit: r.record for r in done.values() if "/train/" in r.unit}
        scores = [
            {
                **score,
                "benchmark": result.record["benchmark"],
                "command": self._command(planned, result),
            }
            for result in done.values()
            if result.unit.split("/")[-2] in {e.eval_id for e in planned.evaluations}
            for score in result.record["scores"]
        ]
        return {
            "trial_id": planned.trial_id,
            "status": collect.trial_status(planned, done, attempts, self.store.holder() is not None),
            "base_model": planned.base_model,
            "dataset": planned.dataset,
            "epochs": list(planned.epochs),
            "settings": planned.trial.train and planned.trial.train.identity(),
            "training": records,
            "scores": scores,
            "attempts": attempts,
        }

    def find(self, trial_id: str) -> str:
        """The owner (`trials/<id>` or `measures/<key>`) whose id begins so.

        Raises:
            UnknownTrial: none or several do.
        """
        found = [o for o in self.store.owners() if trial_id and o.split("/")[1].startswith(trial_id)]
        if len(found) != 1:
            reason = f"{len(found)} begin" if found else "none begins"
            raise UnknownTrial(
                f"no single trial '{trial_id}' in {self.store.root}: {reason} with it; the ids are the folders in "
                f"{self.store.root / 'trials'}"
            )
        return found[0]

    # ------------------------------------------------------------------ doing

    def run(self, *, retrain: bool = False, num_cpus: int | None = None, quiet: bool = False) -> RunResult:
        """Run what is missing, here or on the Ray cluster this process is in; then write the tables.

        Args:
            retrain: train again where weights are gone that missing work needs.
            num_cpus: size of a local Ray; None takes the machine's.
            quiet: print nothing.

        Raises:
            StoreError: another process runs this sweep, or its folder cannot be used.
            ConfigError: a source changed or cannot be had; or checkpoints would have to be trained again and
                `retrain` was not given.
            ResourceError: a stage asks for more than any node has.
        """
        self.store.root.mkdir(parents=True, exist_ok=True)
        with self.store.lease():
            with self._named():
                self.spec = config.parse(self._text, self._origin)  # now with the files it names
                digests = pins.resolve(self.spec, self.store.lock_path, self._update)
                self._plan = plan = expand(self.spec, digests, MEASURE_VERSION)
            self._save_config()
            for owner in self.store.owners():
                self.store.repair(owner)
            done = self._done(plan)
            self._reopen(plan, done, retrain)
            for owner, planned in _owners(plan).items():
                if self.store.spec_path(owner).exists():
                    write_spec(self.store, owner, planned)  # names and evaluations may have changed
            os.environ.setdefault("SWEEP_COMMIT", _commit())
            board = Board(plan, self.store, self.spec.execution.max_retries)
            display = Display(board, self.store.notes, quiet=quiet)
            before, finished = board.done.total(), True
            if not board.finished:
                base_models, datasets, benchmarks = pins.tiny_names(self.spec)
                tiny.build_all(base_models, datasets, benchmarks, tiny.default_cache_dir())
                from sweep import tuner  # 2 s of imports, not needed to see that nothing is due

                with display:
                    finished = tuner.run(board, self.store, self.spec.resources, display.refresh, num_cpus)
            ran, failed = board.done.total() - before, list(board.failed.values())
        try:
            tables = self.collect()
        except OSError as error:
            reason = f"could not be written ({error}); run `python -m sweep collect {self.store.root}` later"
            failed.append({"item": "tables", "failure_kind": failure_kind(error), "message": reason})
            tables = {}
        return RunResult(failed=failed, interrupted=not finished, ran=ran, tables=tables)

    def collect(self) -> dict[str, int]:
        """Write the tables from what is committed; returns the number of rows by table."""
        return collect.build(self.store, set(_owners(self.planned())))

    def export(self, trial_id: str, epoch: int, target: Path | str, *, merge: bool = False) -> Path:
        """Copy a checkpoint out, as a folder that `transformers` or `peft` loads.

        Args:
            trial_id: the trial; may be shortened.
            epoch: whose checkpoint.
            target: folder to make.
            merge: merge an adapter into its base model, in float32.

        Raises:
            UnknownTrial: as `find`.
            StoreError: there is no such checkpoint, or its weights were not kept, or `target` is in use.
        """
        owner, target = self.find(trial_id), Path(target)
        if owner.startswith("measures/"):
            raise StoreError(f"{owner} is a measure: it has no weights; give a trial")
        planned = read_spec(self.store, owner)
        assert isinstance(planned, PlannedTrial)
        kept = kept_weights(planned, self.store.committed(owner))
        if epoch not in kept:
            have = f"it has those of epochs {list(kept)}" if kept else "it has none (see keep: in the YAML)"
            raise StoreError(f"trial {planned.trial_id} has no weights of epoch {epoch}; {have}")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise StoreError(f"{target} is not an empty folder; give a new one")
        weights = kept[epoch]
        import torch  # 5 s of imports, not needed to refuse

        from sweep import models

        if merge and models.adapter_config(weights) is not None:
            base = planned.trial.base_model
            path = models.locate(base, planned.trial.base_digest)
            model = models.load_checkpoint(path, weights, "float32", base.trust_remote_code, base_dtype=base.dtype)
            model = model.to(getattr(torch, planned.export_dtype))
            models.save_checkpoint(model, target, models.load_tokenizer(weights), "")
        else:
            shutil.copytree(weights, target, dirs_exist_ok=True)
        return target

    def removable(self) -> dict[str, int]:
        """What `clean` would remove, in bytes: weights, states, orphans, left-over attempts, caches."""
        return {name: sum(folder_size(path) for path in paths) for name, paths in self._removable().items()}

    def clean(self, what: set[str]) -> int:
        """Remove those parts; results and tables stay. Returns the bytes freed."""
        freed = 0
        with self.store.lease():
            for owner in self.store.owners():
                self.store.repair(owner)  # finished work that a killed driver left is no left-over
            for name, paths in self._removable().items():
                if name in what:
                    for path in paths:
                        freed += remove_folder(path)
        return freed

    # ------------------------------------------------------------------ inside

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors about the request begin with the YAML they are about."""
        try:
            yield
        except ConfigError as error:
            text, name = str(error), str(self._origin)
            raise ConfigError(text if text.startswith(name) else f"{name}: {text}") from error

    def _done(self, plan: Plan) -> dict[str, dict[str, Result]]:
        return {owner: self.store.committed(owner) for owner in _owners(plan)}

    def _reopen(self, plan: Plan, done: dict[str, dict[str, Result]], retrain: bool) -> None:
        units = _to_redo(plan, done)
        count = sum("/train/" in unit for unit in units)
        if count and not retrain:
            raise ConfigError(
                f"{count} checkpoint{'s' * (count > 1)} would be retrained: the weights were not kept, and work on "
                "them is missing (a new benchmark, for instance); allow it with --retrain"
            )
        for unit in units:
            self.store.reopen(unit)

    def _save_config(self) -> None:
        """Keep the YAML with its results, and where it lay: relative paths in it start there."""
        origin = self.store.root / "sweep.yaml.origin"
        for path, text in ((self.store.config_path, self._text), (origin, f"{self._origin}\n")):
            if not path.exists() or path.read_text() != text:
                write_text(path, text)

    def _command(self, planned: PlannedTrial, result: Result) -> str:
        """The recorded `lm_eval` command with this machine's folders put in."""
        base = planned.trial.base_model  # not by `models.locate`: its imports take 5 s
        path = base.hub or base.path or str(tiny.build_base_model(base.tiny or "", tiny.default_cache_dir()))
        evaluation = next(e for e in planned.evaluations if f"/{e.eval_id}/" in result.unit)
        return with_paths(result.record["command"], evaluation, sweep=str(self.store.root), base_model=path)

    def _removable(self) -> dict[str, list[Path]]:
        plan = _owners(self.planned())
        found: dict[str, list[Path]] = {"weights": [], "states": [], "orphans": [], "attempts": [], "cache": []}
        for owner in self.store.owners():
            if owner not in plan:
                found["orphans"].append(self.store.owner_folder(owner))
                continue
            for unit in self.store.units(owner):
                result = self.store.result(unit)
                if result is not None and result.weights is not None:
                    found["weights"].append(result.weights)
                if result is not None and result.state is not None:
                    found["states"].append(result.folder / STATE)
                attempts = self.store.root / unit / "attempts"
                kept = result.folder if result is not None else None
                found["attempts"] += [
                    folder
                    for folder in attempts.glob("[!.]*")
                    if folder != kept and (kept is not None or not (folder / "manifest.json").exists())
                ]
        if self.store.cache.is_dir():
            found["cache"].append(self.store.cache)
        return found


def _owners(plan: Plan) -> dict[str, PlannedTrial | PlannedMeasure]:
    owners: dict[str, PlannedTrial | PlannedMeasure] = {f"trials/{p.trial_id}": p for p in plan.trials}
    return owners | {f"measures/{m.key}": m for m in plan.measures}


def _other_recipes(store: Store, orphans: set[str]) -> Counter[int]:
    """Orphaned trials whose weights an older version of the training code defined, by that version."""
    specs = [read_spec(store, owner) for owner in orphans if owner.startswith("trials/")]
    versions = [s.trial.recipe_version for s in specs if isinstance(s, PlannedTrial) and not s.trial.is_baseline]
    return Counter(version for version in versions if version != RECIPE_VERSION)


def _to_redo(plan: Plan, done: dict[str, dict[str, Result]]) -> list[str]:
    """Committed units whose weights are gone but needed by work that is missing."""
    units = []
    for planned in plan.trials:
        results = done[f"trials/{planned.trial_id}"]
        for epoch in dict.fromkeys(item.epoch for item in due(planned, results).retrain if item.epoch is not None):
            units += units_to_redo(planned, epoch, results)
    return units


def _longer(trials: list[PlannedTrial], done: dict[str, dict[str, Result]]) -> tuple[int, int]:
    """Trials with some epochs trained and later ones missing: (those that start again, those that continue)."""
    again = onward = 0
    for planned in trials:
        results = done[f"trials/{planned.trial_id}"]
        have, missing = trained_epochs(results), epochs_to_train(planned, results)
        if have and missing:
            kept = any(results[train_unit(planned.trial_id, e)].state for e in have if e < min(missing))
            onward, again = onward + kept, again + (not kept)
    return again, onward


def _commit() -> str:
    """The commit of this code, with a mark if files were changed since; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip()
