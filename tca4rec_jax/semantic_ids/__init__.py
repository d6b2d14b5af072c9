"""Semantic ids: every item a short sequence of tokens whose first ones it shares with its like.

An id is the text of its tokens, as '<a_183><b_70>'. `ids` reads and writes them, the other modules
make them of item embeddings: a quantiser, and a policy for items that get the same codes.
"""
