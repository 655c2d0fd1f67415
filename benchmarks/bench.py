"""What all measurements share: cores, database server, load generator and sizes."""

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
    """Durations and counts: FULL for reliable figures, QUICK to check that the benchmark runs."""

    rounds: int
    seconds: float
    """Per variant and round, in the CPU figures."""
    few_users: int
    many_users: int
    sign_ins: int
    """Per core and round."""
    sign_in_rounds: int
    rpcs: int
    """Between the two measurements of memory."""
    starts: int
    repeats: int
    """Requests of each list page."""
    storm_rounds: int
    storm_seconds: float
    """Measured per idle and per storm round."""
    flood_rounds: int
    flood_seconds: float
    """Per load and round of the overload figures."""
    timed_calls: int
    """Per class of users in the equal-time figures."""
    dropped_connections: int
    idle_connections: int
    half_open_seconds: float
    malformed: int
    """Malformed messages and HTTP/2 violations, together."""


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
    """The shared environment of the measurements."""

    cores: Cores
    database_server: DatabaseServer
    load_generator: LoadGenerator
    directory: Path
    """Working directory of the servers; they log there. Empty at the start."""
    sizes: Sizes
    database_url: URL
    """A migrated database with sizes.few_users users."""
    api_key: str = field(repr=False)
    """Of a caller with the scope users.read."""

    @property
    def in_flight(self) -> int:
        """Concurrent calls in the CPU figures: enough to keep the server's core busy."""
        return 5


@contextmanager
def prepare(sizes: Sizes) -> Iterator[Bench]:
    """Set up the shared environment. Raises UnsupportedMachineError, EmbeddedPostgresError, MeasurementError."""
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
