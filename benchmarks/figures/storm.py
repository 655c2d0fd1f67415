"""Latency of reads during a sign-in storm that exceeds the hashing capacity, and the throughput of sign-ins in it."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.accounts import sign_in_user_ids
from benchmarks.bench import Bench
from benchmarks.data import COST, PASSWORD
from benchmarks.load import LoadGenerator, load_generator
from benchmarks.machine import cpu_seconds, real_time_priority
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import authenticate, authenticate_malformed, get_user
from benchmarks.storms import Reads, Storm, bcrypt_throughput, read_on_schedule, sign_in_storm
from benchmarks.table import Findings, MeasurementError, spread

_SIGN_INS_AT_ONCE = 320
"""Far more than can hash or wait in a queue."""
_READERS = 20
_READ_INTERVAL_SECONDS = 0.1
"""Per reader. 200 reads per second leave the cores mostly idle, and readers do not wait for each other."""
_RAMP_UP_SECONDS = 2
"""From the first sign-in to the first measured read: until every queue is full."""
_MARGIN_SECONDS = 0.5
_PAUSE_SECONDS = 0.5
"""Of a refused client: the pushback of HASHING_BUSY."""
_COOL_DOWN_SECONDS = 1
"""After a storm, until the last hashes are computed."""
_USERS = range(1, 1001)
_MILLI = 1e3


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The results of alternating idle and storm rounds, in order."""

    idle_reads: list[Reads]
    storm_reads: list[Reads]
    storms: list[Storm]
    bare: list[float]
    """Hashes per second of bcrypt in as many threads as cores, beside the same reads and as many refusals."""
    server_cores: list[float]
    """CPU utilisation of the server in each storm, in cores."""


def measure(bench: Bench) -> Findings:
    """Alternate idle and storm rounds on a service with default settings, without pinning.

    The database represents one on a machine of its own, so it gets real-time priority. Otherwise its backends would
    wait for hundreds of ms behind bcrypt on shared cores: the kernel's group scheduling gives the sessions of both
    equal weight, whatever the niceness of the hashing threads.
    """
    with (
        real_time_priority(bench.database_server.pid) as has_priority,
        running(SERVICE, bench.database_url, bench.directory, settings={"BCRYPT_COST": str(COST)}) as server,
        load_generator(bench.cores.all) as read_load,
        load_generator(bench.cores.all) as sign_in_load,
        load_generator(bench.cores.all) as refusal_load,
    ):
        rounds = _run_rounds(bench, server, read_load, sign_in_load, refusal_load)
    for reads in rounds.idle_reads:
        if reads.errors:
            raise MeasurementError(f"wrong responses in an idle round: {dict(reads.errors)}")
    findings = _findings(bench, rounds)
    if not has_priority:
        findings.note(
            "The storm: the database had no real-time priority. If it shared these cores, reads waited for it."
        )
    return findings


def _run_rounds(
    bench: Bench, server: Server, read_load: LoadGenerator, sign_in_load: LoadGenerator, refusal_load: LoadGenerator
) -> _Rounds:
    reads = [get_user(user_id) for user_id in _USERS]
    sign_ins = [authenticate(user_id, PASSWORD) for user_id in sign_in_user_ids(bench.database_url, _SIGN_INS_AT_ONCE)]
    seconds = bench.sizes.storm_seconds

    def read() -> Reads:
        return read_load.run(
            read_on_schedule, server.target, reads, readers=_READERS, interval=_READ_INTERVAL_SECONDS, seconds=seconds
        )

    rounds = _Rounds([], [], [], [], [])
    read()  # warms up
    for _ in range(bench.sizes.storm_rounds):
        rounds.idle_reads.append(read())
        storm_seconds = _RAMP_UP_SECONDS + seconds + _MARGIN_SECONDS
        storm = sign_in_load.submit(sign_in_storm, server.target, sign_ins, seconds=storm_seconds)
        time.sleep(_RAMP_UP_SECONDS)
        cpu, started = cpu_seconds(server.pid), time.perf_counter()
        rounds.storm_reads.append(read())
        rounds.server_cores.append((cpu_seconds(server.pid) - cpu) / (time.perf_counter() - started))
        rounds.storms.append(storm.result())
        time.sleep(_COOL_DOWN_SECONDS)
        # The clients and refusals of the storm use CPU time on the same cores, so bare bcrypt gets as many.
        refusal_clients = round(len(rounds.storms[-1].refused) / storm_seconds * _PAUSE_SECONDS)
        refusals = refusal_load.submit(
            sign_in_storm,
            server.target,
            [authenticate_malformed()] * refusal_clients,
            seconds=seconds,
            min_backoff=_PAUSE_SECONDS,
        )
        bare = sign_in_load.submit(
            bcrypt_throughput, threads=len(bench.cores.all), password=PASSWORD, cost=COST, seconds=seconds
        )
        read()
        rounds.bare.append(bare.result())
        refusals.result()
    return rounds


def _findings(bench: Bench, rounds: _Rounds) -> Findings:
    idle_reads, storm_reads = ([_p99(reads) for reads in found] for found in (rounds.idle_reads, rounds.storm_reads))
    errors = _total(reads.errors for reads in rounds.storm_reads)
    outcomes = _total(storm.outcomes for storm in rounds.storms)
    refused = [taken for storm in rounds.storms for taken in storm.refused]
    without_pushback = sum(storm.without_pushback for storm in rounds.storms)
    took = f" in {spread(refused, scale=_MILLI, unit=' ms', digits=1)}" if refused else ""
    findings = Findings()
    findings.at_most(
        "p99 of GetUser under a saturating sign-in storm / idle", median(storm_reads) / median(idle_reads), 5
    )
    findings.at_most("reads that failed during the storm", errors.total(), 0, digits=0)
    findings.at_most("refused sign-ins without pushback", without_pushback, 0, digits=0)
    findings.at_least(
        "sign-ins/s in the storm / bare bcrypt beside the same reads and refusals",
        median(storm.signed_in_per_second for storm in rounds.storms) / median(rounds.bare),
        0.9,
    )
    for name, found, p99s in (
        ("idle", rounds.idle_reads, idle_reads),
        ("in the storm", rounds.storm_reads, storm_reads),
    ):
        p50s = [median(reads.latencies) for reads in found]
        findings.note(
            f"GetUser {name}: p50 {spread(p50s, scale=_MILLI, unit=' ms', digits=2)}, "
            f"p99 {spread(p99s, scale=_MILLI, unit=' ms', digits=2)}; {bench.sizes.storm_rounds} rounds of "
            f"{bench.sizes.storm_seconds:g} s, {sum(len(reads.latencies) for reads in found):,} reads"
            f"{f', failed {dict(errors)}' if errors and found is rounds.storm_reads else ''}."
        )
    rates = [storm.signed_in_per_second for storm in rounds.storms]
    findings.note(
        f"The storm: {_SIGN_INS_AT_ONCE} callers, {spread(rates, unit=' sign-ins/s', digits=1)}, the server on "
        f"{spread(rounds.server_cores, digits=2)} cores; bare bcrypt {spread(rounds.bare, unit='/s', digits=1)}; "
        f"{len(refused):,} refused{took}, "
        f"{len(refused) - without_pushback:,} of them with pushback; all answers: "
        f"{', '.join(f'{name} {count:,}' for name, count in outcomes.most_common())}."
    )
    return findings


def _p99(reads: Reads) -> float:
    return quantiles(reads.latencies, n=100, method="inclusive")[-1]


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())
