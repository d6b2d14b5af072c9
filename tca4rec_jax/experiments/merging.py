"""Two work directories of one grid that both went on, made one."""

import shutil
from pathlib import Path

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments.results import FILE, append, read_lines
from tca4rec_jax.fileio import atomic_path, read_json_lines, remove
from tca4rec_jax.lease import only_writer
from tca4rec_jax.training.run_folder import RunFolder

_OWN = (FILE, "claims")  # lines are appended; a lease is a process of there
_SEVERAL = ("cf", "evaluation", "llm")  # folders of data whose entries do not depend on each other
_PASSING = shutil.ignore_patterns(".*.lease", ".*.partial")


def take_over(other: Path, workdir: Path) -> int:
    """Copies to `workdir` what it lacks of `other`, in which nobody writes; returns how many lines.

    A line is taken if its cell and split have none here. A run, a CF model, prepared data are taken
    whole, if there are none here; a run also if it is made from the same and is further there. All
    else that is here stays. Killed at any time it may be called again.

    Raises UserError for a folder that is none or damaged results, LeaseError if a run that would be
    replaced is being trained.
    """
    if not other.is_dir():
        raise UserError(f"{other}: no such work directory")
    here, there = read_lines(workdir), read_lines(other)
    for entry in sorted(other.iterdir()):
        if entry.name not in _OWN:
            _take(entry, workdir / entry.name, depth=1)
    new = [line for of, line in there.items() if of not in here]
    for line in new:  # their ranks are there by now
        append(workdir, line)
    return len(new)


def _take(source: Path, target: Path, depth: int) -> None:
    """What is not here of a file or folder, so far below the work directory."""
    if _PASSING("", [source.name]):
        return
    if source.is_dir() and (depth == 1 or (depth == 2 and source.name in _SEVERAL)):
        for entry in sorted(source.iterdir()):
            _take(entry, target / entry.name, depth + 1)
        return
    if source.parent.name == "llm" and _is_further(RunFolder(source), RunFolder(target)):
        with only_writer(target):
            remove(target)
            _copy(source, target)
    elif not target.exists():
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    with atomic_path(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, ignore=_PASSING)
        else:
            shutil.copy2(source, temporary)


def _is_further(one: RunFolder, other: RunFolder) -> bool:
    """Whether a run has a later checkpoint than all that another, made from the same, has done."""
    logged = (line.get("step", -1) + 1 for line in read_json_lines(other.log))
    done = max(other.trained_steps, *logged, 0)  # a finished run's checkpoints may be deleted
    if not done or one.trained_steps <= done:
        return one.trained_steps > done
    try:
        return one.made_from.fingerprint == other.made_from.fingerprint
    except UserError:
        return False
