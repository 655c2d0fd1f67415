"""The drain of a server that stops: which RPCs still run, and the refusal of new ones."""

from threading import Condition

from service.base.clock import monotonic
from service.base.errors import ServerStoppingError
from service.rpc.context import CallContext


class Drain:
    """Knows the RPCs that run. Lets new ones in until the drain begins."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._running: dict[int, CallContext] = {}
        self._has_begun = False

    def enter(self, call: CallContext) -> None:
        """Note that an RPC begins. Raises ServerStoppingError once the drain has begun."""
        with self._changed:
            if self._has_begun:
                raise ServerStoppingError
            self._running[id(call)] = call

    def leave(self, call: CallContext) -> None:
        """Note that an RPC has ended."""
        with self._changed:
            self._running.pop(id(call), None)
            if self._has_begun:
                self._changed.notify_all()

    def begin(self) -> None:
        """Let no RPC in any more."""
        with self._changed:
            self._has_begun = True

    def wait_for_one(self, *, until: float) -> bool:
        """Wait until an RPC has ended, up to this moment in monotonic seconds; False when none runs, or none ended."""
        with self._changed:
            running = len(self._running)
            return running > 0 and self._changed.wait_for(
                lambda: len(self._running) < running, timeout=max(0.0, until - monotonic())
            )

    def peer_ports(self) -> frozenset[int]:
        """The ports from which the callers of the running RPCs have connected."""
        with self._changed:
            ports = {call.context.peer().rpartition(":")[2] for call in self._running.values()}
        return frozenset(int(port) for port in ports if port.isdecimal())
