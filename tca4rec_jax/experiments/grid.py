"""A grid of experiments: named data, CF models and recommenders, and the values of axes.

A grid file defines `get_grid(arg="")`, which returns `Grid(...).with_argument(arg)`; the config
files that it names lie relative to its folder. cells.py expands it.
"""

import ast
import dataclasses
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tca4rec_jax.config import parse_setting, split_argument
from tca4rec_jax.errors import UserError, check_choice, did_you_mean
from tca4rec_jax.experiments.results import CF, POPULAR
from tca4rec_jax.ranges import FolderName, check

OBJECTIVE = ("softmax", "form", "tau", "beta", "alpha")
AXES = ("seed", "cf_seed", "budget", *OBJECTIVE, "guidance")
"""From the slowest to the fastest: all cells of the first seed come first."""

AxisValues = tuple | Mapping[str, tuple]
"""The values of an axis, or {data: values}; on other data it is as if they were not given."""

OF_DATA = (
    *("data", "cf", "evaluation", "validation.rows"),
    *(f"decoding.{name}" for name in ("exclude_history", "allow", "deny", "max_title_tokens")),
)
"""What of a config is the same for all models on some data."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Data, and how all models are evaluated on them.

    Attributes:
      config: a config file. Its sections data, cf and evaluation, its validation.rows and what may
        be recommended count for every recommender on these data.
      settings: fields of these, by dotted name.
      more: {data: further ones, which an argument gives}; they hold whatever debug shrinks.
    """

    config: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CFModel:
    """A CF model.

    Attributes:
      settings: fields of config.cf by dotted name; `more` is as in Data.
      on, axes: as in Recommender; its own beta, for one, makes its logits a distribution.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, AxisValues] = dataclasses.field(default_factory=dict)
    more: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recommender:
    """A recommender.

    Attributes:
      config: a config file; what is the data's is taken from theirs.
      settings: fields by dotted name; `more` is as in Data.
      on: {data: further settings on them}, where it is not for all data of the grid.
      vectors: the CF model whose item vectors its prompts carry, or its semantic ids are made of;
        by default prompts carry those of the cell's CF model, and ids are made of titles.
      axes: values of axes that are not the grid's.
    """

    config: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    vectors: str = ""
    axes: Mapping[str, AxisValues] = dataclasses.field(default_factory=dict)
    more: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
      data, cf, recommenders: by name.
      axes: {a name in AXES: its values}; budget is a factor of training.steps and
        validation.every, the other fields are those of the config where the grid does not say.
      chosen: the axes whose value is chosen on the validation split, among the runs of
        `choose_seeds` (by default all seeds of `axes`, whichever an argument leaves); then the test
        split is ranked with that value alone.
      metric: which chooses what is trained: 'ndcg@K', 'hr@K' or, the least, 'nll per title'.
      guided_metric: which chooses guidance, whose lists have no NLL.
      split: which is ranked where nothing is chosen.
      keep_checkpoints: of runs that no cell needs any more.
      debug: shrink all configs, as the argument 'debug' of a config file does.
      folder: that of the grid file.
    """

    data: Mapping[str, Data]
    cf: Mapping[str, CFModel]
    recommenders: Mapping[str, Recommender]
    axes: Mapping[str, AxisValues] = dataclasses.field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    choose_seeds: tuple[int, ...] = ()
    metric: str = "ndcg@10"
    guided_metric: str = "ndcg@10"
    split: str = "test"
    keep_checkpoints: bool = False
    debug: bool = False
    folder: Path = Path()

    def with_argument(self, arg: str) -> "Grid":
        """The grid changed as the part of --grid=FILE:ARG after the colon says.

        A comma-separated list of 'debug'; AXIS=value or AXIS=(value, ..); data=, cf= or
        recommender=NAME or (NAME, ..), those that are left (recommenders= does the same);
        NAME.FIELD=value, a config field of one of them; NAME.on.DATA.FIELD=value, that of a CF
        model or a recommender on some data. Raises UserError for anything else.
        """
        grid = self
        for setting in split_argument(arg):
            grid = grid._shrunk() if setting == "debug" else grid._set(setting)
        return grid

    def _shrunk(self) -> "Grid":
        """With the configs of 'debug', whose lists are of three."""
        metric = self.metric.replace("@10", "@3")
        return dataclasses.replace(self, debug=True, metric=metric, guided_metric="ndcg@3")

    def _set(self, setting: str) -> "Grid":
        """Changed by one setting of an argument."""
        name, given, text = setting.partition("=")
        label, _, field = name.partition(".")
        values = _values(text)
        if name in AXES and given:
            return self._with_axis(name, values)
        for part in ("data", "cf", "recommenders"):
            named = dict(getattr(self, part))
            if name in (part, part.removesuffix("s")) and given:
                for value in values:
                    check_choice(f"grid argument {part}", value, named)
                return self._with(part, {one: named[one] for one in values})
            if field and label in named:
                changed = self._with_field(label, named[label], setting)
                return self._with(part, named | {label: changed})
        raise UserError(
            f"grid argument {setting!r}: expected debug, {', '.join(AXES)}, data, cf or "
            "recommender and =value, or NAME.FIELD=value with a name in the grid "
            "(NAME.on.DATA.FIELD on some data)"
            f"{did_you_mean(name, ['debug', *AXES, 'data', 'cf', 'recommender'])}"
        )

    def _with_field(self, label: str, one: Any, setting: str) -> Any:
        """Data, a CF model or recommender with LABEL.FIELD=value or LABEL.on.DATA.FIELD=value."""
        assigned = setting.removeprefix(f"{label}.")
        every = [label] if isinstance(one, Data) else [*(one.on or self.data)]
        if assigned.startswith("on.") and not isinstance(one, Data):
            data, _, assigned = assigned.removeprefix("on.").partition(".")
            check_choice(f"grid argument {setting!r}: data", data, every)
            every = [data]
        try:
            name, value = parse_setting(assigned)
        except UserError as error:
            raise UserError(f"{label} of the grid: {error}") from error
        more = {data: {**one.more.get(data, {}), name: value} for data in every}
        return dataclasses.replace(one, more={**one.more, **more})

    def _with_axis(self, axis: str, values: tuple) -> "Grid":
        """With these values of an axis alone, also where a CF model or recommender has its own."""
        given = {axis: values}
        of, seeds = dataclasses.replace, self.axes.get("seed", ())
        chooses_by_all = axis == "seed" and not self.choose_seeds and isinstance(seeds, tuple)
        return of(
            self,
            choose_seeds=seeds if chooses_by_all else self.choose_seeds,
            axes={**self.axes, **given},
            cf={n: of(one, axes={**one.axes, **given}) for n, one in self.cf.items()},
            recommenders={
                n: of(one, axes={**one.axes, **given}) for n, one in self.recommenders.items()
            },
        )

    def _with(self, part: str, named: Mapping[str, Any]) -> "Grid":
        changed: Any = {part: named}
        return dataclasses.replace(self, **changed)

    def check(self) -> "Grid":
        """Returns itself; UserError for a name, an axis or a field that is none."""
        models: dict[str, CFModel | Recommender] = {**self.cf, **self.recommenders}
        for name in (*self.data, *models):
            check("a name in the grid", name, FolderName)
        for name in {*self.recommenders} & {CF, POPULAR}:
            raise UserError(f"a recommender of the grid may not be called {name!r}")
        for axis in (*self.axes, *(axis for one in models.values() for axis in one.axes)):
            check_choice("an axis of the grid", axis, AXES)
        for axis in self.chosen:
            check_choice("a chosen axis of the grid", axis, AXES[2:])
        for name, one in self.recommenders.items():
            if one.vectors:
                check_choice(f"recommenders[{name!r}].vectors", one.vectors, self.cf)
            settings = one.settings, *one.on.values(), *one.more.values()
            if own := [field for of in settings for field in of if _of_data(field)]:
                raise UserError(
                    f"recommenders[{name!r}] of the grid sets {own[0]}, which its data say"
                )
        check_choice("the split of the grid", self.split, ("validation", "test"))
        return self


