"""Which work items are due, handed out, done or failed. Knows the plan and the store, and no scheduler.

The board belongs to the driver, the only process that commits. Workers say what they finished; the board checks it on
disk, commits it, and finds what has become due.
"""

import heapq
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sweep.plan import Plan
from sweep.spec import PlannedMeasure, PlannedTrial
from sweep.store import LeaseLost, Result, Store, StoreError
from sweep.trial import STAGES, WorkItem, due, failure_kind, removable, write_spec


@dataclass
class Running:
    """A work item in a worker's hands."""

    item: WorkItem
    attempt: int
    since: float
    """`time.time()` when it was handed out, then when a worker took it."""
    started: bool = False
    """A worker has taken it."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Last epoch and loss it told."""


class Board:
    """Hands out due work items, longest first, and commits what comes back."""

    def __init__(self, plan: Plan, store: Store, max_retries: int) -> None:
        self._store, self._max_retries = store, max_retries
        self._planned: dict[str, PlannedTrial | PlannedMeasure] = {}
        self._planned |= {f"trials/{p.trial_id}": p for p in plan.trials}
        self._planned |= {f"measures/{m.key}": m for m in plan.measures}
        self._results: dict[str, dict[str, Result]] = {}
        self._queue: list[tuple[tuple[int, ...], WorkItem]] = []
        self._queued: set[WorkItem] = set()
        self._order = itertools.count()
        self._lost: Counter[WorkItem] = Counter()
        self._numbers: Counter[str] = Counter()
        self._later: dict[str, int] = {}
        self.running: dict[str, Running] = {}
        """Handed-out items by key."""
        self.failed: dict[str, dict[str, Any]] = {}
        """Items that failed in this run, with the entry of the failure."""
        self.done: Counter[str] = Counter()
        """Finished items by stage, those of earlier runs included."""
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
        """Durations of the items finished in this run, by stage."""
        for owner, planned in self._planned.items():
            self._results[owner] = store.committed(owner)
            self._close_lost_attempts(owner)
            self.done.update(item.stage for item in due(planned, self._results[owner]).done)
            self._enqueue(owner)
            self._remove_unneeded(owner)  # a stricter `keep:`, or a driver that died before it

    # ------------------------------------------------------------------ handing out

    def next(self) -> tuple[WorkItem, int] | None:
        """The next due item and the number of its try; None if nothing is due now."""
        while self._queue:
            _, item = heapq.heappop(self._queue)
            self._queued.discard(item)
            # by count too: what a full disk did not let us log must not be used again
            number = max(self._store.next_attempt(item.owner), self._numbers[item.owner] + 1)
            self._numbers[item.owner] = number
            entry: dict[str, Any] = {"item": item.key, "attempt": number, "outcome": "running"}
            try:
                write_spec(self._store, item.owner, self._planned[item.owner])
            except OSError as error:
                failure = {"outcome": "failed", "failure_kind": failure_kind(error), "message": str(error)}
                self.failed[item.key] = entry | failure
                continue
            self.running[item.key] = Running(item, number, time.time())
            self._store.log_attempt(item.owner, entry)
            return item, number
        return None

    @property
    def finished(self) -> bool:
        """Nothing is due and nothing is running."""
        return not self._queue and not self.running

    @property
    def waiting(self) -> Counter[str]:
        """Items to be handed out by stage; `later` counts those that wait for another one."""
        counts: Counter[str] = Counter(item.stage for item in self._queued)
        counts["later"] = sum(self._later.values())
        return counts

    # ------------------------------------------------------------------ what comes back

    def started(self, key: str) -> None:
        """A worker has taken an item that was handed out."""
        if key in self.running:
            self.running[key].started, self.running[key].since = True, time.time()

    def progress(self, key: str, message: dict[str, Any]) -> None:
        """A worker's message about an item: a finished unit to commit, or its epoch and loss.

        Raises:
            LeaseLost: another driver has taken the sweep over.
        """
        running = self.running.get(key)
        if running is None:
            return
        if "unit" in message:
            owner = running.item.owner
            try:
                self._results[owner][message["unit"]] = self._store.commit(message["unit"], running.attempt)
            except LeaseLost:
                raise
            except (StoreError, OSError):
                return  # `complete` looks again, and says so if it is still not there
            self._enqueue(owner)
        else:
            running.progress.update(message)

    def complete(self, key: str, entry: dict[str, Any]) -> None:
        """An item ended; `entry` is what the worker's `perform` returned."""
        running = self.running.pop(key)
        item, owner = running.item, running.item.owner
        if entry["outcome"] == "succeeded" and self._is_due(item):
            entry = {**entry, **self._look_again(item)}
        self._store.log_attempt(owner, entry)
        if entry["outcome"] == "succeeded":
            self.done[item.stage] += 1
            self.seconds[item.stage].append(entry["seconds"])
        else:
            self.failed[key] = entry
        self._enqueue(owner)
        self._remove_unneeded(owner)

    def lose(self, key: str, message: str) -> None:
        """The worker of an item died; what it had finished is adopted, the rest is tried again."""
        running = self.running.pop(key)
        item = running.item
        self._store.repair(item.owner)
        self._results[item.owner] = self._store.committed(item.owner)
        entry = {
            "item": key,
            "attempt": running.attempt,
            "outcome": "lost",
            "failure_kind": "lost_worker",
            "message": message,
            "seconds": time.time() - running.since,
        }
        self._lost[item] += 1
        if not self._is_due(item):  # it died after its last unit
            self.done[item.stage] += 1
            self.seconds[item.stage].append(entry["seconds"])
        elif self._lost[item] > self._max_retries:
            entry["outcome"] = "failed"
            self.failed[key] = entry
        else:
            self._store.notes.append(f"{key}: {message}; it is tried again")
        self._store.log_attempt(item.owner, entry)
        self._enqueue(item.owner)
        self._remove_unneeded(item.owner)

    def release(self) -> None:
        """Let go of what is running: the sweep is being stopped. Finished units are adopted."""
        for key, running in list(self.running.items()):
            self._store.repair(running.item.owner)
            entry = {"outcome": "lost", "failure_kind": "stopped", "message": "the sweep was stopped"}
            self._store.log_attempt(running.item.owner, {"item": key, "attempt": running.attempt, **entry})
            del self.running[key]

    # ------------------------------------------------------------------ inside

    def _enqueue(self, owner: str) -> None:
        state = due(self._planned[owner], self._results[owner])
        self._later[owner] = len(state.later)
        for item in state.now:
            if item in self._queued or item.key in self.running or item.key in self.failed:
                continue
            self._queued.add(item)
            heapq.heappush(self._queue, (self._priority(item), item))

    def _close_lost_attempts(self, owner: str) -> None:
        """Tries that an earlier, killed driver left as running."""
        for entry in self._store.attempts(owner):
            if entry["outcome"] == "running":
                lost = {"outcome": "lost", "failure_kind": "lost_worker", "message": "its driver was lost"}
                self._store.log_attempt(owner, {"item": entry["item"], "attempt": entry["attempt"], **lost})

    def _is_due(self, item: WorkItem) -> bool:
        return item in due(self._planned[item.owner], self._results[item.owner]).now

    def _look_again(self, item: WorkItem) -> dict[str, Any]:
        """A worker says it succeeded, but the results are not committed: why?"""
        try:
            self._store.repair(item.owner)
        except OSError as error:
            return {"outcome": "failed", "failure_kind": failure_kind(error), "message": str(error)}
        self._results[item.owner] = self._store.committed(item.owner)
        if not self._is_due(item):
            return {}
        return {"outcome": "failed", "failure_kind": "bug", "message": "it ended well but left no whole result"}

    def _priority(self, item: WorkItem) -> tuple[int, ...]:
        """Smaller is earlier: work on finished checkpoints frees weights; then the longest training."""
        planned, order = self._planned[item.owner], next(self._order)
        if isinstance(planned, PlannedMeasure) or planned.trial.is_baseline:
            return (2, 0, order)  # short ones fill the end, when workers would fall idle
        if item.stage != "train":
            return (0, 0, order)
        assert planned.trial.train is not None
        examples = planned.trial.train.num_examples or 10_000
        return (1, -max(planned.epochs) * examples, order)

    def _remove_unneeded(self, owner: str) -> None:
        planned = self._planned[owner]
        busy = any(running.item.owner == owner for running in self.running.values())
        if isinstance(planned, PlannedTrial) and not busy:
            for result, subfolder in list(removable(planned, self._results[owner])):
                self._store.remove_weights(result, subfolder)
