"""MovieLens-100K and SmolLM2-135M on two CPU cores: `bash launch/quickstart.sh`."""

from tca4rec_jax.config import apply_argument, movielens_config


def get_config(arg=""):
    config = movielens_config()
    config.lora.first_layer = 20  # of 30: a step takes 0.6 of the time
    config.training.cache_hidden_states = True  # of the 20 layers below, for all trainings
    config.objective.alpha = 0.9
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 10
    config.training.batch_size = 2
    config.training.steps = 250
    config.training.checkpoint_every = 50
    config.evaluation.rows = 700
    config.inference.batch_size = 64  # calls of a search hold more tokens, and less padding
    config.inference.buckets = 3
    config.evaluation.variants = (
        ("LLM, untrained", "", 0.0),
        ("LLM, alpha = 0", "plain", 0.0),
        ("LLM, alpha > 0", "aligned", 0.0),
        ("LLM, alpha > 0, guided", "aligned", 1.0),
    )
    config.evaluation.differences = (
        ("CF model", "Most popular"),
        ("LLM, alpha = 0", "LLM, untrained"),
        ("LLM, alpha > 0", "LLM, untrained"),
        ("LLM, alpha > 0", "LLM, alpha = 0"),
        ("LLM, alpha > 0, guided", "LLM, alpha > 0"),
        ("LLM, alpha > 0, guided", "CF model"),
    )
    return apply_argument(config, arg)
