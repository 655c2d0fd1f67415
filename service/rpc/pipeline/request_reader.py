"""Reads the message of a unary RPC: after the call was authorised, and within a bound.

For a unary handler grpcio waits for the message on the RPC's thread, without a limit, before any code of ours runs. A
few streams that are opened and never written to would then hold all threads of the server, for callers that nobody has
authenticated. The pipeline therefore serves every unary method as one whose requests are a stream, which is the same on
the wire, and takes its one message here. See docs/decisions/0022-messages-after-authorisation.md.
"""

from collections.abc import Iterator
from threading import Lock

import grpc

from service.base.clock import monotonic
from service.base.errors import CallerGoneError, DeadlineOverError, MalformedMessageError, RequestLateError

WATCH_INTERVAL = 0.25
"""Seconds between two looks at the calls whose message has not come."""
_SLOW_AFTER = 2
"""Looks after which a message is slow. Looks are counted and not seconds, so that a process that was kept from running
does not take the time that it lost for its callers' slowness."""
_OVERDUE_AFTER = 20
MESSAGE_SECONDS = _OVERDUE_AFTER * WATCH_INTERVAL
"""How long a message may take: 4 MiB at 7 Mbit/s."""


class RequestReader:
    """Reads the messages of the RPCs of one executor.

    Waiting on the iterator has no timeout. Only cancelling the call ends it: `cancel_slow` does that, and the caller
    sees CANCELLED.
    """

    def __init__(self, *, max_slow: int) -> None:
        """max_slow: threads that calls may hold whose message is slow."""
        self._max_slow = max_slow
        self._lock = Lock()
        self._waiting: dict[grpc.ServicerContext, int] = {}
        """How often each call was seen waiting; in the order in which they began to wait."""

    @property
    def waiting(self) -> int:
        """How many calls wait for their message."""
        return len(self._waiting)

    def read(self, requests: Iterator[bytes], context: grpc.ServicerContext, deadline: float) -> bytes:
        """The message of this call; further messages are not looked at. deadline: in monotonic seconds.

        Raises MalformedMessageError when the caller ends its side without a message, RequestLateError when the message
        did not come in time, DeadlineOverError, CallerGoneError.
        """
        with self._lock:
            self._waiting[context] = 0
        try:
            return next(requests)
        except (StopIteration, grpc.RpcError) as error:
            with self._lock:
                was_cancelled_here = context not in self._waiting
            if was_cancelled_here:
                raise RequestLateError(seconds=f"{MESSAGE_SECONDS:g}") from None
            if isinstance(error, StopIteration) and context.is_active():
                raise MalformedMessageError from None
            raise (DeadlineOverError if monotonic() >= deadline else CallerGoneError) from None
        finally:
            with self._lock:
                self._waiting.pop(context, None)

    def cancel_slow(self) -> None:
        """Cancel the calls whose message is overdue, and where too many are slow those that have waited longest.

        To be called every WATCH_INTERVAL seconds.
        """
        with self._lock:
            for context in self._waiting:
                self._waiting[context] += 1
            too_many = len(self._waiting) - self._max_slow
            slow = [
                context
                for position, (context, looks) in enumerate(self._waiting.items())
                if looks > _OVERDUE_AFTER or (position < too_many and looks >= _SLOW_AFTER)
            ]
            for context in slow:
                del self._waiting[context]
        for context in slow:
            context.cancel()
