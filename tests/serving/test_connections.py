"""What the parser of HTTP would hold without limit."""

import asyncio
from unittest.mock import Mock

import pytest
import uvicorn
from uvicorn.server import ServerState

from tca4rec_jax.serving.connections import connections

POST = b"POST / HTTP/1.1\r\n%b: %b\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "refused"),
    [
        (b"GET / HTTP/1.1\r\nX: ", True),
        (b"GET /", True),
        (POST % (b"Content-Length", b"1000000"), False),
        (POST % (b"Transfer-Encoding", b"chunked") + b"ff000\r\n", False),
        (POST % (b"Transfer-Encoding", b"chunked") + b"0\r\nX: ", True),
        (POST % (b"Transfer-Encoding", b"chunked") + b"1\r\nx\r\n" * 20_000 + b"ff000\r\n", False),
    ],
    ids=["header", "URL", "body", "chunk", "trailer", "small chunks"],
)
def test_only_a_body_may_be_long(begun, refused):
    async def read(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    async def written():
        config = uvicorn.Config(read, log_config=None)
        one = connections(60.0)(config=config, server_state=ServerState(), app_state={})
        transport = Mock(is_closing=Mock(return_value=False))
        one.connection_made(transport)
        for start in range(0, len(begun), 1 << 12):
            one.data_received(begun[start : start + (1 << 12)])
        one.data_received(b"x" * 60_000)
        before = transport.write.call_count
        one.data_received(b"x" * 60_000)
        one.connection_lost(None)
        await asyncio.gather(*one.tasks)
        return before, b"".join(call.args[0] for call in transport.write.call_args_list)

    before, answer = asyncio.run(written())
    assert before == 0  # 64 KB may be
    assert (b"head of the request is too long" in answer) == refused
