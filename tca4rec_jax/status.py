"""What a work directory holds: each artefact, what it was made from, and why it is stale."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tca4rec_jax.cf.checkpoint import load_model
from tca4rec_jax.cf.logits_format import MANIFEST, StorePath, identity
from tca4rec_jax.cf.logits_store import made_from_of, read_manifest, split_path
from tca4rec_jax.data.dataset import load
from tca4rec_jax.data.item_vectors import (
    EMBEDDINGS,
    VECTORS,
    embeddings_fingerprint,
    embeddings_folder,
)
from tca4rec_jax.data.sequences import SPLITS, RecData
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.evaluation.comparison import CF_LOGITS
from tca4rec_jax.experiment import Experiment, config_of_run
from tca4rec_jax.fileio import file_sha256, read_json
from tca4rec_jax.lease import holder_of
from tca4rec_jax.provenance import FILE, Provenance, short
from tca4rec_jax.reporting import Cell
from tca4rec_jax.semantic_ids.ids import ids_path
from tca4rec_jax.training.run_folder import RunFolder

_MADE_ANEW = "made anew with"
_Read = TypeVar("_Read")


class _Artefact(NamedTuple):
    """One row of the table."""

    path: Path
    what: str
    made_from: str
    stale: str  # why; '' if it is not
    command: str
    state: str = "up to date"
    whole: bool = True  # or it was interrupted: the command goes on

    def cells(self) -> dict[str, Cell]:
        stale = f"stale: {self.stale}" if self.stale else self.state
        command = None if self.whole and not self.stale else self.command
        return {"what": self.what, "made from": self.made_from, "state": stale, _MADE_ANEW: command}


class Status:
    """The artefacts below a work directory; nothing is loaded, written or downloaded."""

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def rows(self) -> dict[str, dict[str, Cell]]:
        """{path in the work directory: its cells}. Raises FileNotFoundError for no folder."""
        if not self._workdir.is_dir():
            raise FileNotFoundError(f"{self._workdir}: no such work directory")
        parts = self._prepared, self._cf, self._runs, self._reports, self._folders
        found = [artefact for part in parts for artefact in part()]
        return {str(one.path.relative_to(self._workdir)): one.cells() for one in found}

    @cached_property
    def _data(self) -> RecData | str:
        """The prepared data, or why there are none."""
        try:
            return load(self._workdir / "data")
        except (OSError, UserError) as error:
            return str(error)

    @cached_property
    def _catalogue(self) -> str:
        return "" if isinstance(self._data, str) else self._data.catalogue.content_hash()

    @cached_property
    def _trained(self) -> dict[str, RunFolder]:
        """The runs that say what they were made from, by the fingerprint of that."""
        runs = [run for run in RunFolder.all(self._workdir) if (run.path / FILE).is_file()]
        return {
            run.made_from.fingerprint: run for run in runs if not _why(lambda r=run: r.made_from)
        }

    @cached_property
    def _cf_logits(self) -> set[str]:
        """The content hashes of the stores below cf/ and of those that runs were trained with."""
        configs = (_or_none(partial(config_of_run, run)) for run in RunFolder.all(self._workdir))
        folders = {config.cf.logits for config in configs if config is not None}
        stores: list[StorePath] = [file.parent for file in self._manifests]
        stores += [split_path(one, self._workdir, split) for one in folders for split in SPLITS]
        manifests = (_or_none(partial(read_manifest, store)) for store in stores)
        return {manifest["content_hash"] for manifest in manifests if manifest is not None}

    @property
    def _cf_model(self) -> Path:
        return self._workdir / "cf" / "checkpoint.npz"

    @property
    def _manifests(self) -> list[Path]:
        """Those of the stores below cf/."""
        return sorted((self._workdir / "cf").glob(f"**/{MANIFEST}"))

    def _prepared(self) -> Iterator[_Artefact]:
        path, data = self._workdir / "data", self._data
        if path.is_dir():
            stale, items = (data, "?") if isinstance(data, str) else ("", data.catalogue.num_items)
            yield _Artefact(path, "data", f"{items} items", stale, "launch/prepare_data.py")

    def _cf(self) -> Iterator[_Artefact]:
        """The CF model and the stores of its logits."""
        command, path = "launch/train_cf.py", self._cf_model
        if path.is_file():
            try:
                name, stale = load_model(path, {"catalogue": self._catalogue})[0], ""
            except UserError as error:
                name, stale = "?", str(error)
            yield _Artefact(path, "CF model", name, stale, command)
        for file in self._manifests:
            model = "?"
            try:
                manifest = read_manifest(file.parent)
                model = manifest["cf_model"]
                command = made_from_of(file.parent, manifest).command
                stale = self._of_other_rows(file.parent.name, manifest)
            except UserError as error:
                stale = str(error)
            yield _Artefact(file.parent, "CF logits", model, stale, command, _written(file.parent))

    def _of_other_rows(self, split: str, manifest: Mapping) -> str:
        if isinstance(self._data, str) or split not in SPLITS:
            return "" if split not in SPLITS else "there are no prepared data"
        now = identity(self._data.splits[split], self._data.catalogue)
        names = [name for name, value in now.items() if manifest.get(name) != value]
        return f"written for other data ({', '.join(names)})" if names else ""

    def _runs(self) -> Iterator[_Artefact]:
        for run in RunFolder.all(self._workdir):
            name, described, whole = run.path.name, "?", False
            try:
                experiment = Experiment.of_run(self._workdir, name)
                config = experiment.config
                described = f"{config.llm.weights}, alpha {config.objective.alpha:g}"
                stale = "; ".join(run.made_from.differences(experiment.training_inputs))
                done, steps, outcome = run.trained_steps, run.steps, run.outcome
                unfinished, ended = run.unfinished, f"{done} of {steps} steps, ended by validation"
                whole = not unfinished
                state = unfinished or (f"{steps} steps" if done >= steps else ended)
                state += "" if outcome.best is None else f", best {outcome.best}"
            except (OSError, UserError) as error:
                stale, state = str(error), ""
            command = f"launch/train.py --config.run={name}"
            state = _written(run.path, state)
            yield _Artefact(run.path, "LLM run", described, stale, command, state, whole)

    def _reports(self) -> Iterator[_Artefact]:
        """Single files: lists of an evaluation, results, files of recommendations."""
        readers = {"*.npz": _of_npz, "*.json": _of_json}
        for pattern, read in readers.items():
            for path in sorted(self._workdir.rglob(pattern)):
                inside = path.relative_to(self._workdir).parts
                if inside[0] in ("data", "cf", "llm") or path.name == FILE:
                    continue
                if (made_from := read(path)) is not None:
                    yield self._described(path, made_from)

    def _folders(self) -> Iterator[_Artefact]:
        """Hidden states, item embeddings, semantic ids and exports."""
        ids = ids_path(None, self._workdir)
        whole_with = {embeddings_folder(self._workdir): VECTORS, ids.parent: ids.name}
        for file in sorted(self._workdir.rglob(FILE)):
            path, run = file.parent, RunFolder(file.parent)
            if path == self._workdir / "data" or run in RunFolder.all(self._workdir):
                continue
            try:
                found = self._described(path, Provenance.load(path))
                if path in whole_with:
                    whole = (path / whole_with[path]).is_file()
                    state = _written(path, "up to date" if whole else "interrupted")
                    found = found._replace(state=state, whole=whole)
                yield found
            except UserError as error:
                yield _Artefact(path, "?", "?", str(error), "-")

    def _described(self, path: Path, made_from: Provenance) -> _Artefact:
        inputs = made_from.inputs
        of_runs = [value for name, value in inputs.items() if name.endswith("run.made_from")]
        runs = [self._trained[one] for one in of_runs if one in self._trained]
        names = sorted({run.path.name for run in runs} | {inputs.get("run.name", "")} - {""})
        stale = [
            f"run.made_from was {one[:12]}, which no run is now"
            for one in of_runs
            if one not in self._trained
        ]
        now: dict[str, Any] = {
            name: self._catalogue for name in inputs if name.endswith("catalogue")
        }
        if EMBEDDINGS in inputs:
            now[EMBEDDINGS] = embeddings_fingerprint(self._workdir)
        if name := inputs.get("run.name"):
            run = RunFolder.of(self._workdir, name)
            stale += [why] if (why := _why(lambda: run.made_from)) else []
            now |= {} if why else {"run": run.made_from.inputs, "run.step": run.trained_steps}
        if (logits := inputs.get(CF_LOGITS)) and logits not in self._cf_logits:
            stale.append(f"{CF_LOGITS} was {short(logits)}, which no store is now")
        if "CF model" in inputs:
            now["CF model"] = _or_none(partial(file_sha256, self._cf_model))
        stale += made_from.differences(now)
        weights = f"weights {str(inputs['weights'])[:12]}" if "weights" in inputs else "-"
        described = ", ".join(names) or weights
        shown = "; ".join(dict.fromkeys(stale))
        return _Artefact(path, made_from.artefact, described, shown, made_from.command)


def _of_npz(path: Path) -> Provenance | None:
    try:
        with reading(path, ".npz file"), np.load(path) as arrays:
            text = str(arrays["provenance"])
    except UserError:
        return None
    return Provenance.from_json(text, path)


def _of_json(path: Path) -> Provenance | None:
    try:
        with reading(path, "JSON file"):
            fields = read_json(path)
            return Provenance(
                **(fields if path.name.endswith(f".{FILE}") else fields["provenance"])
            )
    except UserError:
        return None


def _or_none(read: Callable[[], _Read]) -> _Read | None:
    """What is read; None if it is missing or damaged."""
    try:
        return read()
    except (OSError, UserError):
        return None


def _why(read: Callable) -> str:
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def _written(path: Path, state: str = "up to date") -> str:
    holder = holder_of(path)
    return state if holder is None else f"{state}, being written by {holder}"
