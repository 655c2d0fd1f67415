"""What the workers are started with: told by the supervisor to each of them, by its command line and environment."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Ports(NamedTuple):
    """Where the workers listen together, and where their metrics are served; 0: there is no such port.

    What is said here holds for all workers until the service is restarted, whatever their settings say at a reload.
    """

    grpc: int
    mtls: int = 0
    host: str = "127.0.0.1"
    metrics: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the workers are started with."""

    ports: Ports
    cores: Sequence[int | None]
    """For each worker the core it is kept to; None: it runs anywhere."""
    hash_places: int
    """How many passwords are hashed at once, by all of them together."""
    leave_seconds: float
    """How long a worker may take to leave once it is told to end."""
    retire_seconds: float = 0.0
    """How long callers may take to leave a worker that another one has replaced."""
    silent_seconds: float = 30.0
    """A worker that has said nothing for so long hangs: it says how its health is with every look at the database."""
    kill_after: float = 15.0
    """How much longer than it may a worker takes until it is killed."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the workers, where the supervisor's own environment has none of the name."""
    directories: Mapping[str, str] = field(default_factory=dict)
    """Variables of the workers that name directories which were made for them, and so win."""


def worker_command(slot: int, core: int | None, ports: Ports, line: int) -> list[str]:
    """How a worker is started: as this very program, with the verb `worker`."""
    command = [sys.executable, "-m", "service", "worker", "--slot", str(slot), "--line", str(line)]
    command += ["--host", ports.host, "--port", str(ports.grpc), "--mtls-port", str(ports.mtls)]
    command += ["--metrics-port", str(ports.metrics)]
    return command if core is None else [*command, "--core", str(core)]
