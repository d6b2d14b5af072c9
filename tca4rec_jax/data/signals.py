"""Signals while a library works: what their handlers raise goes on as it is."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raises what the handler of SIGINT or SIGTERM raised, where a library hides it in an error.

    A RuntimeError: of DuckDB 'Query interrupted' (the handler runs between the tasks of a query, or
    at its end if DuckDB's own threads do them all), of Beam one that names the step. Without a
    signal a RuntimeError stays as it is. Only in the main thread, which alone sets handlers.
    """
    raised: list[BaseException] = []

    def keeping(handler: Any) -> Any:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return handle

    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    previous = {n: handler for n in numbers if callable(handler := signal.getsignal(n))}
    try:
        for number, handler in previous.items():
            signal.signal(number, keeping(handler))
        yield
    except RuntimeError:
        if raised:
            raise raised[0] from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
