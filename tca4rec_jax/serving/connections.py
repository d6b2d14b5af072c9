"""Connections that end where a client says nothing, reads nothing, or has too long a head.

They speak HTTP/1.1 alone, and pass over a wish for another protocol, as RFC 9110, 7.8 allows:
Java's clients ask for HTTP/2 with their requests.
"""

from asyncio import TimerHandle
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_UNREAD = 1 << 16  # bytes: the parser itself holds a head, or a trailer, of any length


def connections(seconds: float) -> type[HttpToolsProtocol]:
    """A protocol that closes a connection if, so long after an answer (or the beginning), the next
    request has no whole head, or the body of the one that was refused has not ended; or if nothing
    of an answer was read for so long.

    A head of more than 64 KB is refused with 400.
    """
    return type("Connection", (_Connection,), {"seconds": seconds})


class _Connection(HttpToolsProtocol):
    seconds: float
    _waits: object = None
    _unread = 0  # bytes since the last whole head, chunk or request, without those of bodies
    _writes: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._is_read()

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except HttpParserError:
            self.logger.warning(why := "Invalid HTTP request received.")
            return self.send_400_response(why)
        if self._unread > _MOST_UNREAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def _parse(self, data: bytes | memoryview) -> None:
        while True:
            try:
                return self.parser.feed_data(data)
            except HttpParserUpgrade as head:  # the parser knows no body of such a request
                if not self._wishes():
                    return None
                data = memoryview(data)[head.args[0] :]
                again = self._head_without_wish()
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as before
                self.parser.feed_data(again)

    def _wishes(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_wish(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % one for one in self.headers if one[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        self._unread = 0
        if not self._wishes():
            super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._unread = 0

    def on_body(self, body: bytes) -> None:
        self._unread = max(self._unread - len(body), 0)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        if not self._wishes():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writes = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()

    def _is_read(self) -> None:
        if self._writes is not None:
            self._writes.cancel()
            self._writes = None

    def _wait(self) -> None:
        self._waits = now = object()
        self.loop.call_later(self.seconds, self._end_if_still, now)

    def _end_if_still(self, since: object) -> None:
        answers = self.cycle is not None and not self.cycle.response_complete
        if self._waits is since and not answers:
            self.transport.abort()  # to close would wait for one who does not read
