"""The service over HTTP, in this process: a tiny model, and one that is only counted on."""

import asyncio
import json
import logging
import threading

import numpy as np
import pytest
from httpx2 import ASGITransport, AsyncClient
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.compilations import CompilationCounter
from tca4rec_jax.decoding.recommender import Recommended, Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.serving.app import make_app
from tca4rec_jax.serving.guard import KEY_HEADER
from tca4rec_jax.serving.model import Group, Limits, ServedModel
from tca4rec_jax.serving.service import Service

LIMITS = Limits(histories=3, items=5, candidates=3, waiting=8, seconds=20.0, body_bytes=2000)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    make_workdir(path)
    return Experiment(make_config(path, "any"), path)


def model_of(experiment, limits=LIMITS):
    return ServedModel(experiment, "", limits, guidance=0.5)


@pytest.fixture(scope="module")
def service(experiment):
    service = Service(lambda name: model_of(experiment), "", LIMITS)
    service.reload()
    yield service
    service.close()


def ask(service, *requests, key="", admin_key="", headers=()):
    """The answers to requests (method, path, json) that are sent at once."""
    app = make_app(service, key=key, admin_key=admin_key)

    async def send():
        async with AsyncClient(transport=ASGITransport(app), base_url="http://x") as client:
            calls = (
                client.request(
                    method, path, headers={"content-type": "application/json", **dict(headers)},
                    **({"content": body} if isinstance(body, bytes) else {"json": body}),
                )
                for method, path, body in requests
            )  # fmt: skip
            return await asyncio.gather(*calls)

    return asyncio.run(send())


def post(service, path, body, **more):
    (answer,) = ask(service, ("POST", path, body), **more)
    return answer


def test_answers_are_those_of_the_recommender_and_nothing_is_compiled(service, experiment):
    histories = [["0", "1"], ["2"], ["cc", "4", "5"], ["7", "7"], ["8"]]
    wanted = [(one, history) for one in (None, 0.0, 0.5, 2.0) for history in histories]
    counter = CompilationCounter()
    requests = [
        ("POST", "/recommend", {"history": history, "guidance": guidance, "k": 2})
        for guidance, history in wanted
    ]
    answers = ask(service, *requests[:8]) + ask(service, *requests[8:14])
    answers += ask(service, *requests[14:])
    several = post(service, "/recommend", {"histories": histories[:3], "k": 3})
    filters = {"allow": ["0", "3", "6"], "deny": ["3"], "exclude_history": True}
    filtered = post(service, "/recommend", {"history": ["0"], "k": 3, **filters})
    scores = post(service, "/score", {"history": ["3"], "candidates": ["5", "9"]})
    assert counter.count == 0
    counter.close()
    recommender = Recommender(experiment, "", guidance=0.5)
    for (guidance, history), answer in zip(wanted, answers, strict=True):
        found = recommender.recommend(history, 2, guidance=guidance)
        assert answer.status_code == 200, answer.text
        (items,) = answer.json()["lists"]
        assert [one["item_id"] for one in items] == [one.item_id for one in found]
        assert [one["title"] for one in items] == [one.title for one in found]
        assert [one["score"] for one in items] == pytest.approx(
            [one.score for one in found], abs=1e-4
        )
    lists = [recommender.recommend(history, 3) for history in histories[:3]]
    assert [[one["item_id"] for one in items] for items in several.json()["lists"]] == [
        [one.item_id for one in items] for items in lists
    ]
    assert [one["item_id"] for one in filtered.json()["lists"][0]] == ["6"]
    alone = recommender.score(["3"], ["5", "9"])
    np.testing.assert_allclose(scores.json()["scores"], alone, atol=1e-4)


