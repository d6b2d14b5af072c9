"""Generation of catalogue items: beam search over the item trie."""
