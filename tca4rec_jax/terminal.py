"""What people see of work: its log, how far it is, text that a terminal does not obey."""

import io
import logging as standard_logging
import math
import re
import sys
import time
from pathlib import Path

from absl import logging
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Display
from rich.table import Column
from rich.text import Text

_PACKAGE = Path(__file__).parent
_CONSOLE = Console(stderr=True)
_LINE_SECONDS = 30.0  # between two lines of a log file, at least
_DRAW_SECONDS = 0.1
# Control characters, line breaks, what turns the direction of text, halves of a UTF-16 pair.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain_text(text: str) -> str:
    """The text as one line that a terminal shows and does not obey: an escape as '\\x1b'."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Progress:
    """How far some work is: a context in which `advance` counts.

    On a terminal it is one line with a bar, drawn anew; elsewhere (a log file, a notebook) a line
    of the log after every 30 seconds, or after a hundredth more of the time so far, whichever is
    longer, and in the end.
    Where INFO is not logged (--quiet, the other processes of a job) there is none.
    """

    def __init__(self, name: str | None, total: int | None = None, unit: str = "", done: int = 0):
        """`total` units of work, some `done` already; None: not known. No `name`: nothing shown."""
        shown = name is not None and total != done and logging.level_info()
        self._unit, self._done = unit, done
        self._said: tuple[str, ...] = ()
        self._over = False
        self._logs = shown and not _CONSOLE.is_terminal
        columns = TextColumn("{task.description}", markup=False), BarColumn(20), _Words(self)
        self._display = Display(
            *columns,
            console=_CONSOLE,
            redirect_stdout=False,  # it may be a file
            refresh_per_second=4,
            speed_estimate_period=math.inf,  # of the last 1000 draws: a unit may take hours
            disable=self._logs or not shown,
        )
        about = plain_text(name or "")
        self._display.add_task(about, total=total, completed=done)
        (self._task,) = self._display.tasks
        self._waiting, self._drawn = 0, 0.0
        self._next_line = time.monotonic() + _LINE_SECONDS

    def __enter__(self):
        self._display.start()
        return self

    def __exit__(self, *_):
        self._over = True
        self._draw()
        if self._logs and self._task.completed > self._done:
            self._log()
        self._display.stop()

    def advance(self, count: int = 1, *said: str) -> None:
        """`count` more units are done; what is `said` of the work stays until the next."""
        self._waiting += count
        self._said = said or self._said
        now = time.monotonic()
        if now - self._drawn >= _DRAW_SECONDS:
            self._drawn = now
            self._draw()
        if self._logs and now >= self._next_line and self._has_more:
            self._log()
            # Not of an estimate: the first steps wait for compilation.
            self._next_line = now + max(_LINE_SECONDS, (self._task.elapsed or 0.0) / 100)

    def words(self, task: Task) -> str:
        """What is said behind the name."""
        done = int(task.completed)
        amount = decimal(done) if self._unit == "bytes" else f"{done:,}"
        if task.total is not None:
            amount += f"/{int(task.total):,} {self._unit}"
        said = [amount, *self._said]
        if self._over:
            said.insert(1, f"in {_clock(task.elapsed or 0.0)}")
        elif task.time_remaining is not None:
            said.insert(1, f"{_clock(task.time_remaining)} left")
        return ", ".join(said)

    @property
    def _has_more(self) -> bool:
        """Whether work is left; the last line is that of the end."""
        total = self._task.total
        return total is None or self._task.completed + self._waiting < total

    def _draw(self) -> None:
        self._display.advance(self._task.id, self._waiting)
        self._waiting = 0

    def _log(self) -> None:
        self._draw()
        logging.info("%s: %s", self._task.description, self.words(self._task))


def log_to_console(verbosity: int | None = None) -> None:
    """Shows the log of the package, and the warnings of others, on stderr; of that `verbosity`."""
    if verbosity is not None:
        logging.set_verbosity(verbosity)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.python_handler.setStream(_Stderr())
    handler.setFormatter(_PlainText("%(message)s"))
    handler.addFilter(is_ours_or_a_warning)


class _Stderr(io.TextIOBase):
    """sys.stderr as it is now: while a bar is drawn, what writes above it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class _PlainText(standard_logging.Formatter):
    def format(self, record: standard_logging.LogRecord) -> str:
        return "\n".join(map(plain_text, super().format(record).split("\n")))


def is_ours_or_a_warning(record: standard_logging.LogRecord) -> bool:
    """Whether to show a log line; Orbax and TFDS write dozens to the same logger."""
    ours = Path(record.pathname).is_relative_to(_PACKAGE)
    return ours or record.levelno >= standard_logging.WARNING


class _Words(ProgressColumn):
    """What a Progress says, cut where the line ends."""

    def __init__(self, progress: Progress):
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(plain_text(self._progress.words(task)))


def _clock(seconds: float) -> str:
    """As 0:07, 12:30 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
