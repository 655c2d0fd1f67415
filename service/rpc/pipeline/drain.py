"""The gate that every RPC goes through: counts who is inside, and is closed when the server ends."""

from threading import Condition
from typing import Any

from service.base.clock import monotonic
from service.base.errors import ServerStoppingError
from service.rpc.context import CallContext
from service.rpc.pipeline.stages import Handler, Method


class Gate:
    """Lets RPCs in until it is closed."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside: dict[int, CallContext] = {}
        self._is_closed = False

    def gate(self, proceed: Handler, _method: Method) -> Handler:
        """The stage of the pipeline. Raises ServerStoppingError once the gate is closed: nothing was done for the RPC,
        so that it may be repeated whatever it is.
        """
        changed = self._changed

        def run(request: Any, call: CallContext) -> Any:
            with changed:
                if self._is_closed:
                    raise ServerStoppingError
                self._inside[id(call)] = call
            try:
                return proceed(request, call)
            finally:
                self._leave(call)

        return run

    def _leave(self, call: CallContext) -> None:
        with self._changed:
            del self._inside[id(call)]
            if self._is_closed:
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self._is_closed = True

    def wait_until_fewer(self, *, until: float) -> bool:
        """Wait until somebody has left, up to this moment in monotonic seconds; False when nobody is inside, or nobody
        has left.
        """
        with self._changed:
            inside = len(self._inside)
            return inside > 0 and self._changed.wait_for(
                lambda: len(self._inside) < inside, timeout=max(0.0, until - monotonic())
            )

    def peer_ports(self) -> frozenset[int]:
        """The ports from which those who are inside have connected. Who has hung up meanwhile has none any more."""
        with self._changed:
            ports = {call.context.peer().rpartition(":")[2] for call in self._inside.values()}
        return frozenset(int(port) for port in ports if port.isdecimal())
