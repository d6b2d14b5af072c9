"""The decoder LLM: architecture, weights, adapters, tokenizer."""
