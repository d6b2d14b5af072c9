"""Grids of experiments: cells, the lines of results.jsonl, what is made of them."""
