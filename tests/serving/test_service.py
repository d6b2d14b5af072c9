"""The service with a model that only says its name: queue, reload, rollback, faults, end."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
import weakref

import pytest
from counted import FAULTS, Counted, counted
from httpx2 import ASGITransport, AsyncClient
from served import ask, listening, post

from tca4rec_jax.errors import UserError
from tca4rec_jax.serving.app import make_app
from tca4rec_jax.serving.batcher import Closed, Full
from tca4rec_jax.serving.connections import connections
from tca4rec_jax.serving.guard import KEY_HEADER
from tca4rec_jax.serving.model import Limits
from tca4rec_jax.serving.server import serve
from tca4rec_jax.serving.service import Busy, Service


def test_an_address_that_is_taken_is_told_before_anything_is_loaded():
    service = counted("broken")
    app = make_app(service, key="", admin_key="")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"can't listen on 127.0.0.1, port {port} .*in use"):
            serve(service, app, host="127.0.0.1", port=port)
    assert service.error is None
    service.close()


def test_nothing_is_answered_before_all_is_compiled_nor_after_the_end():
    service = counted()
    requests = [("POST", "/recommend", {"history": ["1"]}), ("GET", "/ready", None)]
    requests += [("GET", "/health", None)]
    assert [one.status_code for one in ask(service, *requests)] == [503, 503, 200]
    service.reload()
    assert [one.status_code for one in ask(service, *requests)] == [200, 200, 200]
    service.drain()
    answers = ask(service, *requests)
    assert [one.status_code for one in answers] == [503, 503, 200]
    assert answers[0].headers["Retry-After"] == "1"
    assert answers[1].json()["state"] == "draining"
    service.close()


def test_the_end_takes_no_reload_and_waits_for_none():
    may_load = threading.Event()

    def load(name):
        assert name == "old" or may_load.wait(5)
        return Counted(name, may_load)

    service = Service(load, "old", Limits())
    service.reload()
    reloads = [service.begin_reload("new")]
    while not service.is_changing:
        time.sleep(0.01)
    reloads.append(service.begin_reload("newer"))
    with pytest.raises(Busy):
        reloads[1].result(5)
    service.drain()
    with pytest.raises(Closed):
        reloads[0].result(0)
    requests = [("POST", f"/admin/{path}", {}) for path in ("reload", "rollback")]
    answers = ask(service, *requests, admin_key="key", headers={KEY_HEADER: "key"})
    assert [one.status_code for one in answers] == [503] * 2
    may_load.set()
    service.close()


def test_who_is_told_to_end_while_it_loads_has_not_failed():
    may_load = threading.Event()
    service = Service(lambda name: may_load.wait(5) and Counted(name, may_load), "old", Limits())
    service.start()
    service.drain()
    assert service.error is None
    assert service.is_drained
    may_load.set()


def test_a_full_queue_and_a_deadline():
    may_go_on = threading.Event()
    service = counted("small", may_go_on=may_go_on, waiting=2, seconds=0.3)
    service.reload()
    answers = ask(service, *[("POST", "/recommend", {"history": ["1"]})] * 9)
    statuses = [one.status_code for one in answers]
    assert {*statuses} == {429, 504}
    assert 2 <= statuses.count(504) <= 4  # two wait, at most one is searched in each thread
    assert {one.headers.get("Retry-After") for one in answers} == {"1", None}
    may_go_on.set()
    service.close()


def test_a_reload_and_a_rollback_under_load_lose_nothing():
    may_go_on = threading.Event()
    service = counted(may_go_on=may_go_on)
    service.reload()
    app = make_app(service, key="", admin_key="key")
    request = {"history": ["1"]}

    async def under_load():
        transport, headers = ASGITransport(app), {KEY_HEADER: "key"}
        async with AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            before = [client.post("/recommend", json=request) for _ in range(8)]
            before = [*map(asyncio.create_task, before)]  # two batches of at most two, and more
            while not service._batchers[0].waiting:
                await asyncio.sleep(0.01)
            assert (await client.post("/admin/reload", json={"run": "new"})).json()["run"] == "new"
            after = asyncio.create_task(client.post("/recommend", json=request))
            await asyncio.sleep(0.05)
            may_go_on.set()
            answers = [await one for one in (*before, after)]
            broken = await client.post("/admin/reload", json={"run": "broken"})
            back = await client.post("/admin/rollback")
            return answers, broken, back, await client.post("/recommend", json=request)

    answers, broken, back, last = asyncio.run(under_load())
    assert service._before.loaded_in.daemon  # SIGTERM need not wait for it
    assert [one.json()["lists"][0][0]["title"] for one in answers] == ["old"] * 8 + ["new"]
    assert (broken.status_code, broken.json()) == (409, {"error": "broken cannot be loaded"})
    assert (back.json()["run"], back.json()["run_before"]) == ("old", "new")
    assert last.json()["lists"][0][0]["title"] == "old"
    service.close()


@pytest.mark.parametrize("run", FAULTS)
def test_what_cannot_be_loaded_is_said_and_changes_nothing(run):
    service = counted()
    service.reload()
    requests = ("POST", "/admin/reload", {"run": run}), ("GET", "/health", None)
    answers = ask(service, *requests, admin_key="key", headers={KEY_HEADER: "key"})
    assert (answers[0].status_code, answers[0].json()) == (409, {"error": str(FAULTS[run])})
    assert answers[1].json()["run"] == "old"
    service.close()


def test_after_a_reload_batches_have_the_size_of_the_new_run():
    service = counted()
    service.reload()
    service.reload("small")
    answer = post(service, "/recommend", {"histories": [["1"], ["2"], ["3"]]})
    assert [found[0]["item_id"] for found in answer.json()["lists"]] == ["1", "2", "3"]
    service.close()


def test_each_run_has_a_pace_of_its_own():
    may_go_on, paces = threading.Event(), iter([{1: 0.01}, {1: 5.0}])

    def load(name):
        model = Counted("small", may_go_on)
        model.warm_up = lambda: next(paces)
        return model

    def submit():
        asked = service.model.lists_after([["1"]], 1, None, {})
        return service._batchers[0].submit(*asked, time.monotonic() + 10)

    service = Service(load, "", Limits())
    service.reload()
    submit()
    service.reload()
    with pytest.raises(Full):  # by 0.01 + 5 s, and 5 that may be beside
        submit()
    service.rollback()
    submit()
    may_go_on.set()
    service.close()


def test_a_reload_looks_for_garbage():
    loaded = []

    def load(name):
        model = Counted(name, None)
        model.itself = model
        loaded.append((name, weakref.ref(model)))
        if name == "unfit":
            raise UserError("unfit")
        return model

    def held():
        return [name for name, one in loaded if one() is not None]

    service = Service(load, "first", Limits())
    for name in ("first", "second", "unfit", "third"):
        with contextlib.suppress(UserError):
            service.reload(name)
    assert held() == ["second", "third"]
    with contextlib.suppress(UserError):
        service.reload("unfit")
    assert isinstance(service.begin_reload("broken").exception(5), UserError)
    assert held() == ["second", "third"]
    service.close()


def test_a_fault_of_the_service_is_logged_without_what_was_asked(caplog):
    service = counted()
    service.reload()
    (answer,) = ask(service, ("GET", "/items?title=secret", None))
    assert (answer.status_code, answer.json()["error"]) == (
        500, "the service has failed, see its log",
    )  # fmt: skip
    (line,) = [record.line for record in caplog.records if hasattr(record, "line")]
    assert line["error"] == "RuntimeError"
    assert "in titles_like" in line["traceback"]
    assert "secret" not in json.dumps(
        {key: value for key, value in line.items() if key != "traceback"}
    )
    service.close()


def test_a_body_that_does_not_arrive_is_not_waited_for():
    service = counted(read_seconds=0.05)
    service.reload()
    app, sent = make_app(service, key="", admin_key=""), []
    scope = {
        "type": "http", "method": "POST", "path": "/recommend", "headers": [], "query_string": b"",
    }  # fmt: skip

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    service.close()


def test_half_a_body_is_not_answered(caplog):
    caplog.set_level(logging.INFO)
    service = counted()
    service.reload()
    app, sent = make_app(service, key="", admin_key=""), []
    scope = {
        "type": "http", "method": "POST", "path": "/recommend", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    body = b'{"history": ["1"]}'
    messages = [{"type": "http.request", "body": body, "more_body": True}]
    messages += [{"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    (line,) = [record.line for record in caplog.records if hasattr(record, "line")]
    assert (sent[0]["status"], line["status"]) == (499, 499)
    service.close()


def seconds_to_the_end(address, head, drop):
    """Of a connection whose client goes on and on with a body that was refused."""
    begin = time.monotonic()
    with socket.create_connection(address, timeout=20) as client, contextlib.suppress(OSError):
        client.sendall(head)
        while time.monotonic() < begin + 5:
            client.sendall(drop)
            time.sleep(0.05)
    return time.monotonic() - begin


def test_who_has_gone_is_not_searched(caplog):
    caplog.set_level(logging.INFO)
    may_go_on, searched = threading.Event(), []
    service = counted("small", may_go_on=may_go_on)
    service.reload()
    run = service.model.run
    service.model.run = lambda group, rows: [searched.append(rows), run(group, rows)][1]
    body = b'{"history": ["1"]}'
    head = b"POST /recommend HTTP/1.1\r\nX-API-Key: k\r\nContent-Type: application/json\r\n"

    def wait_for(waiting):
        deadline = time.monotonic() + 2  # before what is searched ends
        while service._batchers[0].waiting != waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with listening(service, http=connections(9.0)) as address:
        clients = [socket.create_connection(address) for _ in range(8)]
        for client in clients:
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(6)  # and one is searched in each thread
        for client in clients:
            client.close()
        wait_for(0)
        may_go_on.set()
        service.drain()
        service.close()
    assert len(searched) == 2
    statuses = [record.line["status"] for record in caplog.records if hasattr(record, "line")]
    assert statuses == [499] * 8


def test_slow_clients_and_bodies_of_megabytes_over_a_socket():
    service = counted(read_seconds=0.3)
    service.reload()
    head = b"POST /recommend HTTP/1.1\r\nHost: x\r\nX-API-Key: k\r\nContent-Length: %d\r\n\r\n"
    with listening(service, http=connections(0.3)) as address:

        def answer_to(sent):
            with socket.create_connection(address, timeout=20) as client:
                client.sendall(sent)
                return b"".join(iter(lambda: client.recv(1 << 16), b""))  # until it is closed

        assert answer_to(b"POST /recommend HTTP/1.1\r\nHost:") == b""
        assert answer_to(head % 20 + b"{").startswith(b"HTTP/1.1 408 ")
        megabytes = head % 10_000_000 + b"{" * 10_000_000
        assert answer_to(megabytes).startswith(b"HTTP/1.1 413 ")  # it is sent to its end
        closes = megabytes.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost")
        assert answer_to(closes).startswith(b"HTTP/1.1 413 ")
        assert answer_to(closes.replace(b" k\r", b" x\r")).startswith(b"HTTP/1.1 401 ")
        assert answer_to(megabytes.replace(b"HTTP/1.1", b"HTTP/1.0")).startswith(b"HTTP/1.1 413 ")
        assert answer_to(head % 10_000_000).startswith(b"HTTP/1.1 413 ")
        assert answer_to(head.replace(b" k", b" x") % 20 + b"{" * 20).startswith(b"HTTP/1.1 401 ")
        assert answer_to(b"no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert answer_to(head % 900_000 + b"{" * 900_000).startswith(b"HTTP/1.1 422 ")
        assert seconds_to_the_end(address, head.replace(b" k", b" x") % 10_000, b"{") < 2
    service.close()


def test_who_reads_nothing_is_not_answered_for_ever():
    service = counted(read_seconds=0.3)
    with (
        listening(service, http=connections(0.3)) as address,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(b"GET /docs-static/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 8)
        time.sleep(0.9)
        client.settimeout(5)
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while more := client.recv(1 << 20):
                answers += more
    assert 1 <= answers.count(b"HTTP/1.1 200 ") < 8  # what the system had taken, and no more
    service.close()


WISH = (
    b"POST /recommend HTTP/1.1\r\nHost: x\r\nX-API-Key: k\r\nContent-Type: application/json\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
)
ASKED = b'{"history": ["1"]}'
SIZED = WISH + b"Content-Length: %d\r\n\r\n" % len(ASKED)
CHUNKED = WISH + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(ASKED), ASKED)


@pytest.mark.parametrize(
    "sent",
    [
        [SIZED + ASKED],
        [SIZED, ASKED],
        [SIZED[:90], SIZED[90:] + ASKED],
        [CHUNKED + CHUNKS],
        [CHUNKED, CHUNKS],
    ],
    ids=["one segment", "own segment", "half a head", "chunked", "chunked, own segment"],
)
def test_java_clients_ask_for_http_2_and_are_answered_over_http_1(sent):
    service = counted()
    service.reload()
    with (
        listening(service, http=connections(5.0)) as address,
        socket.create_connection(address, timeout=5) as client,
    ):
        for _ in range(2):
            for part in sent:
                client.sendall(part)
                time.sleep(0.05)
            answer = client.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            assert b'"item_id":"1"' in answer
        client.sendall((SIZED + ASKED) * 3)  # and if they don't wait for the answers
        answers = b""
        while answers.count(b"HTTP/1.1 200 ") < 3:
            assert (more := client.recv(1 << 16))
            answers += more
    service.close()
