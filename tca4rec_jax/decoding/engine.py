"""Beam search for many rows: texts in batches of similar length, results by row.

Axes: core/__init__.py; here W are distinct widths.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tca4rec_jax.batching import bucket_lengths
from tca4rec_jax.core import Array
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.embedder import Embedder
from tca4rec_jax.decoding.grounding import TitleIndex
from tca4rec_jax.decoding.likelihood import scored_titles
from tca4rec_jax.decoding.results import Recommendations, ResultsFile
from tca4rec_jax.decoding.search_programs import (
    SearchProgram,
    TextBatch,
    Users,
    read_prefix,
    read_prompts,
    read_titles_batch,
    search_batch,
)
from tca4rec_jax.decoding.title_paths import TitlePaths, TitleScores
from tca4rec_jax.distributed import sharding
from tca4rec_jax.distributed.multihost import gather_to_host
from tca4rec_jax.distributed.sharded_search import put_items, put_trie, search_shards
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.projector import SoftTokens
from tca4rec_jax.ranges import Temperature, check
from tca4rec_jax.terminal import Progress

_LLM_ALONE = ScoreWeights()
_SMALLEST_BUCKET = 16  # tokens, of those that do not depend on the prompts of one call
# A model (on the mesh or not), and the sets of weights to search with.
SearchJob = tuple[Decoder, Sequence[ScoreWeights]]


@dataclass(frozen=True, eq=False)
class SearchRows:
    """The rows of a search.

    Attributes:
      prompts: int32 token ids of R rows.
      cf: row numbers int64 [B] -> CF vectors float [B, D], on the host or a device, for guidance.
      cf_items: the item side of these vectors; DENSE if they are the logits [B, I] themselves.
      allowed: row numbers int64 [B] -> bool [B, I], the items that may be recommended, as if the
        trie held no others. Pass the same to `Recommendations.items`.
      target_R: int, each row's target item, if the likelihood of its title is wanted.
      soft: (row numbers int64 [B], their padded length) -> what their placeholders carry.
      guided: whether the program has room for guidance although it may be 0, so that another weight
        compiles nothing new.
    """

    prompts: Ragged
    cf: Callable[[np.ndarray], Array] | None = None
    cf_items: CFItems = DENSE
    allowed: Callable[[np.ndarray], np.ndarray] | None = None
    target_R: np.ndarray | None = None
    soft: Callable[[np.ndarray, int], SoftTokens] | None = None
    guided: bool = False


class BatchSizes(NamedTuple):
    """The shapes that a search is compiled for."""

    batch_size: int
    buckets: tuple[int, ...]  # padded lengths of texts

    def rounded(self, longest: int) -> "BatchSizes":
        """Of a few sizes, so that calls with other prompts compile nothing new.

        Buckets are 16, 24, 32, 48, 64 .. up to `longest`, the room of any prompt.
        """
        largest = max(-(-longest // 8) * 8, *self.buckets)
        powers = (_SMALLEST_BUCKET << n for n in range(largest.bit_length()))
        sizes = [size for power in powers for size in (power, power * 3 // 2) if size < largest]
        at = np.searchsorted(sizes, self.buckets)
        return self._replace(buckets=tuple(sorted({(*sizes, largest)[one] for one in at})))


class BatchedSearch:
    """Runs beam search over many rows.

    All of one process share their compiled programs: other adapters, temperatures or guidance
    compile nothing new.
    """

    def __init__(
        self,
        trie: ItemTrie,
        config: SearchConfig,
        *,
        mesh: Mesh,
        batch_size: int = 16,
        buckets: Sequence[int] | int = 3,
    ):
        """Prepares an `ItemTrie.build`; raises UserError for a bad batch size, or no bucket.

        The mesh's axis 'data' shares the rows of a batch (batch_size divides over it), the others
        the model. buckets: padded lengths of the texts, or how many to derive from their lengths;
        reading prompts is compiled once for every length, the search for the longest.
        """
        sharding.check_batch_size(mesh, batch_size, "batch_size", "prompts")
        if (buckets < 1) if isinstance(buckets, int) else not buckets:
            raise UserError(f"need at least one bucket, got {buckets!r}")
        self.config, self.mesh, self.batch_size, self.buckets = config, mesh, batch_size, buckets
        self.host_trie, self.trie = trie, _trie_on_mesh(trie, config, mesh)
        self._on_mesh: WeakKeyDictionary[Decoder, tuple] = WeakKeyDictionary()
        self._titles: WeakKeyDictionary[Decoder, TitleIndex] = WeakKeyDictionary()
        self._items: list[tuple[CFItems, CFItems]] = [(DENSE, DENSE)]

    def sizes(self, lengths_R: np.ndarray) -> BatchSizes:
        """What suits prompts of these lengths: no batch that is mostly filler.

        The batch is the smallest that holds all prompts, of 1, 2, 4 .. times as many rows as
        devices share it, or the search's own.
        """
        parts = sharding.smallest_batch(self.mesh, "prompts")
        parts <<= max(-(-len(lengths_R) // parts) - 1, 0).bit_length()
        given = self.buckets
        buckets = bucket_lengths(lengths_R, given).tolist() if isinstance(given, int) else given
        return BatchSizes(min(parts, self.batch_size), tuple(buckets))

    def of_sizes(self, sizes: BatchSizes) -> "BatchedSearch":
        """The same search, compiled for other shapes."""
        other = copy.copy(self)
        other.batch_size, other.buckets = sizes
        return other

    def of_config(self, config: SearchConfig) -> "BatchedSearch":
        """The same search by other rules; for grounding the catalogue is read once for both."""
        other = copy.copy(self)
        other.config = config
        other.trie = _trie_on_mesh(self.host_trie, config, self.mesh)
        other._items = [(DENSE, DENSE)]  # as many as this trie has
        return other

    def put(self, decoder: Decoder) -> tuple[nnx.GraphDef, nnx.State]:
        """A model's graph, and its state on the mesh; once for each, so a model must not change."""
        if decoder not in self._on_mesh:
            graph, state = nnx.split(decoder)
            shardings = sharding.tree_shardings(self.mesh, decoder.config, state)
            self._on_mesh[decoder] = graph, sharding.put(state, shardings)
        return self._on_mesh[decoder]

    def put_items(self, items: CFItems) -> CFItems:
        """CF items on the mesh; once as long as calls have the same, which must not change."""
        given, on_mesh = self._items[0]
        if given is not items:
            on_mesh = put_items(self.mesh, items, self.trie)
            self._items[0] = items, on_mesh
        return on_mesh

    def titles(self, decoder: Decoder) -> TitleIndex | None:
        """The catalogue as a model reads it, for grounding; made once for each model."""
        if self.config.find == "grounding" and decoder not in self._titles:
            embedder = Embedder(nnx.merge(*self.put(decoder)), self.mesh, "last", self.batch_size)
            index = TitleIndex.of(self.host_trie, embedder)
            self._titles[decoder] = sharding.put(index, sharding.replicated(self.mesh))
        return self._titles.get(decoder)

    def recommend(
        self,
        decoder: Decoder,
        rows: SearchRows,
        weights: ScoreWeights = _LLM_ALONE,
        *,
        progress: str | None = "Recommending",
    ) -> Recommendations:
        """The best titles for every row: `sweep` of one model with one set of weights."""
        ((found,),) = self.sweep([(decoder, [weights])], rows, progress=progress)
        return found

    def sweep(
        self,
        jobs: Sequence[SearchJob],
        rows: SearchRows,
        *,
        frozen_prefix: int = 0,
        temperatures: Sequence[float] = (1.0,),
        progress: str | None = "Recommending",
        file: ResultsFile | None = None,
        after_batch: Callable[[], object] = lambda: None,
    ) -> list[list[Recommendations]]:
        """The best titles for every row, by each model with each of its sets of weights.

        A model reads the prompts once for all of its weights, the frozen prefix once for all.

        Args:
          frozen_prefix: how many layers, from the first, are the same in all models.
          temperatures: of the targets' likelihood under the LLM alone, if there are targets.
          progress: name of the progress that is shown; None shows none.
          file: where to resume from and, from time to time, save the results so far.
          after_batch: called when all models have done a batch; what it raises ends the sweep.

        Returns for each job the results by each of its weights, all rows in every process.

        Raises UserError for a prompt that is empty, longer than the largest bucket, or that leaves
        the model no room for a title; guidance without CF vectors; a temperature out of range;
        FloatingPointError, naming a row, for scores that are not finite.
        """
        temperatures = () if rows.target_R is None else temperatures
        one_pass = _Pass(self, jobs, rows, temperatures)
        num_rows, sizes = len(rows.prompts), (self.config.beams, len(temperatures))
        results = [[Recommendations.empty(num_rows, *sizes) for _ in sets] for _, sets in jobs]
        done_R = np.zeros(num_rows, bool) if file is None else file.read(results)
        with Progress(progress, num_rows, "rows", int(done_R.sum())) as shown:
            # Fetched after the next was dispatched: the host works while the devices search.
            dispatched = itertools.chain(one_pass.dispatch(done_R, frozen_prefix), [()])
            for (rows_B, number, found), _ in itertools.pairwise(dispatched):
                arrays = map(jax.tree.leaves, (results[number], gather_to_host(found)))
                for array, values in zip(*arrays, strict=True):
                    array[rows_B] = values[: len(rows_B)]
                    _check_scores(array[rows_B], rows_B)
                if number == len(jobs) - 1:
                    done_R[rows_B] = True
                    if file is not None:
                        file.write(results, done_R)
                    shown.advance(len(rows_B))
                    after_batch()
        return results

    def read_titles(
        self, decoder: Decoder, rows: SearchRows, paths: TitlePaths, temperature: float
    ) -> TitleScores:
        """What the LLM says along the same titles after every prompt [R, ..], on the host.

        Of a search that walks the compressed trie, as `paths` do. Raises as `sweep`.
        """
        slots = paths.pool_slots(self.trie)

        def read(state, prompts, users, cf_items, trie, weights, titles, *, program):
            args = state, prompts, trie, weights.temperature, paths
            return read_titles_batch(*args, program=program, slots=slots)

        weights, num_rows = _LLM_ALONE._replace(temperature=temperature), len(rows.prompts)
        one_pass = _Pass(self, [(decoder, [weights])], rows, ())
        parts, order = [], []
        for rows_B, _, found in one_pass.dispatch(np.zeros(num_rows, bool), 0, read):
            ((root, inner, _),) = gather_to_host(found)
            _check_scores(root.child_BxMxC[: len(rows_B), 0], rows_B)
            arrays, tree = jax.tree.flatten(TitleScores(root, inner))
            parts.append([array[: len(rows_B)] for array in arrays])
            order.append(rows_B)
        back_R = np.argsort(np.concatenate(order))
        joined = [np.concatenate(arrays)[back_R] for arrays in zip(*parts, strict=True)]
        return jax.tree.unflatten(tree, joined)


