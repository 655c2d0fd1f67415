"""Serves a WSGI application over HTTP on threads of its own, beside gRPC. No TLS: the port belongs on loopback or on a
network that only its clients reach.
"""

import logging
import socket
from functools import partial
from threading import Thread
from typing import Any
from wsgiref.types import WSGIApplication

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel

MAX_CONNECTIONS = 32
"""One more takes the place of the oldest without a request. Where all have one, it waits in the kernel's backlog."""
_STOP_SECONDS = 2.0
_MAX_HEADER_BYTES = 16_384
_MAX_BODY_BYTES = 16_384


class WsgiServer:
    """An HTTP server that answers from when it is made until it is closed."""

    def __init__(self, app: WSGIApplication, host: str, port: int, *, idle_seconds: int = 5) -> None:
        """port: 0 picks a free one. idle_seconds: a connection is closed that has no whole request for so long, so that
        idle and slow clients keep nobody out. Raises OSError when the address cannot be bound.
        """
        logging.getLogger("waitress").setLevel(logging.ERROR)  # it would warn whenever its clients are many
        host = host.strip("[]")
        is_ipv6 = ":" in host
        family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=is_ipv6)
        self.port: int = listener.getsockname()[1]
        self._sockets: dict[int, object] = {}
        self._server = create_server(
            app,
            map=self._sockets,
            sockets=[listener],
            connection_limit=MAX_CONNECTIONS + 2,  # it counts the listener and the pipe that wakes its thread
            channel_timeout=idle_seconds,
            cleanup_interval=1,
            max_request_header_size=_MAX_HEADER_BYTES,
            max_request_body_size=_MAX_BODY_BYTES,
            asyncore_use_poll=True,  # select() fails for descriptors above 1023, and gRPC may hold thousands
            log_socket_errors=False,  # a client that leaves is no event
            ident="personae",  # in place of the name of the library
        )
        self._server.channel_class = _Connection
        self._thread = Thread(target=self._server.run, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the requests that run, for two seconds at most; close the port and every connection."""
        self._server.task_dispatcher.shutdown(timeout=_STOP_SECONDS)
        # On the server's own thread, which alone uses the sockets: it ends when none is left.
        self._server.trigger.pull_trigger(partial(wasyncore.close_all, self._sockets, ignore_all=True))
        self._thread.join(_STOP_SECONDS)


class _Connection(HTTPChannel):  # type: ignore[misc]  # waitress has no types
    """A connection that a client cannot keep open by sending a request, or reading an answer, bit by bit; nor by saying
    nothing while others want to connect.
    """

    last_activity: float

    def __init__(self, server: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(server, *arguments, **options)
        if len(server.active_channels) >= MAX_CONNECTIONS:
            others = (one for one in server.active_channels.values() if one is not self)
            idle = [one for one in others if not one.requests and not one.total_outbufs_len]
            if idle:
                min(idle, key=lambda one: one.creation_time).will_close = True

    def handle_read(self) -> None:
        last_activity = self.last_activity
        super().handle_read()
        if self.request is not None:
            self.last_activity = last_activity

    def handle_write(self) -> None:
        last_activity = self.last_activity
        super().handle_write()
        self.last_activity = last_activity
