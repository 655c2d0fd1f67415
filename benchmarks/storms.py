"""Two kinds of callers that meet: a crowd that wants to sign in all at once, and a few that read on a timetable.

Each kind runs in a process of its own. See `benchmarks/load.py` for the callers of all other measurements.
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
"""For each kind."""
_REFUSED = "RESOURCE_EXHAUSTED"
MIN_BACKOFF_SECONDS = 0.05
"""Of a caller whose attempt failed, also when it was not told to wait."""


@dataclass(slots=True)
class Reads:
    """What became of the reads on the timetable."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from when a read was due. One that failed counts as its whole deadline: by then it had not come."""
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Storm:
    """What became of the sign-ins."""

    signed_in_per_second: float
    answers: Counter[str]
    """By code and reason."""
    refused: list[float]
    """The seconds that each RESOURCE_EXHAUSTED took."""
    without_pushback: int
    """How many of those did not say when to come again."""


def read_on_schedule(
    target: str, requests: Sequence[Request], *, readers: int, interval: float, seconds: float
) -> Reads:
    """Each reader makes a call `every` so many seconds, and the readers take turns.

    A call that is due while the reader's last one is still out is made as soon as that is answered, and has been
    waiting since it was due: otherwise a server that stalls would be asked less often, and look faster.
    """
    channels = [_connected_channel(target) for _ in range(_CHANNELS)]
    all_reads = [Reads() for _ in range(readers)]
    barrier = threading.Barrier(readers)

    def read(number: int) -> None:
        call: Any = channels[number % _CHANNELS].unary_unary(requests[0].method)
        cycle = itertools.cycle(requests[number::readers])
        _read(call, next(cycle), time.perf_counter(), all_reads[number])
        all_reads[number].latencies.clear()  # that one warmed up
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
    """One caller for each request, which makes it again and again for so long, without any retry by gRPC.

    Who is refused waits as long as the pushback says, give or take a half, so that the crowd does not come in step:
    callers that are refused without a pause would measure how fast refusals are, and on the cores of the server.
    Ends when the last call is answered, or its deadline is over.
    """
    channels = [_connected_channel(target) for _ in range(_CHANNELS)]
    all_answers: list[list[Outcome]] = [[] for _ in requests]
    signed_in = [0] * len(requests)
    end = time.perf_counter() + seconds

    def sign_in(number: int) -> None:
        request = requests[number]
        call: Any = channels[number % _CHANNELS].unary_unary(request.method)
        rng = random.Random(number)
        while time.perf_counter() < end:
            answer = outcome_of(call, request)
            all_answers[number].append(answer)
            if answer.code != "OK":
                time.sleep(max(answer.pushback or 0, min_backoff) * rng.uniform(0.5, 1.5))
            elif time.perf_counter() < end:
                signed_in[number] += 1

    _run_threads([threading.Thread(target=sign_in, args=(number,), daemon=True) for number in range(len(requests))])
    for channel in channels:
        channel.close()
    answers = [answer for found in all_answers for answer in found]
    refused = [answer for answer in answers if answer.code == _REFUSED]
    return Storm(
        signed_in_per_second=sum(signed_in) / seconds,
        answers=Counter(answer.name for answer in answers),
        refused=[answer.seconds for answer in refused],
        without_pushback=sum(answer.pushback is None for answer in refused),
    )


def bcrypt_throughput(*, threads: int, password: str, cost: int, seconds: float) -> float:
    """Check a password again and again on so many threads; how many checks a second."""
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
        due = time.perf_counter()  # that this process woke up late is not the server's fault
    error = call_error(call, request)
    if error is None:
        reads.latencies.append(time.perf_counter() - due)
    else:
        reads.latencies.append(DEADLINE_SECONDS)
        reads.errors[error] += 1


def _connected_channel(target: str) -> grpc.Channel:
    """A channel whose connection is there already. Raises MeasurementError."""
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
