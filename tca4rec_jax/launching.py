"""What every launch script does before its work."""

import logging as standard_logging

import jax
from absl import logging

from tca4rec_jax.data.downloads import default_cache_dir
from tca4rec_jax.sharding import use_cpu_cores


def start() -> None:
    """Readable logging, one device per CPU core, and compiled programs kept between runs."""
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(standard_logging.Formatter("%(message)s"))
    for noisy in ("orbax", "jax", "grain", "tensorflow_datasets"):
        standard_logging.getLogger(noisy).setLevel(standard_logging.WARNING)
    use_cpu_cores()
    jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2)
    logging.info("JAX devices: %s", jax.devices())
