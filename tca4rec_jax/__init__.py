"""Token-level Collaborative Alignment for LLM-based generative recommendation, in JAX/Flax."""