def test_a_list_is_explained(service):
    body = {"history": ["0", "1"], "k": 2, "guidance": 2.0, "deny": ["9"]}
    items = post(service, "/recommend", body).json()["lists"][0]
    more = {"compare": [[items[1]["item_id"], items[0]["title"]]]}
    answer = post(service, "/explain", body | more)
    assert answer.status_code == 200, answer.text
    explanation = answer.json()["explanation"]
    listed = [one for one in explanation["items"] if one["place"] is not None]
    assert [one["item_id"] for one in listed] == [one["item_id"] for one in items]
    assert explanation["settings"]["guidance"] == 2.0
    page = post(service, "/explain", body | {"page": True, "leave_one_out": False})
    assert page.headers["content-type"].startswith("text/html")
    assert items[0]["title"] in page.text


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("recommend", b'{"history": ', 400, "the body is no JSON"),
        ("recommend", b"\xff\xfe", 400, ""),
        ("recommend", {"history": []}, 422, "history: List should have at least 1 item"),
        ("recommend", {"histories": []}, 422, "histories: List should have at least 1 item"),
        ("recommend", {"histories": [["1"], []]}, 422, "histories.1: List should have"),
        ("recommend", {}, 422, "give either history or histories"),
        ("recommend", {"history": ["1"], "kk": 1}, 422, "kk: Extra inputs"),
        ("recommend", {"history": ["1"], "k": 0}, 422, "k: Input should be greater"),
        ("recommend", {"history": ["1"], "k": 99}, 422, "k is 99: at most 3, the beams"),
        ("recommend", {"history": ["1"] * 6}, 422, "history 0 has 6 items: at most 5"),
        ("recommend", {"histories": [["1"]] * 4}, 422, "has 4 histories: at most 3"),
        ("recommend", {"history": ["1"], "guidance": -1}, 422, "guidance: Input should be"),
        ("recommend", b'{"history": ["1"], "guidance": NaN}', 422, "guidance: Input should be"),
        ("recommend", {"history": ["1", "bbb"]}, 422, "'bbb' is no item id and no title; did you"),
        ("recommend", {"history": ["1"], "allow": ["x"]}, 422, "allow: 'x' is no item id"),
        ("recommend", {"history": ["1"], "allow": ["2"], "deny": ["2"]}, 422, "leaves no item"),
        ("score", {"history": ["1"], "candidates": ["1"] * 4}, 422, "has 4 items: at most 3"),
        ("score", {"history": ["1"], "candidates": ["q"]}, 422, "candidates: 'q' is no item id"),
        ("explain", {"history": ["1"], "compare": [["1"]]}, 422, "compare.0: List should have"),
        ("explain", {"history": ["1"], "compare": [["1", "q"]]}, 422, "compare: 'q' is no item"),
        ("recommend", b"x" * 3000, 413, "at most 2000 bytes"),
        ("nowhere", {}, 404, "Not Found"),
        ("health", {}, 405, "Method Not Allowed"),
    ],
)
def test_what_is_refused_is_said_in_one_line(service, path, body, status, message):
    answer = post(service, f"/{path}", body)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    assert message in answer.json()["error"]


def test_keys_are_asked_for(service):
    body = {"history": ["1"], "k": 1}
    for given, status in (({}, 401), ({KEY_HEADER: "wrong"}, 401), ({KEY_HEADER: "right"}, 200)):
        answer = post(service, "/recommend", body, key="right", headers=given.items())
        assert answer.status_code == status
    header = {KEY_HEADER: "right"}.items()
    assert post(service, "/admin/rollback", {}, key="right", headers=header).status_code == 401
    assert post(service, "/admin/rollback", {}, headers={KEY_HEADER: ""}.items()).status_code == 401
    watched = ask(service, *[("GET", path, None) for path in ("/", "/ready", "/metrics")], key="k")
    assert [one.status_code for one in watched] == [200] * 3


def test_a_line_of_the_log_has_no_history(service, caplog):
    caplog.set_level(logging.INFO)
    post(service, "/recommend", {"history": ["cc", "secret title"]})
    post(service, "/recommend", {"history": ["cc"], "k": 1})
    lines = [record.line for record in caplog.records if hasattr(record, "line")]
    assert [(line["status"], line["route"]) for line in lines] == [
        (422, "/recommend"), (200, "/recommend"),
    ]  # fmt: skip
    assert lines[1]["rows"] == 1
    assert not {"secret title", "cc"} & {*json.dumps(lines).split('"')}
    assert "secret" not in caplog.text