def values_on(data: str, values: AxisValues) -> tuple:
    """Those of an axis on data; none if it has none there."""
    return values.get(data, ()) if isinstance(values, Mapping) else values


def load_grid(flag: str) -> Grid:
    """The grid of --grid=FILE:ARGUMENT. Raises UserError for a file or grid that is none."""
    name, _, arg = flag.partition(":")
    if not Path(name).is_file():
        near = did_you_mean(name, map(str, Path(name).parent.glob("*.py")))
        raise UserError(f"--grid={flag}: {name} does not exist{near}")
    found = runpy.run_path(name)
    if "get_grid" not in found:
        raise UserError(f"--grid={flag}: {name} defines no get_grid(arg)")
    return dataclasses.replace(found["get_grid"](arg), folder=Path(name).parent).check()


def _values(text: str) -> tuple:
    """What an argument gives: one value, or several in brackets."""
    several = text[:1] == "(" and text[-1:] == ")"
    return tuple(map(_value, split_argument(text[1:-1]) if several else [text]))


def _value(text: str) -> Any:
    """A number or a name, which needs no quotes."""
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return text.strip()


def _of_data(field: str) -> bool:
    """Whether a field of a recommender's config is its data's."""
    return any(f"{field}.".startswith(f"{name}.") for name in OF_DATA)
