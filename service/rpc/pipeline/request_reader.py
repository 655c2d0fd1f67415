"""Reads the message of a unary RPC: after authorisation, and within a time limit.

For a unary handler grpcio waits for the message on the RPC's thread, without a limit, before any code of this service
runs. A few streams that are opened and never written to would hold all threads, for callers that nobody has
authenticated. The pipeline therefore serves every unary method as one with a stream of requests, which is the same on
the wire, and reads its one message here. See docs/decisions/0022-messages-after-authorisation.md.

Streams that anybody may open, for health and reflection, wait for their clients here too: for each message, and for the
client to take each response.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any

import grpc

from service.base.clock import monotonic
from service.base.errors import (
    CallerGoneError,
    DeadlineOverError,
    MalformedMessageError,
    RequestLateError,
    ServerBusyError,
)

CHECK_INTERVAL = 0.25
"""Seconds between two checks of the calls that wait for their message."""
_SLOW_AFTER = 2
"""Checks after which a message is slow. Checks are counted instead of seconds, so that a process that was suspended
does not blame its callers for the lost time."""
_OVERDUE_AFTER = 20
MESSAGE_SECONDS = _OVERDUE_AFTER * CHECK_INTERVAL
"""How long a message may take: enough for 4 MiB at 7 Mbit/s."""
_GONE_SECONDS = 0.05
_MAX_SLOW_PEERS = 1000


class RequestReader:
    """Reads the messages of the RPCs of one executor.

    Waiting on the iterator has no timeout. Only cancelling the call ends it: `cancel_slow` does that, and the caller
    sees CANCELLED.
    """

    def __init__(self, *, max_slow: int, crowded: Event) -> None:
        """max_slow: threads that calls with a slow message may hold. crowded: is set when more calls than that wait."""
        self._max_slow = max_slow
        self._crowded = crowded
        self._checked_at = monotonic()
        self._slow_peers: set[str] = set()
        """Connections on which a message was slow and none has come since. One call of each may wait at a time; while
        more calls wait than may, it is cancelled at the next check.
        """
        self._checked: frozenset[grpc.ServicerContext] = frozenset()
        """The calls that were waiting when `cancel_slow` ran last."""
        self._lock = Lock()
        self._waiting: dict[grpc.ServicerContext, int] = {}
        """For each call in how many checks it was waiting; the oldest call first."""

    def read(self, requests: Iterator[bytes], context: grpc.ServicerContext, deadline: float) -> bytes:
        """Read the first message of this call. deadline: in monotonic seconds.

        Raises MalformedMessageError when the caller ends its side without a message, RequestLateError when the message
        did not come in time, ServerBusyError while another call of a slow connection waits, DeadlineOverError,
        CallerGoneError.
        """
        if self._slow_peers:
            self._require_no_other(context.peer())
        self._enter(context)
        try:
            message = next(requests)
        except (StopIteration, grpc.RpcError) as error:
            with self._lock:
                was_cancelled_here = context not in self._waiting
            if was_cancelled_here:
                raise RequestLateError(seconds=f"{MESSAGE_SECONDS:g}") from None
            if isinstance(error, StopIteration) and not _has_gone(context):
                raise MalformedMessageError from None
            raise (DeadlineOverError if monotonic() >= deadline else CallerGoneError) from None
        finally:
            was_waiting = self._leave(context)
        if not was_waiting:  # it was cancelled at the moment at which the message came: its caller sees CANCELLED
            raise RequestLateError(seconds=f"{MESSAGE_SECONDS:g}")
        if self._slow_peers:
            self._slow_peers.discard(context.peer())
        return message

    @contextmanager
    def sending(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Send a response of a stream in this block. It blocks until the client takes it: a client that does not is
        cancelled like one that sends no message.
        """
        self._enter(context)
        try:
            yield
        finally:
            self._leave(context)

    def send(self, send: Callable[[Any], None], response: Any, context: grpc.ServicerContext) -> None:
        """As `sending`. Raises CallerGoneError when the client did not take the response in time."""
        self._enter(context)
        try:
            send(response)
        finally:
            was_waiting = self._leave(context)
        if not was_waiting:
            raise CallerGoneError

    def cancel_slow(self) -> None:
        """Cancel the calls whose message is overdue. While more calls wait than may, also the oldest that are slow.

        Called every CHECK_INTERVAL seconds, and sooner when too many calls wait.
        """
        now = monotonic()
        with self._lock:
            if now - self._checked_at >= CHECK_INTERVAL:
                self._checked_at = now
                for context in self._waiting:
                    self._waiting[context] += 1
            excess = len(self._waiting) - self._max_slow
            slow = [
                context
                for position, (context, checks) in enumerate(self._waiting.items())
                if checks > _OVERDUE_AFTER
                or (position < excess and (checks >= _SLOW_AFTER or self._is_slow_again(context)))
            ]
            for context in slow:
                del self._waiting[context]
            self._checked = frozenset(self._waiting)
        self._note_slow(slow)  # before: a call that was cancelled has no peer any more
        for context in slow:
            context.cancel()

    def _enter(self, context: grpc.ServicerContext) -> None:
        """Count a call that waits for its client."""
        with self._lock:
            self._waiting[context] = 0
            if len(self._waiting) > self._max_slow:
                self._crowded.set()

    def _require_no_other(self, peer: str) -> None:
        if peer in self._slow_peers:
            with self._lock:
                if any(other.peer() == peer for other in self._waiting):
                    raise ServerBusyError

    def _leave(self, context: grpc.ServicerContext) -> bool:
        """Whether the call was still waiting; False: it was cancelled."""
        with self._lock:
            return self._waiting.pop(context, None) is not None

    def _is_slow_again(self, context: grpc.ServicerContext) -> bool:
        return context in self._checked and context.peer() in self._slow_peers

    def _note_slow(self, contexts: list[grpc.ServicerContext]) -> None:
        if len(self._slow_peers) > _MAX_SLOW_PEERS:
            self._slow_peers.clear()
        self._slow_peers.update(context.peer() for context in contexts)


def _has_gone(context: grpc.ServicerContext) -> bool:
    """Whether the caller has left. gRPC ends the stream of requests a moment before it marks the call as ended."""
    gone = Event()
    return not context.add_callback(gone.set) or gone.wait(_GONE_SECONDS)
