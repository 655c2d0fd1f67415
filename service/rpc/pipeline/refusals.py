"""Floods of refused calls: anybody can cause them, so that they must not fill the disk through the log.

A call that is refused before its message was read costs its client next to nothing. Of these calls a few have a line of
their own in each period, for each reason and caller; the others are counted, and one line says how many there were.
The metrics count every call.
"""

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock

import structlog

from service.rpc.context import CallContext, address_of

LINES = 20
"""Access log lines of a reason and caller in a period: 10 MB a day at the most."""
_MAX_ADDRESSES = 10
"""Addresses that the line names. Those of others are not kept, since a client may have very many."""
_log = structlog.get_logger("personae.rpc")


@dataclass(slots=True)
class _Refused:
    lines: int = 0
    calls: int = 0
    addresses: Counter[str] = field(default_factory=Counter)


class Refusals:
    """Counts the refused calls of one period, which `report` ends."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._refused: dict[tuple[str | None, str], _Refused] = {}

    def is_counted(self, call: CallContext) -> bool:
        """Whether this call that has ended was counted here, and needs no line of its own."""
        if call.status is None or call.has_message:
            return False
        address = address_of(call.context.peer())
        with self._lock:
            refused = self._refused.setdefault((call.reason, call.caller), _Refused())
            if refused.lines < LINES:
                refused.lines += 1
                return False
            refused.calls += 1
            if address and (address in refused.addresses or len(refused.addresses) < _MAX_ADDRESSES):
                refused.addresses[address] += 1
            return True

    def report(self) -> None:
        """Log what was counted, one line for each reason and caller, and begin a new period."""
        with self._lock:
            ended, self._refused = self._refused, {}
        for (reason, caller), refused in ended.items():
            if refused.calls:
                addresses = dict(refused.addresses.most_common())
                _log.warning(
                    "more calls refused", reason=reason, caller=caller, calls=refused.calls, addresses=addresses
                )
