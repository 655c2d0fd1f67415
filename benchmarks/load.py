"""The load generator: client threads in a process of its own, pinned to its own cores.

The status code and the users of each response are checked, because a server that fails every call looks fast. Calls
block, one per thread: gRPC's futures use half as much CPU again, and the clients must be faster than the server.
"""

import itertools
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.identities import ANONYMOUS, Identity
from benchmarks.machine import cpu_seconds, pinned_to
from benchmarks.table import MeasurementError
from personae.v1 import authentication_pb2, session_pb2, user_pb2
from service.rpc.envoy import ext_authz_pb2

GET_USER = "/personae.v1.UserService/GetUser"
BATCH_GET_USERS = "/personae.v1.UserService/BatchGetUsers"
LIST_USERS = "/personae.v1.UserService/ListUsers"
CREATE_USER = "/personae.v1.UserService/CreateUser"
UPDATE_USER = "/personae.v1.UserService/UpdateUser"
AUTHENTICATE = "/personae.v1.AuthenticationService/Authenticate"
START_PASSWORD_RESET = "/personae.v1.CredentialService/StartPasswordReset"
REFRESH_SESSION = "/personae.v1.SessionService/RefreshSession"
INTROSPECT_TOKEN = "/personae.v1.SessionService/IntrospectToken"
CHECK = "/envoy.service.auth.v3.Authorization/Check"
DEADLINE_SECONDS = 10
WARM_UP_SECONDS = 0.3
"""Of run_closed_loop, before the measured window."""

_CHANNELS = 4
_STEP_SECONDS = 0.002

