"""What a library says of a file becomes one line that names it."""

import pytest

from tca4rec_jax.errors import UserError, one_line, reading


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ValueError("bad\nlines"),
            "a.bin: not a readable model (bad lines); buy it",
        ),
        (KeyError(3), "a.bin: not a readable model (KeyError: 3); buy it"),
        (MemoryError(), "a.bin: not a readable model (MemoryError:); buy it"),
        (UserError("too\nold"), "a.bin: too old"),
        (UserError("a.bin: too old"), "a.bin: too old"),
        (FileNotFoundError(2, "No such file"), "a.bin: no such file"),
        (PermissionError(13, "Permission denied"), "a.bin: Permission denied"),
    ],
)
def test_errors_of_parsers_name_the_file_in_one_line(error, line):
    with pytest.raises(UserError) as raised, reading("a.bin", "model", remedy="buy it"):
        raise error
    assert str(raised.value) == line


def test_a_long_line_is_cut():
    assert one_line("x" * 2000) == "x" * 1000 + " ..."
