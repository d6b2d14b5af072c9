"""CF logits for the soft labels alone: of the few items that a row may get next.

A CF model whose scores are no log-probabilities (EASE) leaves most of its softmax to the items that
it knows nothing of, and one that was trained on next items still expects those of the history.

Axis letters: m events, K kept items, n items of the histories of all events.
"""

import numpy as np

from tca4rec_jax.cf.logits_store import multiply_out
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import ItemSequences

NEVER = np.float32(-60_000)
"""The logit of an item without a share, finite in every dtype of a store.

exp(NEVER / beta) is 0 in float32 up to a beta of 500.
"""


def label_logits(
    vectors: LazyRows, items: CFItems, sequences: ItemSequences, count: int
) -> LazyRows:
    """The logits of `count` items of each event, of the others NEVER: float32 [E, I].

    They are the event's target and the highest of those that are not in its history. `vectors` are
    what scoring.user_vectors gives for positions of `sequences`.
    """
    table_IxD, bias_I = (None if one is None else np.asarray(one) for one in items)
    num_items = vectors.columns if table_IxD is None else len(table_IxD)
    last = min(count, num_items) - 1

    def of_events(position_m: np.ndarray) -> np.ndarray:
        logits_mxI = np.array(multiply_out(vectors.function(position_m), table_IxD, bias_I))
        event_m, target_m = np.arange(len(position_m)), sequences.items[position_m]
        own_m = logits_mxI[event_m, target_m]
        logits_mxI[_histories(sequences, position_m)] = NEVER
        logits_mxI[event_m, target_m] = np.inf
        kept_mxK = np.argpartition(-logits_mxI, last, axis=1)[:, : last + 1]
        found_mxI = np.full_like(logits_mxI, NEVER)
        np.put_along_axis(found_mxI, kept_mxK, np.take_along_axis(logits_mxI, kept_mxK, 1), 1)
        found_mxI[event_m, target_m] = own_m
        return found_mxI

    return LazyRows(of_events, vectors.source, num_items)


def _histories(sequences: ItemSequences, position_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(event, item) of every item before the events' positions in their rows, int64 [n] each."""
    first_m = sequences.offsets[sequences.row_of(position_m)]
    length_m = position_m - first_m
    event_n = np.repeat(np.arange(len(position_m)), length_m)
    place_n = np.arange(len(event_n)) - (np.cumsum(length_m) - length_m)[event_n]
    return event_n, sequences.items[first_m[event_n] + place_n]
