"""Ray Tune hands out due work items to warm workers, and brings back what they did.

Inside this module a Tune trial is one work item. Tune gets only the item's key: the worker reads what to do from the
store, so that Tune's own snapshots stay small, and losing them loses nothing.
"""

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the store is the record
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # its clean-up waits 10 s for what we throw away
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # the board tells of lost workers
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "2")  # Tune's default for a searcher is 1: a worker would wait
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the progress display is ours
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune.search import Searcher

from sweep.board import Board
from sweep.spec import Resources
from sweep.store import Store
from sweep.trial import WorkItem, perform

ENTRY = "entry"
MESSAGE = "message"


class ResourceError(ValueError):
    """The YAML asks for resources this cluster can never give."""


def run(
    board: Board, store: Store, resources: Resources, on_change: Callable[[], None], num_cpus: int | None = None
) -> bool:
    """Do everything that is due on the board. Returns False if it was interrupted.

    Args:
        board: what is due; all results and failures end there.
        store: the sweep's folder, reachable from every worker under the same path.
        resources: what a work item of each stage holds.
        on_change: called whenever an item starts, tells something or ends.
        num_cpus: size of a local Ray; None takes the machine's. Ignored on an existing cluster.

    Raises:
        ResourceError: a stage can never be placed.
        LeaseLost: another driver has taken the sweep over.
    """
    if board.finished:
        return True
    started_here = not ray.is_initialized()
    if started_here:
        _start_ray(num_cpus)
    try:
        _check_fits(resources)
        return _tune(board, store, resources, on_change)
    finally:
        if started_here:
            ray.shutdown()


def _start_ray(num_cpus: int | None) -> None:
    # "A worker died ..." goes to standard output whatever log_to_driver says; Ray's debugger uses this switch too
    ray._private.worker._worker_logs_enabled = False
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the board tells of failures, in one line each
    here = "RAY_ADDRESS" not in os.environ
    local = {"num_cpus": num_cpus, "include_dashboard": False} if here else {}
    ray.init(
        log_to_driver=False,  # every trial has its own log file
        logging_level=logging.ERROR,
        runtime_env={"env_vars": _worker_environment()},
        **local,
    )


def _worker_environment() -> dict[str, str]:
    """One set of variables for all workers, so that any of them can do any item."""
    names = ("SWEEP_CACHE", "SWEEP_COMMIT", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    passed = {name: os.environ[name] for name in names if name in os.environ}
    here = str(Path(__file__).parents[1])  # a worker's working directory is not the driver's
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **passed}


def _check_fits(resources: Resources) -> None:
    """Tune would wait for ever for what no node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for stage in type(resources).model_fields:
        wanted = getattr(resources, stage)
        if not any(n.get("CPU", 0) >= wanted.cpus and n.get("GPU", 0) >= wanted.gpus for n in nodes):
            have = ", ".join(f"{n.get('CPU', 0):g} CPU + {n.get('GPU', 0):g} GPU" for n in nodes)
            raise ResourceError(
                f"resources.{stage} asks for {wanted.cpus:g} CPU + {wanted.gpus:g} GPU on one node, but the nodes "
                f"have {have}; lower it in the YAML or add a larger node"
            )


def _tune(board: Board, store: Store, resources: Resources, on_change: Callable[[], None]) -> bool:
    # Tune's own snapshots: on this machine alone, where the sweep's disk may be full or slow
    scratch = tempfile.mkdtemp(prefix="sweep-tune-")

    def shape(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        wanted = getattr(resources, WorkItem.parse(config["item"]).stage)
        bundle = {"CPU": wanted.cpus} | ({"GPU": wanted.gpus} if wanted.gpus else {})
        return tune.PlacementGroupFactory([bundle])

    queue = _Queue(board, on_change)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_work, root=str(store.root), resources=resources), shape),
        tune_config=tune.TuneConfig(search_alg=queue, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="items",
            storage_path=scratch,
            verbose=0,
            callbacks=[_Started(queue)],
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),  # retries are the board's business
        ),
    )
    interrupted = False
    try:
        with _terminable():
            tuner.fit()
    except KeyboardInterrupt:  # Tune's own state is of no worth, so it is left where it stands
        interrupted = True
    finally:
        board.release()
        on_change()
        shutil.rmtree(scratch, ignore_errors=True)
    if queue.error is not None:
        raise queue.error
    return not interrupted


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does. In the main thread only: elsewhere Python takes no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


class _Queue(Searcher):
    """The board as Tune sees it: suggestions are due work items."""

    def __init__(self, board: Board, on_change: Callable[[], None]) -> None:
        super().__init__(metric=None, mode=None)
        self._board, self._on_change = board, on_change
        self._keys: dict[str, str] = {}
        self.error: Exception | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error is not None:
            return Searcher.FINISHED
        handed = self._board.next()
        if handed is None:
            return Searcher.FINISHED if self._board.finished else None
        item, number = handed
        self._keys[trial_id] = item.key
        self._on_change()
        return {"item": item.key, "attempt": number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._take(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result is not None and not error:
            self._take(trial_id, result)
        key = self._keys.pop(trial_id, None)
        if key is not None and key in self._board.running:  # it ended without telling how
            self._board.lose(key, "its worker process died")
            self._on_change()

    def _take(self, trial_id: str, result: dict[str, Any]) -> None:
        key = self._keys.get(trial_id)
        if key is None:
            return
        try:
            if MESSAGE in result:
                self._board.progress(key, json.loads(result[MESSAGE]))
            elif ENTRY in result and key in self._board.running:
                self._board.complete(key, json.loads(result[ENTRY]))
        except Exception as error:  # Tune would only log it and go on
            self.error = error
        self._on_change()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for a restore that we never do."""
        return {}

    def started(self, trial_id: str) -> None:
        """A worker has taken the item; until then it waited for a free one."""
        key = self._keys.get(trial_id)
        if key is not None:
            self._board.started(key)
            self._on_change()

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: every launch plans again from the files."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _Started(tune.Callback):
    """Tells the board when an item really starts: Tune asks for a few items more than there are workers."""

    def __init__(self, queue: _Queue) -> None:
        self._queue = queue

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._queue.started(trial.trial_id)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _work(config: dict[str, Any], root: str, resources: Resources) -> None:
    """What a worker does with one item."""
    item = WorkItem.parse(config["item"])
    threads = max(1, int(getattr(resources, item.stage).cpus))
    store = Store(Path(root))
    entry = perform(
        item, config["attempt"], store, threads, lambda message: tune.report({MESSAGE: json.dumps(message)})
    )
    tune.report({ENTRY: json.dumps(entry)})  # as text: Tune flattens nested results
