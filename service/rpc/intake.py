"""Which calls are taken from gRPC, and how it is known of the others.

A call that Python has taken costs a third of a read even when it is refused. So nothing is taken that there is no room
for (service/rpc/admission.py): it waits in gRPC, in one queue for each method, and beyond so many gRPC turns calls
away by itself, at a tenth of the cost, as CANCELLED without a reason. While it does that, a few of those who wait are
refused with SERVER_BUSY and a pushback, so that callers and the log tell why. See
docs/decisions/0029-calls-wait-in-grpc.md.

grpcio has no public name for any of it: a server's completion queue, its counts for channelz, the calls it knows.
"""

import json
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import grpc
import structlog
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # an extension without stubs

from service.rpc.admission import BoundedExecutor

LOOK_EVERY = 0.25
"""Seconds between two looks at what gRPC does."""
_LOOKS_BACK = 4
_REFUSED_EACH_LOOK = 10
"""Forty a second, which take about a hundredth of a core."""
_log = structlog.get_logger("personae.intake")


class Intake:
    """Has a server that has not started take calls as their executors have room for them."""

    def __init__(
        self,
        server: grpc.Server,
        executors: Mapping[str, BoundedExecutor],
        others: BoundedExecutor,
        *,
        most_waiting: int,
    ) -> None:
        """executors: of the methods that do not run on the one for the others. most_waiting: how many calls of one
        method gRPC lets wait before it turns calls away.
        """
        self._state: Any = server._state  # type: ignore[attr-defined]  # noqa: SLF001  see the module
        self._state.server = _Asking(self._state.server, executors, others)
        self._executors = {others, *executors.values()}
        self._others = others
        self._most_waiting = most_waiting
        self._number = max(int(found["ref"]["serverId"]) for found in _servers())
        self._latest = deque([0], maxlen=_LOOKS_BACK)
        self._is_overloaded = False
        self.unseen = 0
        """How many calls have ended without having been taken, as far as is known: their callers gave up, or gRPC
        turned them away. Calls that wait for longer than a second are counted, too."""

    def look(self) -> None:
        """See how many calls have not been taken, and have some refused when gRPC turns calls away."""
        now = self._untaken()
        lowest, latest = min(self._latest), self._latest[-1]
        self._latest.append(now)
        self.unseen = max(self.unseen, lowest)
        is_overloaded = now - lowest > self._most_waiting
        if is_overloaded != self._is_overloaded:
            self._is_overloaded = is_overloaded
            if is_overloaded:
                _log.warning("more calls than can be served", remedy="see PersonaeServerBusy in docs/operations.md")
            else:
                _log.info("all calls are served again", not_served=now)
        full = {executor for executor in self._executors if executor.is_full} or {self._others}
        for executor in self._executors:
            executor.refuse(_REFUSED_EACH_LOOK if is_overloaded and now > latest and executor in full else 0)

    def _untaken(self) -> int:
        """How many calls that began were never taken: those that wait, and all that ended waiting."""
        counts = json.loads(cygrpc.channelz_get_server(self._number))["server"]["data"]
        ended = int(counts["callsSucceeded"]) + int(counts["callsFailed"])
        return int(counts["callsStarted"]) - ended - len(self._state.rpc_states)


class _Asking:
    """Stands in the place of the object that grpcio asks for the next call of a method as soon as it was given one."""

    def __init__(self, server: Any, executors: Mapping[str, BoundedExecutor], others: BoundedExecutor) -> None:
        self._server = server
        self._executors = executors
        self._others = others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def request_registered_call(self, calls: Any, events: Any, method: str, tag: Any) -> None:
        """Ask now, or when there is room."""
        ask = partial(self._server.request_registered_call, calls, events, method, tag)
        if method.startswith("/grpc."):
            ask()  # health has threads of its own
        else:
            self._executors.get(method, self._others).ask(ask)


def _servers() -> list[dict[str, Any]]:
    """All that this process has, as channelz names them."""
    found: list[dict[str, Any]] = []
    while True:
        start = int(found[-1]["ref"]["serverId"]) + 1 if found else 0
        page = json.loads(cygrpc.channelz_get_servers(start))
        found += page.get("server", [])
        if page.get("end", False) or not page.get("server"):
            return found
