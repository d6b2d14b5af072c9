"""Serves recommendations over HTTP: lists, scores, a page to try them; see docs/serving.md.

    python launch/serve.py --workdir=runs/quickstart --run=aligned
    curl localhost:8000/recommend --json '{"history": ["Toy Story (1995)"], "k": 5}'

Reads WORKDIR/data, the run in WORKDIR/llm and the CF model in WORKDIR/cf. Writes nothing but its
log. Programs are compiled first, then /ready says so. SIGTERM ends it when all that was taken is
answered; SIGHUP loads the run anew. The environment variable TCA4REC_API_KEY holds the key that
requests need, TCA4REC_ADMIN_KEY that of /admin/reload and /admin/rollback.
"""

import os

from absl import flags
from ml_collections import config_flags

from tca4rec_jax import run_config
from tca4rec_jax.config import run_name
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment, config_of_run
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import Count, NotNegative, Port, Positive
from tca4rec_jax.serving.app import make_app
from tca4rec_jax.serving.model import Limits, ServedModel
from tca4rec_jax.serving.server import serve
from tca4rec_jax.serving.service import Service
from tca4rec_jax.training.run_folder import RunFolder

_HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0: all.")
_PORT = DEFINE_field("port", Port, 8000, "The port to listen on.")
_OPEN = flags.DEFINE_bool("open", False, "Listen on other addresses although there is no key.")
_GUIDANCE = DEFINE_field("guidance", NotNegative, 0.0, "Of requests that do not say any.")
_WAITING = DEFINE_field("waiting", Count, 256, "Histories that may wait; more are refused.")
_SECONDS = DEFINE_field("seconds", Positive, 10.0, "Most seconds from a request to its answer.")
_HISTORIES = DEFINE_field("histories", Count, 64, "Most histories in a request.")
_CANDIDATES = DEFINE_field("candidates", Count, 20, "Most candidates to score in a request.")


def serve_run(config, workdir):
    """Serves the run of the config until it is told to end."""
    key = os.environ.get("TCA4REC_API_KEY", "")
    if not (key or _OPEN.value or _HOST.value in ("127.0.0.1", "localhost", "::1")):
        raise UserError(
            f"--host={_HOST.value} lets others ask: set TCA4REC_API_KEY, or give --open"
        )
    limits = Limits(
        histories=_HISTORIES.value,
        candidates=_CANDIDATES.value,
        waiting=_WAITING.value,
        seconds=_SECONDS.value,
    )

    def load(name: str) -> ServedModel:
        experiment = Experiment(_config_of(name, config, workdir), workdir)
        return ServedModel(experiment, name, limits, guidance=_GUIDANCE.value)

    service = Service(load, run_name(config), limits)
    app = make_app(service, key=key, admin_key=os.environ.get("TCA4REC_ADMIN_KEY", ""))
    serve(service, app, host=_HOST.value, port=_PORT.value)


def _config_of(name, given, workdir):
    """The config of a run, as it was trained last, with the flags; or that given by --config."""
    flag, config = flags.FLAGS["config"], given.copy_and_resolve_references()
    if config_flags.get_config_filename(flag).startswith(f"{run_config.__file__}:"):
        config = config_of_run(RunFolder.of(workdir, name))
        config.update_from_flattened_dict(config_flags.get_override_values(flag))
    config.run = name
    return config


if __name__ == "__main__":
    launch(serve_run, "serve", reads=["data", "cf", "llm", "run"], config_of="run")
