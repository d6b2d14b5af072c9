"""Fine-tuning the LLM with the soft next-token-prediction objective."""
