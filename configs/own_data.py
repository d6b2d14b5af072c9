"""Your own tables and SmolLM2-135M on a few CPU cores: copy this file, change the first lines.

    C=configs/own_data.py W=runs/mine, then the README's "The steps one by one".

What users there are, what they chose and when: docs/data.md says which tables and columns will do.
"""

from tca4rec_jax.config import apply_argument, movielens_config


def get_config(arg=""):
    config = movielens_config()
    config.data.source = "files"
    config.data.interactions = "interactions.csv"  # user, item, timestamp
    config.data.catalogue = "items.csv"  # item, title
    # config.data.user_column = "customer"  # if a column has another name
    # what the LLM reads first, and where the history and the target stand
    config.prompt.templates = ("What one person chose, in order:\n{history}\n{target}",)
    # As by default, not as the published numbers of MovieLens were made: an item that a user has is
    # recommended again only if the training data have such repeats.
    config.prompt.bos, config.decoding.exclude_history = "added", None
    config.training.buckets = ()  # padded lengths: chosen from the data
    config.training.batch_size = 4
    config.training.steps = 500
    config.objective.alpha = 0.9
    config.optimizer.learning_rate = 1e-3
    return apply_argument(config, arg)
