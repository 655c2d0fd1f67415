"""Where passwords are hashed: on as many threads as there are cores, at a lower priority than everything else.

bcrypt is all that a sign-in costs, and it is meant to cost. So that cheap calls stay fast while sign-ins saturate every
core, the RPCs that hash run on executors of their own with bounded queues (service/rpc/admission.py), and what they
hash, here: an RPC's own Python and SQL keep their priority. See docs/decisions/0016-hashing-apart.md.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from functools import partial
from threading import get_native_id
from typing import ParamSpec, Protocol, TypeVar

from service.base.clock import monotonic
from service.base.cores import keep_to
from service.base.errors import DeadlineOverError, HashingBusyError

_NICENESS = 10
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Places(Protocol):
    """The places to hash on that several processes share."""

    def take(self, *, until: float) -> bool:
        """Wait for a place until then, in monotonic seconds; whether there was one."""

    def give_back(self) -> None:
        """Let another one have it."""


class Hashing:
    """The threads that hash."""

    def __init__(self, threads: int, *, cores: frozenset[int] | None = None, places: Places | None = None) -> None:
        """cores: where they run; None: where the thread runs that first needs one.

        places: what is shared with other processes, and taken for each hash; None: nothing is.
        """
        self._places = places
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hash", initializer=_step_back, initargs=(cores,))

    def run(
        self,
        deadline: float,
        function: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> _Result:
        """Call the function on one of the threads, and wait for it.

        Raises DeadlineOverError for what has not started by then (monotonic seconds), HashingBusyError for what has not
        when the server ends. What has started is finished, also beyond the deadline: work that was done is to count.
        """
        remaining = deadline - monotonic()
        if remaining <= 0:
            raise DeadlineOverError
        try:
            future = self._pool.submit(self._in_turn, deadline, partial(function, *arguments, **options))
        except BrokenThreadPool:
            raise
        except RuntimeError:  # the server has ended
            raise HashingBusyError from None
        try:
            return future.result(remaining)
        except TimeoutError:
            if future.cancel():
                raise DeadlineOverError from None
            return future.result()
        except CancelledError:  # the server stops, and the caller has been told already
            raise HashingBusyError from None

    def _in_turn(self, deadline: float, hashes: Callable[[], _Result]) -> _Result:
        if self._places is None:
            return hashes()
        if not self._places.take(until=deadline):
            raise DeadlineOverError
        try:
            return hashes()
        finally:
            self._places.give_back()

    def end(self) -> None:
        """Start nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _step_back(cores: frozenset[int] | None) -> None:
    """Use these cores, and let every other thread of the machine go first. Only Linux knows priorities of threads."""
    if cores is not None:
        keep_to(cores)
    if sys.platform == "linux":
        thread = get_native_id()
        with contextlib.suppress(OSError):  # a sandbox may forbid it: slower reads are better than no sign-ins
            niceness = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))  # never up, which takes a privilege
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
