"""Serves a WSGI application over HTTP or HTTPS on threads of its own, beside gRPC.

One thread has all connections and waits for none of them: a slow client holds no thread, neither in its TLS handshake
nor in its request. Other threads run the application, for requests that have arrived whole.

All these threads together use a tenth of a core at the most, but for what callers ask (`exempt_from_throttling`).
Python runs one thread at a time, so what they use is taken from gRPC; under a flood they read, and the clients wait.
"""

import logging
import socket
import ssl
import sys
import time
from functools import partial
from threading import Event, Lock, Thread
from typing import Any
from wsgiref.types import WSGIApplication

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel

from service.base.clock import monotonic
from service.observability.cpu_share import CpuShare

_CPU_SHARE = 0.1
MAX_CONNECTIONS = 32
_END_SECONDS = 2.0
_POLL_SECONDS = 0.01
_MAX_HEADER_BYTES = 16_384
_MAX_BODY_BYTES = 16_384
_MAX_TLS_RECORD_BYTES = 16_384  # RFC 8446, section 5.1


class WsgiServer:
    """An HTTP server that answers from when it is made until it is closed."""

    def __init__(
        self,
        app: WSGIApplication,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        shares_port: bool = False,
        max_connections: int = MAX_CONNECTIONS,
        idle_seconds: int = 5,
    ) -> None:
        """port: 0 picks a free one. tls: None: in clear text. shares_port: other processes listen on the same port;
        the kernel gives each connection to one of them. max_connections: one more takes the place of the oldest without
        a request; where all have one, it waits in the kernel's backlog. idle_seconds: a connection is closed that has
        no whole request for so long, so that idle and slow clients keep nobody out.

        Raises OSError when the address cannot be bound.
        """
        logging.getLogger("waitress").setLevel(logging.ERROR)  # it would warn whenever its clients are many
        listener = _listen(host.strip("[]"), port, tls, shares_port=shares_port)
        self.port: int = listener.getsockname()[1]
        self._sockets: dict[int, object] = {}
        self._server = create_server(
            app,
            map=self._sockets,
            sockets=[listener],
            connection_limit=max_connections + 2,  # it counts the listener and the pipe that wakes its thread
            channel_timeout=idle_seconds,
            cleanup_interval=1,
            channel_request_lookahead=1,  # so that a client that leaves is noticed, and its request not begun
            max_request_header_size=_MAX_HEADER_BYTES,
            max_request_body_size=_MAX_BODY_BYTES,
            url_scheme="http" if tls is None else "https",
            log_socket_errors=False,  # a client that leaves is no event
            ident="personae",  # in place of the name of the library
        )
        self._is_closing = Event()
        self._share = CpuShare(_CPU_SHARE)
        connection = _Connection if tls is None else _TlsConnection
        self._server.channel_class = partial(connection, max_connections, self._share)
        self._thread = Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 2.0) -> None:
        """Close the port, answer the requests that have begun to arrive, and close every connection after `timeout`
        seconds at most.
        """
        self._share.close()
        ends_at = monotonic() + timeout
        on_thread_of_sockets = self._server.trigger.pull_trigger
        on_thread_of_sockets(partial(wasyncore.dispatcher.close, self._server))  # the listening one
        while self._server.active_channels and monotonic() < ends_at:
            on_thread_of_sockets(self._close_idle)
            self._is_closing.wait(_POLL_SECONDS)
        self._server.task_dispatcher.shutdown(timeout=max(0.0, ends_at - monotonic()))
        self._is_closing.set()
        self._server.pull_trigger()
        self._thread.join(_END_SECONDS)
        wasyncore.close_all(self._sockets, ignore_all=True)  # by now nobody else uses them

    def _close_idle(self) -> None:
        for one in self._server.active_channels.values():
            one.will_close |= not (one.requests or one.request or one.total_outbufs_len)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            with self._share.used():
                # By poll(): select() fails for descriptors above 1023, and gRPC may hold thousands.
                wasyncore.loop(timeout=1, use_poll=True, map=self._sockets, count=1)


def _listen(host: str, port: int, tls: ssl.SSLContext | None, *, shares_port: bool) -> socket.socket:
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    listener = socket.create_server((host, port), family=family, dualstack_ipv6=is_ipv6, reuse_port=shares_port)
    if tls is None:
        return listener
    # The sockets that it accepts speak TLS. Their handshake happens as they are read.
    return tls.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)


class _Connection(HTTPChannel):  # type: ignore[misc]  # waitress has no types
    """A connection that a client cannot keep open by sending a request, or reading an answer, bit by bit; nor by saying
    nothing while others want to connect.
    """

    last_activity: float

    def __init__(self, max_connections: int, share: CpuShare, server: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(server, *arguments, **options)
        self._share = share
        if len(server.active_channels) >= max_connections:
            others = (one for one in server.active_channels.values() if one is not self)
            idle = [one for one in others if not one.requests and not one.total_outbufs_len]
            if idle:
                min(idle, key=lambda one: one.creation_time).will_close = True

    def service(self) -> None:
        with self._share.used():  # once it is answered
            super().service()

    def writable(self) -> bool:
        # The library closes a connection once there is room for more of its answer: if its client reads nothing, never.
        now = time.time()  # noqa: TID251  what last_activity is of
        if self.total_outbufs_len and now - self.last_activity > self.adj.channel_timeout:
            self.handle_close()
            return False
        return bool(super().writable())

    def handle_error(self) -> None:
        if isinstance(sys.exc_info()[1], ValueError):  # of urlsplit, for "http://[": strangers must not fill the log
            self.handle_close()
        else:
            super().handle_error()

    def handle_read(self) -> None:
        last_activity = self.last_activity
        super().handle_read()
        if self.request is not None:
            self.last_activity = last_activity

    def handle_write(self) -> None:
        last_activity = self.last_activity
        super().handle_write()
        self.last_activity = last_activity


class _TlsConnection(_Connection):
    """The same over TLS. Its socket shakes hands when it is first read."""

    socket: ssl.SSLSocket | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._tls_lock = Lock()  # an SSLSocket is not for two threads; both the server's and the application's send
        self._decrypted = b""
        super().__init__(*arguments, **options)

    def handle_read(self) -> None:
        if (sock := self.socket) is None:
            return
        try:
            with self._tls_lock:
                # A whole record, since what OpenSSL kept of one would never show as readable.
                self._decrypted = sock.recv(_MAX_TLS_RECORD_BYTES)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return  # half a record, or a step of the handshake
        except OSError:
            self.handle_close()
            return
        super().handle_read()

    def recv(self, _buffer_size: int) -> bytes:
        if not self._decrypted:
            self.handle_close()
        return self._decrypted

    def send(self, data: bytes, do_close: bool = True) -> int:  # noqa: ARG002, FBT001, FBT002  its signature
        if (sock := self.socket) is None:  # another thread may close the connection at any moment
            return 0
        try:
            with self._tls_lock:
                return sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
