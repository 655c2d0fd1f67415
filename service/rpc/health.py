"""The standard health service (grpc.health.v1). Anybody may ask, so it is built to answer everybody."""

import sys
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.admission.executor import BoundedExecutor
from service.rpc.context import Send

CHECK_THREADS = 32
"""More than health checks need: slow messages may hold half of them."""
_SEND_THREADS = 32
"""A client that does not take what is sent holds one for half a second."""
_Status = health_pb2.HealthCheckResponse


class _Watch:
    """A stream of Watch. It holds no thread: one is taken for as long as a message is sent."""

    def __init__(self, service: str, context: grpc.ServicerContext, send: Send) -> None:
        self.service = service
        self.peer = context.peer()
        self._context = context
        self._send = send
        self._sending = Lock()
        self._sent: int | None = None
        self._is_over = False

    def tell(self, current: Callable[[str], tuple[int, bool]]) -> None:
        """Send the current status unless it was sent already, and end the stream if it is the last one.

        current: the status of a service, and whether it is the last. While another thread sends, that one goes on with
        what is new.
        """
        while not self._is_over and (new := current(self.service)) != (self._sent, False):
            if not self._sending.acquire(blocking=False):
                return
            try:
                status, is_last = new
                if status != self._sent:
                    self._send(health_pb2.HealthCheckResponse(status=status))
                    self._sent = status
                if is_last:
                    self._end()
            finally:
                self._sending.release()

    def end(self) -> None:
        """End the stream with OK; its client asks again. Does not block."""
        if not self._sending.acquire(blocking=False):
            self._context.cancel()  # its client does not take what is sent
            return
        try:
            self._end()
        finally:
            self._sending.release()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._send(None)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking is untyped
    """Says whether the server can serve. It has its own threads, so that it answers under full load.

    A call for which no thread is free is answered at once, as if it asked for the whole server: see built_in.py.

    The servicer of grpcio-health-checking is not used: it sends to watchers under the lock that gRPC's serving thread
    takes when a watcher leaves, so that one slow watcher can block the whole server. See decision 0037.
    """

    def __init__(self, services: tuple[str, ...], *, max_watches: int) -> None:
        """max_watches: with as many as there may be connections, each connection can have one."""
        self._services = frozenset(("", *services))
        self._max_watches = max_watches
        self._status = _Status.NOT_SERVING
        self._withdrawn: frozenset[str] = frozenset()
        self._is_stopping = False
        self._lock = Lock()
        self._watches: dict[str, list[_Watch]] = {}
        """The open watches of each connection, the oldest first."""
        executor = BoundedExecutor(CHECK_THREADS, max_waiting=0, name="health")
        self.sending = BoundedExecutor(_SEND_THREADS, max_waiting=sys.maxsize, name="health-watch")
        """Sends to the watches. Its queue is bounded by their number."""
        self.executors = (executor, self.sending)
        for name in ("Check", "List", "Watch"):
            setattr(self, name, on_pool(getattr(self, name), executor))

    def set_serving(self, *, is_serving: bool) -> None:
        """Set the status of the server and of each service. Without effect once the server stops."""
        self._set(_Status.SERVING if is_serving else _Status.NOT_SERVING)

    def withdraw(self, *services: str) -> None:
        """Let these services be NOT_SERVING, and all others as the server is."""
        with self._lock:
            if self._withdrawn == frozenset(services):
                return
            self._withdrawn = frozenset(services)
        self._tell_all()

    @property
    def is_serving(self) -> bool:
        """Whether the status is SERVING."""
        return bool(self._status == _Status.SERVING)

    def enter_graceful_shutdown(self) -> None:
        """Turn NOT_SERVING for good, and end the watchers' streams, so that the server does not wait for them."""
        self._set(_Status.NOT_SERVING, is_stopping=True)

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The status of one service. Aborts with NOT_FOUND for an unknown one."""
        if request.service not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service here.")
        return health_pb2.HealthCheckResponse(status=self._status_of(request.service))

    def List(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The status of every service."""
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status_of(name)) for name in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    def Watch(self, request: Any, context: grpc.ServicerContext, send: Send) -> None:
        """The status of one service now, and whenever it changes, until the watcher leaves or the server stops.

        Beyond the limit the oldest watch of the connection with the most of them ends. A connection with few keeps
        them, however many a stranger opens.
        """
        watch = _Watch(request.service, context, send)
        with self._lock:
            is_full = sum(map(len, self._watches.values())) >= self._max_watches
            surplus = max(self._watches.values(), key=len)[0] if is_full else None
            if surplus is not None:
                self._drop(surplus)
            self._watches.setdefault(watch.peer, []).append(watch)
        if surplus is not None:
            surplus.end()
        if context.add_callback(partial(self._forget, watch)):
            self.sending.submit(watch.tell, self._current)
        else:
            self._forget(watch)

    def _set(self, status: int, *, is_stopping: bool = False) -> None:
        with self._lock:
            if self._is_stopping or (status, is_stopping) == (self._status, False):
                return
            self._status, self._is_stopping = status, is_stopping
        self._tell_all()

    def _tell_all(self) -> None:
        with self._lock:
            watches = [watch for watches in self._watches.values() for watch in watches]
        for watch in watches:
            self.sending.submit(watch.tell, self._current)

    def _status_of(self, service: str) -> int:
        """The status of a service of this server."""
        return int(_Status.NOT_SERVING if service in self._withdrawn else self._status)

    def _current(self, service: str) -> tuple[int, bool]:
        """The status of a service, and whether it is the last one."""
        with self._lock:
            status = self._status_of(service) if service in self._services else _Status.SERVICE_UNKNOWN
            return status, self._is_stopping

    def _forget(self, watch: _Watch) -> None:
        with self._lock:
            self._drop(watch)

    def _drop(self, watch: _Watch) -> None:
        of_peer = self._watches.get(watch.peer, [])
        if watch in of_peer:
            of_peer.remove(watch)
            if not of_peer:
                del self._watches[watch.peer]


def on_pool(method: Callable[..., Any], pool: BoundedExecutor) -> Any:
    """The method as a function with its own thread pool, which gRPC reads from an attribute."""

    def run(*arguments: Any) -> Any:
        return method(*arguments)

    run.experimental_thread_pool = pool  # type: ignore[attr-defined]  # see above
    return run
