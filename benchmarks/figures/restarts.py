"""Failed calls during reloads, restarts and kills of workers, under mixed load. Measured only on request."""

import os
import signal
import time
from collections import Counter
from contextlib import ExitStack

import orjson
import psutil

from benchmarks.bench import Bench
from benchmarks.table import Findings
from tests.support.databases import libpq_url
from tests.support.load import Load
from tests.support.processes import Process, process
from tests.support.scrapes import free_port

_THREADS = 8
_DRAIN_SECONDS = "1"
_AGE_SECONDS = "5"
_COST = "10"


def measure(bench: Bench) -> Findings:
    """Measure each on a server of its own with one worker per core."""
    findings = Findings()
    for name, measured in (("reload", _reload), ("restart", _restart), ("kill -9 of a worker", _kill)):
        with ExitStack() as stack:
            measured(findings, name, bench, stack)
    return findings


def _start(bench: Bench, stack: ExitStack, port: int) -> Process:
    return stack.enter_context(
        process(
            "serve",
            DATABASE_URL=libpq_url(bench.database_url),
            BCRYPT_COST=_COST,
            GRPC_PORT=str(port),
            GRPC_WORKERS="0",
            GRPC_MAX_CONNECTION_AGE=_AGE_SECONDS,
            SHUTDOWN_DRAIN=_DRAIN_SECONDS,
        )
    )


def _reload(findings: Findings, name: str, bench: Bench, stack: ExitStack) -> None:
    """Send SIGHUP twice; callers do not retry."""
    server = _start(bench, stack, port := free_port())
    server.wait_for("all workers serve")
    started = time.monotonic()
    with Load(f"127.0.0.1:{port}", threads=_THREADS) as load:
        for times in (1, 2):
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reload done", times)
            load.wait_for_calls(100)
    _note(findings, f"{name} (SIGHUP), callers without retries", load, f"2 in {time.monotonic() - started:.0f} s")
    findings.at_most(f"{name}: failed calls of callers without retries", sum(load.failures.values()), 0, digits=0)
    server.end()


def _restart(findings: Findings, name: str, bench: Bench, stack: ExitStack) -> None:
    """Stop with SIGTERM and start again three times; callers have the retry policy of docs/python.md."""
    server = _start(bench, stack, port := free_port())
    server.wait_for("all workers serve")
    times = 3
    with Load(f"127.0.0.1:{port}", threads=_THREADS, retries=True) as load:
        for _ in range(times):
            server.end()
            server = _start(bench, stack, port)
            load.wait_for_calls(100)
    _note(findings, f"{name} (SIGTERM, then a new process), callers with retries", load, f"{times} times")
    findings.at_most(f"{name}: failed calls of callers with retries", sum(load.failures.values()), 0, digits=0)
    twice = len(load.created) - len(set(load.created))
    findings.at_most(f"{name}: users created twice", twice, 0, digits=0)
    server.end()


def _kill(findings: Findings, name: str, bench: Bench, stack: ExitStack) -> None:
    """Kill one worker after another with SIGKILL; callers do not retry."""
    server = _start(bench, stack, port := free_port())
    server.wait_for("all workers serve")
    victims = [child.pid for child in psutil.Process(server.process.pid).children()]
    gaps = []
    with Load(f"127.0.0.1:{port}", threads=_THREADS) as load:
        for number, victim in enumerate(victims, 1):
            started = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            server.wait_for("worker serves", len(victims) + number)
            gaps.append(time.monotonic() - started)
            load.wait_for_calls(100)
    _note(findings, name, load, f"{len(victims)} of {len(victims)}")
    findings.at_most(f"{name}: until its replacement serves", max(gaps), 2, unit=" s")
    others = sum(count for outcome, count in load.failures.items() if outcome.split()[1] != "UNAVAILABLE")
    findings.at_most(f"{name}: calls that failed with anything but UNAVAILABLE", others, 0, digits=0)
    died = orjson.loads(server.wait_for("worker died"))
    findings.note(f"The log of {name}: {died['event']}, why {died['why']}, again in {died['again_in_seconds']:g} s.")
    server.end()


def _note(findings: Findings, name: str, load: Load, times: str) -> None:
    calls = sum(load.ended.values())
    codes: Counter[str] = Counter()
    for outcome, count in load.failures.items():
        codes[outcome.split()[1]] += count
    failed = f"failed: {dict(codes)}" if codes else "none failed"
    made = ", ".join(f"{_count(load, name):,} {name}" for name in ("GetUser", "CreateUser", "Authenticate"))
    findings.note(f"{name}: {times}; {calls:,} calls ({made}), {failed}.")


def _count(load: Load, method: str) -> int:
    return sum(count for outcome, count in load.ended.items() if outcome.startswith(f"{method} "))
