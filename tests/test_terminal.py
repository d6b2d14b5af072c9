"""How far long work is: lines in a log file, a bar on a terminal, nothing if it is to be quiet."""

import io
import logging as standard_logging
import re

import pytest
from absl import logging
from rich.console import Console  # noqa: TID251

from tca4rec_jax import terminal
from tca4rec_jax.terminal import Progress


@pytest.fixture
def verbosity():
    before = logging.get_verbosity()
    yield logging.set_verbosity
    logging.set_verbosity(before)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: `clock.now += 1` lets a second pass."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(terminal, "time", clock := Clock())
    return clock


def lines_of(caplog, monkeypatch, clock, seconds=lambda epoch: 1, **how):
    monkeypatch.setattr(terminal, "_CONSOLE", Console(file=io.StringIO(), get_time=clock.monotonic))
    caplog.set_level(standard_logging.INFO, logger="absl")
    with Progress("CF", 1000, "epochs", **how) as progress:
        for epoch in range(1000 - how.get("done", 0)):
            clock.now += seconds(epoch)
            progress.advance(1, f"loss {epoch}")
    return [record.getMessage() for record in caplog.records]


def test_a_log_file_gets_a_line_now_and_then(caplog, monkeypatch, clock, verbosity):
    verbosity(logging.INFO)
    lines = lines_of(caplog, monkeypatch, clock)
    assert len(lines) == 1000 // 30 + 1
    assert lines[1] == "CF: 60/1,000 epochs, 15:40 left, loss 59"
    assert lines[-1] == "CF: 1,000/1,000 epochs, in 16:40, loss 999"


def test_work_that_goes_on_counts_from_what_is_done(caplog, monkeypatch, clock, verbosity):
    verbosity(logging.INFO)
    assert lines_of(caplog, monkeypatch, clock, done=970)[0].startswith("CF: 1,000/1,000 epochs")
    caplog.clear()
    assert not lines_of(caplog, monkeypatch, clock, done=1000)


def test_hours_for_a_unit_have_an_estimate_and_the_end_one_line(
    caplog, monkeypatch, clock, verbosity
):
    verbosity(logging.INFO)
    lines = lines_of(caplog, monkeypatch, clock, seconds=lambda _: 3600, done=996)
    assert lines[0] == "CF: 997/1,000 epochs, loss 0"  # none was timed yet
    assert lines[1:] == [
        "CF: 998/1,000 epochs, 2:00:00 left, loss 1",
        "CF: 999/1,000 epochs, 1:00:00 left, loss 2",
        "CF: 1,000/1,000 epochs, in 4:00:00, loss 3",
    ]


def test_slow_first_steps_do_not_silence_the_rest(caplog, monkeypatch, clock, verbosity):
    """They were compiled: by their pace a hundredth of the work takes an hour."""
    verbosity(logging.INFO)
    lines = lines_of(caplog, monkeypatch, clock, seconds=lambda epoch: 400 if epoch < 2 else 1)
    assert [line.split("/")[0] for line in lines[:4]] == ["CF: 1", "CF: 2", "CF: 32", "CF: 62"]
    assert len(lines) == 2 + 998 // 30 + 1


def test_nothing_is_shown_where_info_is_not_logged(caplog, monkeypatch, clock, verbosity):
    verbosity(logging.WARNING)
    assert not lines_of(caplog, monkeypatch, clock)


def test_a_terminal_gets_one_line_that_holds_what_a_user_wrote(monkeypatch, verbosity):
    verbosity(logging.INFO)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "_CONSOLE", console)
    with Progress("[/b]\x1b[2J", 3, "rows") as progress:
        progress.advance(3, "[red]\x07")
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue()).splitlines()[-1].strip()
    assert last.startswith(r"[/b]\x1b[2J ")
    assert last.endswith(r"3/3 rows, in 0:00, [red]\x07")


def test_the_log_is_written_above_a_bar(monkeypatch, verbosity, capsys):
    """To sys.stderr as it is when a line is logged, not as it was at the start."""
    stream = terminal._Stderr()
    stream.write("a\n")
    monkeypatch.setattr("sys.stderr", later := io.StringIO())
    stream.write("b\n")
    assert (capsys.readouterr().err, later.getvalue()) == ("a\n", "b\n")
