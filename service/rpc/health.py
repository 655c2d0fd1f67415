"""The standard health service (grpc.health.v1)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.admission.executor import BoundedExecutor

CHECK_THREADS = 32
"""More than health checks need: slow messages may hold half of them."""
_MAX_CHECKS_WAITING = 1000
"""Many, because anybody may open checks without sending a message, and the operator's checks must not be refused."""
MAX_WATCHERS = 64
"""Health watchers at a time: each holds a thread."""
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking is untyped
    """Says whether the server can serve. It has its own threads, so that it answers under full load.

    The servicer of grpcio-health-checking is not used: it sends to watchers under the lock that gRPC's serving thread
    takes when a watcher leaves, so that one slow watcher can block the whole server.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = frozenset(("", *services))
        self._status = _Status.NOT_SERVING
        self._is_stopping = False
        self._watchers = 0
        self._changed = Condition()
        # More threads than watchers: one watcher too many needs a thread to be refused on.
        watching = BoundedExecutor(MAX_WATCHERS + 4, max_waiting=_MAX_CHECKS_WAITING, name="health-watch")
        self.executor = BoundedExecutor(CHECK_THREADS, max_waiting=_MAX_CHECKS_WAITING, name="health")
        """Runs the health checks."""
        self.executors = (self.executor, watching)
        for name, pool in (("Check", self.executor), ("List", self.executor), ("Watch", watching)):
            setattr(self, name, on_pool(getattr(self, name), pool))

    def set_serving(self, *, is_serving: bool) -> None:
        """Set the status of the server and of each service. Without effect once the server stops."""
        with self._changed:
            if not self._is_stopping:
                self._status = _Status.SERVING if is_serving else _Status.NOT_SERVING
                self._changed.notify_all()

    @property
    def is_serving(self) -> bool:
        """Whether the status is SERVING."""
        return bool(self._status == _Status.SERVING)

    def enter_graceful_shutdown(self) -> None:
        """Turn NOT_SERVING for good, and end the watchers' streams, so that the server does not wait for them."""
        self.set_serving(is_serving=False)
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The status of one service. Aborts with NOT_FOUND for an unknown one."""
        if request.service not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service here.")
        return health_pb2.HealthCheckResponse(status=self._status)

    def List(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The status of every service."""
        status = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, status))

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """The status of one service now, and whenever it changes, until the watcher leaves or the server stops."""
        with self._changed:
            is_admitted = self._watchers < MAX_WATCHERS
            self._watchers += is_admitted
        if not is_admitted:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"There are {MAX_WATCHERS} watchers already.")
        try:
            context.add_callback(self._wake)
            yield from self._changes(request.service, context)
        finally:
            with self._changed:
                self._watchers -= 1

    def _changes(self, service: str, context: grpc.ServicerContext) -> Iterator[Any]:
        sent: int | None = None
        while True:
            with self._changed:
                while not self._is_stopping and self._status_of(service) == sent and context.is_active():
                    self._changed.wait()
                is_last, status = self._is_stopping, self._status_of(service)
            if not context.is_active():
                return
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)  # outside the lock, because it may block
                sent = status
            if is_last:
                return

    def _status_of(self, service: str) -> int:
        status: int = self._status if service in self._services else _Status.SERVICE_UNKNOWN
        return status

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def on_pool(method: Callable[[Any, grpc.ServicerContext], Any], pool: ThreadPoolExecutor) -> Any:
    """The method as a function with its own thread pool, which gRPC reads from an attribute."""

    def run(request: Any, context: grpc.ServicerContext) -> Any:
        return method(request, context)

    run.experimental_thread_pool = pool  # type: ignore[attr-defined]  # see above
    return run
