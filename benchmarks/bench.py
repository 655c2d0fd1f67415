"""What every measurement is given: the cores, the database server, the callers, and how much to do."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy.engine import URL

from benchmarks.data import DatabaseServer, database, database_server
from benchmarks.identities import make_caller
from benchmarks.load import LoadGenerator, load_generator
from benchmarks.machine import Cores, find_cores


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything: enough for a figure to trust, or just enough to see that it runs."""

    rounds: int
    seconds: float
    """For each server and round of the CPU figures."""
    few_users: int
    many_users: int
    sign_ins: int
    """For each core and round."""
    sign_in_rounds: int
    rpcs: int
    """Between the two looks at the memory."""
    starts: int
    repeats: int
    """Of each page of a list."""
    storm_rounds: int
    storm_seconds: float
    """In which reads are measured, of each idle and each stormy round."""
    flood_rounds: int
    flood_seconds: float
    """Of each load that is a multiple of what the server can do."""
    timed_calls: int
    """Of each class of users whose durations are compared."""
    dropped_connections: int
    idle_connections: int
    half_open_seconds: float
    malformed: int
    """Messages and frames, together."""


FULL = Sizes(
    rounds=9,
    seconds=1.5,
    few_users=10_000,
    many_users=1_000_000,
    sign_ins=12,
    sign_in_rounds=5,
    rpcs=50_000,
    starts=5,
    repeats=40,
    storm_rounds=5,
    storm_seconds=5,
    flood_rounds=3,
    flood_seconds=1.5,
    timed_calls=1_000,
    dropped_connections=100_000,
    idle_connections=1_000,
    half_open_seconds=20,
    malformed=10_000,
)
QUICK = Sizes(
    rounds=3,
    seconds=0.5,
    few_users=10_000,
    many_users=100_000,
    sign_ins=3,
    sign_in_rounds=2,
    rpcs=5_000,
    starts=2,
    repeats=10,
    storm_rounds=2,
    storm_seconds=2,
    flood_rounds=1,
    flood_seconds=1,
    timed_calls=150,
    dropped_connections=5_000,
    idle_connections=200,
    half_open_seconds=7,
    malformed=1_000,
)


@dataclass(slots=True)
class Bench:
    """Everything that runs while measurements are made, and ends with them."""

    cores: Cores
    database_server: DatabaseServer
    load_generator: LoadGenerator
    directory: Path
    """Where servers work and log; empty at the beginning."""
    sizes: Sizes
    database_url: URL
    """A migrated database with sizes.few_users users."""
    api_key: str = field(repr=False)
    """The API key of a caller that may read them."""

    @property
    def in_flight(self) -> int:
        """How many calls are made at once: enough to keep the server's core busy."""
        return 5


@contextmanager
def prepare(sizes: Sizes) -> Iterator[Bench]:
    """Start what all measurements share. Raises UnsupportedMachineError, EmbeddedPostgresError, MeasurementError."""
    cores = find_cores()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="personae-bench-")))
        postgres = stack.enter_context(database_server(cores.rest))
        database_url = stack.enter_context(database(postgres, "few", directory, users=sizes.few_users))
        yield Bench(
            cores=cores,
            database_server=postgres,
            load_generator=stack.enter_context(load_generator(cores.rest)),
            directory=directory,
            sizes=sizes,
            database_url=database_url,
            api_key=make_caller(database_url, directory),
        )
