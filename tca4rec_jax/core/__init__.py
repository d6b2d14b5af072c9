"""The method: trie, Collaborative Tokenizer, objective."""
