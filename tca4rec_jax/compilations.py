"""What is compiled: said while it lasts, for nothing else is shown then; and counted."""

import re
import threading

import jax
from absl import logging

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_SILENCE = 2.0  # seconds: what is compiled, or read from JAX's cache, in less is not said


def announce_compilations() -> None:
    """Logs the name of every program that is still being compiled after two seconds."""
    jax.monitoring.register_event_duration_secs_listener(_Announcer())


class CompilationCounter:
    """Counts the programs that this process compiles, or reads from JAX's cache, from now on."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **about: str | int) -> None:
        self.count += event == _COMPILED

    def close(self) -> None:
        """Counts no further."""
        jax.monitoring.unregister_event_duration_listener(self._hear)


class _Announcer:
    """Hears when JAX has lowered a program, which it compiles next, and when it has compiled it."""

    def __init__(self):
        self._timers: dict[int, threading.Timer] = {}  # by thread

    def __call__(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event not in (_LOWERED, _COMPILED):
            return
        thread = threading.get_ident()
        if (last := self._timers.pop(thread, None)) is not None:
            last.cancel()
        if event == _LOWERED:
            name = re.sub(r"^jit[_(]|\)$", "", str(about.get("fun_name")))
            message = f"Compiling {name}: up to a minute or two, once; kept for later commands"
            timer = threading.Timer(_SILENCE, logging.info, [message])
            timer.daemon = True
            timer.start()
            self._timers[thread] = timer
