"""Requests to a service in this process, and one that listens."""

import asyncio
import threading
import time
from contextlib import contextmanager

import uvicorn
from httpx2 import ASGITransport, AsyncClient

from tca4rec_jax.serving.app import make_app


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


@contextmanager
def listening(service, **config):
    """The address (host, port) of a service with the key "k", in a thread."""
    app = make_app(service, key="k", admin_key="")
    config = {"port": 0, "log_config": None, "lifespan": "off"} | config
    server = uvicorn.Server(uvicorn.Config(app, **config))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()
