"""Interactions, catalogue, prompts and batches: everything that is read before a model runs."""
