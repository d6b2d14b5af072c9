"""Exact scores of given items, to re-rank the candidates of another system.

Axis letters: B rows of a batch, M beams, I items.
"""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
from tca4rec_jax.decoding.filters import membership
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.decoder import Decoder


def score_candidates(
    trie: ItemTrie,
    mask: str,
    decoder: Decoder,
    rows: SearchRows,
    candidates: Ragged,
    weights: ScoreWeights,
    *,
    mesh: Mesh,
    batch_size: int = 16,
) -> Ragged:
    """Exact scores of given items after each prompt, as the whole catalogue is scored.

    The search is confined to the candidates, with a beam for each: none is ever dropped, and the
    prefixes that their titles share are computed once.

    Args:
      mask: as in SearchConfig.
      rows: prompts and CF vectors; `allowed` is not used.
      candidates: int items of each row, at least one; items that share a title share a score.

    Returns:
      float32 Ragged aligned with `candidates`.

    Raises:
      UserError: as BatchedSearch; a row without candidates or with an item outside the catalogue.
    """
    if len(candidates) != len(rows.prompts):
        raise ValueError(f"{len(candidates)} rows of candidates for {len(rows.prompts)} prompts")
    if (candidates.lengths == 0).any():
        raise UserError(f"row {int(np.argmin(candidates.lengths))} has no candidates")
    outside = (candidates.values < 0) | (candidates.values >= trie.num_items)
    if outside.any():
        at = int(np.argmax(outside))
        raise UserError(
            f"row {candidates.row_of(at)}: candidate {candidates.values[at]} is not an item "
            f"(0..{trie.num_items - 1})"
        )

    def among_candidates(rows_B: np.ndarray) -> np.ndarray:
        return membership(candidates.take(rows_B), trie.num_items)

    config = SearchConfig(int(candidates.lengths.max()), mask, "exact", renormalise=False)
    search = BatchedSearch(trie, config, mesh=mesh, batch_size=batch_size)
    rows = dataclasses.replace(rows, allowed=among_candidates)
    found = search.recommend(decoder, rows, weights, progress=None)
    row_of = np.repeat(np.arange(len(candidates)), candidates.lengths)
    leaf_of = trie.leaf_of_item[candidates.values]
    scores = np.empty(leaf_of.size, np.float32)
    for start in range(0, leaf_of.size, 1 << 20):  # bounds [candidates, beams]
        part = slice(start, start + (1 << 20))
        beam = np.argmax(found.leaves_RxM[row_of[part]] == leaf_of[part, None], axis=1)
        scores[part] = found.scores_RxM[row_of[part], beam]
    return Ragged(scores, candidates.offsets)
