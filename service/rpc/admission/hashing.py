"""Where passwords are hashed: on as many threads as there are cores, at a lower priority than everything else.

bcrypt is all that a sign-in costs, and it is meant to cost. So that cheap calls stay fast while sign-ins saturate every
core, the RPCs that hash run on executors of their own, a few at once (service/rpc/admission/places.py), and what they
hash, here: an RPC's own Python and SQL keep their priority. See docs/decisions/0016-hashing-apart.md.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from functools import partial
from threading import get_native_id
from typing import Any, ParamSpec, Protocol, TypeVar

from service.base.clock import monotonic
from service.base.cores import pin_thread
from service.base.errors import CallerGoneError, DeadlineOverError, HashingBusyError
from service.rpc.context import CallContext, current_or_none

_NICENESS = 10
Around = Callable[[Callable[[], object]], Callable[[], object]]
"""Is given what is to be run, on the thread that wants it; gives back what is run in its place, on one that hashes."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Turn(Protocol):
    """One that waits for its turn."""

    def wait(self, *, until: float) -> bool:
        """Wait until then, in monotonic seconds; whether it has come."""

    def cancel(self) -> None:
        """Wait no longer."""


class Turns(Protocol):
    """What several processes share, so that not all of them hash at once."""

    def ask(self) -> Turn:
        """Ask for a turn."""

    def give_back(self) -> None:
        """Let another one have it."""


class Hashing:
    """The threads that hash."""

    def __init__(
        self,
        threads: int,
        *,
        cores: frozenset[int] | None = None,
        turns: Turns | None = None,
        around: Sequence[Around] = (),
    ) -> None:
        """cores: where they run; None: where the thread runs that first needs one.

        turns: what is waited for before each hash; None: nothing is. around: what looks at each hash, from the inside
        out.
        """
        self._turns = turns
        self._around = tuple(around)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hash", initializer=_step_back, initargs=(cores,))

    @property
    def waiting(self) -> int:
        """How many wait for one of the threads."""
        return self._pool._work_queue.qsize()  # noqa: SLF001  there is no public way to ask

    def run(
        self,
        deadline: float,
        function: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> _Result:
        """Call the function on one of the threads, and wait for it.

        Raises DeadlineOverError for what has not started by then (monotonic seconds), CallerGoneError for what has not
        when its caller hangs up, HashingBusyError for what has not when the server ends. What has started is finished,
        also beyond the deadline: work that was done is to count.
        """
        if deadline <= monotonic():
            raise DeadlineOverError
        call = current_or_none()
        hashes = self._watched(partial(function, *arguments, **options))
        if self._turns is None:
            return self._run(hashes, call, deadline)
        turn = self._turns.ask()
        if call is not None and not call.context.add_callback(turn.cancel):
            turn.cancel()  # it has hung up already
        if not turn.wait(until=deadline):
            raise CallerGoneError if deadline > monotonic() else DeadlineOverError
        try:
            return self._run(hashes, call, deadline)
        finally:
            self._turns.give_back()

    def _run(self, hashes: Callable[[], _Result], call: CallContext | None, deadline: float) -> _Result:
        try:
            future = self._pool.submit(hashes)
        except BrokenThreadPool:
            raise
        except RuntimeError:  # the server has ended
            raise HashingBusyError from None

        def leave() -> None:
            future.cancel()

        if call is not None and not call.context.add_callback(leave):
            leave()  # it has hung up already
        try:
            return future.result(max(0.0, deadline - monotonic()))
        except TimeoutError:
            if future.cancel():
                raise DeadlineOverError from None
            return future.result()
        except CancelledError:
            if call is not None and not call.context.is_active():
                raise CallerGoneError from None
            raise HashingBusyError from None  # the server stops, and the caller has been told already

    def _watched(self, hashes: Callable[[], _Result]) -> Callable[[], _Result]:
        watched: Any = hashes
        for around in self._around:
            watched = around(watched)
        found: Callable[[], _Result] = watched
        return found

    def end(self) -> None:
        """Start nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _step_back(cores: frozenset[int] | None) -> None:
    """Use these cores, and let every other thread of the machine go first. Only Linux knows priorities of threads."""
    if cores is not None:
        pin_thread(cores)
    if sys.platform == "linux":
        thread = get_native_id()
        with contextlib.suppress(OSError):  # a sandbox may forbid it: slower reads are better than no sign-ins
            niceness = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))  # never up, which takes a privilege
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
