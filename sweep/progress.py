"""The live progress of a run: a table on a terminal, plain lines elsewhere."""

import math
import statistics
import time
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweep.board import Board, Running

REFRESH_SECONDS = 0.5
LINE_SECONDS = 10.0
"""Without a terminal: one line in this time, and one for every failure."""

MAX_ROWS = 12
"""Running items shown; the rest is counted."""


class Display:
    """What the board says, for people."""

    def __init__(self, board: Board, notes: list[str], quiet: bool = False) -> None:
        self._board, self._notes = board, notes
        self._console = Console(quiet=quiet, stderr=True, markup=False, emoji=False)  # [/x] in a message is text
        self._live: Live | None = None
        self._started = self._last = time.monotonic()
        self._done_before = board.done.total()
        self._told_failures: set[str] = set()
        self._told_notes = 0
        self._tell()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, auto_refresh=False, transient=True)
            self._live.__enter__()
        else:
            self._console.print(self._line(), highlight=False, soft_wrap=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None
        self._tell()
        self._console.print(self._line(), highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show the board again, if the last time is long enough ago."""
        self._tell()
        now = time.monotonic()
        if now - self._last < (REFRESH_SECONDS if self._live is not None else LINE_SECONDS):
            return
        self._last = now
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
        else:
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def _tell(self) -> None:
        """Failures and repaired damage, each once."""
        for note in self._notes[self._told_notes :]:
            self._console.print(f"note: {note}", highlight=False, style="yellow", soft_wrap=True)
        self._told_notes = len(self._notes)
        for key, entry in list(self._board.failed.items()):
            if key not in self._told_failures:
                self._told_failures.add(key)
                text = f"failed: {key} ({entry['failure_kind']}): {entry['message']}"
                self._console.print(text, highlight=False, style="red", soft_wrap=True)

    def _line(self) -> str:
        board, running = self._board, self._running()
        parts = [f"{board.done.total()} of {self._total()} work items done", f"{len(running)} running"]
        if board.failed:
            parts.append(f"{len(board.failed)} failed")
        first = next((r for r in running if "loss" in r.progress), None)
        if first is not None:
            parts.append(f"{first.item.key}: {_progress(first)}")
        return " · ".join([*parts, f"{_time(self.seconds_left())} left" if board.running else "", ""]).rstrip(" ·")

    def _render(self) -> Group:
        head = Text(self._line())
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
        for title in ("running", "try", "for", "epoch, loss"):
            table.add_column(title, style="dim" if title != "running" else "")
        for running in self._running()[:MAX_ROWS]:
            seconds = time.time() - running.since
            table.add_row(running.item.key, str(running.attempt), _time(seconds), _progress(running))
        rest = len(self._running()) - MAX_ROWS
        return Group(head, table, Text(f"and {rest} more" if rest > 0 else ""))

    def _total(self) -> int:
        board = self._board
        return board.done.total() + len(board.running) + len(board.failed) + board.waiting.total()

    def seconds_left(self) -> float | None:
        """By the pace of this run; None before anything finished."""
        board = self._board
        finished = board.done.total() - self._done_before
        if not finished:
            return None
        waiting = board.waiting
        times = {stage: statistics.fmean(s) for stage, s in board.seconds.items() if s}
        typical = statistics.fmean(times.values())
        work = sum(count * times.get(stage, typical) for stage, count in waiting.items())
        work += sum(times.get(r.item.stage, typical) / 2 for r in board.running.values())
        return work / max(1, len(self._running()))

    def _running(self) -> list[Running]:
        """Items that a worker has; a few more are handed out and wait for one."""
        return [running for running in self._board.running.values() if running.started]


def _progress(running: Running) -> str:
    if "loss" not in running.progress:
        return ""
    return f"{running.progress['epoch']:.1f}, {running.progress['loss']:.3f}"


def _time(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
