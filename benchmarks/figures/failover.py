"""Failover: the primary is killed under writes and a standby is promoted; counts lost writes.

Measured only on request: it needs two PostgreSQL servers of its own, and the time without service is mostly that of the
promotion.
"""

import time
from pathlib import Path

import grpc

from benchmarks.bench import Bench
from benchmarks.processes import SERVICE, running
from benchmarks.table import Findings, spread
from personae.v1 import user_pb2_grpc
from service.base.settings import Settings
from tests.support.crash import crash
from tests.support.databases import migrate
from tests.support.load import Writers, missing
from tests.support.pair import replicating

_ROUNDS = 3
_WRITERS = 4
_SECONDS = 4
"""Of writes before the crash, and after the promotion."""


def measure(bench: Bench) -> Findings:
    """Repeat the failover, each time on a new pair of PostgreSQL servers."""
    bindir = Settings(_env_file=None).pg_bindir
    gaps, lost, acknowledged, reasons = [], 0, 0, set[str]()
    for number in range(_ROUNDS):
        writers, lost_ids = _round(bench.directory / f"pair-{number}", bindir, bench)
        gaps.append(writers.longest_gap)
        lost += len(lost_ids)
        acknowledged += len(writers.created)
        reasons |= {failure.split()[2] for failure in writers.failures}
    findings = Findings()
    findings.at_most("acknowledged writes lost in a failover", lost, 0, digits=0)
    findings.note(
        f"Failover: {acknowledged:,} writes acknowledged, {lost} lost; {spread(gaps, unit=' s', digits=2)} without "
        f"service. {_ROUNDS} times the primary was killed with SIGKILL and the standby promoted at once. Calls failed "
        f"meanwhile with: {', '.join(sorted(reasons)) or 'nothing'}."
    )
    return findings


def _round(directory: Path, bindir: Path | None, bench: Bench) -> tuple[Writers, list[int]]:
    directory.mkdir(mode=0o711)
    with replicating(directory, bindir) as pair:
        migrate(pair.url)
        with running(SERVICE, pair.url, bench.directory) as server, grpc.insecure_channel(server.target) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            with Writers(users, threads=_WRITERS) as writers:
                time.sleep(_SECONDS)
                crash(pair.primary)
                pair.promote()
                writers.wait_for_calls(1)
                time.sleep(_SECONDS)
            return writers, missing(users, writers.created)