class _Pass:
    """One pass of models over rows, which read texts: the prompt, and the target's title."""

    def __init__(
        self,
        search: BatchedSearch,
        jobs: Sequence[SearchJob],
        rows: SearchRows,
        temperatures: Sequence[float],
    ):
        """Raises UserError as `BatchedSearch.sweep`."""
        self.search, self.jobs, self.rows = search, jobs, rows
        self.temperatures = np.array(temperatures, np.float32)
        guidance = max(one.check().guidance for _, sets in jobs for one in sets)
        self.guided = rows.guided or guidance > 0
        self.texts, self.scored = rows.prompts, None
        if rows.target_R is not None:
            titles, self.scored = scored_titles(search.host_trie, rows.target_R, search.config)
            self.texts = rows.prompts.followed_by(titles)
        prompt_R, text_R, given = rows.prompts.lengths, self.texts.lengths, search.buckets
        self.buckets = bucket_lengths(text_R, given) if isinstance(given, int) else np.sort(given)
        if self.guided and rows.cf is None:
            raise UserError(f"guidance is {guidance}, but there are no CF logits for it")
        for one in temperatures:
            check("temperature", one, Temperature)
        positions = min(decoder.config.max_positions for decoder, _ in jobs)
        largest_R = self.buckets.max(initial=0) - (text_R - prompt_R)
        limit_R = np.minimum(positions - search.config.most_reads(search.trie), largest_R)
        bad_R = (prompt_R < 1) | (prompt_R > limit_R)
        if bad_R.any():
            row = int(np.argmax(bad_R))
            raise UserError(
                f"row {row}: a prompt of {prompt_R[row]} tokens, expected 1..{limit_R[row]} (the "
                "largest bucket, and room for a title in the positions): lower prompt.max_tokens"
            )

    def dispatch(
        self, done_R: np.ndarray, frozen_prefix: int, find: Callable = search_batch
    ) -> Iterator[tuple]:
        """(rows int64 [B], number of the job, its results on the devices) of the batches to do.

        The longest texts come first. Results are padded to the batch size: for each of the job's
        weights what `find`, called as `search_batch`, gives, and the likelihoods.
        """
        search, mesh, lengths_R = self.search, self.search.mesh, self.texts.lengths
        capacity = int(self.buckets.max(initial=0))
        cf_items = search.put_items(self.rows.cf_items if self.guided else DENSE)
        models = []
        for decoder, sets in self.jobs:
            graph, state = search.put(decoder)
            program, weights = SearchProgram(mesh, graph, search.config), list(sets)
            weights = jax.tree.map(np.float32, weights)
            models.append((state, program, weights, search.titles(decoder)))
        order_R = np.argsort(-lengths_R, kind="stable")
        for start in range(0, len(order_R), search.batch_size):
            rows_B = order_R[start : start + search.batch_size]
            if done_R[rows_B].all():
                continue
            width = self.buckets[np.searchsorted(self.buckets, lengths_R[rows_B[0]])]
            texts, users = self._batch(rows_B, int(width))
            prefix, (state, program, *_) = None, models[0]
            if frozen_prefix and len(models) > 1:
                prefix = read_prefix(state, texts.tokens_BxS, program=program, layers=frozen_prefix)
            for number, (state, program, weights, titles) in enumerate(models):
                args = state, texts, prefix, search.trie, self.temperatures
                prompts, nll_BxT = read_prompts(*args, program=program, capacity=capacity)
                after = state, prompts, users, cf_items, search.trie
                found = [(*find(*after, one, titles, program=program), nll_BxT) for one in weights]
                del prompts, after  # so that no more than two prompts' keys and values are held
                yield rows_B, number, found

    def _batch(self, rows_B: np.ndarray, width: int) -> tuple[TextBatch, Users]:
        """A batch on the devices; one that is not full repeats its rows."""
        search, rows = self.search, self.rows
        here_B = sharding.local_rows(search.mesh, search.batch_size, "prompts")
        padded_B = np.resize(rows_B, search.batch_size)[here_B]
        texts = TextBatch(
            self.texts.pad(padded_B, width, 0).astype(np.int32),
            rows.prompts.lengths[padded_B].astype(np.int32),
            jax.tree.map(lambda field: field[padded_B], self.scored),
            rows.soft and rows.soft(padded_B, width),
        )
        cf = rows.cf(padded_B).astype(np.float32) if rows.cf and self.guided else None
        users = Users(cf, rows.allowed and rows.allowed(padded_B))
        return sharding.shard_batch(search.mesh, (texts, users), "prompts")


def _trie_on_mesh(trie: ItemTrie, config: SearchConfig, mesh: Mesh) -> DeviceTrie:
    item_shards = 1 if config.find == "grounding" else search_shards(mesh)
    return put_trie(mesh, config.device_trie(trie, item_shards))


def _check_scores(values_BxX: np.ndarray, rows_B: np.ndarray) -> None:
    broken_B = np.isnan(values_BxX).any(axis=1)
    if broken_B.any():
        raise FloatingPointError(
            f"row {rows_B[np.argmax(broken_B)]}: the LLM's scores are not finite: its weights hold "
            "NaN or infinities, or are too large for llm.dtype, or a title has a token that is not "
            "in its vocabulary"
        )