_USER_IDS_OF: dict[str, Callable[[bytes], list[int]]] = {
    GET_USER: lambda raw: [user_pb2.User.FromString(raw).id],
    BATCH_GET_USERS: lambda raw: [entry.user.id for entry in user_pb2.BatchGetUsersResponse.FromString(raw).entries],
    LIST_USERS: lambda raw: [user.id for user in user_pb2.ListUsersResponse.FromString(raw).users],
    UPDATE_USER: lambda raw: [user_pb2.User.FromString(raw).id],
    AUTHENTICATE: lambda raw: [authentication_pb2.AuthenticateResponse.FromString(raw).user.id],
    REFRESH_SESSION: lambda raw: [authentication_pb2.SessionTokens.FromString(raw).user.id],
    CHECK: lambda raw: _allowed_user(ext_authz_pb2.CheckResponse.FromString(raw)),
    INTROSPECT_TOKEN: lambda raw: _token_owner(session_pb2.IntrospectTokenResponse.FromString(raw)),
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Request:
    """A call and its expected response: the status code and, for OK, the users in order (None: any)."""

    method: str
    body: bytes
    ids: list[int] | None = None
    code: str = "OK"


@dataclass(frozen=True, slots=True)
class ClosedLoopResult:
    """What was measured within the window."""

    calls: int
    seconds: float
    server_cpu: float
    """CPU seconds of the server process."""

    @property
    def cpu_per_call(self) -> float:
        """CPU seconds of the server per call."""
        return self.server_cpu / self.calls

    @property
    def cpu_utilisation(self) -> float:
        """Of the server, as a share of one core."""
        return self.server_cpu / self.seconds


class LoadGenerator:
    """A process that makes calls. It runs the functions below, one at a time."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Run a function in the process and wait for its result. Raises what the function raises."""
        return self.submit(function, *args, **kwargs).result()

    def submit(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """Run a function in the process without waiting."""
        return self._pool.submit(function, *args, **kwargs)


@contextmanager
def load_generator(cores: frozenset[int]) -> Iterator[LoadGenerator]:
    """Start a load generator on these cores."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pinned_to(cores):
            pool.submit(int).result()  # starts the process now, so that it inherits the affinity
        yield LoadGenerator(pool)


def run_closed_loop(
    target: str,
    server_pid: int,
    requests: Sequence[Request],
    *,
    in_flight: int,
    seconds: float,
    identity: Identity = ANONYMOUS,
    single_use: bool = False,
) -> ClosedLoopResult:
    """Call without a pause for `seconds`, and measure calls and the CPU time of the server.

    single_use: send no request twice. Raises MeasurementError for a wrong response, and when single-use requests run
    out.
    """
    threads = _ClientThreads(
        target, requests, in_flight, identity, calls_per_thread=len(requests) // in_flight if single_use else None
    )
    with threads.running():
        time.sleep(WARM_UP_SECONDS)
        started, calls, cpu = time.perf_counter(), threads.calls, cpu_seconds(server_pid)
        time.sleep(seconds)
        result = ClosedLoopResult(threads.calls - calls, time.perf_counter() - started, cpu_seconds(server_pid) - cpu)
    threads.require_no_errors()
    if single_use and threads.has_exhausted_requests:
        raise MeasurementError(f"{len(requests)} single-use requests were too few for {seconds:g} s")
    return result


def closed_loop_latencies(target: str, requests: Sequence[Request], *, in_flight: int, seconds: float) -> list[float]:
    """Call without a pause for `seconds`. Returns the seconds of each call.

    Raises MeasurementError for a wrong response.
    """
    channels = [open_channel(target) for _ in range(min(_CHANNELS, in_flight))]
    latencies: list[list[float]] = [[] for _ in range(in_flight)]
    errors: Counter[str] = Counter()
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        call: Any = channels[number % len(channels)].unary_unary(requests[0].method)
        for request in itertools.cycle(requests[number::in_flight]):
            started = time.perf_counter()
            if started >= end:
                return
            error = call_error(call, request)
            latencies[number].append(time.perf_counter() - started)
            if error is not None:
                errors[error] += 1

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for channel in channels:
        channel.close()
    if errors:
        raise MeasurementError(f"wrong responses: {dict(errors)}")
    return [latency for of_thread in latencies for latency in of_thread]


def run_calls(
    target: str, requests: Sequence[Request], *, in_flight: int, calls_per_thread: int, identity: Identity = ANONYMOUS
) -> float:
    """Make a fixed number of calls on each thread. Returns the seconds until all have completed.

    Raises MeasurementError for a wrong response.
    """
    threads = _ClientThreads(target, requests, in_flight, identity, calls_per_thread=calls_per_thread)
    started = time.perf_counter()
    with threads.running():
        threads.join()
        took = time.perf_counter() - started
    threads.require_no_errors()
    return took


def interleaved_latencies(target: str, requests: Sequence[Request], *, rounds: int) -> list[list[float]]:
    """Send the requests one at a time, in interleaved rounds. Returns the seconds, one list per request.

    Raises MeasurementError for a wrong response.
    """
    found: list[list[float]] = [[] for _ in requests]
    with open_channel(target) as channel:
        calls: list[Any] = [channel.unary_unary(request.method) for request in requests]
        for round_number in range(rounds + 1):
            for request, call, latencies in zip(requests, calls, found, strict=True):
                timed = _timed_call(call, request)
                if round_number:  # the first one warms up
                    latencies.append(timed.seconds)
    return found


@dataclass(frozen=True, slots=True)
class TimedResponse:
    """A correct response and its latency."""

    seconds: float
    body: bytes


def call_sequentially(target: str, requests: Sequence[Request]) -> list[TimedResponse]:
    """Make calls of one method, one after another. Raises MeasurementError for a wrong response."""
    with open_channel(target) as channel:
        call: Any = channel.unary_unary(requests[0].method)
        return [_timed_call(call, request) for request in requests]


def burst(target: str, requests: Sequence[Request]) -> int:
    """Make calls of one method at once on a new channel. Returns how many did not end with OK."""
    with open_channel(target) as channel:
        call: Any = channel.unary_unary(requests[0].method)
        futures = [call.future(request.body, timeout=DEADLINE_SECONDS) for request in requests]
        return sum(future.exception() is not None for future in futures)


@dataclass(frozen=True, slots=True)
class ListPage:
    """A page of ListUsers: its number, its page token and the ids on it."""

    number: int
    token: str
    ids: list[int]


def first_and_deep_page(target: str, body: bytes, *, pages: int) -> list[ListPage]:
    """Page through a list. Returns the first page and the last full one within `pages`, if there are such.

    Raises MeasurementError for a wrong response.
    """
    message = user_pb2.ListUsersRequest.FromString(body)
    seen: list[ListPage] = []
    with open_channel(target) as channel:
        call: Any = channel.unary_unary(LIST_USERS)
        for number in range(1, pages + 1):
            response = user_pb2.ListUsersResponse.FromString(_call_ok(call, message.SerializeToString()))
            if len(response.users) < message.page_size:
                break
            seen[1:] = [ListPage(number, message.page_token, [user.id for user in response.users])]
            message.page_token = response.next_page_token
            if not message.page_token:
                break
    return seen


def wait_until_serving(target: str) -> None:
    """Poll the health service until SERVING. Raises MeasurementError after the deadline."""
    give_up_at = time.monotonic() + DEADLINE_SECONDS
    with open_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < give_up_at:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_SECONDS, wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(_STEP_SECONDS)
    raise MeasurementError(f"the server was not SERVING within {DEADLINE_SECONDS} s")


class _ClientThreads:
    """The client threads of a closed loop, their channels and counters."""

    def __init__(
        self,
        target: str,
        requests: Sequence[Request],
        size: int,
        identity: Identity,
        *,
        calls_per_thread: int | None = None,
    ) -> None:
        self._channels = [open_channel(target, identity) for _ in range(min(_CHANNELS, size))]
        self._metadata = identity.metadata
        self._counts = [0] * size
        self._errors: Counter[str] = Counter()
        self._calls_per_thread = calls_per_thread
        self._is_stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(number, requests), daemon=True) for number in range(size)
        ]

    @property
    def calls(self) -> int:
        """Completed calls so far."""
        return sum(self._counts)

    @property
    def has_exhausted_requests(self) -> bool:
        """Whether a thread has sent all its requests."""
        return self._calls_per_thread in self._counts

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the threads during the block."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._is_stopped.set()
            self.join()
            for channel in self._channels:
                channel.close()

    def join(self) -> None:
        """Wait until all threads have ended."""
        for thread in self._threads:
            thread.join()

    def require_no_errors(self) -> None:
        """Raises MeasurementError if a response was wrong, or if there was none."""
        if self._errors:
            raise MeasurementError(f"wrong responses among {self.calls} calls: {dict(self._errors)}")
        if not self.calls:
            raise MeasurementError("no call completed")

    def _work(self, number: int, requests: Sequence[Request]) -> None:
        channel = self._channels[number % len(self._channels)]
        methods = {request.method for request in requests}
        calls: dict[str, Any] = {method: channel.unary_unary(method) for method in methods}
        start = number * len(requests) // len(self._threads)  # each thread starts at another request
        cycle = itertools.islice(itertools.cycle((*requests[start:], *requests[:start])), self._calls_per_thread)
        for request in cycle:
            if self._is_stopped.is_set():
                return
            error = call_error(calls[request.method], request, self._metadata)
            if error is not None:
                self._errors[error] += 1
            self._counts[number] += 1


def _timed_call(call: Callable[..., bytes], request: Request) -> TimedResponse:
    """Raises MeasurementError for a wrong response."""
    started = time.perf_counter()
    raw = _call_ok(call, request.body)
    took = time.perf_counter() - started
    if not has_expected_users(request, raw):
        raise MeasurementError(f"{request.method} returned other users than requested")
    return TimedResponse(took, raw)


def _call_ok(call: Callable[..., bytes], body: bytes) -> bytes:
    """Raises MeasurementError for any status but OK: grpc.RpcError cannot be pickled for the other process."""
    try:
        return call(body, timeout=DEADLINE_SECONDS)
    except grpc.RpcError as error:
        raise MeasurementError(f"a call ended with {error.code().name}") from None


def call_error(
    call: Callable[..., Any], request: Request, metadata: Sequence[tuple[str, str]] | None = None
) -> str | None:
    """Make a call and describe the error if its response is wrong; None otherwise."""
    try:
        raw = call(request.body, timeout=DEADLINE_SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        code = str(error.code().name)
        description = f"{request.method.rpartition('/')[2]} {code}: {error.details()}"
        return None if code == request.code else description
    if request.code != "OK":
        return f"OK instead of {request.code}"
    return None if has_expected_users(request, raw) else "other users"


def has_expected_users(request: Request, raw: bytes) -> bool:
    """Whether the response has the users that the request expects."""
    return request.ids is None or _USER_IDS_OF[request.method](raw) == request.ids


def _allowed_user(response: ext_authz_pb2.CheckResponse) -> list[int]:
    """The id of the user whose request is allowed; empty if it is denied."""
    return [int(header.header.value) for header in response.ok_response.headers if header.header.key == "x-user-id"]


def _token_owner(token: session_pb2.IntrospectTokenResponse) -> list[int]:
    return [token.user_id] if token.active else []


def open_channel(target: str, identity: Identity = ANONYMOUS) -> grpc.Channel:
    """Open a channel with its own connection; by default gRPC shares one among equal channels."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    if identity.ca is None:
        return grpc.insecure_channel(target, options=options)
    private_key, chain = identity.certificate or (None, None)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(identity.ca, private_key, chain), options=options)
