"""launch/serve.py as a process, from its start to SIGTERM under load; an example for Kubernetes."""

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import counted
import forked
import httpx2
import pytest
import yaml
from forked import Script
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.experiment import Experiment
from tca4rec_jax.serving.app import make_app
from tca4rec_jax.serving.model import Limits
from tca4rec_jax.serving.server import seconds_to_end
from tca4rec_jax.serving.service import Service
from tca4rec_jax.train import train

LAUNCH = Path(__file__).parents[2] / "launch"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(ready, script, seconds=120):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, script.printed("stderr")
        assert script._process.exitcode is None, script.printed("stderr")
        time.sleep(0.1)


@pytest.mark.slow
def test_a_process_serves_and_ends_without_losing_what_it_took(tmp_path):
    make_workdir(tmp_path)
    train(Experiment(make_config(tmp_path, "any"), tmp_path))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = [f"--workdir={tmp_path}", f"--port={port}", "--candidates=3", "--run=any"]
    flags.append("--config.inference.batch_size=1")  # few programs to compile
    environment = os.environ | {"TCA4REC_API_KEY": "k"}
    script = Script([str(LAUNCH / "serve.py"), *flags], environment, devices=1)

    def is_ready():
        try:
            return httpx2.get(f"{url}/ready").status_code == 200
        except httpx2.TransportError:
            return False

    wait_until(is_ready, script)
    before, after = asyncio.run(ask_until_the_end(url, script.pid))
    assert script.wait(30) == 0, script.printed("stderr")
    assert [one and one.status_code for one in before] == [200] * len(before)
    statuses = [one.status_code for one in (*before, *after) if one is not None]
    assert {*statuses} <= {200, 503}
    lines = [json.loads(line) for line in script.printed("stderr").splitlines() if line[0] == "{"]
    answered = [line["status"] for line in lines if line.get("route") == "/recommend"]
    assert sorted(answered) == sorted(statuses)  # what was taken has got its answer


async def ask_until_the_end(url, pid):
    """The answers to what was taken before SIGTERM, and to what was sent after: None for no answer.

    A connection may wait for a service that stops listening: the system then resets it.
    """
    async with httpx2.AsyncClient(base_url=url, headers={"X-API-Key": "k"}) as client:

        async def ask():
            try:
                return await client.post("/recommend", json={"histories": [["1", "2"]] * 8})
            except (httpx2.ConnectError, httpx2.ReadError):
                return None

        before = [asyncio.create_task(ask()) for _ in range(8)]
        taken = waiting = 0
        while taken < len(before):
            done = sum(one.done() for one in before)
            metrics = (await client.get("/metrics")).text
            waiting = float(re.search(r"^tca4rec_waiting (.*)$", metrics, re.MULTILINE)[1])
            taken = done + math.ceil(waiting / 8)  # the oldest are searched first
        assert waiting
        os.kill(pid, signal.SIGTERM)
        after = [asyncio.create_task(ask()) for _ in range(8)]
        return await asyncio.gather(*before), await asyncio.gather(*after)


def test_the_kubernetes_example_fits_the_service():
    deployment, service = yaml.safe_load_all((LAUNCH / "serve_k8s.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    app = make_app(Service(lambda name: None, "", Limits()), key="", admin_key="")
    routes = {getattr(route, "path", "") for route in app.routes}
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    assert [probe["path"] for probe in probes] == ["/health", "/health", "/ready"]
    assert {probe["path"] for probe in probes} <= routes
    script = (LAUNCH / "serve.py").read_text()
    names = {one["name"] for one in container["env"]} - {"TCA4REC_CACHE"}
    given = {flag.removeprefix("--").split("=")[0] for flag in container["args"]}
    assert all(f'"{name}"' in script for name in names | given - {"workdir", "run"})
    assert container["command"] == [".venv/bin/python", "launch/serve.py"]
    (port,) = service["spec"]["ports"]
    ports = {port["targetPort"], *(probe["port"] for probe in probes)}
    assert ports == {container["ports"][0]["containerPort"]} == {8000}
    seconds = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    (flag,) = (one for one in container["args"] if one.startswith("--seconds="))
    limits = Limits(seconds=float(flag.split("=")[1]))
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert seconds > before + seconds_to_end(limits)


@contextlib.contextmanager
def stuck_process(seconds):
    """The process of such a service, a client, and a pool to ask it in."""
    process = forked.start(counted.serve_stuck, port := free_port(), seconds)
    url, headers = f"http://127.0.0.1:{port}", {"X-API-Key": "k"}
    with httpx2.Client(base_url=url, headers=headers) as client, ThreadPoolExecutor() as pool:
        try:
            for _ in range(300):
                with contextlib.suppress(httpx2.TransportError):
                    if client.get("/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield process, client, pool
        finally:
            process.kill()


def until_metric(client, name, value):
    for _ in range(50):
        if f"{name} {value}" in client.get("/metrics").text.splitlines():
            return
        time.sleep(0.05)
    raise AssertionError(client.get("/metrics").text)


def test_the_end_waits_neither_for_late_searches_nor_for_reloads():
    with stuck_process(seconds=1.0) as (process, client, pool):
        asked = {"json": {"histories": [["1"]] * 6}}
        searched = pool.submit(client.post, "/recommend", **asked)
        until_metric(client, "tca4rec_waiting", "2.0")
        loaded = pool.submit(client.post, "/admin/reload", json={"run": "stuck"})
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        begin = time.monotonic()
        assert loaded.result(15).status_code == 503
        assert searched.result(15).status_code == 504
        process.join(15)
        assert time.monotonic() < begin + 15  # within 3 s, but for other work on the cores
        assert process.exitcode == 0


def test_a_signal_loads_anew_and_a_second_one_ends_at_once():
    with stuck_process(seconds=60.0) as (process, client, pool):
        os.kill(process.pid, signal.SIGHUP)
        until_metric(client, 'tca4rec_loads_total{outcome="ready"}', "2.0")
        asked = pool.submit(client.post, "/recommend", json={"histories": [["1"]] * 6})
        until_metric(client, "tca4rec_waiting", "2.0")
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGTERM)
        process.join(15)
        assert process.exitcode == 128 + signal.SIGTERM
        assert isinstance(asked.exception(15), httpx2.TransportError)


def test_a_port_that_is_none_is_told_in_one_line():
    config = LAUNCH.parent / "configs" / "quickstart.py"
    flags = ["--workdir=w", f"--config={config}", "--port=70000"]
    ended = Script([str(LAUNCH / "serve.py"), *flags], {**os.environ}).completed(60)
    assert ended.returncode == 1
    assert ended.stderr == "serve: flag --port=70000: expected 1 to 65535\n"
