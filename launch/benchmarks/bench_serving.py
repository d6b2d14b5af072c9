"""The service under load, against the search of the same histories in one call.

    python launch/benchmarks/bench_serving.py --workdir=runs/quickstart --run=aligned

Starts launch/serve.py and asks it with the histories of the data's test rows: clients that each
send a burst, wait for its answers, and send the next. A 429 is sent again when it says so. Prints
latencies and throughput, beside that of `Recommender.recommend` with all histories before and
after; then what a reload under load and SIGTERM under load have lost, and how the memory of the
service grew.
"""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from absl import app, flags

from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.experiment import Experiment, config_of_run
from tca4rec_jax.launching import RUN, WORKDIR, start
from tca4rec_jax.training.run_folder import RunFolder

_CLIENTS = flags.DEFINE_integer("clients", 50, "Clients, each with connections of its own.")
_REQUESTS = flags.DEFINE_integer("requests", 1000, "Requests of all clients.")
_BURST = flags.DEFINE_integer("burst", 4, "Requests that a client sends at once.")
_BESIDE = flags.DEFINE_integer(
    "beside", 1000, "Most histories of the one call, and requests during a reload and an end."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "inference.batch_size of both, if another.")
_PORT = flags.DEFINE_integer("port", 8741, "The port of the service.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "The service's deadline.")
_SERVE = Path(__file__).parents[1] / "serve.py"
_ADMIN_KEY = "admin"


class Answer(NamedTuple):
    """Of one request: its status (0: the connection was refused or ended) and seconds."""

    status: int
    seconds: float


class Server:
    """launch/serve.py in a process."""

    def __init__(self):
        self.log = Path(tempfile.mkdtemp()) / "log.jsonl"
        command = [sys.executable, str(_SERVE), f"--workdir={WORKDIR.value}", f"--run={RUN.value}"]
        command += [f"--port={_PORT.value}", f"--seconds={_SECONDS.value}"]
        if _BATCH_SIZE.value:
            command += [f"--config.inference.batch_size={_BATCH_SIZE.value}"]
        environment = os.environ | {"TCA4REC_ADMIN_KEY": _ADMIN_KEY}
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment)
        while self.get("/ready") != 200:
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text())
            time.sleep(0.2)

    def get(self, path: str) -> int:
        """The status of a route; 0 if nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_PORT.value}{path}") as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    @property
    def cpu_seconds(self) -> float:
        """That the process has used, whatever else the cores did meanwhile."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def statuses(self) -> Counter:
        """Of all requests for lists that the service has answered, by its log."""
        lines = self.log.read_text().splitlines()
        lines = [json.loads(line) for line in lines if line.startswith("{")]
        return Counter(line["status"] for line in lines if line.get("route") == "/recommend")


async def ask(path: str, body: bytes, key: str = "") -> Answer:
    """One request over a connection of its own, with as little work for the client as can be."""
    begin = time.perf_counter()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"X-API-Key: {key}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", _PORT.value)
            writer.write(head.encode() + body)
            answer = await reader.read()
            writer.close()
        except OSError:
            answer = b""
        status = int(answer[9:12]) if answer else 0
        if status != 429:
            return Answer(status, time.perf_counter() - begin)
        refused.append(status)
        await asyncio.sleep(1)


refused: list[int] = []


async def load(bodies: list[bytes], after=lambda done: None) -> list[Answer]:
    """All requests, by clients in bursts; `after` hears how many are answered."""
    answers: list[Answer] = []
    waiting = iter(bodies)

    async def one(body: bytes) -> None:
        answers.append(await ask("/recommend", body))
        after(len(answers))

    async def client() -> None:
        while burst := list(itertools.islice(waiting, _BURST.value)):
            await asyncio.gather(*map(one, burst))

    await asyncio.gather(*(client() for _ in range(_CLIENTS.value)))
    return answers


def throughput(recommender: Recommender, histories: list, k: int) -> np.ndarray:
    """Users per second, and per CPU-second, of one call; its programs are compiled before."""
    sizes = recommender.sizes(histories, k)
    recommender.recommend(histories[:64], k, sizes=sizes)
    begin = np.array([time.perf_counter(), time.process_time()])
    recommender.recommend(histories, k, sizes=sizes)
    return len(histories) / (np.array([time.perf_counter(), time.process_time()]) - begin)


