"""Dense views of what the method computes sparsely: to look at, for small catalogues.

Axes: core/__init__.py.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.collaborative_tokenizer import DENSE, project
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie


def token_distributions(
    logits_BxI: jax.Array, trie: ItemTrie, target_B: np.ndarray, vocab_size: int, beta: float = 1.0
) -> jax.Array:
    """p_cf at every token of each row's target title.

    Args:
      logits_BxI: CF logits.
      trie: token by token, from `ItemTrie.build`.
      target_B: int, each row's target item.
      vocab_size: V, above every token of the trie.

    Returns:
      float32 [B, T, V], T the tokens of the longest of these titles, the end token included:
      [b, t] is p_cf(. | first t tokens of the title of target_B[b]), zero after its end.
    """
    leaf_B = trie.leaf_of_item[target_B]
    length_B = trie.lengths_Q[leaf_B]
    # Token by token, the node of a prefix of t tokens is that of level t.
    node_BxT = trie.paths_QxK[leaf_B, : length_B.max()]
    inside_BxT = np.arange(node_BxT.shape[1]) < length_B[:, None]
    row_K, place_K = np.nonzero(inside_BxT)
    node_K, on_device = jnp.asarray(node_BxT[row_K, place_K]), DeviceTrie.of(trie)
    log_p_KxC = jax.jit(project)(logits_BxI, DENSE, row_K, node_K, on_device, beta)
    token_KxC = on_device.token[on_device.children(node_K)[0]]
    p_BxTxV = jnp.zeros((*node_BxT.shape, vocab_size))
    return p_BxTxV.at[row_K[:, None], place_K[:, None], token_KxC].add(jnp.exp(log_p_KxC))
