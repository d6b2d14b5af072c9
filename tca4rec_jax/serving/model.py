"""A recommender of fixed shapes: all of its programs are compiled before the first request."""

import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from tca4rec_jax.decoding.engine import BatchSizes
from tca4rec_jax.decoding.recommender import Recommended, Recommender
from tca4rec_jax.distributed.sharding import smallest_batch
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.explanation.explainer import Explainer
from tca4rec_jax.explanation.explanation import Explanation
from tca4rec_jax.ranges import Count, NotNegative, Positive, check_fields

_SAMPLE = 512  # histories of the data, whose lengths suggest the padded lengths of prompts
_GROWTH = 4  # from one compiled batch size to the next
_COMMUNICATING = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait, may have.

    Attributes:
      histories: in one request.
      items: of one history, and of an allow- or deny-list.
      candidates: to score in one request.
      waiting: histories in the queue.
      seconds: from a request to its answer.
      body_bytes: of a request.
      read_seconds: for the arrival of a request.

    Raises UserError for a value outside its range.
    """

    histories: Count = 64
    items: Count = 1000
    candidates: Count = 20
    waiting: Count = 256
    seconds: Positive = 10.0
    body_bytes: Count = 1 << 20
    read_seconds: Positive = 10.0

    def __post_init__(self):
        check_fields(self)

    @property
    def most_histories(self) -> int:
        """In one request: more than may wait could never do so."""
        return min(self.histories, self.waiting)


class Group(NamedTuple):
    """What rows share that are searched in one batch."""

    model: "ServedModel"
    kind: Literal["recommend", "score", "explain"]
    guidance: float
    only: int = 0  # this number of candidates; or the number of a request that is alone


class Row(NamedTuple):
    """One history, and what is asked about it."""

    history: Sequence[str]
    asked: Any  # the filter of a list, candidates, or arguments of an explanation


Admitted = tuple[Group, list[Row]]
"""A group, and rows of it: what `Batcher.submit` takes."""


class ServedModel:
    """The LLM of a run with the shapes that requests are searched with."""

    def __init__(
        self, experiment: Experiment, name: str, limits: Limits, *, guidance: NotNegative = 0.0
    ):
        """Raises as Recommender; `guidance` is that of requests which don't say any.

        Raises UserError for a recommender that lists nothing, too.
        """
        if (kind := experiment.recipe.evaluated_by) != "rankings":
            raise UserError(
                f"recommender.name is {experiment.config.recommender.name!r}, which has no lists "
                f"to serve: launch/evaluate.py compares its {kind}"
            )
        self.name, self.limits, self.guidance = name, limits, guidance
        self._recommender = Recommender(experiment, name, guidance=guidance)
        self._catalogue = experiment.data.catalogue
        self.most_items = experiment.config.decoding.beams
        self.guided = True
        try:
            self._recommender.load_cf()
        except FileNotFoundError as error:
            self.guided, self._why_not = False, str(error)
        self._experiment, self._explained = experiment, itertools.count()
        # Devices that share a model wait for each other inside a program: started by two threads in
        # another order on each, they could wait for ever. Devices with a model each never wait.
        shared = experiment.mesh.size > smallest_batch(experiment.mesh, "prompts")
        self._devices = _COMMUNICATING if shared else contextlib.nullcontext()

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """What the lists depend on: provenance."""
        return self._recommender.inputs

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self._recommender)

    @cached_property
    def batch_sizes(self) -> list[int]:
        """Ascending: those that are compiled."""
        largest = self._experiment.config.inference.batch_size
        smallest = smallest_batch(self._experiment.mesh, "prompts")
        sizes = itertools.takewhile(
            lambda size: size < largest, (smallest * _GROWTH**n for n in itertools.count())
        )
        return [*sizes, largest]

    @cached_property
    def _shortest(self) -> list[str]:
        """A history with a prompt that is as short as any."""
        titles = self._catalogue.titles
        return [self._catalogue.item_ids[min(range(len(titles)), key=lambda i: len(titles[i]))]]

    @cached_property
    def _sample(self) -> list[list[str]]:
        """Histories of the data."""
        rows, ids = self._experiment.data.splits["test"], self._catalogue.item_ids
        spans = itertools.pairwise(rows.offsets[: _SAMPLE + 1].tolist())
        items = (rows.items[start : end - 1].tolist() for start, end in spans if end - start > 1)
        return [[ids[item] for item in history] for history in items]

    @cached_property
    def buckets(self) -> tuple[int, ...]:
        """Ascending: the padded lengths of prompts, such as the data's own have, and the most."""
        histories = [*self._sample, self._shortest]
        suited = self._recommender.sizes(histories, self.most_items).buckets
        shortest = self._recommender.sizes([self._shortest], self.most_items).buckets[0]
        room = -(-self._experiment.config.prompt.max_tokens // 8) * 8
        return (*sorted({size for size in suited if shortest <= size < room}), room)

    def warm_up(self) -> dict[int, float]:
        """Loads the weights and compiles all programs of lists and scores, most of explanations.

        Returns the seconds of a batch of each size, with the longest prompts.
        """
        everything, seconds_of = self._recommender.filter(), {}
        self._recommender.decoder  # noqa: B018 - loaded before the devices are taken
        for batch_size in self.batch_sizes:
            for bucket in self.buckets:
                # All lengths have the capacity of the longest, as in a search.
                sizes = BatchSizes(batch_size, tuple(sorted({bucket, self.buckets[-1]})))
                self._lists(0.0, [Row(self._shortest, everything)], sizes)
                self._scores(0.0, [Row(self._shortest, self._shortest)], sizes)
            begin = time.monotonic()
            self._lists(0.0, [Row(self._shortest, everything)], sizes)  # of the longest
            seconds_of[batch_size] = time.monotonic() - begin
        if self.explains:
            for history in (self._shortest, *self._sample[:1]):
                self._explain(0.0, Row(history, {"k": self.most_items}))
        return seconds_of

    def lists_after(
        self,
        histories: Sequence[Sequence[str]],
        k: int,
        guidance: float | None,
        filters: dict[str, Any],
    ) -> Admitted:
        """What to search for lists of at least k items; `filters` are those of Recommender.filter.

        Raises UserError for unknown items, or more than the limits.
        """
        if k > self.most_items:
            raise UserError(f"k is {k}: at most {self.most_items}, the beams of the search")
        self._check(histories)
        for name in ("allow", "deny"):
            self._check_number(name, len(filters.get(name) or ()), "items", self.limits.items)
        allowed = self._recommender.filter(**filters)
        group = Group(self, "recommend", self._weight(guidance))
        return group, [Row(history, allowed) for history in histories]

    def scores_of(
        self, history: Sequence[str], candidates: Sequence[str], guidance: float | None
    ) -> Admitted:
        """What to search for the scores of candidates. Raises as `lists_after`."""
        self._check([history])
        self._check_number("candidates", len(candidates), "items", self.limits.candidates)
        self._recommender.find(candidates, "candidates")
        group = Group(self, "score", self._weight(guidance), len(candidates))
        return group, [Row(history, candidates)]

    def explanation_of(
        self,
        history: Sequence[str],
        k: int,
        guidance: float | None,
        filters: dict[str, Any],
        **more: Any,
    ) -> Admitted:
        """What to explain; `more` are arguments of Explainer.explain. Raises as `lists_after`."""
        if not self.explains:
            raise UserError(
                "this service explains nothing: it needs a CF model and decoding.find=beams"
            )
        _, (row,) = self.lists_after([history], k, guidance, filters)
        for pair in more.get("compare", ()):
            self._recommender.find(pair, "compare")
        group = Group(self, "explain", self._weight(guidance), next(self._explained))
        return group, [row._replace(asked={"k": k, "filter": row.asked, **more})]

    @property
    def explains(self) -> bool:
        """Whether lists can be explained."""
        return self.guided and self._experiment.config.decoding.find == "beams"

    def run(self, group: Group, rows: list[Row]) -> list | np.ndarray:
        """The list of each row, or the scores of its candidates; several threads may ask."""
        if group.kind == "explain":
            return [self._explain(group.guidance, row) for row in rows]
        size = next(size for size in self.batch_sizes if size >= len(rows))
        sizes = BatchSizes(size, self.buckets)
        if group.kind == "score":
            return self._scores(group.guidance, rows, sizes)
        return self._lists(group.guidance, rows, sizes)

    def widths(self, group: Group, rows: list[Row]) -> list[int]:
        """The padded length of each row's prompt."""
        histories, asked = zip(*rows, strict=True)
        shown = None
        if group.kind == "score":
            shown = np.stack([self._recommender.find(names, "candidates") for names in asked])
        with self._devices:  # a prompt may show what the CF model makes of its history
            made = self._recommender.rows(histories, self._recommender.item_filter, shown)
        return np.array(self.buckets)[np.searchsorted(self.buckets, made.prompts.lengths)].tolist()

    def titles_like(self, text: str, most: int) -> list[tuple[str, str]]:
        """(id, title) of items whose title has a text, whatever the case; its beginning first."""
        text = text.casefold()
        at = [place for place, title in enumerate(self._folded_titles) if text in title]
        at.sort(key=lambda place: not self._folded_titles[place].startswith(text))
        columns = self._catalogue.item_ids, self._catalogue.titles
        return [(columns[0][place], columns[1][place]) for place in at[:most]]

    @cached_property
    def _folded_titles(self) -> list[str]:
        return [title.casefold() for title in self._catalogue.titles]

    def _lists(
        self,
        guidance: float,
        rows: list[Row],
        sizes: BatchSizes,
    ) -> list[list[Recommended]]:
        histories, filters = zip(*rows, strict=True)
        more: dict[str, Any] = {"filters": filters, "sizes": sizes}
        more["guidance"] = guidance if self.guided else None
        with self._devices:
            return self._recommender.recommend(histories, self.most_items, **more)

    def _explain(self, guidance: float, row: Row) -> Explanation:
        with self._devices:
            return self._explainer.explain(row.history, guidance=guidance, **row.asked)

    def _scores(self, guidance: float, rows: list[Row], sizes: BatchSizes) -> np.ndarray:
        histories, candidates = zip(*rows, strict=True)
        more: dict[str, Any] = {"most": self.limits.candidates, "sizes": sizes}
        more["guidance"] = guidance if self.guided else None
        with self._devices:
            return self._recommender.scores(histories, candidates, **more)

    def _weight(self, guidance: float | None) -> float:
        if guidance and not self.guided:
            raise UserError(f"guidance is {guidance}: {self._why_not}")
        return self.guidance if guidance is None else guidance

    def _check(self, histories: Sequence[Sequence[str]]) -> None:
        self._check_number("the request", len(histories), "histories", self.limits.most_histories)
        for number, history in enumerate(histories):
            what = f"history {number}"
            self._check_number(what, len(history), "items", self.limits.items)
            self._recommender.find(history, what)

    @staticmethod
    def _check_number(what: str, number: int, of: str, most: int) -> None:
        if number > most:
            raise UserError(f"{what} has {number} {of}: at most {most}")
