"""The process of a service: uvicorn, signals, and its log as one JSON object a line."""

import json
import logging
import math
import os
import signal
import socket
import time
from concurrent.futures import Future
from types import FrameType

import absl.logging
import uvicorn
from fastapi import FastAPI

from tca4rec_jax.errors import UserError
from tca4rec_jax.serving.connections import connections
from tca4rec_jax.serving.model import Limits
from tca4rec_jax.serving.service import Busy, Service


class JsonLines(logging.Formatter):
    """A record, with the fields of its `line` if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "line", {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line)


def serve(service: Service, app: FastAPI, *, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT, and then until all that was taken is answered.

    It ends within `seconds_to_end`. SIGHUP loads the run in use anew. A second signal ends the
    process at once, with status 128 and the signal's number. Raises UserError for an address that
    is taken or not this machine's, and what the first load of the service raises.
    """
    listener = _listener(host, port)
    absl.logging.get_absl_handler().setFormatter(JsonLines())
    config = uvicorn.Config(
        app,
        http=connections(service.limits.read_seconds),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_seconds_to_close(service.limits),
    )
    service.start()
    server = _Server(config, service)
    absl.logging.info("listening on %s, port %d", host, port)
    server.run([listener])
    service.close()
    if service.error is not None:
        raise service.error
    if service.is_changing or not service.is_idle:
        _end_at_once(0)


def seconds_to_end(limits: Limits) -> int:
    """At most from SIGTERM to the end."""
    return math.ceil(limits.seconds) + _seconds_to_close(limits)


def _seconds_to_close(limits: Limits) -> int:
    # All that was taken has its answer by then, or its 504: the rest is sent, and read.
    return math.ceil(limits.read_seconds) + 1


def _end_at_once(status: int) -> None:
    # A thread that compiles or searches can't be ended; the interpreter, ending, aborts for it.
    try:
        logging.shutdown()
    finally:
        os._exit(status)


def _listener(host: str, port: int) -> socket.socket:
    """A socket of the address, before anything is loaded. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"can't listen on {host}, port {port} ({error.strerror}): give another --port or --host"
        ) from error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def startup(self, sockets=None) -> None:
        signal.signal(signal.SIGHUP, self._reload)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends in order: listens on, and refuses, until all that was taken is answered."""
        if self._service.state == "draining":
            _end_at_once(128 + sig)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        ends = self._service.is_drained or self._service.error is not None
        return await super().on_tick(counter) or ends

    def _reload(self, *_: object) -> None:
        def ended(done: Future[None]) -> None:  # what has failed the service has said
            if isinstance(error := done.exception(), Busy):
                logging.getLogger(__name__).warning("SIGHUP: %s", error)

        self._service.begin_reload().add_done_callback(ended)
