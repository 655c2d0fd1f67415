"""The standard health service (grpc.health.v1)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.admission.executor import BoundedExecutor

CHECK_THREADS = 128
"""More than health checks need: half of them may be held by checks whose message is slow to come."""
_MAX_CHECKS_WAITING = 1000
"""Many, since anybody may open checks and send no message: a check of the operator must not find the queue full."""
MAX_WATCHERS = 64
"""How many health watchers a server has at a time: each holds a thread."""
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking is untyped
    """Says whether the server can do its work. Answers on threads of its own, so also under full load.

    The library's servicer is not used: it sends to its watchers while it holds the lock that gRPC's serving thread
    needs when a watcher leaves, so that one slow watcher can stop the whole server.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = frozenset(("", *services))
        self._status = _Status.NOT_SERVING
        self._is_over = False
        self._watchers = 0
        self._changed = Condition()
        # More threads than watchers, so that there is one to refuse the watcher that is too many.
        watching = ThreadPoolExecutor(MAX_WATCHERS + 4, thread_name_prefix="health-watch")
        self.executor = BoundedExecutor(CHECK_THREADS, max_waiting=_MAX_CHECKS_WAITING, name="health")
        """Where health checks are answered."""
        for name, pool in (("Check", self.executor), ("List", self.executor), ("Watch", watching)):
            setattr(self, name, on_pool(getattr(self, name), pool))

    def set_serving(self, *, is_serving: bool) -> None:
        """Say the same of the server as a whole and of each service. Without effect once the server stops."""
        with self._changed:
            if not self._is_over:
                self._status = _Status.SERVING if is_serving else _Status.NOT_SERVING
                self._changed.notify_all()

    @property
    def is_serving(self) -> bool:
        """Whether that is what it says."""
        return bool(self._status == _Status.SERVING)

    def enter_graceful_shutdown(self) -> None:
        """Turn NOT_SERVING for good, tell the watchers, and let them go: the server does not wait for them."""
        self.set_serving(is_serving=False)
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The status of one service; NOT_FOUND for one that is not served here."""
        if request.service not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service here.")
        return health_pb2.HealthCheckResponse(status=self._status)

    def List(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Every service with its status."""
        status = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, status))

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """The status of one service now, and whenever it changes, until the watcher leaves or the server stops."""
        with self._changed:
            is_too_many = self._watchers >= MAX_WATCHERS
            self._watchers += not is_too_many
        if is_too_many:
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
                while not self._is_over and self._status_of(service) == sent and context.is_active():
                    self._changed.wait()
                is_last, status = self._is_over, self._status_of(service)
            if not context.is_active():
                return
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)  # never under the lock: it may take for ever
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
    """The method with its own thread pool, as an attribute: that is where gRPC looks for it."""

    def run(request: Any, context: grpc.ServicerContext) -> Any:
        return method(request, context)

    run.experimental_thread_pool = pool  # type: ignore[attr-defined]  # see above
    return run
