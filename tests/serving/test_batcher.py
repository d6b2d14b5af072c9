"""The queue in front of a model, without model and HTTP."""

import contextlib
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future

import pytest

from tca4rec_jax.serving import batcher
from tca4rec_jax.serving.batcher import Batcher, Closed, Full, Late
from tca4rec_jax.serving.pace import Pace


class Searches:
    """Doubles numbers, in batches that wait until they may go on."""

    def __init__(self, seconds_of=(), **sizes):
        self.batches, self.may_go_on, self.begun = [], threading.Event(), threading.Event()
        pace = Pace(dict(seconds_of))
        sizes["pace_of"] = lambda group: pace
        sizes = {"sizes": lambda group: (4,), "most_waiting": 10} | sizes
        self.batcher = Batcher(self.run, **sizes)

    def run(self, group, values):
        self.batches.append((group, list(values)))
        self.begun.set()
        assert self.may_go_on.wait(5)
        if -1 in values:
            raise ValueError("-1")
        return [2 * value for value in values]

    def submit(self, *values, group="a", seconds=5.0):
        return self.batcher.submit(group, values, time.monotonic() + seconds)

    def hold(self):
        """A first request, which is being searched while others come."""
        first = self.submit(0)
        assert self.begun.wait(5)
        return first

    def hold_both(self):
        """A batch in each thread: others wait, however many they are."""
        self.hold()
        self.begun.clear()
        self.submit(0, 0, 0, 0)
        assert self.begun.wait(5)


@pytest.fixture
def searches(request):
    made = Searches(**getattr(request, "param", {}))
    yield made
    made.may_go_on.set()
    made.batcher.close()
    made.batcher.join(5)


def test_what_waits_shares_batches_of_one_group_the_oldest_first(searches):
    held = searches.hold()
    futures = [searches.submit(1, 2), searches.submit(3, group="b"), searches.submit(4, 5, 6)]
    searches.may_go_on.set()
    assert [one.result(5) for one in (held, *futures)] == [[0], [2, 4], [6], [8, 10, 12]]
    assert searches.batches == [("a", [0]), ("a", [1, 2, 4, 5]), ("b", [3]), ("a", [6])]


def test_a_whole_batch_begins_beside_the_one_that_is_searched_and_less_waits(searches):
    held = searches.hold()
    searches.begun.clear()
    three = searches.submit(1, 2, 3)
    assert not searches.begun.wait(0.1)
    two = searches.submit(4, 5)
    assert searches.begun.wait(5)
    searches.begun.clear()
    others = searches.submit(6, 7, 8)
    assert not searches.begun.wait(0.1)  # four wait again, but there is no third thread
    searches.may_go_on.set()
    results = [one.result(5) for one in (held, three, two, others)]
    assert results == [[0], [2, 4, 6], [8, 10], [12, 14, 16]]
    assert searches.batches == [("a", [0]), ("a", [1, 2, 3, 4]), ("a", [5, 6, 7, 8])]


