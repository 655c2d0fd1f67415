"""The threads that RPCs run on: one executor for most of them, one for each queue of those that hash."""

from collections.abc import Callable, Mapping

from service.base.errors import ServerBusyError
from service.base.settings import Settings
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.admission.places import Places
from service.rpc.health import CHECK_METHODS
from service.server.registration import HASHING_METHODS, METHODS

_SPARE_HASHING_RPCS = 2
"""RPCs beyond those that hash, so that no core waits while one of them is at the database. Not more: the lock of a name
is looked at right before the hash, so that of many guesses at once only these few are hashed in vain."""
_REFUSING_RPCS = 2
"""Threads beyond those of all RPCs that have a place or wait for one: strangers are turned away there, and who comes
when the queue is full."""


class Executors:
    """All of one server's. Each ends by itself; none is shared with what is not an RPC."""

    def __init__(
        self,
        settings: Settings,
        *,
        hash_threads: int,
        checks: BoundedExecutor,
        note_wait: Callable[[float], None] | None,
    ) -> None:
        """checks: where health is answered. note_wait: see BoundedExecutor."""

        def bounded(name: str, threads: int) -> BoundedExecutor:
            return BoundedExecutor(
                threads,
                max_waiting=settings.grpc_max_waiting,
                name=name,
                refusal=ServerBusyError,
                note_wait=note_wait,
            )

        at_once = hash_threads + _SPARE_HASHING_RPCS
        queues = sorted(set(HASHING_METHODS.values()))
        self._places = {name: Places(at_once, max_waiting=settings.hash_max_waiting) for name in queues}
        hashing = {name: bounded(name, at_once + settings.hash_max_waiting + _REFUSING_RPCS) for name in queues}
        self.usual = bounded("rpc", settings.grpc_threads)
        self.of_hashing = {method: hashing[name] for method, name in HASHING_METHODS.items()}
        """By the method that runs there."""
        self.of_methods = dict.fromkeys(METHODS, self.usual) | self.of_hashing | dict.fromkeys(CHECK_METHODS, checks)
        """By the method, those that check health among them."""
        self.measured = (self.usual, *hashing.values())
        """Those that the metrics tell of."""
        self._all = (*self.measured, checks)

    @property
    def places(self) -> Mapping[str, Places]:
        """How many may go on to hash, and how many wait for that, by the method."""
        return {method: self._places[name] for method, name in HASHING_METHODS.items()}

    def refuse_all(self) -> None:
        """As BoundedExecutor.refuse_all."""
        for executor in self._all:
            executor.refuse_all()

    def end(self, *, patience: float) -> bool:
        """Take nothing more; whether all threads of each ended within `patience` seconds."""
        has_ended = True
        for executor in self._all:
            has_ended &= executor.end(patience=patience)
        return has_ended
