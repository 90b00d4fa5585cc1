"""The progress of a run without a terminal: plain lines, every failure and every note once."""

import pytest
from test_board import open_board

from sweep.progress import Display


def test_a_run_says_where_it_stands_and_each_failure_and_note_once(tmp_path, capsys):
    board, worker, store = open_board(tmp_path, measure=False, baselines=False, axes={"seed": [1, 2]})
    store.notes.append("damage was repaired")
    with Display(board, store.notes) as display:
        failing, number = board.next()
        message = "shapes [batch, length] and [/INST] differ :warning:"
        worker.end(failing, number, "failed", failure_kind="bug", message=message)
        for _ in range(3):
            display.refresh()
        worker.do_all()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("note: damage was repaired") == 1
    assert said.err.count(f"failed: {failing.key} (bug): {message}") == 1
    first, *_, last = said.err.splitlines()
    assert first == "note: damage was repaired"
    assert last == "5 of 10 work items done · 0 running · 1 failed"  # four waited for the failed one


def test_quiet_says_nothing(tmp_path, capsys):
    board, worker, store = open_board(tmp_path)
    with Display(board, store.notes, quiet=True) as display:
        worker.fail(*board.next())
        display.refresh()
    assert capsys.readouterr() == ("", "")


def test_the_line_tells_epoch_and_loss_of_what_runs(tmp_path, capsys):
    board, _, store = open_board(tmp_path, measure=False, baselines=False)
    item, _ = board.next()
    board.next()  # handed out too, but no worker has it yet
    board.started(item.key)
    board.progress(item.key, {"epoch": 1.25, "loss": 0.5})
    with Display(board, store.notes):
        pass
    assert f"0 of 5 work items done · 1 running · {item.key}: 1.2, 0.500 · unknown time left" in capsys.readouterr().err


def test_the_table_stays_short_for_a_thousand_trials(tmp_path):
    board, _, store = open_board(tmp_path, measure=False, baselines=False, axes={"seed": list(range(60))})
    running = [board.next() for _ in range(50)]
    for item, _ in running:
        board.started(item.key)
    display = Display(board, store.notes, quiet=True)
    head, table, rest = display._render().renderables
    assert str(head).startswith("0 of 300 work items done · 50 running")
    assert table.row_count == 12
    assert str(rest) == f"and {len(running) - 12} more"


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_the_time_left_is_known_once_something_finished_and_shrinks(tmp_path, finished):
    board, worker, store = open_board(tmp_path, measure=False, baselines=False)
    display = Display(board, store.notes, quiet=True)
    for _ in range(finished):
        worker.do(*board.next())
    expected = None if not finished else 5 - finished  # every item takes one second here
    assert display.seconds_left() == (expected if expected is None else pytest.approx(expected))
