"""Whether reads go on as usual while far more people sign in than the machine can hash for."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.accounts import who_may_sign_in
from benchmarks.bench import Bench
from benchmarks.data import COST, PASSWORD
from benchmarks.load import Callers, callers
from benchmarks.machine import cpu_seconds, first_in_line
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import authenticate, authenticate_unreadably, get_user
from benchmarks.storms import Reads, Storm, bcrypt_storm, read_on_schedule, sign_in_storm
from benchmarks.table import Findings, MeasurementError, spread

_SIGN_INS_AT_ONCE = 320
"""Far more than the RPCs that hash or wait to hash."""
_READERS = 20
_READ_EVERY_SECONDS = 0.1
"""For each reader. 200 reads a second leave the cores idle most of the time, as the name of the round says; and where
one read has to wait, the others are still made, as by callers who do not know of each other."""
_GATHERING_SECONDS = 2
"""From the first sign-in until reads are measured: by then every queue is full."""
_MARGIN_SECONDS = 0.5
_PAUSE_SECONDS = 0.5
"""Of a caller who is refused: the pushback of HASHING_BUSY."""
_CALM_SECONDS = 1
"""After a storm: what was begun is hashed to its end."""
_USERS = range(1, 1001)
_MILLI = 1e3


@dataclass(frozen=True, slots=True)
class _Rounds:
    """Idle and stormy rounds, in the order in which they took turns."""

    idle: list[Reads]
    stormy: list[Reads]
    storms: list[Storm]
    bare: list[float]
    """Hashes a second of bcrypt alone, on as many threads as cores, beside the same reads and as many refusals."""
    busy: list[float]
    """The cores that the server used during each storm."""


def measure(bench: Bench) -> Findings:
    """The service as it is shipped, not pinned; idle and storm in turns.

    The database stands for one on a machine of its own. Where it shares the cores, its backends must not queue behind
    bcrypt: the kernel weighs its session against the service's as equals, whatever the niceness of the threads that
    hash, and a backend then waits for hundreds of ms.
    """
    with (
        first_in_line(bench.server.pid) as is_first,
        running(SERVICE, bench.few_users, bench.directory, settings={"BCRYPT_COST": str(COST)}) as server,
        callers(bench.cores.all) as readers,
        callers(bench.cores.all) as crowd,
        callers(bench.cores.all) as refused,
    ):
        rounds = _in_turns(bench, server, readers, crowd, refused)
    for reads in rounds.idle:
        if reads.faults:
            raise MeasurementError(f"wrong answers while nobody signed in: {dict(reads.faults)}")
    findings = _findings(bench, rounds)
    if not is_first:
        findings.note("The storm: the database was not first in line. If it shared these cores, reads waited for it.")
    return findings


def _in_turns(bench: Bench, server: Server, readers: Callers, crowd: Callers, refused: Callers) -> _Rounds:
    reads = [get_user(user_id) for user_id in _USERS]
    sign_ins = [authenticate(user_id, PASSWORD) for user_id in who_may_sign_in(bench.few_users, _SIGN_INS_AT_ONCE)]
    seconds = bench.sizes.storm_seconds

    def read() -> Reads:
        return readers.do(
            read_on_schedule, server.target, reads, readers=_READERS, every=_READ_EVERY_SECONDS, seconds=seconds
        )

    rounds = _Rounds([], [], [], [], [])
    read()  # warms up
    for _ in range(bench.sizes.storm_rounds):
        rounds.idle.append(read())
        whole = _GATHERING_SECONDS + seconds + _MARGIN_SECONDS
        storm = crowd.start(sign_in_storm, server.target, sign_ins, seconds=whole)
        time.sleep(_GATHERING_SECONDS)
        cpu, started = cpu_seconds(server.pid), time.perf_counter()
        rounds.stormy.append(read())
        rounds.busy.append((cpu_seconds(server.pid) - cpu) / (time.perf_counter() - started))
        rounds.storms.append(storm.result())
        time.sleep(_CALM_SECONDS)
        # The callers of the storm and their refusals cost CPU time on the same cores, so bare bcrypt has them too.
        many = round(len(rounds.storms[-1].refused) / whole * _PAUSE_SECONDS)
        others = refused.start(
            sign_in_storm,
            server.target,
            [authenticate_unreadably()] * many,
            seconds=seconds,
            least_pause=_PAUSE_SECONDS,
        )
        bare = crowd.start(bcrypt_storm, threads=len(bench.cores.all), password=PASSWORD, cost=COST, seconds=seconds)
        read()
        rounds.bare.append(bare.result())
        others.result()
    return rounds


def _findings(bench: Bench, rounds: _Rounds) -> Findings:
    calm, stormy = ([_p99(reads) for reads in found] for found in (rounds.idle, rounds.stormy))
    faults = _total(reads.faults for reads in rounds.stormy)
    answers = _total(storm.answers for storm in rounds.storms)
    refused = [taken for storm in rounds.storms for taken in storm.refused]
    without_pushback = sum(storm.without_pushback for storm in rounds.storms)
    took = f" in {spread(refused, scale=_MILLI, unit=' ms', digits=1)}" if refused else ""
    findings = Findings()
    findings.at_most("p99 of GetUser under a saturating sign-in storm / idle", median(stormy) / median(calm), 5)
    findings.at_most("reads that failed during the storm", faults.total(), 0, digits=0)
    findings.at_most("refused sign-ins without pushback", without_pushback, 0, digits=0)
    findings.at_least(
        "sign-ins/s in the storm / bare bcrypt beside the same reads and refusals",
        median(storm.signed_in_per_second for storm in rounds.storms) / median(rounds.bare),
        0.9,
    )
    for name, found, p99s in (("idle", rounds.idle, calm), ("in the storm", rounds.stormy, stormy)):
        p50s = [median(reads.latencies) for reads in found]
        findings.note(
            f"GetUser {name}: p50 {spread(p50s, scale=_MILLI, unit=' ms', digits=2)}, "
            f"p99 {spread(p99s, scale=_MILLI, unit=' ms', digits=2)}; {bench.sizes.storm_rounds} rounds of "
            f"{bench.sizes.storm_seconds:g} s, {sum(len(reads.latencies) for reads in found):,} reads"
            f"{f', failed {dict(faults)}' if faults and found is rounds.stormy else ''}."
        )
    rates = [storm.signed_in_per_second for storm in rounds.storms]
    findings.note(
        f"The storm: {_SIGN_INS_AT_ONCE} callers, {spread(rates, unit=' sign-ins/s', digits=1)}, the server on "
        f"{spread(rounds.busy, digits=2)} cores; bare bcrypt {spread(rounds.bare, unit='/s', digits=1)}; "
        f"{len(refused):,} refused{took}, "
        f"{len(refused) - without_pushback:,} of them with pushback; all answers: "
        f"{', '.join(f'{name} {count:,}' for name, count in answers.most_common())}."
    )
    return findings


def _p99(reads: Reads) -> float:
    return quantiles(reads.latencies, n=100, method="inclusive")[-1]


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())