def test_titles_are_found_and_the_page_needs_no_network(service):
    (found, none, page) = ask(
        service,
        ("GET", "/items?title=C", None),
        ("GET", "/items?title=zz", None),
        ("GET", "/", None),
    )
    assert {"item_id": "2", "title": "cc"} in found.json()["items"]
    assert found.json()["items"][0]["title"].startswith("c")
    assert none.json() == {"items": []}
    assert "://" not in page.text.replace("http://www.w3.org/2000/svg", "")


def test_prometheus_reads_what_was_done(service):
    post(service, "/recommend", {"history": ["1"]})
    (answer,) = ask(service, ("GET", "/metrics", None))
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
    assert float(lines["tca4rec_ready"]) == 1
    assert float(lines['tca4rec_requests_total{route="/recommend",status="200"}']) >= 1
    assert float(lines["tca4rec_batch_rows_count"]) >= 1


class Counted:
    """A model that gives its name, when it may."""

    most_items, guidance, guided, explains, made_from = 3, 0.0, False, False, {}

    def __init__(self, name, may_go_on):
        self.name, self.may_go_on, self.batch_sizes = name, may_go_on, [1 if name == "small" else 2]
        if name == "broken":
            raise UserError("broken cannot be loaded")

    def warm_up(self):
        self.loaded_in = threading.current_thread()

    def titles_like(self, text, most):
        raise RuntimeError(f"a bug that quotes {text}")

    def lists_after(self, histories, k, guidance, filters):
        return Group(self, "recommend", 0.0), [(self.name, history) for history in histories]

    def run(self, group, rows):
        assert self.may_go_on.wait(5)
        assert {name for name, _ in rows} == {self.name}
        assert len(rows) <= self.batch_sizes[-1]
        return [[Recommended(history[0], self.name, 0.0)] for _, history in rows]


def counted(run="old", may_go_on=None, **limits):
    """A service of such models; what is searched at once is told to go on, or waits."""
    event = may_go_on or threading.Event()
    if may_go_on is None:
        event.set()
    service = Service(lambda name: Counted(name, event), run, Limits(**limits))
    return service


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


def test_a_full_queue_and_a_deadline():
    may_go_on = threading.Event()
    service = counted(may_go_on=may_go_on, waiting=2, seconds=0.3)
    service.reload()
    answers = ask(service, *[("POST", "/recommend", {"history": ["1"]})] * 9)
    statuses = [one.status_code for one in answers]
    assert {*statuses} == {429, 504}
    assert 2 <= statuses.count(504) <= 4
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
            before = [asyncio.create_task(client.post("/recommend", json=request)) for _ in "1234"]
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
    assert [one.json()["lists"][0][0]["title"] for one in answers] == ["old"] * 4 + ["new"]
    assert (broken.status_code, broken.json()) == (409, {"error": "broken cannot be loaded"})
    assert (back.json()["run"], back.json()["run_before"]) == ("old", "new")
    assert last.json()["lists"][0][0]["title"] == "old"
    service.close()


def test_after_a_reload_batches_have_the_size_of_the_new_run():
    service = counted()
    service.reload()
    service.reload("small")
    answer = post(service, "/recommend", {"histories": [["1"], ["2"], ["3"]]})
    assert [found[0]["item_id"] for found in answer.json()["lists"]] == ["1", "2", "3"]
    service.close()


def test_more_histories_than_may_ever_wait_are_refused(experiment):
    model = model_of(experiment, Limits(histories=5, waiting=2))
    assert len(model.lists_after([["1"]] * 2, 1, None, {})[1]) == 2
    with pytest.raises(UserError, match="has 3 histories: at most 2"):
        model.lists_after([["1"]] * 3, 1, None, {})


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
