"""Pictures of the tests: they are made, but few are drawn, which takes longer than all else."""

import contextlib
from pathlib import Path

import pytest
from matplotlib.figure import Figure

_DRAW = Figure.savefig


@contextlib.contextmanager
def saved_by(save):
    """Within it figures are saved by this function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


def drawn():
    """Within it pictures are drawn."""
    return saved_by(_DRAW)


def undrawn():
    """Within it an empty picture is written in the place of each."""
    return saved_by(_leave_empty)


def _leave_empty(figure, file, *, format, **_):
    empty = '<svg xmlns="http://www.w3.org/2000/svg"/>' if format == "svg" else "not drawn"
    file.write(empty) if hasattr(file, "write") else Path(file).write_text(empty)
