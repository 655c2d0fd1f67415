"""Starts and stops the measured servers, each in a process of its own, as an operator would."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL

from benchmarks.machine import pinned_to
from benchmarks.table import MeasurementError
from service.base.secret_keys import generate_secret_key
from service.base.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SERVICE = ("-m", "service", "serve")
SESSION_AND_CORE = ("-m", "benchmarks.servers", "session")
BARE = ("-m", "benchmarks.servers", "bare")
COLLECTOR = ("-m", "benchmarks.servers", "collector")
WORKER = (
    "-c",
    "from service.observability import metrics as m; m.use_worker_number(0); from service.cli.main import main; main()",
    "serve",
)
"""The service with the metrics of a worker among others, in files under PROMETHEUS_MULTIPROC_DIR."""
CALLER_AUTH_REQUIRED = {"CALLER_AUTH": "required"}
"""The service's default, which `environment` turns off."""

_STEP_SECONDS = 0.002
_START_SECONDS = 60
_STOP_SECONDS = 15


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    pid: int
    """Of its first worker."""
    target: str
    """host:port."""
    workers: tuple[int, ...]
    """The pids of all processes that serve calls."""
    supervisor: int
    """The pid of the process that was started."""


def environment(url: URL, **settings: str) -> dict[str, str]:
    """The environment of a server: the service's default settings, this database, and the settings given.

    Callers are not authenticated, except with CALLER_AUTH_REQUIRED, and calls are not rate-limited.
    """
    names = {name.upper() for name in Settings.model_fields} - {"INSECURE_PLAINTEXT_DATABASE"}
    return {
        **{name: value for name, value in os.environ.items() if name.upper() not in names},
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "SECRET_KEYS": generate_secret_key("bench"),
        "GRPC_PORT": "0",
        "LOG_FORMAT": "json",
        "CALLER_AUTH": "off",
        "GRPC_WORKERS": "1",
        "SHUTDOWN_DRAIN": "0",
        "CALLER_CODE_RATE_LIMIT": "0",  # off: the benchmark calls faster
        **settings,
    }


def run_verb(url: URL, directory: Path, *verb: str) -> str:
    """Run `python -m service VERB …` and return its output. Raises MeasurementError if it fails."""
    ran = subprocess.run(
        [sys.executable, "-m", "service", *verb],
        cwd=directory,
        env=environment(url),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        raise MeasurementError(f"`{' '.join(verb)}` failed: {ran.stderr.strip()}")
    return ran.stdout


@contextmanager
def running(
    program: tuple[str, ...],
    url: URL,
    directory: Path,
    *,
    settings: Mapping[str, str] | None = None,
    cores: frozenset[int] | None = None,
) -> Iterator[Server]:
    """Start a server, wait until it listens, and stop it at the end of the block. cores: where it may run.

    Its working directory is `directory`, which has no .env; it logs into a file there. Raises MeasurementError if it
    does not start.
    """
    log = directory / f"{time.monotonic_ns()}.log"
    with log.open("wb") as stream, nullcontext() if cores is None else pinned_to(cores):
        process = subprocess.Popen(
            [sys.executable, *program],
            cwd=directory,
            env=environment(url, **(settings or {})),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        listening = _wait_until_listening(process, log)
        workers = tuple(line["pid"] for line in listening)
        yield Server(workers[0], f"127.0.0.1:{listening[0]['port']}", workers, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.unlink()


def _wait_until_listening(process: "subprocess.Popen[bytes]", log: Path) -> list[dict[str, int]]:
    """Wait until every worker has logged "listening". Returns these log entries."""
    give_up_at = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up_at:
        has_ended = process.poll() is not None
        text = log.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
        wanted = next((line["workers"] for line in lines if line["event"] == "starting workers"), 1)
        listening = [line for line in lines if line["event"] == "listening"]
        if len(listening) >= wanted:
            return listening
        if has_ended:
            raise MeasurementError(f"a server exited before it listened: {text.strip()}")
        time.sleep(_STEP_SECONDS)
    raise MeasurementError(f"a server did not listen within {_START_SECONDS} s")
