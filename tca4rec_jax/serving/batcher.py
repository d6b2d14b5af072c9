"""Requests in batches: a bounded queue, and the two threads that search.

While a batch is searched the next requests wait, and then share one: no request waits for others
to come. Where a whole batch waits it begins at once, in the second thread: the host makes it ready
while the devices search. Where more wait than a batch has room for, rows of one width share it:
less is padding. Only then does anybody ask for widths, and for those of all new rows at once.

A batch is so large, and so many wait, that by the pace so far answers come before their deadlines.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from tca4rec_jax.serving.pace import Pace


class Full(Exception):
    """The queue has no room for a request; `seconds` until it may have, at least 1."""

    def __init__(self, seconds: int):
        super().__init__(f"too many requests are waiting: try again in {seconds} s")
        self.seconds = seconds


class Late(Exception):
    """The deadline of a request has passed."""


class Closed(Exception):
    """No further requests are taken."""


class Ran(NamedTuple):
    """One batch that was searched."""

    rows: int
    seconds: float
    waited: list[float]  # seconds of each row in the queue


class _Request:
    """Rows whose results are given together; both threads may have some of them."""

    def __init__(self, group: Hashable, rows: int, now: float, deadline: float):
        self.group, self.submitted, self.deadline = group, now, deadline
        self.allowed = max(deadline - now, 0.0)  # seconds
        self._ending = threading.Lock()
        self.future: Future[list] = Future()
        self.results: list[Any] = [None] * rows
        self.missing = rows

    def is_wanted(self, now: float) -> bool:
        """Whether somebody still waits for it; a late one is told so."""
        if now > self.deadline:
            self.fail(Late())
        return not self.future.done()

    def give(self, place: int, result: Any) -> None:
        with self._ending:
            self.results[place] = result
            self.missing -= 1
            if not self.missing and self._may_end():
                self.future.set_result(self.results)

    def fail(self, error: Exception) -> None:
        with self._ending:
            if self._may_end():
                self.future.set_exception(error)

    def _may_end(self) -> bool:
        # Until now it may be cancelled at any time, by a thread that asks for no lock of this.
        return not self.future.done() and self.future.set_running_or_notify_cancel()


@dataclass(eq=False)
class _Row:
    request: _Request
    place: int  # among the rows of the request
    value: Any
    width: int = -1  # not asked for yet


class Batcher:
    """Runs rows of one group, the oldest first, in batches of at most the largest of its sizes.

    `sizes(group)` are ascending: a batch takes as long as the next of them. Every batch has the
    oldest row, and of the others those that are closest to it in width. At most `most_waiting` rows
    wait. `run(group, values)` gives a result for each value, in up to `threads` at a time; `widths`
    their widths, in one. `on_batch` hears of every batch; `pace_of(group)` learns of those of some
    groups, by default of all.
    """

    def __init__(
        self,
        run: Callable[[Any, list], Iterable],
        *,
        sizes: Callable[[Any], Sequence[int]],
        most_waiting: int,
        widths: Callable[[Any, list], Sequence[int]] = lambda group, values: [0] * len(values),
        on_batch: Callable[[Ran], object] = lambda ran: None,
        threads: int = 2,
        pace_of: Callable[[Any], Pace] | None = None,
    ):
        self._run, self._on_batch = run, on_batch
        self._sizes, self._most_waiting, self._widths = sizes, most_waiting, widths
        self._rows: deque[_Row] = deque()
        self._rows_of: Counter[Hashable] = Counter()  # how many by group
        self._running: list[tuple[Hashable, int]] = []  # group and size of batches
        self._changed, self._choosing = threading.Condition(), threading.Lock()
        self._closed, self._ended, of_all = False, 0.0, Pace({})
        self._pace_of = pace_of or (lambda group: of_all)
        self._threads = [
            threading.Thread(target=self._work, name=f"search {n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._rows)

    @property
    def is_idle(self) -> bool:
        """Whether no row waits or is searched."""
        with self._changed:
            return not self._rows and not self._running

    def submit(self, group: Hashable, values: Sequence, deadline: float) -> Future[list]:
        """The results of rows that may share batches with others of an equal group.

        They are all in time, by `deadline` (of time.monotonic), or the future raises Late. One that
        is cancelled is not searched. Raises Full if there is no room for all rows, or no time; and
        Closed.
        """
        request = _Request(group, len(values), time.monotonic(), deadline)
        with self._changed:
            if self._closed:
                raise Closed("no further requests are taken: the service ends")
            self._check_room(request, len(values))
            self._rows.extend(_Row(request, *one) for one in enumerate(values))
            self._rows_of[group] += len(values)
            self._changed.notify_all()
        return request.future

    def _check_room(self, request: _Request, rows: int) -> None:
        """Raises Full unless they may wait; what waits for nobody may always try."""
        if len(self._rows) + rows > self._most_waiting:
            raise Full(max(1, math.ceil(self._seconds(self._rows_of, request.allowed))))
        if not (self._rows or self._running):
            return
        one_more = self._pace_of(request.group).seconds(self._size(request))  # it may run beside
        all_rows = self._rows_of + Counter({request.group: rows})
        late = self._seconds(all_rows, request.allowed) + one_more - request.allowed
        if late > 0:
            raise Full(max(1, math.ceil(late)))

    def _seconds(self, rows_of: Counter[Hashable], allowed: float) -> float:
        """Until what runs and so many rows by group, each in batches of its own, are searched."""
        running = sum(self._pace_of(group).seconds(size) for group, size in self._running)
        return running + sum(
            self._pace_of(group).wait(rows, self._sizes(group), allowed)
            for group, rows in rows_of.items()
        )

    def _size(self, request: _Request) -> int:
        """Rows of a batch that has this request's."""
        return self._pace_of(request.group).largest(self._sizes(request.group), request.allowed)

    def close(self) -> None:
        """Takes no further requests; those that were taken are searched."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def forget(self) -> None:
        """Drops at once what waits and was cancelled: else it counts until a thread is free."""
        with self._changed:
            self._drop_unwanted()
            self._changed.notify_all()

    def join(self, seconds: float | None = None) -> None:
        """Waits, after `close`, until all are searched, or for so long."""
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0.0))

    def _work(self) -> None:
        while batch := self._next():
            begin = time.monotonic()
            try:
                self._search(batch)
                waited = [begin - row.request.submitted for row in batch]
                self._on_batch(Ran(len(batch), time.monotonic() - begin, waited))
            finally:
                self._end(batch, begin)
                del batch  # a thread that waits would keep the model of its last one

    def _end(self, batch: list[_Row], begin: float) -> None:
        group, size = self._shape(batch)
        with self._changed:
            now = time.monotonic()
            self._pace_of(group).learn(size, now - max(begin, self._ended))  # two share the time
            self._ended = now
            self._running.remove((group, size))
            self._changed.notify_all()

    def _shape(self, batch: list[_Row]) -> tuple[Hashable, int]:
        """Its group, and the size that it is padded to."""
        group = batch[0].request.group
        return group, next(one for one in self._sizes(group) if one >= len(batch))

    def _next(self) -> list[_Row]:
        """The rows to search now: the oldest, and others of its group; [] once closed and done."""
        with self._choosing:
            of_group, most = self._of_one_group()
            batch = self._closest(of_group, most)  # others may submit meanwhile
            with self._changed:
                self._remove(batch)
                if batch:
                    self._running.append(self._shape(batch))
            return batch

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        self._remove([row for row in self._rows if not row.request.is_wanted(now)])

    def _remove(self, rows: list[_Row]) -> None:
        if not rows:
            return
        unwanted = {*map(id, rows)}  # some of a batch may be gone: they were cancelled meanwhile
        removed = [row.request.group for row in self._rows if id(row) in unwanted]
        self._rows = deque(row for row in self._rows if id(row) not in unwanted)
        self._rows_of -= Counter(removed)  # which keeps no group that has none

    def _of_one_group(self) -> tuple[list[_Row], int]:
        """The oldest row and all others of its group, and how many of them may share a batch.

        While a batch is searched, at least so many; none once all is closed and done.
        """
        with self._changed:
            while True:
                self._drop_unwanted()
                of_group = [r for r in self._rows if r.request.group == self._rows[0].request.group]
                if of_group:
                    most = self._size(of_group[0].request)
                    if not self._running or len(of_group) >= most:
                        return of_group, most
                elif self._closed:
                    return [], 0
                self._changed.wait()

    def _closest(self, rows: list[_Row], most: int) -> list[_Row]:
        """The first row, and of the others those that are closest to it in width."""
        if len(rows) <= most:
            return rows
        oldest, new = rows[0], [row for row in rows if row.width < 0]
        for row, width in zip(new, self._widths_of(new), strict=True):
            row.width = width
        return sorted(rows, key=lambda row: abs(row.width - oldest.width))[:most]

    def _widths_of(self, rows: list[_Row]) -> Sequence[int]:
        try:
            return self._widths(rows[0].request.group, [row.value for row in rows]) if rows else []
        except Exception:  # the fault of one of them: its search will say so to who has asked
            return [0] * len(rows)

    def _search(self, batch: list[_Row]) -> None:
        """One batch; what makes it fail is the fault of one request, so each is tried alone."""
        try:
            results = self._run(batch[0].request.group, [row.value for row in batch])
            for row, result in zip(batch, results, strict=True):
                row.request.give(row.place, result)
        except Exception as error:
            requests = {id(row.request): row.request for row in batch}
            for one in requests.values():
                if len(requests) == 1:
                    one.fail(error)
                else:
                    self._search([row for row in batch if row.request is one])
