"""What the launch scripts share: their flags, the start of a process, errors in one line."""

import ctypes
import logging as standard_logging
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from tca4rec_jax.data.downloads import DownloadError, default_cache_dir
from tca4rec_jax.sharding import use_cpu_cores

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's parts are read and written.")
_EXPECTED = (ValueError, FileNotFoundError, DownloadError, FloatingPointError)


def launch(run: Callable[[ConfigDict, Path], None], name: str) -> None:
    """Parses --config and --workdir and calls run(config, workdir).

    An error of the input ends the process with status 1 and one line; a bug keeps its traceback.
    """

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}")
        start()
        try:
            run(CONFIG.value, Path(WORKDIR.value))
        except _EXPECTED as error:
            logging.debug("", exc_info=True)
            sys.exit(f"{name}: {error}")

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


def start() -> None:
    """Readable logging, one device per CPU core, and compiled programs kept between runs."""
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(message)s"))
    handler.addFilter(_is_ours_or_a_warning)
    keep_freed_pages()
    use_cpu_cores()
    jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2)


def _is_ours_or_a_warning(record: standard_logging.LogRecord) -> bool:
    """Orbax and TFDS write dozens of lines to the same logger."""
    return record.levelno >= standard_logging.WARNING or "tca4rec_jax" in record.pathname


def keep_freed_pages() -> None:
    """Makes glibc reuse the pages of large temporaries instead of returning them to the kernel.

    By default each large array is mapped, faulted in page by page and unmapped again at every step,
    which on CPU can take as long as the arithmetic; so it is, whatever the thresholds, with arrays
    that a thread takes from an arena of its own. Call before the first use of a device.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return  # not glibc
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**28)
    libc.mallopt(arena_max, 1)
