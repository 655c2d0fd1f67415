"""The RPCs that run: when the server stops it refuses new ones, and waits for these."""

from threading import Condition

from service.base.clock import monotonic
from service.base.errors import ServerStoppingError
from service.rpc.context import CallContext


class RunningCalls:
    """The RPCs that run."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._running: dict[int, CallContext] = {}
        self._refuses = False

    def enter(self, call: CallContext) -> None:
        """Register an RPC. Raises ServerStoppingError after `refuse_new`."""
        with self._changed:
            if self._refuses:
                raise ServerStoppingError
            self._running[id(call)] = call

    def leave(self, call: CallContext) -> None:
        """Unregister an RPC that has ended."""
        with self._changed:
            self._running.pop(id(call), None)
            if self._refuses:
                self._changed.notify_all()

    def refuse_new(self) -> None:
        """Refuse RPCs from now on."""
        with self._changed:
            self._refuses = True

    def wait_for_one(self, *, until: float) -> bool:
        """Wait until an RPC has ended; False when none runs, or none has ended by `until`, in monotonic seconds."""
        with self._changed:
            running = len(self._running)
            return running > 0 and self._changed.wait_for(
                lambda: len(self._running) < running, timeout=max(0.0, until - monotonic())
            )

    def peer_ports(self) -> frozenset[int]:
        """The client's TCP ports of the connections with running RPCs."""
        with self._changed:
            ports = {call.context.peer().rpartition(":")[2] for call in self._running.values()}
        return frozenset(int(port) for port in ports if port.isdecimal())
