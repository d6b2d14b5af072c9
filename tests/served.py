"""Requests to a service in this process."""

import asyncio

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
