"""What the launch scripts share: their flags, the settings of a process, errors in one line."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from tca4rec_jax import run_config
from tca4rec_jax.compilations import announce_compilations
from tca4rec_jax.config import SHORT_NAMES, build, config_fields, run_name
from tca4rec_jax.config_checks import doubts, validate
from tca4rec_jax.data.downloads import default_cache_dir
from tca4rec_jax.data.item_vectors import embeddings_folder
from tca4rec_jax.data.settings import DataConfig
from tca4rec_jax.data.templates import shows_ids
from tca4rec_jax.distributed import multihost
from tca4rec_jax.distributed.multihost import is_main_process, is_multiprocess
from tca4rec_jax.distributed.sharding import leave_products_to_cublas, use_cpu_cores
from tca4rec_jax.errors import UserError, did_you_mean
from tca4rec_jax.llm.from_scratch import RANDOM
from tca4rec_jax.memory import collect_garbage_rarely, keep_freed_pages
from tca4rec_jax.ranges import FolderName, LocalPath, expected, plain_type
from tca4rec_jax.reporting import show
from tca4rec_jax.terminal import log_to_console
from tca4rec_jax.training.fault_tolerance import STOPPED, CheckpointError, Stopped
from tca4rec_jax.training.run_folder import RunFolder


class _Parser(flags.ArgumentParser):
    def __init__(self, annotation: Any):
        self._annotation = annotation

    def parse(self, argument: Any) -> Any:
        kind = plain_type(self._annotation)
        value = kind(argument) if kind is not tuple else [float(x) for x in argument.split(",")]
        if words := expected(self._annotation, value):
            raise ValueError(f"expected {words}")
        return value


def DEFINE_field(
    name: str, annotation: Any, default: Any, help_: str, *, required: bool = False
) -> flags.FlagHolder[Any]:
    """A flag whose type and range an annotation says; of a tuple, numbers separated by commas."""
    return flags.DEFINE(_Parser(annotation), name, default, help_, required=required)


CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
WORKDIR = DEFINE_field("workdir", LocalPath, None, "Where the run's parts are read and written.")
RUN = DEFINE_field("run", FolderName, None, "An LLM run of the work directory: config.run.")

QUIET = flags.DEFINE_bool("quiet", False, "Show results, warnings and errors only.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the config, say what is read and written.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "Several processes: HOST:PORT of process 0.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", 0, "How many processes there are.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", -1, "Which of them this is, from 0.")
Part = str | Path | flags.FlagHolder
Parts = Sequence[Part] | Callable[[ConfigDict], Sequence[Part]]
JOB = _COORDINATOR, _PROCESS_COUNT, _PROCESS_INDEX  # what `start` needs
flags.disclaim_key_flags()  # what DEFINE_field defines is the script's

_MISSING = re.compile(r"flag (--\w+)=None: Flag --\w+ must have a value other than None\.")
_ABSENT = re.compile("No such file or directory: '(.+)'")
_MOST_PROGRAM_BYTES = 4 << 30  # the least recently used ones make room
_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports Ctrl-C
_LONGEST_WAIT = 24 * 3600  # seconds, of the other processes for what the first one does alone


def launch(
    run: Callable[[ConfigDict, Path], object],
    name: str,
    *,
    run_on: Literal["single_process", "main_process", "all_processes"] = "single_process",
    reads: Parts = (),
    writes: Parts = (),
    config_of: Literal["run", "any_run"] | None = None,
) -> None:
    """Calls run(config, workdir) with the flags; --dry_run says what it would read and write.

    `reads` and `writes` are names in `_paths`, flags that hold paths, and paths below the work
    directory; or a function of the config that gives these once the flags are known. Of several
    processes 'all_processes' run together, or the others wait for the 'main_process', or it is an
    error to start more than one ('single_process').

    Without --config a script that starts from a trained run takes the config that it was trained
    with: `config_of` the 'run' of --run, or the only one that is there; or of 'any_run', the first
    of --runs or the latest. Flags --config.x.y= change it. Such a script searches: see `start`.

    An error of the user's input ends the process with status 1 and one line, a bug with its
    traceback, a stop signal with status 143, Ctrl-C with 130. In a job of several processes the
    others then end too.
    """

    def main(_):
        with _errors_in_words(name):
            validate(CONFIG.value)
            if DRY_RUN.value:
                lines = [f"  reads {path}{_is_there(path)}" for path in _paths_of(reads)]
                lines += [f"  writes {path}" for path in _paths_of(writes)]
                return show(f"{name}: the config is valid", *lines)
            start(cublas=config_of is not None and not CONFIG.value.llm.quantise)
            for doubt in doubts(CONFIG.value):
                logging.warning(doubt)
            if run_on == "single_process" and is_multiprocess():
                raise UserError("this script runs in one process: give --process_count=1")
            if run_on == "all_processes" or is_main_process():
                run(CONFIG.value, Path(WORKDIR.value or ""))
            multihost.barrier(name, _LONGEST_WAIT)
            multihost.leave_job()

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=partial(_parse_flags, name, config_of))


def launch_alone(
    run: Callable[[], object],
    name: str,
    *,
    takes: Sequence[flags.FlagHolder] = (),
    required: Sequence[str] = (),
    failed: int = 1,
) -> None:
    """Calls run() of a script in one process that starts no device by itself.

    Of the flags above it takes those in `takes`, and --quiet; `required` are names of flags.
    Errors end it as in `launch`, but with the status `failed`.
    """
    kept = {flag.name for flag in (*takes, QUIET)}
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        if flag.name not in kept:
            delattr(flags.FLAGS, flag.name)

    def main(_):
        with _errors_in_words(name, failed):
            log_to_console()
            run()

    flags.mark_flags_as_required([*required])
    app.run(main, flags_parser=partial(_parse_flags, name, None))


@contextlib.contextmanager
def _errors_in_words(name: str, failed: int = 1) -> Iterator[None]:
    """Ends the process as `launch` says where its block raises."""
    try:
        yield
    except Stopped as stopped:
        _end(f"{name}: {stopped}", STOPPED, together=True)
    except KeyboardInterrupt:
        logging.debug("", exc_info=True)
        _end(f"{name}: interrupted", _INTERRUPTED)
    except Exception as error:
        if _speaks_to_the_user(error):
            logging.debug("", exc_info=True)
            _end(f"{name}: {error}", failed)
        if not is_multiprocess():
            raise
        traceback.print_exc()
        _end(f"{name}: {_why(error)}", failed)


def _parse_flags(name: str, config_of: str | None, argv: list[str]) -> list[str]:
    """Parses the arguments; a bad flag or config field ends the process in one line."""
    for flag in flags.FLAGS.get_flags_for_module(__name__):  # for --help
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    try:
        _check_names_of_fields(argv)
        program, *others = flags.FLAGS(_with_config_of_run(argv, config_of) if config_of else argv)
        if others:
            raise UserError(f"unexpected argument {others[0]!r}: give flags as --name=value")
        if QUIET.value and flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)
        if "config" in flags.FLAGS:
            getattr(CONFIG.value, "run", None)  # raises for a file that cannot be read
            if "run" in flags.FLAGS and RUN.value:
                CONFIG.value.run = RUN.value
        return [program]
    except (flags.Error, AttributeError, OSError, UserError) as error:
        _, by_user, message = str(error).rpartition("UserError: ")  # after the file's traceback
        if "in get_config" in traceback.format_exc() and not by_user:
            raise  # a bug of the config file
        if missing := _MISSING.findall(message):
            message = f"give {', '.join(missing)} (--help says what for)"
        if absent := _ABSENT.search(message):
            near = did_you_mean(absent[1], map(str, _config_files(absent[1])))
            message = f"--config={absent[1]}: no such file{near}"
        _end(f"{name}: {' '.join(message.split())}", 1)
    except SystemExit:  # of --help
        sys.exit(0)


def _config_files(name: str) -> list[Path]:
    """The Python files beside one that is not there, and those of configs/."""
    folders = Path(name).parent, Path("configs")
    return [path for folder in folders for path in folder.glob("*.py")]


def _check_names_of_fields(argv: list[str]) -> None:
    """Raises UserError for a --config.x.y that is no field; absl's own errors differ by level."""
    for name in re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE):
        if name not in config_fields():
            names = {f"--config.{field}" for field in config_fields()}
            near = f"--config.{SHORT_NAMES.get(name, name)}"
            raise UserError(f"there is no field --config.{name}{did_you_mean(near, names)}")


