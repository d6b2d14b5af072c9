"""The model in use, the one before it, and the queue in front: start, reload, rollback, end.

A request is bound to the model that it was checked against, and searched with that one: a reload
in between changes nothing for it.
"""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, Literal
from weakref import WeakKeyDictionary

from absl import logging
from starlette.types import Receive

from tca4rec_jax.compilations import CompilationCounter
from tca4rec_jax.errors import one_line
from tca4rec_jax.fileio import fingerprint
from tca4rec_jax.memory import return_freed_pages
from tca4rec_jax.serving.batcher import Batcher, Closed, Late
from tca4rec_jax.serving.metrics import Metrics
from tca4rec_jax.serving.model import Admitted, Limits, ServedModel
from tca4rec_jax.serving.pace import Pace

State = Literal["loading", "ready", "draining"]
_ENDS = "the service ends: ask another one, or try again later"


class Busy(Exception):
    """Another reload is going on, or there is no model to go back to."""


class Gone(Exception):
    """The client has gone, before it had its answer."""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Service:
    """Answers requests with the model in use.

    `error` is what the first load has failed with, if it has: there is nothing to serve then.
    """

    def __init__(self, load: Callable[[str], ServedModel], run: str, limits: Limits):
        """load: a run's name -> its model, not compiled yet; `run` is the first one."""
        self.limits, self.metrics = limits, Metrics()
        self.error: BaseException | None = None
        self._load, self._first = load, run
        self._model: ServedModel | None = None
        self._before: ServedModel | None = None
        self._batchers: list[Batcher] = []  # of lists and scores, and of explanations
        self._paces: WeakKeyDictionary[ServedModel, list[Pace]] = WeakKeyDictionary()  # likewise
        self._changing = threading.Lock()
        self._end: float | None = None  # once draining: when the last has its answer, or its 504
        self._reloads: set[Future[None]] = set()  # that somebody may wait for
        self._compilations = CompilationCounter()
        self.metrics.compilations.set_function(lambda: self._compilations.count)
        self.metrics.waiting.set_function(lambda: sum(one.waiting for one in self._batchers))
        self.metrics.ready.set_function(lambda: self.state == "ready")

    @property
    def state(self) -> State:
        """Whether requests are taken."""
        if self._end is not None:
            return "draining"
        return "loading" if self._model is None else "ready"

    @property
    def model(self) -> ServedModel:
        """The one in use. Raises Closed while there is none, or no requests are taken."""
        if self._model is None or self._end is not None:
            raise Closed(f"the service is {self.state}: try again later")
        return self._model

    def about(self) -> dict[str, Any]:
        """The state and what is served, for people and probes."""
        model, before = self._model, self._before
        if model is None:
            return {"state": self.state}
        return {
            "state": self.state,
            "run": model.name,
            "made_from": fingerprint(model.made_from),
            "run_before": before.name if before else None,
            "most_items": model.most_items,
            "guidance": model.guidance,
            "guided": model.guided,
            "explains": model.explains,
        }

    def start(self) -> None:
        """Begins to load the first run; the state is 'ready' once all is compiled."""

        def ended(done: Future[None]) -> None:
            if not isinstance(error := done.exception(), Closed):  # told to end while it loads
                self.error = error

        self.begin_reload(self._first).add_done_callback(ended)

    def begin_reload(self, run: str | None = None) -> Future[None]:
        """`reload` in a thread of its own, which does not keep the process from ending.

        The future raises as `reload`; and Closed as soon as the service drains.
        """
        done: Future[None] = Future()
        self._reloads.add(done)
        done.add_done_callback(self._reloads.discard)

        def load() -> None:
            with contextlib.suppress(InvalidStateError):  # it may have drained, or been cancelled
                try:
                    self.reload(run)
                    done.set_result(None)
                except Exception as error:
                    done.set_exception(error)

        threading.Thread(target=load, name="load", daemon=True).start()
        return done

    def reload(self, run: str | None = None) -> None:
        """Loads and compiles a run (by default that in use, anew) and then serves it.

        What was served before goes on until then, and stays in memory for `rollback`. Raises Busy
        during another reload, Closed once it drains, and what loading raises: the model in use
        stays.
        """
        with self._alone():
            self._reload(run)

    def _reload(self, run: str | None) -> None:
        begin, retires = time.monotonic(), self._before is not None
        if self._model is not None:
            gc.collect()  # a run that was not loaded is held by the traceback of its error
        try:
            model = self._load(run or (self._model.name if self._model else self._first))
            seconds_of = model.warm_up()
            fingerprint(model.made_from)  # reads files, which requests should not wait for
            self._paces[model] = [Pace(seconds_of), Pace({})]
            if not self._batchers:
                self._batchers = [self._batcher(0, threads=2), self._batcher(1, threads=1)]
            self._before, self._model = self._model, model
            if retires:
                gc.collect()  # what only cycles hold of the oldest; else looked for rarely
            return_freed_pages()  # its own, and as much again that loading and compiling needed
            self.metrics.loads.labels("ready").inc()
            logging.info("serving %s after %.1f s", model.name, time.monotonic() - begin)
        except Exception as error:
            self.metrics.loads.labels("failed").inc()
            logging.warning("%s was not loaded: %s", run or "the run", one_line(error))
            raise

    def _batcher(self, place: int, threads: int) -> Batcher:
        return Batcher(
            lambda group, rows: group.model.run(group, rows),
            sizes=lambda group: (1,) if group.kind == "explain" else group.model.batch_sizes,
            most_waiting=self.limits.waiting,
            widths=lambda group, rows: group.model.widths(group, rows),
            on_batch=self.metrics.searched,
            threads=threads,
            pace_of=lambda group: self._paces[group.model][place],
        )

    def rollback(self) -> None:
        """Serves the model before the last reload again. Raises Busy as reload, or without one."""
        with self._alone():
            if self._before is None:
                raise Busy("no run was served before this one")
            self._model, self._before = self._before, self._model
            logging.info("serving %s again", self.model.name)

    @property
    def is_changing(self) -> bool:
        """Whether a run is being loaded."""
        return self._changing.locked()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._end is not None:
            raise Closed(_ENDS)
        if not self._changing.acquire(blocking=False):
            raise Busy("a reload is going on: try again when it has ended")
        try:
            yield
        finally:
            self._changing.release()

    async def answer(self, admitted: Admitted, receive: Receive) -> list:
        """The results of rows that a model has admitted; `receive` says when the client has gone.

        Raises Full, Closed, Late, Gone, and what the search raises.
        """
        if not self._batchers or self._end is not None:
            raise Closed(f"the service is {self.state}: try again later")
        seconds = self.limits.seconds
        # Explanations have threads of their own: what they compile nobody else waits for.
        batcher = self._batchers[admitted[0].kind == "explain"]
        future = batcher.submit(*admitted, deadline=time.monotonic() + seconds)
        found, gone = asyncio.wrap_future(future), asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: found.cancel())
        try:
            async with asyncio.timeout(seconds):
                return await found
        except TimeoutError as error:
            raise Late() from error
        except asyncio.CancelledError as error:
            if gone.done():
                raise Gone() from error
            raise
        finally:
            gone.cancel()
            if future.cancel():  # nobody waits for what is not given yet
                batcher.forget()

    def drain(self) -> None:
        """Takes no further requests; those that were taken are answered, but for reloads."""
        if self._end is None:
            self._end = time.monotonic() + self.limits.seconds
        for batcher in self._batchers:
            batcher.close()
        for reload in [*self._reloads]:
            with contextlib.suppress(InvalidStateError):
                reload.set_exception(Closed(_ENDS))

    @property
    def is_drained(self) -> bool:
        """Whether nobody waits for an answer any more, though what nobody waits for may go on."""
        return self._end is not None and (self.is_idle or time.monotonic() > self._end)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or is searched."""
        return all(batcher.is_idle for batcher in self._batchers)

    def close(self) -> None:
        """Waits until all that was taken is searched, or nobody waits for it; counts no further."""
        self.drain()
        assert self._end is not None
        for batcher in self._batchers:
            batcher.join(max(self._end - time.monotonic(), 0.0))
        self._compilations.close()
