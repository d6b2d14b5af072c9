"""What is said while programs are compiled."""

import logging
import time

import jax
import pytest

from tca4rec_jax import compilations
from tca4rec_jax.compilations import _COMPILED, _LOWERED, _Announcer


@pytest.fixture
def said(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    monkeypatch.setattr(compilations, "_SILENCE", 0.05)
    return lambda: [record.getMessage() for record in caplog.records if "Compiling" in record.msg]


def test_what_is_still_compiled_after_a_while_is_said(said):
    announcer = _Announcer()
    announcer(_LOWERED, 0.1, fun_name="jit_quick")
    announcer(_COMPILED, 0.1, fun_name="jit_quick")
    time.sleep(0.1)
    assert not said()
    announcer(_LOWERED, 0.1, fun_name="jit_search_batch")
    time.sleep(0.1)
    assert [line.split(":")[0] for line in said()] == ["Compiling search_batch"]


def test_jax_names_the_program_before_and_after_it_is_compiled(monkeypatch):
    heard = []
    listen = lambda event, _, **more: heard.append((event, more.get("fun_name")))  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:

        @jax.jit
        def some_program(x):
            return x * 2 + 1

        some_program(jax.numpy.arange(3))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    of_program = [event for event, name in heard if "some_program" in (name or "")]
    assert of_program.index(_LOWERED) < of_program.index(_COMPILED)
