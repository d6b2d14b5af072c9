"""Beam search for many rows: prompts in batches of similar length, results by row.

Axis letters: R rows, B rows of a batch, S prompt tokens, M beams, I items, K places of a list,
U sets of score weights, T temperatures.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig, prepare_trie
from tca4rec_jax.decoding.likelihood import TargetTitles, target_titles
from tca4rec_jax.decoding.recommendations import Found, Recommendations, Sweep, SweepFile
from tca4rec_jax.decoding.search_programs import lower_layers, read_prompts, search_batch
from tca4rec_jax.distributed.multihost import gather_to_host
from tca4rec_jax.distributed.sharding import (
    check_batch_size,
    local_rows,
    put,
    replicate,
    shard_batch,
    tree_shardings,
)
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.decoder import Decoder

_ROUND_BUCKETS_TO = 8
_LLM_ALONE = ScoreWeights()


class Contender(NamedTuple):
    """A model that searches, and the weights that it does so with."""

    decoder: Decoder
    weights: Sequence[ScoreWeights]


class BatchedSearch:
    """Runs beam search over many rows.

    All of one process share their compiled programs: another set of adapters, temperature or
    guidance (where there are CF logits) compiles nothing new, and the search is compiled once for
    prompts of every length.
    """

    def __init__(
        self,
        trie: ItemTrie,
        config: SearchConfig,
        *,
        mesh: Mesh,
        batch_size: int = 16,
        buckets: Sequence[int] | int = 3,
        renormalise: bool = True,
    ):
        """Prepares the trie for the search.

        Args:
          trie: token by token, from `ItemTrie.build`.
          config: what is searched for.
          mesh: its axis 'data' shares the rows of a batch, the others the model.
          batch_size: rows per call, a multiple of the devices along 'data'.
          buckets: padded prompt lengths, or how many to derive from the prompts' lengths. Reading
            prompts is compiled once for every length, the search for the longest.
          renormalise: whether scores are those of a catalogue of the allowed items alone.

        Raises:
          UserError: a batch that does not divide over the mesh, or no bucket.
        """
        check_batch_size(mesh, batch_size, "batch_size", "prompts")
        if (isinstance(buckets, int) and buckets < 1) or (
            not isinstance(buckets, int) and not buckets
        ):
            raise UserError(f"need at least one bucket, got {buckets!r}")
        self._config, self._mesh, self._renormalise = config, mesh, renormalise
        self._batch_size, self._buckets = batch_size, buckets
        self._scored = trie if config.vocabulary else trie.compress()
        self._trie = replicate(mesh, prepare_trie(trie, config))

    def recommend(
        self,
        decoder: Decoder,
        prompts: Ragged,
        weights: ScoreWeights = _LLM_ALONE,
        cf_logits: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        allowed: Callable[[np.ndarray], np.ndarray] | None = None,
        progress: str | None = "Recommending",
    ) -> Recommendations:
        """The best titles for every prompt: `sweep` of one model with one set of weights."""
        contenders = [Contender(decoder, [weights])]
        found = self.sweep(contenders, prompts, cf_logits, allowed=allowed, progress=progress)
        return found[0].recommendations[0]

    def sweep(
        self,
        contenders: Sequence[Contender],
        prompts: Ragged,
        cf_logits: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        shared_layers: int = 0,
        allowed: Callable[[np.ndarray], np.ndarray] | None = None,
        target_leaf_R: np.ndarray | None = None,
        temperatures: Sequence[float] = (1.0,),
        progress: str | None = "Recommending",
        file: SweepFile | None = None,
    ) -> list[Sweep]:
        """The best titles for every prompt, found with each model and each of its weights.

        A model runs the prompts once for all of its weights, and what models share once for all.

        Args:
          contenders: models, on the mesh or not, and for each guidance, temperature and length
            penalty, sets of them.
          prompts: int32 token ids of R rows.
          cf_logits: row numbers int64 [B] -> the CF logits of all items, float [B, I]; required for
            guidance > 0. If no model has guidance, none runs a program with guidance in it.
          shared_layers: how many layers, from the first, are the same in all models.
          allowed: row numbers int64 [B] -> bool [B, I], the items that may be recommended (the
            user's history left out, a part of the catalogue): as if the trie held no others.
            Another program is compiled for it. Pass the same to `Recommendations.items`.
          target_leaf_R: int, leaf of the trie of each row's target: its likelihood under the LLM
            alone is wanted too, at each of the temperatures. It is read behind the prompt.
          temperatures: each above 0.
          progress: label of the progress bar, None for none.
          file: keeps what is found on the way; rows that it holds are not run again.

        Returns:
          Of each contender what it found.

        Raises:
          UserError: a prompt that is empty, longer than the largest bucket or too long for a
            model, guidance without CF logits, or a temperature that is not above 0.
        """
        guidance = max(one.check().guidance for _, weights in contenders for one in weights)
        if guidance > 0 and cf_logits is None:
            raise UserError(f"guidance is {guidance}, but there are no CF logits for it")
        if min(temperatures) <= 0:
            raise UserError(f"temperatures must be above 0, got {tuple(temperatures)}")
        num_rows = len(prompts)
        texts, targets = prompts, None
        if target_leaf_R is not None:
            read, targets = target_titles(self._scored, target_leaf_R)
            texts = prompts.followed_by(read)
        searches, found = [], []
        room = max(self._bucket_lengths(texts.lengths), default=0)
        for decoder, weights in contenders:
            self._check_lengths(prompts.lengths, texts.lengths, decoder)
            searches.append(self._search(decoder, weights, temperatures, room))
            shape = (num_rows, len(weights), self._config.beams)
            found.append(Found.of_nothing(shape, len(temperatures)))
        lower = None
        if shared_layers and len(contenders) > 1:
            lower = self._lower_program(contenders[0].decoder, shared_layers)
        done_R = np.zeros(num_rows, bool) if file is None else file.read(found)
        bar = tqdm(
            total=num_rows, desc=progress, unit="row", disable=progress is None,
            initial=int(done_R.sum()),
        )  # fmt: skip

        def store(rows_B: np.ndarray, number: int, results) -> None:
            found[number].put(rows_B, *gather_to_host(results))
            if number == len(found) - 1:
                done_R[rows_B] = True
                if file is not None:
                    file.write(found, done_R)
                bar.update(len(rows_B))

        pending = None
        with bar:
            for rows_B, width in self._batches(texts.lengths):
                if done_R[rows_B].all():
                    continue
                padded_B = np.resize(rows_B, self._batch_size)  # the last batch repeats its rows
                padded_B = padded_B[local_rows(self._mesh, self._batch_size, "prompts")]
                cf_BxI = None
                if guidance > 0:
                    cf_BxI = np.asarray(cf_logits(padded_B), np.float32)
                batch = (
                    texts.pad(padded_B, width, 0).astype(np.int32),
                    prompts.lengths[padded_B].astype(np.int32),
                    cf_BxI,
                    None if allowed is None else np.asarray(allowed(padded_B), bool),
                    targets and TargetTitles(*(field[padded_B] for field in targets)),
                )
                tokens, *rest = shard_batch(self._mesh, batch, "prompts")
                below = lower and lower(tokens)
                for number, search in enumerate(searches):
                    results = search(below, tokens, *rest)
                    # Fetched after the next were dispatched: the host works meanwhile, and no more
                    # than two prompts' keys and values are held.
                    if pending is not None:
                        store(*pending)
                    pending = rows_B, number, results
            if pending is not None:
                store(*pending)
        return [one.sweep(with_nll=targets is not None) for one in found]

    def _search(self, decoder: Decoder, weights: Sequence[ScoreWeights], temperatures, room: int):
        """What a model does with a batch: ([(leaves, scores) of each of its weights], NLL)."""
        graph, state = self._split(decoder)
        same = {"mesh": self._mesh, "graph": graph, "config": self._config}

        def search(below, tokens, lengths, cf, allowed, target):
            prompt, nll = read_prompts(
                state, below, tokens, lengths, target, self._trie,
                np.array(temperatures, np.float32), room=room, **same,
            )  # fmt: skip
            args = state, prompt, lengths, cf, allowed, self._trie
            scalars = [ScoreWeights(*map(np.float32, one)) for one in weights]
            return [
                search_batch(*args, one, renormalise=self._renormalise, **same) for one in scalars
            ], nll

        return search

    def _lower_program(self, decoder: Decoder, layers: int):
        """`lower_layers` of a batch's tokens."""
        graph, state = self._split(decoder)
        return partial(lower_layers, state, mesh=self._mesh, graph=graph, layers=layers)

    def _split(self, decoder: Decoder) -> tuple[nnx.GraphDef, nnx.State]:
        """Its graph, and its state where it belongs on the mesh."""
        graph, state = nnx.split(decoder)
        return graph, put(state, tree_shardings(self._mesh, decoder.config, state))

    def _check_lengths(self, prompt_R: np.ndarray, text_R: np.ndarray, decoder: Decoder) -> None:
        """Lengths of the prompts, and of what is read: these and what follows them."""
        limit_R = np.full_like(
            prompt_R, decoder.config.max_positions - self._trie.sizes.longest_path
        )
        if not isinstance(self._buckets, int):
            limit_R = np.minimum(limit_R, max(self._buckets) - (text_R - prompt_R))
        bad_R = (prompt_R < 1) | (prompt_R > limit_R)
        if bad_R.any():
            row = int(np.argmax(bad_R))
            raise UserError(
                f"row {row}: a prompt of {prompt_R[row]} tokens, expected 1..{limit_R[row]} (the "
                "largest bucket, and room for a title in the positions of the model): lower "
                "prompt.max_tokens"
            )

    def _batches(self, lengths_R: np.ndarray):
        """(rows int64 [at most batch size], padded length) of every batch, the longest first."""
        buckets = self._bucket_lengths(lengths_R)
        rows_R = np.argsort(-lengths_R, kind="stable")
        for start in range(0, len(rows_R), self._batch_size):
            rows = rows_R[start : start + self._batch_size]
            yield rows, int(buckets[np.searchsorted(buckets, lengths_R[rows[0]])])

    def _bucket_lengths(self, lengths_R: np.ndarray) -> np.ndarray:
        if not isinstance(self._buckets, int):
            return np.sort(np.asarray(self._buckets))
        return bucket_lengths(lengths_R, self._buckets) if lengths_R.size else lengths_R


def bucket_lengths(lengths_R: np.ndarray, count: int) -> np.ndarray:
    """At most `count` padded lengths, multiples of eight, with the least padding in all."""
    width_V, rows_V = np.unique(-(-lengths_R // _ROUND_BUCKETS_TO), return_counts=True)
    below_V = np.concatenate([[0], np.cumsum(rows_V)])
    # cost[v]: tokens of the rows up to width v in the buckets so far, v being the last of them.
    cost_V, choices = width_V * below_V[1:], []
    for _ in range(min(count, width_V.size) - 1):
        # [v, u]: u is the bucket before v; -1 (none) is the last column.
        rows_VxV = np.maximum(below_V[1:, None] - below_V[None, 1:], 0)
        with_VxV = np.where(
            np.tri(width_V.size, k=-1, dtype=bool), cost_V + width_V[:, None] * rows_VxV, np.inf
        )
        with_VxV = np.concatenate([with_VxV, (width_V * below_V[1:])[:, None]], axis=1)
        choices.append(np.argmin(with_VxV, axis=1))
        cost_V = np.min(with_VxV, axis=1)
    buckets, last = [width_V.size - 1], width_V.size - 1
    for before_V in reversed(choices):
        last = int(before_V[last])
        if last == width_V.size:
            break
        buckets.append(last)
    return np.sort(width_V[buckets] * _ROUND_BUCKETS_TO).astype(np.int64)
