"""The cells of a grid, their configs, and where their parts lie below the grid's work directory W.

W/<data>/                   a work directory: data/, item_embeddings/, ids/, llm/<run>/, evaluation/
W/<data>/cf/<cf>_<seed>/    the work directory of a CF model alone: cf/, item_vectors.npy
W/results.jsonl, W/ranks/, W/rows/   what finished cells left (results.py)
W/agreement/                  how far lists agree with CF models (agreements.py)
W/claims/                   the leases of the jobs that are being done
"""

import dataclasses
import itertools
import math
import runpy
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.config import SHORT_NAMES, apply_argument, build, config_fields, config_value
from tca4rec_jax.config_checks import validate
from tca4rec_jax.data.prompts import check_sequence_texts
from tca4rec_jax.data.templates import (
    PromptTemplate,
    carried_vectors,
    reads_users,
    shows_ids,
)
from tca4rec_jax.errors import UserError, check_choice
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.summary import check_cutoffs
from tca4rec_jax.experiments.grid import AXES, OBJECTIVE, OF_DATA, AxisValues, Grid, values_on
from tca4rec_jax.experiments.results import CF, POPULAR, Cell
from tca4rec_jax.fileio import fingerprint
from tca4rec_jax.training.run_folder import RunFolder

Pair = tuple[str, str]  # data and recommender


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a grid whose work directory is `workdir`; config files are read once."""

    grid: Grid
    workdir: Path

    @cached_property
    def all(self) -> list[Cell]:
        """Each once: CF models first, then all cells of the first seed, and so on.

        Raises UserError for a config file that is missing, or a field or value that is none.
        """
        found = [Cell(data, POPULAR) for data in self.grid.data]
        found += [Cell(*of, seed) for of, seeds in self._cf_seeds.items() for seed in seeds]
        seeds = itertools.chain(*(values["seed"] for values in self._axes.values()))
        for seed in dict.fromkeys(seeds):
            for pair, values in self._axes.items():
                if seed in values["seed"]:
                    found += self._of_pair(pair, values | {"seed": (seed,)})
        return list(dict.fromkeys(found))

    @property
    def seeds_elsewhere(self) -> list[int]:
        """The seeds that choose and that a recommender of this slice of a grid is without."""
        of_pairs = [values["seed"] for values in self._axes.values()]
        return [one for one in self.grid.choose_seeds if any(one not in of for of in of_pairs)]

    def _of_pair(self, pair: Pair, values: Mapping[str, tuple]) -> Iterator[Cell]:
        steps = self._bases[pair].training.steps
        for cf in self._cf_models(pair[0]):
            of_cf = {**values, **self._typed(pair, self.grid.cf[cf].axes)}
            for chosen in itertools.product(*of_cf.values()):
                named = dict(zip(AXES, chosen, strict=True))
                named["steps"] = max(round(steps * named.pop("budget")), 1)
                yield self._collapsed(Cell(*pair, cf, **named))

    def _collapsed(self, cell: Cell) -> Cell:
        """None for the axes on which nothing of the cell depends."""
        dropped: dict[str, Any] = {}
        if not cell.alpha:
            dropped |= {"form": None}
        if not cell.alpha and not cell.guidance:
            dropped |= {"beta": None}
            if not self._reads_cf(cell):
                dropped |= {"cf": None, "cf_seed": None}
        if cell.cf_seed not in self._cf_seeds.get((cell.data, CF, cell.cf or ""), ()):
            dropped |= {"cf_seed": None}
        return dataclasses.replace(cell, **dropped)

    def run_of(self, cell: Cell) -> Cell:
        """What the training of a cell's run depends on, guidance None: other guidances share it."""
        alone = self._collapsed(dataclasses.replace(cell, guidance=0.0))
        return dataclasses.replace(alone, guidance=None)

    def run_name(self, cell: Cell) -> str:
        """The folder of a cell's run, W/<data>/llm/<name>."""
        run = self.run_of(cell)
        name = f"{run.recommender}_alpha_{run.alpha:g}_seed_{run.seed}_{run.steps}"
        return f"{name}_{fingerprint(dataclasses.asdict(run))[:8]}"

    def run_folder(self, cell: Cell) -> RunFolder:
        """That of a cell's run."""
        return RunFolder.of(self.workdir / cell.data, self.run_name(cell))

    @cached_property
    def _bases(self) -> dict[Pair, ConfigDict]:
        """The config of every recommender on data, before CF model and axes."""
        found = {}
        for data in self.grid.data:
            theirs = self.config_of_data(data)
            for name, own in self.grid.recommenders.items():
                if data not in (own.on or (data,)):
                    continue
                config = self._file(own.config)
                for field in OF_DATA:
                    section, _, key = field.rpartition(".")
                    config_value(config, section)[key] = config_value(theirs, field)
                settings = {**own.settings, **own.on.get(data, {})}
                where = f"recommenders[{name!r}]"
                found[data, name] = self._set(config, settings, own.more.get(data, {}), where)
            if not any(pair[0] == data for pair in found):
                raise UserError(f"data[{data!r}] of the grid has no recommender")
        return found

    def _set(
        self,
        config: ConfigDict,
        settings: Mapping[str, Any],
        more: Mapping[str, Any],
        where: str,
    ) -> ConfigDict:
        """`_apply`, with the sizes of 'debug' between the two if the grid asks for them."""
        _apply(config, settings, where)
        return _apply(apply_argument(config, "debug" if self.grid.debug else None), more, where)

    def _file(self, name: str) -> ConfigDict:
        path = self.grid.folder / name
        if not path.is_file():
            raise UserError(f"the grid names the config {name}: {path} does not exist")
        return runpy.run_path(str(path))["get_config"]()

    @cached_property
    def _axes(self) -> dict[Pair, dict[str, tuple]]:
        """The values of every axis; of one that the grid does not give the config's."""
        grid = self.grid
        return {
            pair: self._typed(pair, grid.axes, grid.recommenders[pair[1]].axes, every=True)
            for pair in self._bases
        }

    def _typed(
        self, pair: Pair, *axes: Mapping[str, AxisValues], every: bool = False
    ) -> dict[str, tuple]:
        """Values of axes, the last given, in the type of their fields; of `every` axis, those of
        the config too."""
        values = [item for one in axes for item in one.items()]
        given = {axis: of for axis, one in values if (of := values_on(pair[0], one))}
        config = self._bases[pair]
        of_config: dict[str, Any] = {n: config_value(config, SHORT_NAMES[n]) for n in OBJECTIVE}
        of_config |= {"seed": config.seed, "cf_seed": config.cf.seed}
        of_config |= {"budget": 1.0, "guidance": 0.0}
        return {
            axis: tuple(map(type(of_config[axis]), given.get(axis, (of_config[axis],))))
            for axis in AXES
            if every or axis in given
        }

    def _cf_models(self, data: str) -> list[str]:
        """The CF models that the grid has on data."""
        return [name for name, one in self.grid.cf.items() if data in (one.on or (data,))]

    @cached_property
    def _cf_seeds(self) -> dict[tuple[str, str, str], tuple[int | None, ...]]:
        """{(data, CF, CF model): its seeds}; None alone for one that is not trained."""
        found = {}
        for data in self.grid.data:
            pair = self.pair_on(data)
            for cf in self._cf_models(data):
                model = MODELS[self._with_cf(self._bases[pair], data, cf, None).cf.model]
                found[data, CF, cf] = self._axes[pair]["cf_seed"] if model.training else (None,)
        return found

    def _reads_cf(self, cell: Cell) -> bool:
        """Whether the LLM reads the cell's CF model, besides being aligned with it."""
        prompt = self._bases[cell.data, cell.recommender].prompt
        vectors = self.grid.recommenders[cell.recommender].vectors
        return reads_users(prompt) or (bool(carried_vectors(prompt)) and not vectors)

    def _with_cf(self, config: ConfigDict, data: str, cf: str, seed: int | None) -> ConfigDict:
        """A copy with a CF model of the grid."""
        one, config = self.grid.cf[cf], config.copy_and_resolve_references()
        settings = {**one.settings, **one.on.get(data, {}), **one.more.get(data, {})}
        _apply(config, settings, f"cf[{cf!r}]")
        if seed is not None:
            config.cf.seed = seed
        return config

    def config_of(self, cell: Cell) -> ConfigDict:
        """The config of a cell. Raises UserError if it is not valid."""
        pair = (cell.data, cell.recommender) if cell.is_llm else self.pair_on(cell.data)
        config = self._bases[pair].copy_and_resolve_references()
        if cell.cf is not None:
            config = self._with_cf(config, cell.data, cell.cf, cell.cf_seed)
            config.cf.logits = str(self.cf_folder(cell) / "cf" / "logits")
        if cell.is_llm:
            every = config.validation.every * (cell.steps or 0) / config.training.steps
            config.validation.every = math.ceil(every)  # as often at every budget
            values = {name: getattr(cell, name) for name in (*OBJECTIVE, "seed", "steps")}
            given = {SHORT_NAMES[name]: v for name, v in values.items() if v is not None}
            _apply(config, given, cell.label)
            config.run = self.run_name(cell)
            if cell.guidance and config.decoding.beta is None:
                config.decoding.beta = config.objective.beta
        if maker := self.cf_of_vectors(*pair):
            carried = bool(carried_vectors(config.prompt))
            field = "projector.vectors" if carried else "ids.item_vectors"
            config.update_from_flattened_dict({field: str(self.vectors_file(maker))})
        validate(config)
        check_cutoffs(config)
        _check_targets(config, cell)
        return config

    def check(self) -> None:
        """Raises UserError, before any work, for what would fail in a cell or mix two of them.

        A config that is not valid; a metric to choose by that is not measured, as the NLL of guided
        lists; recommenders on the same data that would each make semantic ids of their own; several
        seeds of both the runs and the CF models, whose pairs are not independent of each other.
        """
        for pair, values in self._axes.items():
            if min(len(values["seed"]), len(values["cf_seed"])) > 1:
                raise UserError(
                    f"{', '.join(pair)}: seed and cf_seed of the grid have several values each, "
                    "whose pairs are no independent seeds: give one cf_seed (with one seed and "
                    "several cf_seeds, all are compared with one run of alpha = 0: one seed)"
                )
        for (data, _), config in self._bases.items():
            of_lists = [f"{n}@{k}" for k in config.evaluation.cutoffs for n in ("hr", "ndcg")]
            for name, measured in (("metric", [*of_lists, NLL]), ("guided_metric", of_lists)):
                where = f"{name} of the grid, on {data},"
                check_choice(where, getattr(self.grid, name), measured)
        ids: dict[str, dict] = {}
        for cell in {(c.data, c.recommender, c.cf, c.alpha): c for c in self.all}.values():
            config = self.config_of(cell)
            if shows_ids(config.prompt) and config.ids.path is None:
                made = {name: v for name, v in config.ids.to_dict().items() if name != "train"}
                if ids.setdefault(cell.data, made) != made:
                    raise UserError(
                        f"recommenders of the grid make different semantic ids of {cell.data}: "
                        "give them the same section ids and vectors, or ids.path"
                    )

    def config_of_data(self, data: str) -> ConfigDict:
        """The config that the grid names for data, whose LLM embeds titles."""
        one = self.grid.data[data]
        return self._set(
            self._file(one.config), one.settings, one.more.get(data, {}), f"data[{data!r}]"
        )

    def pair_on(self, data: str) -> Pair:
        """Data and the first recommender on them, with whose config CF models are evaluated."""
        return next(pair for pair in self._bases if pair[0] == data)

    def cf_of_vectors(self, data: str, recommender: str) -> Cell | None:
        """The CF model whose item vectors a recommender names."""
        cf = self.grid.recommenders[recommender].vectors
        return Cell(data, CF, cf, self._cf_seeds[data, CF, cf][0]) if cf else None

    def cf_folder(self, cell: Cell) -> Path:
        """The work directory of a cell's CF model alone."""
        seed = "" if cell.cf_seed is None else f"_{cell.cf_seed}"
        return self.workdir / cell.data / "cf" / f"{cell.cf}{seed}"

    def vectors_file(self, cell: Cell) -> Path:
        """Where the item vectors of a cell's CF model are written, if a recommender names it."""
        return self.cf_folder(cell) / "item_vectors.npy"


def _check_targets(config: ConfigDict, cell: Cell) -> None:
    """Raises UserError for prompts that training.targets=all refuses."""
    if config.training.targets == "all":
        try:
            check_sequence_texts(build(PromptTemplate, config.prompt))
        except UserError as error:
            raise UserError(f"{cell.data}, {cell.recommender}: {error}") from error


def _apply(config: ConfigDict, settings: Mapping[str, Any], where: str) -> ConfigDict:
    """The config with settings; it is changed. Raises UserError for one that it cannot have."""
    for name in settings:
        if name not in config_fields():
            raise UserError(f"{where} of the grid: there is no field {name}")
    try:
        config.update_from_flattened_dict(dict(settings))
        return config
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} of the grid: {' '.join(str(error).split())}") from error
