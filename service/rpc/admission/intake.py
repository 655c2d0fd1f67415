"""Has gRPC asked for calls as they can be served or refused, instead of as fast as they come.

A call that Python has taken costs a third of a read even when it is refused. What the executors have no room for
(executor.py) therefore waits in gRPC, in one queue for each method, and beyond so many gRPC turns calls
away by itself, for a sixth of what a read costs, as CANCELLED. See docs/decisions/0029-calls-wait-in-grpc.md.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import grpc

from service.rpc.admission.executor import BoundedExecutor


def ask_through(server: grpc.Server, executors: Mapping[str, BoundedExecutor]) -> None:
    """Have a server that has not started ask for the calls of these methods through their executors.

    grpcio asks for the next call of a method as soon as it was given one, and has no public way to say otherwise.
    """
    state = server._state  # type: ignore[attr-defined]  # noqa: SLF001  see above
    state.server = _Asking(state.server, executors)


class _Asking:
    """Stands in the place of the object that grpcio asks for calls, and passes on all else."""

    def __init__(self, server: Any, executors: Mapping[str, BoundedExecutor]) -> None:
        self._server = server
        self._executors = executors
        self._asks: dict[str, Callable[[], None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def request_registered_call(self, calls: Any, events: Any, method: str, tag: Any) -> None:
        """Ask now or later. All but the method is the same each time."""
        ask = self._asks.get(method)
        if ask is None:
            ask = partial(self._server.request_registered_call, calls, events, method, tag)
            if method in self._executors:
                ask = partial(self._executors[method].ask, ask)
            self._asks[method] = ask
        ask()
