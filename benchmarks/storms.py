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

from benchmarks.answers import Answer, ask
from benchmarks.load import DEADLINE_SECONDS, Request, fault_in, open_channel
from benchmarks.table import MeasurementError

_CHANNELS = 8
"""For each kind."""
_REFUSED = "RESOURCE_EXHAUSTED"
LEAST_PAUSE_SECONDS = 0.05
"""Of a caller whose attempt failed, also when it was not told to wait."""


@dataclass(slots=True)
class Reads:
    """What became of the reads on the timetable."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from when a read was due. One that failed counts as its whole deadline: by then it had not come."""
    faults: Counter[str] = field(default_factory=Counter)


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


def read_on_schedule(target: str, requests: Sequence[Request], *, readers: int, every: float, seconds: float) -> Reads:
    """Each reader makes a call `every` so many seconds, and the readers take turns.

    A call that is due while the reader's last one is still out is made as soon as that is answered, and has been
    waiting since it was due: otherwise a server that stalls would be asked less often, and look faster.
    """
    channels = [_connected(target) for _ in range(_CHANNELS)]
    all_reads = [Reads() for _ in range(readers)]
    go = threading.Barrier(readers)

    def read(number: int) -> None:
        call: Any = channels[number % _CHANNELS].unary_unary(requests[0].method)
        turns = itertools.cycle(requests[number::readers])
        _read(call, next(turns), time.perf_counter(), all_reads[number])
        all_reads[number].latencies.clear()  # that one warmed up
        go.wait()
        started = time.perf_counter()
        due = started + number * every / readers
        while due < started + seconds:
            _read(call, next(turns), due, all_reads[number])
            due += every

    _run_all([threading.Thread(target=read, args=(number,), daemon=True) for number in range(readers)])
    for channel in channels:
        channel.close()
    return Reads(
        latencies=[taken for reads in all_reads for taken in reads.latencies],
        faults=sum((reads.faults for reads in all_reads), Counter()),
    )


def sign_in_storm(
    target: str, requests: Sequence[Request], *, seconds: float, least_pause: float = LEAST_PAUSE_SECONDS
) -> Storm:
    """One caller for each request, which makes it again and again for so long, without any retry by gRPC.

    Who is refused waits as long as the pushback says, give or take a half, so that the crowd does not come in step:
    callers that are refused without a pause would measure how fast refusals are, and on the cores of the server.
    Ends when the last call is answered, or its deadline is over.
    """
    channels = [_connected(target) for _ in range(_CHANNELS)]
    all_answers: list[list[Answer]] = [[] for _ in requests]
    signed_in = [0] * len(requests)
    end = time.perf_counter() + seconds

    def attack(number: int) -> None:
        request = requests[number]
        call: Any = channels[number % _CHANNELS].unary_unary(request.method)
        dice = random.Random(number)
        while time.perf_counter() < end:
            answer = ask(call, request)
            all_answers[number].append(answer)
            if answer.code != "OK":
                time.sleep(max(answer.pushback or 0, least_pause) * dice.uniform(0.5, 1.5))
            elif time.perf_counter() < end:
                signed_in[number] += 1

    _run_all([threading.Thread(target=attack, args=(number,), daemon=True) for number in range(len(requests))])
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


def bcrypt_storm(*, threads: int, password: str, cost: int, seconds: float) -> float:
    """Check a password again and again on so many threads; how many checks a second."""
    stored = bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost))
    checked = [0] * threads
    started = time.perf_counter()

    def check(number: int) -> None:
        while time.perf_counter() < started + seconds:
            bcrypt.checkpw(password.encode(), stored)
            checked[number] += 1

    _run_all([threading.Thread(target=check, args=(number,), daemon=True) for number in range(threads)])
    return sum(checked) / (time.perf_counter() - started)


def _read(call: Any, request: Request, due: float, reads: Reads) -> None:
    wait = due - time.perf_counter()
    if wait > 0:
        time.sleep(wait)
        due = time.perf_counter()  # that this process woke up late is not the server's fault
    fault = fault_in(call, request)
    if fault is None:
        reads.latencies.append(time.perf_counter() - due)
    else:
        reads.latencies.append(DEADLINE_SECONDS)
        reads.faults[fault] += 1


def _connected(target: str) -> grpc.Channel:
    """A channel whose connection is there already. Raises MeasurementError."""
    channel = open_channel(target)
    try:
        grpc.channel_ready_future(channel).result(timeout=DEADLINE_SECONDS)
    except grpc.FutureTimeoutError:
        raise MeasurementError(f"no connection within {DEADLINE_SECONDS} s") from None
    return channel


def _run_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
