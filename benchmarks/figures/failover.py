"""What a failover costs: a primary that is killed under writes, a standby that is promoted, the server in between.

Not part of the usual run: it is a demonstration on two PostgreSQL servers of its own, and how long the promotion takes
is not the service's doing.
"""

import time
from pathlib import Path
from statistics import median

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
"""Of writes, before and after."""


def measure(bench: Bench) -> Findings:
    """A fresh pair each time; the server is a process of its own, as an operator starts it."""
    bindir = Settings(_env_file=None).pg_bindir
    gaps, lost, acknowledged, refused = [], 0, 0, set[str]()
    for number in range(_ROUNDS):
        writers, gone = _round(bench.directory / f"pair-{number}", bindir, bench)
        gaps.append(writers.longest_gap)
        lost += len(gone)
        acknowledged += len(writers.created)
        refused |= {how.split()[2] for how in writers.failures}
    findings = Findings()
    findings.at_most("acknowledged writes lost in a failover", lost, 0, digits=0)
    findings.note(
        f"Failover: {acknowledged:,} writes acknowledged, {lost} lost; {median(gaps):.2f} s without service "
        f"({spread(gaps, unit=' s', digits=2)}), of {_ROUNDS} times that the primary was killed with SIGKILL and the "
        f"standby promoted at once. What failed meanwhile: {', '.join(sorted(refused)) or 'nothing'}."
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
