"""Collaborative-filtering models and the store of their item logits."""
