"""A model that only says its name, and services of it: one in this process, one that gets stuck."""

import threading

from jax.errors import JaxRuntimeError

from tca4rec_jax.decoding.recommender import Recommended
from tca4rec_jax.errors import UserError
from tca4rec_jax.serving.app import make_app
from tca4rec_jax.serving.model import Group, Limits, Row
from tca4rec_jax.serving.server import serve
from tca4rec_jax.serving.service import Service
from tca4rec_jax.training.fault_tolerance import CheckpointError

FAULTS = {
    "broken": UserError("broken cannot be loaded"),
    "damaged": CheckpointError("the checkpoint is damaged"),
    "not a number": FloatingPointError("row 3 has scores that are not finite"),
    "too large": JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
}


class Counted:
    """A model that gives its name, when it may."""

    most_items, guidance, guided, explains, made_from = 3, 0.0, False, False, {}

    def __init__(self, name, may_go_on):
        self.name, self.may_go_on, self.batch_sizes = name, may_go_on, [1 if name == "small" else 2]
        if fault := FAULTS.get(name):
            raise fault

    def warm_up(self):
        self.loaded_in = threading.current_thread()
        return {}

    def titles_like(self, text, most):
        raise RuntimeError(f"a bug that quotes {text}")

    def lists_after(self, histories, k, guidance, filters):
        return Group(self, "recommend", 0.0), [Row(history, self.name) for history in histories]

    def widths(self, group, rows):
        return [0] * len(rows)

    def run(self, group, rows):
        assert self.may_go_on.wait(30)
        assert {row.asked for row in rows} == {self.name}
        assert len(rows) <= self.batch_sizes[-1]
        return [[Recommended(row.history[0], self.name, 0.0)] for row in rows]


def counted(run="old", may_go_on=None, **limits):
    """A service of such models; what is searched at once is told to go on, or waits."""
    event = may_go_on or threading.Event()
    if may_go_on is None:
        event.set()
    service = Service(lambda name: Counted(name, event), run, Limits(**limits))
    return service


def serve_stuck(port, seconds):
    """A service whose searches, and whose loads but the first, last longer than it may."""
    stuck = threading.Event()

    def load(name):
        assert name != "stuck" or stuck.wait(60)
        return Counted(name, stuck)

    service = Service(load, "old", Limits(seconds=seconds, read_seconds=1.0))
    app = make_app(service, key="", admin_key="k")
    serve(service, app, host="127.0.0.1", port=port)