def test_rows_of_a_width_share_a_batch_and_the_oldest_is_never_left():
    asked = []

    def widths(group, values):
        asked.append(values)
        return [value // 10 for value in values]

    searches = Searches(widths=widths)
    searches.hold_both()
    values = [11, 51, 12, 21, 13, 52, 14, 15, 53]
    futures = [searches.submit(value) for value in values]
    searches.may_go_on.set()
    assert [one.result(5) for one in futures] == [[2 * one] for one in values]
    groups = [values for _, values in searches.batches[2:]]
    assert groups == [[11, 12, 13, 14], [51, 52, 53, 21], [15]]
    assert asked == [values]  # of each once, together; none where all fit
    searches.batcher.close()


def test_a_width_that_fails_is_the_fault_of_its_request_alone():
    searches = Searches(widths=lambda group, values: [len(None) for value in values])
    searches.hold_both()
    futures = [searches.submit(value) for value in (1, 2, -1, 3, 4)]
    searches.may_go_on.set()
    assert [one.result(5) for one in futures if one is not futures[2]] == [[2], [4], [6], [8]]
    with pytest.raises(ValueError, match="-1"):
        futures[2].result(5)
    searches.batcher.close()


def test_a_full_queue_refuses_a_request_as_a_whole(searches):
    searches.hold_both()
    futures = [searches.submit(*range(4)), searches.submit(*range(5))]
    with pytest.raises(Full, match="try again in 1 s") as refused:
        searches.submit(1, 2)
    assert refused.value.seconds == 1
    assert searches.batcher.waiting == 9
    searches.may_go_on.set()
    assert [len(one.result(5)) for one in futures] == [4, 5]


@pytest.mark.parametrize("searches", [{"seconds_of": {4: 1.0}}], indirect=True)
def test_what_would_be_late_is_refused_unless_nobody_is_before_it(searches):
    held = searches.submit(0, seconds=0.9)
    assert searches.begun.wait(5)
    with pytest.raises(Full, match="try again in 3 s"):  # three batches, and one beside
        searches.submit(*range(5), seconds=1.5)
    fine = searches.submit(*range(5), seconds=4.1)
    searches.may_go_on.set()
    assert (held.result(5), fine.result(5)) == ([0], [0, 2, 4, 6, 8])


def test_what_is_admitted_is_in_time_though_each_has_a_batch_of_its_own():
    def run(group, values):
        time.sleep(0.05)
        return values

    pace = Pace(dict.fromkeys((1, 4, 16), 0.05))
    one = Batcher(run, sizes=lambda _: (1, 4, 16), most_waiting=99, pace_of=lambda _: pace)
    admitted = []
    for guidance in range(60):
        with contextlib.suppress(Full):
            admitted.append(one.submit(guidance, [guidance], time.monotonic() + 1))
    assert 5 < len(admitted) < 25
    assert [future.result(5) for future in admitted] == [[n] for n in range(len(admitted))]
    one.close()


@pytest.mark.parametrize(("seconds", "begun"), [(3.9, [[1], [2]]), (5.0, [[1, 2, 3]])])
def test_a_batch_is_no_larger_than_the_deadline_allows(seconds, begun):
    searches = Searches(sizes=lambda group: (1, 4), seconds_of={1: 0.3, 4: 1.0})
    found = searches.submit(1, 2, 3, seconds=seconds)
    while len(searches.batches) < len(begun):
        time.sleep(0.01)
    assert sorted(values for _, values in searches.batches) == begun
    searches.may_go_on.set()
    assert found.result(5) == [2, 4, 6]
    searches.batcher.close()


def test_both_threads_may_fail_a_request_at_once(monkeypatch):
    class Slow(Future):
        def done(self):
            done = super().done()
            time.sleep(0.05)  # the other thread looks meanwhile
            return done

    monkeypatch.setattr(batcher, "Future", Slow)
    searches = Searches()
    broken = searches.submit(*[-1] * 8)
    while len(searches.batches) < 2:
        time.sleep(0.01)
    searches.may_go_on.set()
    with pytest.raises(ValueError, match="-1"):
        broken.result(5)
    assert searches.submit(1).result(5) == [2]
    searches.batcher.close()
    searches.batcher.join(5)
    assert searches.batcher.is_idle


def test_late_and_cancelled_requests_are_not_searched(searches):
    searches.hold()
    late, cancelled, fine = searches.submit(1, seconds=0), searches.submit(2), searches.submit(3)
    assert cancelled.cancel()
    searches.batcher.forget()
    assert searches.batcher.waiting == 1
    searches.may_go_on.set()
    assert fine.result(5) == [6]
    with pytest.raises(Late):
        late.result(5)
    with pytest.raises(CancelledError):
        cancelled.result(5)
    assert searches.batches[1:] == [("a", [3])]


def test_the_fault_of_one_request_is_not_that_of_its_batch(searches):
    searches.hold()
    fine, broken, other = searches.submit(1), searches.submit(-1), searches.submit(2)
    searches.may_go_on.set()
    assert (fine.result(5), other.result(5)) == ([2], [4])
    with pytest.raises(ValueError, match="-1"):
        broken.result(5)


def test_a_thread_that_waits_holds_nothing():
    class Group:
        pass

    group, one = Group(), Batcher(lambda group, rows: rows, sizes=lambda _: (4,), most_waiting=9)
    held = weakref.ref(group)
    one.submit(group, [1], time.monotonic() + 5).result(5)
    del group
    deadline = time.monotonic() + 5
    while held() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held() is None
    one.close()


def test_what_was_taken_is_searched_after_the_end(searches):
    held = searches.hold()
    waiting = searches.submit(1, 2, 3, 4, 5)
    searches.batcher.close()
    with pytest.raises(Closed):
        searches.submit(6)
    assert not searches.batcher.is_idle
    searches.may_go_on.set()
    searches.batcher.join(5)
    assert searches.batcher.is_idle
    assert (held.result(0), waiting.result(0)) == ([0], [2, 4, 6, 8, 10])


def test_many_threads_lose_nothing():
    ran = []
    searches = Searches(most_waiting=10_000, on_batch=ran.append)
    searches.may_go_on.set()
    results = {}

    def ask(client):
        for number in range(50):
            value = 100 * client + number
            results[value] = searches.submit(value, group=value % 3).result(10)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    searches.batcher.close()
    searches.batcher.join(5)
    assert results == {100 * a + b: [2 * (100 * a + b)] for a in range(20) for b in range(50)}
    assert sum(one.rows for one in ran) == 1000 == sum(len(one.waited) for one in ran)
    assert all(
        len(values) <= 4 and {v % 3 for v in values} == {g} for g, values in searches.batches
    )
