"""Runs the benchmarks (`make bench`) and prints one table of results.

A missed bar is shown in the table and is not a failure: the exit status is 0 when the run was completed. Figures are
ratios within one run, counts, or sizes of one process, so that they can be compared between machines. See
docs/performance.md.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import psycopg2

from benchmarks.bench import FULL, QUICK, Bench, Sizes, prepare
from benchmarks.figures import (
    abuse,
    callers,
    cpu,
    equal_time,
    failover,
    foreign_hashes,
    health,
    imports,
    lists,
    memory,
    moving,
    overload,
    proxies,
    restarts,
    sessions,
    shipped,
    sign_in,
    soak,
    start,
    statements,
    storm,
    telemetry,
    workers,
)
from benchmarks.machine import UnsupportedMachineError, describe_machine
from benchmarks.table import Figure, Findings, MeasurementError, format_table
from service.base.settings import SettingsError
from service.dev.postgres import EmbeddedPostgresError

for _proxy in ("grpc_proxy", "https_proxy", "http_proxy"):  # gRPC uses a proxy even for loopback
    os.environ.pop(_proxy, None)

_MEASUREMENTS: dict[str, Callable[[Bench], Findings]] = {
    "cpu": cpu.measure,
    "shipped": shipped.measure,
    "callers": callers.measure,
    "telemetry": telemetry.measure,
    "statements": statements.measure,
    "sessions": sessions.measure,
    "proxies": proxies.measure,
    "workers": workers.measure,
    "sign-in": sign_in.measure,
    "storm": storm.measure,
    "overload": overload.measure,
    "health": health.measure,
    "equal-time": equal_time.measure,
    "foreign-hashes": foreign_hashes.measure,
    "lists": lists.measure,
    "memory": memory.measure,
    "start": start.measure,
}
_ON_DEMAND: dict[str, Callable[[Bench], Findings]] = {
    "abuse": abuse.measure,
    "failover": failover.measure,
    "imports": imports.measure,
    "moving": moving.measure,
    "restarts": restarts.measure,
    "soak": soak.measure,
}
"""Measured only when named on the command line."""
_ALL = _MEASUREMENTS | _ON_DEMAND
_SOAK_RPCS = 1_000_000


def main() -> None:
    """Parse the command line, run the measurements and print the results."""
    names, sizes = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that child processes are stopped
    started = time.monotonic()
    try:
        with prepare(sizes) as bench:
            findings = [_measured(name, bench) for name in names]
            machine = _machine(bench)
    except (UnsupportedMachineError, EmbeddedPostgresError, SettingsError, MeasurementError, psycopg2.Error) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    _show_progress("")
    print(format_table([figure for found in findings for figure in found.figures]))
    print(f"\n{machine}")
    for note in (note for found in findings for note in found.notes):
        print(f"- {note}")
    print(f"Medians, with the lowest and highest value in brackets. Took {time.monotonic() - started:.0f} s.")


def _machine(bench: Bench) -> str:
    if not bench.cores.are_separate:
        placement = "everything on one core"
    elif bench.database_server.is_embedded:
        placement = "the measured server on one core, clients and database on the others"
    else:
        placement = "the measured server on one core, clients on the others"
    origin = "embedded" if bench.database_server.is_embedded else "of DATABASE_URL"
    return f"{describe_machine()}; PostgreSQL {bench.database_server.version} ({origin}); {placement}."


def _arguments() -> tuple[list[str], Sizes]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=_names())
    parser.add_argument("--quick", action="store_true", help="small sizes: only checks that it runs")
    parser.add_argument("--soak", action="store_true", help=f"run memory and soak for {_SOAK_RPCS:,} RPCs")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in _ALL]:
        parser.error(f"no such measurement: {', '.join(unknown)}")
    sizes = QUICK if arguments.quick else FULL
    return arguments.names or list(_MEASUREMENTS), replace(sizes, rpcs=_SOAK_RPCS) if arguments.soak else sizes


def _names() -> str:
    return f"one of: {', '.join(_MEASUREMENTS)} (default: all of these); or: {', '.join(_ON_DEMAND)}"


def _measured(name: str, bench: Bench) -> Findings:
    _show_progress(f"measuring: {name} …")
    try:
        return _ALL[name](bench)
    except MeasurementError as error:
        return Findings(figures=[Figure(name, "", "", None)], notes=[f"{name}: {error}"])


def _show_progress(text: str) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
