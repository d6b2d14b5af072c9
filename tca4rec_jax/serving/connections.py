"""Connections that end where a client says nothing, or more than a request may have before it."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_UNREAD = 1 << 16  # bytes: the parser itself holds a head, or a trailer, of any length


def connections(seconds: float) -> type[HttpToolsProtocol]:
    """A protocol that closes a connection if, so long after an answer (or the beginning), the next
    request has no whole head, or the body of the one that was refused has not ended.

    A head of more than 64 KB is refused with 400.
    """

    class Connection(HttpToolsProtocol):
        _waits: object = None
        _unread = 0  # bytes since the last whole head or request, without those of bodies

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            self._unread += len(data)
            super().data_received(data)
            if self._unread > _MOST_UNREAD and not self.transport.is_closing():
                self.send_400_response("The head of the request is too long.")

        def on_headers_complete(self) -> None:
            self._unread = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._unread = max(self._unread - len(body), 0)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._unread = 0
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        def _wait(self) -> None:
            self._waits = now = object()
            self.loop.call_later(seconds, self._close_if_still, now)

        def _close_if_still(self, since: object) -> None:
            answers = self.cycle is not None and not self.cycle.response_complete
            if self._waits is since and not answers:
                self.transport.close()

    return Connection