def _with_config_of_run(argv: list[str], config_of: str) -> list[str]:
    """The arguments, with the --config of a trained run if they have none; see `launch`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("config", "workdir", "run", "runs"):
        parser.add_argument(f"--{flag}", f"-{flag}")
    given, _ = parser.parse_known_args(argv)
    if given.config or not given.workdir:
        return argv
    workdir = Path(given.workdir)
    trained = {
        run.path.name: run.config_path for run in RunFolder.all(workdir) if run.trained_steps
    }
    run = given.run or ""
    if not run and (config_of == "any_run" or len(trained) == 1):
        latest = sorted(trained, key=lambda name: trained[name].stat().st_mtime, reverse=True)
        named = [name for name in (given.runs or "").split(",") if name in trained]
        run = [*named, *latest, ""][0]
    if run not in trained:
        there = f"{workdir} has {', '.join(trained)}" if trained else f"{workdir} has none yet"
        raise UserError(f"give a trained run with --run ({there}), or a --config")
    return [argv[0], f"--config={run_config.__file__}:{workdir / 'llm' / run}", *argv[1:]]


def _paths_of(parts: Parts) -> list[str | Path]:
    """Where the parts of a run lie: each once."""
    known = parts(CONFIG.value) if callable(parts) else parts
    return list(dict.fromkeys(path for part in known for path in _paths(part)))


def _is_there(path: str | Path) -> str:
    """What --dry_run says of a part of the work directory that nothing has written."""
    return " (not there yet)" if isinstance(path, Path) and not path.exists() else ""


def _paths(part: Part) -> Sequence[str | Path]:
    """Where a part of a run lies, or what a flag holds."""
    config, workdir = CONFIG.value, Path(WORKDIR.value or "")
    if isinstance(part, Path):
        return [workdir / part]
    if isinstance(part, flags.FlagHolder):
        held = part.value or []
        return held if isinstance(held, list) else [held]
    if part == "source":
        inputs = build(DataConfig, config.data).inputs()
        return list(inputs.values()) or ["MovieLens-100K, downloaded"]
    if part == "llm":
        ids = config.ids.path or workdir / "ids" / "ids.json"
        weights = [] if config.llm.weights == RANDOM else [config.llm.weights]
        return [*weights, *([ids] if shows_ids(config.prompt) else [])]
    places = {
        "data": workdir / "data",
        "cf": workdir / "cf",
        "cf_logits": config.cf.logits or workdir / "cf" / "logits",
        "run": workdir / "llm" / run_name(config),
        "item_embeddings": embeddings_folder(workdir),
        "ids": workdir / ("ids_of_others" if config.ids.path else "ids"),
    }
    return [places[part]]


def _speaks_to_the_user(error: Exception) -> bool:
    """Whether an error is of the input, the data or the machine: its message says it all."""
    if isinstance(error, OSError):
        return error.filename is not None or isinstance(error, FileNotFoundError)
    return isinstance(error, UserError | FloatingPointError | CheckpointError)


def _why(error: Exception) -> str:
    """What a process of several prints after the traceback of a bug."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return "failed"
    return (
        f"another process of this job has ended or can't be reached ({str(error).splitlines()[0]})"
        ": start all of them again, they go on from the last checkpoint"
    )


