"""What every request passes first: the key, the size and time of its body; and its line in the log.

A middleware of ASGI alone. It reads a body whole, within the limits, before the application sees
the request. A line of the log has no history, title or key in it.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tca4rec_jax.serving.metrics import Metrics
from tca4rec_jax.serving.model import Limits

KEY_HEADER = "X-API-Key"
GONE = 499  # for the log alone
_LOG = logging.getLogger(__name__)


class Json(Response):
    """JSON in ASCII: what a client sent may not be encodable otherwise."""

    media_type = "application/json"

    def render(self, content) -> bytes:
        """The content, whose numbers must be finite."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def refusal(status: int, why: str, **headers: str) -> Json:
    """An error in one line."""
    return Json({"error": " ".join(why.split())}, status, headers)


class Guard:
    """See the module. `keys`: the start of a path -> the key that it needs; '' refuses all.

    `routes` are the paths that the log and the metrics name; whatever else is asked is 'other'.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        keys: Mapping[str, str],
        routes: Collection[str],
    ):
        self._app, self._limits, self._metrics, self._routes = app, limits, metrics, routes
        self._keys = {path: key.encode() for path, key in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin, status = time.monotonic(), 500
        request_id = uuid.uuid4().hex

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        headers, more = Headers(scope=scope), {}
        try:
            refused = self._locked(scope["path"], headers)
            body = b""
            if refused is None:
                body, refused = await self._body(scope, headers, receive)
            elif _closes(scope, headers):
                await self._drop(receive)
            if refused is not None:
                await refused(scope, receive, answer)
            else:
                await self._app(scope, _replay(body, receive), answer)
        except Exception as error:  # its message may quote what a client sent
            where = traceback.format_tb(error.__traceback__)
            more = {"error": type(error).__name__, "traceback": "".join(where[-3:])}
            if status == 500:
                await refusal(500, "the service has failed, see its log")(scope, receive, answer)
        finally:
            seconds = time.monotonic() - begin
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.answered(route, status, seconds)
            line = {"request": request_id, "method": scope["method"], "route": route}
            line |= {"status": status, "ms": round(1000 * seconds, 1), **scope.get("log", {})}
            _LOG.log(
                logging.ERROR if more else logging.INFO, "answered", extra={"line": line | more}
            )

    def _locked(self, path: str, headers: Headers) -> Response | None:
        """The refusal of a request without the key of its path, compared in constant time."""
        for start, key in self._keys.items():
            if path.startswith(start):
                given = headers.get(KEY_HEADER, "").encode("latin-1", "replace")
                if not (hmac.compare_digest(given, key) and key):
                    return refusal(401, f"give the right key in the header {KEY_HEADER}")
        return None

    async def _drop(self, receive: Receive) -> None:
        """Reads what is left of a body: a client that still sends would see a reset, no answer.

        Where the connection stays open `connections` reads it, after the answer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.read_seconds):
                while (await receive()).get("more_body"):
                    pass

    async def _body(
        self, scope: Scope, headers: Headers, receive: Receive
    ) -> tuple[bytes, Response | None]:
        """The whole body, or why it is not read to its end."""
        most, body, more = self._limits.body_bytes, bytearray(), True
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared[:20]) > most
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                while more and not too_large:
                    message = await receive()
                    if message["type"] == "http.disconnect":  # half a body is none
                        return b"", refusal(GONE, "the client has gone")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    too_large = len(body) > most
        except TimeoutError:
            why = f"the request did not arrive within {self._limits.read_seconds:g} s"
            return b"", refusal(408, why, Connection="close")
        if too_large:
            if more and _closes(scope, headers):
                await self._drop(receive)
            return b"", refusal(413, f"a request has at most {most} bytes")
        return bytes(body), None


def _closes(scope: Scope, headers: Headers) -> bool:
    """Whether an answer closes the connection, and a body that has begun may be on its way."""
    close = "close" in headers.get("connection", "").lower() or scope.get("http_version") == "1.0"
    return close and "expect" not in headers  # who expects a 100 sends nothing before it


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read; then what comes after it."""
    first = True

    async def again() -> Message:
        nonlocal first
        if not first:
            return await receive()
        first = False
        return {"type": "http.request", "body": body, "more_body": False}

    return again
