"""Most popular: every user is given the items by their number of interactions.

The baseline any recommender must beat. Its CF logit is the logarithm of an item's smoothed share of
the interactions, so a softmax at temperature 1 gives the shares back.

Axis letters: I items.
"""

import numpy as np

from tca4rec_jax.data.sequences import ItemSequences


def popularity_logits(sequences: ItemSequences, num_items: int) -> np.ndarray:
    """log((count + 1) / sum(count + 1)) of every item, float32 [I].

    One is added to each count so that an item never seen keeps a finite logit.

    Raises:
      ValueError: an item index outside 0..num_items-1.
    """
    if len(sequences.items) and sequences.items.max() >= num_items:
        raise ValueError(
            f"item index {sequences.items.max()} is outside the catalogue of {num_items} items"
        )
    count_I = np.bincount(sequences.items, minlength=num_items) + 1.0
    return np.log(count_I / count_I.sum()).astype(np.float32)