def _end(message: str, status: int, *, together: bool = False) -> NoReturn:
    """Ends the process: one of several at once, as an orderly exit waits, or all together."""
    if is_multiprocess():
        show(f"[process {jax.process_index()}] {message}", error=True)
        sys.stdout.flush()
        try:
            if together:
                multihost.leave_job()
        finally:
            os._exit(status)
    show(message, error=True)
    sys.exit(status)


def start(*, cublas: bool = False) -> None:
    """The settings of a process, before any use of a device; joins the other processes of the job.

    cublas: as `leave_products_to_cublas`, where JAX has a plugin for CUDA. What XLA compiles is
    kept for the next run: in JAX_COMPILATION_CACHE_DIR, by default in the cache of downloads.
    Raises UserError as `multihost.join_job` does.
    """
    log_to_console()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a title may have what a locale lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_freed_pages()
    collect_garbage_rarely()
    announce_compilations()
    use_cpu_cores()
    if cublas and any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        leave_products_to_cublas()
    keep_programs(default_cache_dir() / "programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    multihost.join_job(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value)
    if not is_multiprocess():  # there JAX watches for it
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # leases end, scratch goes
    if not is_main_process():
        logging.set_verbosity(logging.WARNING)


def keep_programs(folder: Path) -> None:
    """Lets JAX keep what it compiles in a folder, unless JAX_COMPILATION_CACHE_DIR is set.

    It runs what it finds there: the folder has to be the user's own, and private. It holds at most
    _MOST_PROGRAM_BYTES, or JAX_COMPILATION_CACHE_MAX_SIZE.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # JAX adds it
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        folder.chmod(0o700)
    except OSError as error:
        logging.warning("Compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_compilation_cache_max_size == -1:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_max_size", _MOST_PROGRAM_BYTES)
