"""The service over HTTP, with a tiny model: in this process, and in a browser."""

import gc
import json
import logging
import weakref

import numpy as np
import pytest
from browser import check_reading, chromium, seen
from served import ask, listening, post
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.compilations import CompilationCounter
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.serving.guard import KEY_HEADER
from tca4rec_jax.serving.model import Limits, ServedModel
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
    """Of the run; "fewer" is the same with a list of items that are never recommended."""

    def load(name):
        if name != "fewer":
            return model_of(experiment)
        config = make_config(experiment.workdir, "any")
        config.decoding.deny = str(experiment.workdir / "deny.txt")
        return model_of(Experiment(config, experiment.workdir))

    service = Service(load, "", LIMITS)
    service.reload()
    yield service
    service.close()


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


def test_what_is_loaded_anew_is_served_until_it_is_taken_back(service, experiment):
    def listed():
        (items,) = post(service, "/recommend", {"history": ["0", "1"], "k": 3}).json()["lists"]
        return [one["item_id"] for one in items]

    before = listed()
    (experiment.workdir / "deny.txt").write_text("\n".join(before[:2]))
    service.reload("fewer")
    after = listed()
    assert after[0] == before[2]
    assert not {*after} & {*before[:2]}
    service.rollback()
    assert listed() == before


def test_memory_holds_the_model_in_use_and_the_one_before(experiment, monkeypatch):
    loaded = []

    def load(name):
        model = model_of(experiment)
        loaded.append(weakref.ref(model._recommender))
        return model

    monkeypatch.setattr(gc, "collect", lambda: 0)  # they are in no cycle
    service = Service(load, "", LIMITS)
    for _ in range(4):
        service.reload()
    assert [one() is not None for one in loaded] == [False, False, True, True]
    service.close()


def test_a_list_is_explained(service):
    body = {"history": ["0", "1"], "k": 2.0, "guidance": 2.0, "deny": ["9"]}
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
        ("recommend", {"history": ["1"], "k": 1.5}, 422, "k: Input should be a valid integer"),
        ("recommend", {"history": ["1"], "k": "1"}, 422, "k: Input should be a valid integer"),
        ("recommend", {"history": ["1"], "histories": [["1"]]}, 422, "either history or"),
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
        ("explain", {"history": ["1"], "compare": [["1", "2"]] * 9}, 422, "compare: List"),
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


def test_keys_are_asked_for_and_documented(service):
    body = {"history": ["1"], "k": 1}
    for given, status in (({}, 401), ({KEY_HEADER: "wrong"}, 401), ({KEY_HEADER: "right"}, 200)):
        answer = post(service, "/recommend", body, key="right", headers=given.items())
        assert answer.status_code == status
    header = {KEY_HEADER: "right"}.items()
    assert post(service, "/admin/rollback", {}, key="right", headers=header).status_code == 401
    assert post(service, "/admin/rollback", {}, headers={KEY_HEADER: ""}.items()).status_code == 401
    watched = ask(service, *[("GET", path, None) for path in ("/", "/ready", "/metrics")], key="k")
    assert [one.status_code for one in watched] == [200] * 3
    for key in ("", "k"):
        (answer,) = ask(service, ("GET", "/openapi.json", None), key=key)
        paths = answer.json()["paths"]
        locked = {path for path in paths for one in paths[path].values() if "security" in one}
        of_all = {"/recommend", "/score", "/explain", "/items"} if key else set()
        assert locked == {"/admin/reload", "/admin/rollback"} | of_all
    fields = answer.json()["components"]["schemas"]["ExplainRequest"]["properties"]
    assert fields["k"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert (fields["children"]["minimum"], fields["children"]["maximum"]) == (1, 100)


def test_the_limits_are_in_the_openapi(service):
    (answer,) = ask(service, ("GET", "/openapi.json", None))
    of_type = answer.json()["components"]["schemas"]
    recommend, score, explain = (
        of_type[f"{name}Request"]["properties"] for name in ("Recommend", "Score", "Explain")
    )
    assert [one["history"]["maxItems"] for one in (score, explain)] == [5, 5]
    assert recommend["history"]["anyOf"][0]["maxItems"] == 5
    assert recommend["histories"]["anyOf"][0]["maxItems"] == 3
    assert recommend["histories"]["anyOf"][0]["items"]["maxItems"] == 5
    assert [recommend["allow"]["anyOf"][0]["maxItems"], explain["deny"]["maxItems"]] == [5, 5]
    assert score["candidates"]["maxItems"] == 3


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
    assert "secret" not in json.dumps(lines) + caplog.text


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


def test_more_histories_than_may_ever_wait_are_refused(experiment):
    model = model_of(experiment, Limits(histories=5, waiting=2))
    assert len(model.lists_after([["1"]] * 2, 1, None, {})[1]) == 2
    with pytest.raises(UserError, match="has 3 histories: at most 2"):
        model.lists_after([["1"]] * 3, 1, None, {})


@pytest.fixture(scope="module")
def address(service):
    """Where the service listens."""
    with listening(service) as (host, port):
        yield f"http://{host}:{port}/"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_list_and_why_follow_lambda_in_a_browser(address, width, dark):
    with chromium() as browser, seen(browser, address, width=width, dark=dark) as page:
        page.click("summary")
        page.fill("#key", "k")
        for title in ("aa", "bb"):
            page.fill("#search", title)
            with page.expect_response("**/recommend") as answer:  # a later list is explained anew
                page.click(f"#found button:text-is('{title}')")
            answer.value.finished()
        page.wait_for_selector("#list li")
        page.click("#why")
        frame = page.wait_for_selector("#explanation:not([hidden])").content_frame()
        assert "Why this list" in frame.inner_text("h1")
        check_reading(frame)
        check_reading(page)
        before = page.inner_text("#list"), page.get_attribute("#explanation", "srcdoc")
        page.focus("#guidance")
        page.keyboard.press("End")
        page.wait_for_function("before => $('explanation').srcdoc !== before", arg=before[1])
        assert page.inner_text("#value") == "4"
        assert page.inner_text("#list") != before[0]
        assert "4 times" in page.frames[1].inner_text("p")
        height = page.frames[1].evaluate("document.documentElement.offsetHeight")
        page.wait_for_function("least => $('explanation').offsetHeight >= least", arg=height)
        page.click("#history button")
        page.click("#history button")
        page.wait_for_selector("#explanation", state="hidden")
