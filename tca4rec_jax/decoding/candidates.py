"""Exact scores of given items, to re-rank the candidates of another system.

Axis letters: B rows of a batch, M beams, I items.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch
from tca4rec_jax.llm.decoder import Decoder


def score_candidates(
    trie: ItemTrie,
    config: SearchConfig,
    decoder: Decoder,
    prompts: Ragged,
    candidates: Ragged,
    weights: ScoreWeights,
    cf_logits: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    mesh: Mesh,
    batch_size: int = 16,
    progress: str | None = "Scoring",
) -> Ragged:
    """Exact scores of given items after each prompt, to re-rank another system's candidates.

    The search is confined to the candidates, with a beam for each, so none is ever dropped and what
    their titles share is computed once; nothing is renormalised: the scores are those of the whole
    catalogue, as `BatchedSearch.recommend` gives them.

    Args:
      trie, decoder, prompts, weights, cf_logits, mesh, batch_size: as for BatchedSearch.
      config: its score is used; beams follow from the candidates.
      candidates: items of each row, at least one; items that share a title share a score.

    Returns:
      float32 Ragged aligned with `candidates`.

    Raises:
      ValueError: as BatchedSearch; a row without candidates or with an item outside the catalogue.
    """
    if len(candidates) != len(prompts):
        raise ValueError(f"{len(candidates)} rows of candidates for {len(prompts)} prompts")
    if (candidates.lengths == 0).any():
        raise ValueError(f"row {int(np.argmin(candidates.lengths))} has no candidates")
    outside = (candidates.values < 0) | (candidates.values >= trie.num_items)
    if outside.any():
        at = int(np.argmax(outside))
        row = int(np.searchsorted(candidates.offsets, at, side="right")) - 1
        raise ValueError(
            f"row {row}: candidate {candidates.values[at]} is not an item (0..{trie.num_items - 1})"
        )
    most = int(candidates.lengths.max())
    config = dataclasses.replace(config, beams=most, rules="exact")
    search = BatchedSearch(
        trie, config, mesh=mesh, batch_size=batch_size, buckets=3, renormalise=False
    )

    def among_candidates(rows_B: np.ndarray) -> np.ndarray:
        allowed_BxI = np.zeros((len(rows_B), trie.num_items), bool)
        chosen = candidates.take(rows_B)
        allowed_BxI[np.repeat(np.arange(len(rows_B)), chosen.lengths), chosen.values] = True
        return allowed_BxI

    found = search.recommend(
        decoder, prompts, weights, cf_logits, allowed=among_candidates, progress=progress
    )
    row_of = np.repeat(np.arange(len(candidates)), candidates.lengths)
    leaf_of = trie.leaf_of_item[candidates.values]
    scores = np.empty(leaf_of.size, np.float32)
    for start in range(0, leaf_of.size, 1 << 20):  # bounds [candidates, beams]
        part = slice(start, start + (1 << 20))
        place = np.argmax(found.leaves_RxM[row_of[part]] == leaf_of[part, None], axis=1)
        scores[part] = found.scores_RxM[row_of[part], place]
    return Ragged(scores, candidates.offsets)
