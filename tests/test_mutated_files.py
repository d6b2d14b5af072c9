"""Mutated files are read right, or refused in one line that names the file (mutated_files.py)."""

import forked
import mutated_files

MUTANTS = 30  # of each of the kinds of file


def test_mutants_are_read_right_or_refused_in_one_line(tmp_path):
    """In a process of its own: a read out of bounds ends it with a signal, one that takes too much
    memory with a MemoryError."""
    assert len(mutated_files.KINDS) * MUTANTS >= 300
    report = tmp_path / "report"
    process = forked.start(mutated_files.read_all, MUTANTS, 0, str(report))
    process.join(120)
    assert process.exitcode == 0
    assert report.read_text() == ""
