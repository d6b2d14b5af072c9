"""The method: trie, decisions, Collaborative Tokenizer, objective. Read these files in turn;
trie_nodes.py makes the arrays of the trie.

Axes of the whole project, as suffixes of names (docs/notation.md):

  B rows of a batch        S tokens of a sequence     T supervised positions of a row
  P supervised titles      K decisions                C children of a trie node
  N trie nodes             Q leaves (distinct titles) I items
  U choice tokens          F tokens of all edges      V vocabulary
  D width of a vector      L layers                   M beams
  E tokens of an edge      X candidates of a step     R rows of a data set
"""

import jax
import numpy as np

Array = np.ndarray | jax.Array  # of the host, or traced
