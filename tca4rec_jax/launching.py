"""What the launch scripts share: their flags, the start of a process, errors in one line."""

import ctypes
import gc
import logging as standard_logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from tca4rec_jax.data.downloads import DownloadError, default_cache_dir
from tca4rec_jax.distributed.multihost import (
    barrier,
    is_main_process,
    is_multiprocess,
    join_job,
    leave_job,
)
from tca4rec_jax.distributed.sharding import use_cpu_cores
from tca4rec_jax.errors import UserError
from tca4rec_jax.training.fault_tolerance import STOPPED, CheckpointError, Stopped

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's parts are read and written.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "Several processes: HOST:PORT of process 0.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", 0, "How many processes there are.")
PROCESS_INDEX = flags.DEFINE_integer("process_index", -1, "Which of them this is, from 0.")

# What is wrong with the input, the data or the machine: one line says it.
_EXPECTED = (UserError, OSError, DownloadError, FloatingPointError, CheckpointError)
# How long the other processes wait for what the first one does alone. Seconds.
_LONGEST_WAIT = 24 * 3600


def launch(run: Callable[[ConfigDict, Path], None], name: str, *, processes: str = "one") -> None:
    """Parses --config and --workdir, joins the other processes if there are any, and calls
    run(config, workdir).

    An error of the input ends the process with status 1 and one line, a bug with its traceback, a
    stop signal with status 143. In a job of several processes the others then end too.

    Args:
      processes: what several of them do: 'all' run together, 'first': the first one runs and the
        others wait for it, 'one': it is an error to start more.
    """

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}")
        try:
            start()
            if processes == "one" and is_multiprocess():
                raise UserError("this script runs in one process: give --process_count=1")
            if processes == "all" or is_main_process():
                run(CONFIG.value, Path(WORKDIR.value))
            barrier(name, _LONGEST_WAIT)
        except Stopped as stopped:
            _end(f"{name}: {stopped}", STOPPED, together=True)
        except _EXPECTED as error:
            logging.debug("", exc_info=True)
            _end(f"{name}: {error}", 1)
        except jax.errors.JaxRuntimeError as error:
            if not is_multiprocess():
                raise
            traceback.print_exc()
            _end(
                f"{name}: another process of this job has ended or can't be reached "
                f"({str(error).splitlines()[0]}): start all of them again, they go on from the "
                "last checkpoint",
                1,
            )
        except Exception:
            if not is_multiprocess():
                raise
            traceback.print_exc()
            _end(f"{name}: failed", 1)

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


def _end(message: str, status: int, *, together: bool = False) -> None:
    """Ends the process; one of several at once, since an orderly exit waits for the others, unless
    all of them end together."""
    if is_multiprocess():
        print(f"[process {jax.process_index()}] {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        try:
            if together:
                leave_job()
        finally:
            os._exit(status)
    print(message, file=sys.stderr)
    sys.exit(status)


def start() -> None:
    """Readable logging, one device per CPU core, compiled programs kept between runs; joins the
    other processes of the job, if there are any. Before any use of a device.

    Raises:
      UserError: as `multihost.join_job`.
    """
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(message)s"))
    handler.addFilter(_is_ours_or_a_warning)
    keep_freed_pages()
    collect_garbage_rarely()
    use_cpu_cores()
    if not jax.config.jax_compilation_cache_dir:  # nor JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    join_job(COORDINATOR.value, PROCESS_COUNT.value, PROCESS_INDEX.value)
    if not is_main_process():
        logging.set_verbosity(logging.WARNING)


def _is_ours_or_a_warning(record: standard_logging.LogRecord) -> bool:
    """Orbax and TFDS write dozens of lines to the same logger."""
    return record.levelno >= standard_logging.WARNING or "tca4rec_jax" in record.pathname


def collect_garbage_rarely() -> None:
    """Tracing makes objects by the million; looking for cycles among them takes 5% of its time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def keep_freed_pages() -> None:
    """Makes glibc reuse the pages of large temporaries instead of returning them to the kernel.

    By default each large array is mapped, faulted in page by page and unmapped again at every step,
    which on CPU can take as long as the arithmetic; so it is, whatever the thresholds, with arrays
    that a thread takes from an arena of its own. Call before the first use of a device. Arenas that
    there are by then (pandas starts a thread, by Arrow) are still shared out to some devices: with
    huge pages, as in launch/quickstart.sh, that costs little.
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
