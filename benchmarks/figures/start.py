"""Time from the start of the process to SERVING."""

import time
from statistics import median

from benchmarks.bench import Bench
from benchmarks.load import wait_until_serving
from benchmarks.processes import CALLER_AUTH_REQUIRED, SERVICE, running
from benchmarks.table import Findings, spread


def measure(bench: Bench) -> Findings:
    """Start a server several times on a migrated database, without pinning."""
    durations = []
    for _ in range(bench.sizes.starts):
        started = time.perf_counter()
        with running(SERVICE, bench.database_url, bench.directory, settings=CALLER_AUTH_REQUIRED) as server:
            bench.load_generator.run(wait_until_serving, server.target)
            durations.append(time.perf_counter() - started)
    findings = Findings()
    findings.at_most("start to SERVING with a migrated database", median(durations), 1.5, unit=" s")
    findings.note(f"Start to SERVING: {spread(durations, unit=' s', digits=2)} of {bench.sizes.starts} starts.")
    return findings
