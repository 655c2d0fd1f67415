"""Load of a sign-in storm: many clients that sign in at once, and readers with a fixed schedule.

Each runs in a load generator of its own (`benchmarks/load.py`).
"""

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import bcrypt
import grpc

from benchmarks.load import DEADLINE_SECONDS, Request, call_error, open_channel
from benchmarks.outcomes import Outcome, outcome_of
from benchmarks.table import MeasurementError

_CHANNELS = 8
"""Per load generator."""
_REFUSED = "RESOURCE_EXHAUSTED"
MIN_BACKOFF_SECONDS = 0.05
"""After a failed attempt, if the server sent no longer pushback."""


@dataclass(slots=True)
class Reads:
    """The results of scheduled reads."""

    latencies: list[float] = field(default_factory=list)
    """Seconds since the read was due. A failed read counts as its whole deadline."""
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Storm:
    """The results of a sign-in storm."""

    signed_in_per_second: float
    outcomes: Counter[str]
    """By code and reason."""
    refused: list[float]
    """The seconds of each call that ended with RESOURCE_EXHAUSTED."""
    without_pushback: int
    """How many of the refused calls had no pushback."""


def read_on_schedule(
    target: str, requests: Sequence[Request], *, readers: int, interval: float, seconds: float
) -> Reads:
    """Make one call per reader and interval, with the readers evenly staggered.

    A call that is due while the reader's previous one is in flight is made right after it, and its latency counts from
    when it was due. Otherwise a server that stalls would look faster (coordinated omission).
    """
    channels = [_connected_channel(target) for _ in range(_CHANNELS)]
    all_reads = [Reads() for _ in range(readers)]
    barrier = threading.Barrier(readers)

    def read(number: int) -> None:
        call: Any = channels[number % _CHANNELS].unary_unary(requests[0].method)
        cycle = itertools.cycle(requests[number::readers])
        _read(call, next(cycle), time.perf_counter(), all_reads[number])
        all_reads[number].latencies.clear()  # the first one warms up
        barrier.wait()
        started = time.perf_counter()
        due = started + number * interval / readers
        while due < started + seconds:
            _read(call, next(cycle), due, all_reads[number])
            due += interval

    _run_threads([threading.Thread(target=read, args=(number,), daemon=True) for number in range(readers)])
    for channel in channels:
        channel.close()
    return Reads(
        latencies=[latency for reads in all_reads for latency in reads.latencies],
        errors=sum((reads.errors for reads in all_reads), Counter()),
    )


def sign_in_storm(
    target: str, requests: Sequence[Request], *, seconds: float, min_backoff: float = MIN_BACKOFF_SECONDS
) -> Storm:
    """Repeat each request on a client of its own for `seconds`, without gRPC's retries.

    A refused client waits for the pushback, with a jitter of half of it, so that clients do not synchronize. Without a
    pause the benchmark would measure how fast the server refuses. Returns once all calls have ended.
    """
    channels = [_connected_channel(target) for _ in range(_CHANNELS)]
    outcomes_by_client: list[list[Outcome]] = [[] for _ in requests]
    signed_in = [0] * len(requests)
    end = time.perf_counter() + seconds

    def sign_in(number: int) -> None:
        request = requests[number]
        call: Any = channels[number % _CHANNELS].unary_unary(request.method)
        rng = random.Random(number)
        while time.perf_counter() < end:
            outcome = outcome_of(call, request)
            outcomes_by_client[number].append(outcome)
            if outcome.code != "OK":
                time.sleep(max(outcome.pushback or 0, min_backoff) * rng.uniform(0.5, 1.5))
            elif time.perf_counter() < end:
                signed_in[number] += 1

    _run_threads([threading.Thread(target=sign_in, args=(number,), daemon=True) for number in range(len(requests))])
    for channel in channels:
        channel.close()
    outcomes = [outcome for of_client in outcomes_by_client for outcome in of_client]
    refused = [outcome for outcome in outcomes if outcome.code == _REFUSED]
    return Storm(
        signed_in_per_second=sum(signed_in) / seconds,
        outcomes=Counter(outcome.name for outcome in outcomes),
        refused=[outcome.seconds for outcome in refused],
        without_pushback=sum(outcome.pushback is None for outcome in refused),
    )


def bcrypt_throughput(*, threads: int, password: str, cost: int, seconds: float) -> float:
    """Check a password in a loop on each of these threads. Returns checks per second."""
    stored = bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost))
    checked = [0] * threads
    started = time.perf_counter()

    def check(number: int) -> None:
        while time.perf_counter() < started + seconds:
            bcrypt.checkpw(password.encode(), stored)
            checked[number] += 1

    _run_threads([threading.Thread(target=check, args=(number,), daemon=True) for number in range(threads)])
    return sum(checked) / (time.perf_counter() - started)


def _read(call: Any, request: Request, due: float, reads: Reads) -> None:
    wait = due - time.perf_counter()
    if wait > 0:
        time.sleep(wait)
        due = time.perf_counter()  # a late wake-up of this process does not count
    error = call_error(call, request)
    if error is None:
        reads.latencies.append(time.perf_counter() - due)
    else:
        reads.latencies.append(DEADLINE_SECONDS)
        reads.errors[error] += 1


def _connected_channel(target: str) -> grpc.Channel:
    """Open a channel and wait for its connection. Raises MeasurementError."""
    channel = open_channel(target)
    try:
        grpc.channel_ready_future(channel).result(timeout=DEADLINE_SECONDS)
    except grpc.FutureTimeoutError:
        raise MeasurementError(f"no connection within {DEADLINE_SECONDS} s") from None
    return channel


def _run_threads(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
