"""MovieLens-100K and SmolLM2-135M on two CPU cores: `bash launch/quickstart.sh`."""

from tca4rec_jax.config import apply_argument, quickstart_config


def get_config(arg=""):
    config = quickstart_config()
    config.lora.first_layer = 20  # of 30: a step takes 0.6 of the time
    return apply_argument(config, arg)