def under_load(server: Server, bodies: list[bytes]) -> np.ndarray:
    """Prints latencies and memory; users per second, and per CPU-second of the service."""
    refused.clear()
    megabytes: list[str] = []

    def after(done: int) -> None:
        if done % max(len(bodies) // 10, 1) == 0:
            megabytes.append(f"{server.megabytes:.0f}")

    begin = np.array([time.perf_counter(), server.cpu_seconds])
    answers = asyncio.run(load(bodies, after))
    rates = len(answers) / (np.array([time.perf_counter(), server.cpu_seconds]) - begin)
    p50, p95, p99 = np.percentile([one.seconds for one in answers], [50, 95, 99])
    statuses = dict(Counter(one.status for one in answers))
    print(f"{len(answers)} requests, statuses {statuses}, {len(refused)} times 429 before")
    print(f"p50 {p50:.3f} s, p95 {p95:.3f} s, p99 {p99:.3f} s, {rates[0]:.1f} users/s")
    print(f"memory after each tenth of the requests: {', '.join(megabytes)} MB")
    return rates


def reload_under_load(bodies: list[bytes]) -> None:
    """Prints what is lost by a reload in the middle."""
    reloads: list[asyncio.Task] = []

    def after(done: int) -> None:
        if done == len(bodies) // 4:
            reloads.append(asyncio.ensure_future(ask("/admin/reload", b"{}", _ADMIN_KEY)))

    async def both() -> tuple[list[Answer], Answer]:
        return await load(bodies, after), await reloads[0]

    answers, reload = asyncio.run(both())
    statuses = dict(Counter(one.status for one in answers))
    print(f"reload under load: status {reload.status} in {reload.seconds:.1f} s; {statuses}")


def end_under_load(server: Server, bodies: list[bytes]) -> None:
    """Prints what is lost by SIGTERM in the middle."""
    before = server.statuses()

    def after(done: int) -> None:
        if done == len(bodies) // 4:
            server.process.send_signal(signal.SIGTERM)

    answers = Counter(one.status for one in asyncio.run(load(bodies, after)))
    status = server.process.wait(120)
    taken = server.statuses() - before
    print(f"SIGTERM under load: exit {status}; got {dict(answers)}, of which 0: nobody listened")
    print(f"searched {taken[200]}, lost {taken[200] - answers[200]}")


def main(_):
    start()
    workdir = Path(WORKDIR.value)
    config = config_of_run(RunFolder.of(workdir, RUN.value))
    config.inference.batch_size = _BATCH_SIZE.value or config.inference.batch_size
    experiment = Experiment(config, workdir)
    rows, ids = experiment.data.splits["test"], experiment.data.catalogue.item_ids
    spans = itertools.pairwise(rows.offsets.tolist())
    all_ = [[ids[item] for item in rows.items[a : b - 1]] for a, b in spans if b - a > 1]
    histories = list(itertools.islice(itertools.cycle(all_), _REQUESTS.value))
    k = experiment.config.decoding.beams
    bodies = [json.dumps({"history": one, "k": k}).encode() for one in histories]
    recommender = Recommender(experiment, RUN.value)
    # Whole batches: what fills up another one would count against the one call.
    beside, batch = _BESIDE.value, experiment.config.inference.batch_size
    compared = histories[: beside - beside % batch or beside]
    server = Server()
    asyncio.run(load(bodies[: min(200, beside)]))
    before = throughput(recommender, compared, k)
    rates = under_load(server, bodies)
    after = throughput(recommender, compared, k)
    for of, one, two, rate in zip(("s", "CPU-s"), before, after, rates, strict=True):
        share = rate / ((one + two) / 2)
        print(f"one call: {one:.1f} and {two:.1f} users/{of}; the service {rate:.1f}, {share:.0%}")
    reload_under_load(bodies[:beside])
    end_under_load(server, bodies[:beside])


if __name__ == "__main__":
    app.run(main)
