"""The callers: threads that make the same calls again and again, in a process of their own on cores of their own.

Every answer is checked, its code and the users in it: a server that fails each call looks fast. Calls block, one in
flight on each thread: gRPC's futures cost the callers half as much again, and they must be faster than the server.
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
"""For which keep_calling calls before the window opens."""

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
    """A call, and what has to come back: the code, and with OK these users in this order (None: any)."""

    method: str
    body: bytes
    ids: list[int] | None = None
    code: str = "OK"


@dataclass(frozen=True, slots=True)
class ClosedLoopResult:
    """What went through while the window was open."""

    calls: int
    seconds: float
    server_cpu: float
    """Seconds of CPU time of the server process."""

    @property
    def cpu_per_call(self) -> float:
        """Seconds."""
        return self.server_cpu / self.calls

    @property
    def cpu_utilisation(self) -> float:
        """The share of one core that the server used."""
        return self.server_cpu / self.seconds


class LoadGenerator:
    """The process of the callers. Its functions below run there, one after the other."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Run the function there. Raises what it raises."""
        return self.submit(function, *args, **kwargs).result()

    def submit(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """Have the function run there, and do something else meanwhile."""
        return self._pool.submit(function, *args, **kwargs)


@contextmanager
def load_generator(cores: frozenset[int]) -> Iterator[LoadGenerator]:
    """Callers on these cores."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pinned_to(cores):
            pool.submit(int).result()  # the process is started now, and here
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
    """Call for so long, and say what that cost the server. once: no request is made twice.

    Raises MeasurementError for any wrong answer, and when requests that are made once run out.
    """
    threads = _ClientThreads(
        target, requests, in_flight, identity, calls_per_thread=len(requests) // in_flight if single_use else None
    )
    with threads.running():
        time.sleep(WARM_UP_SECONDS)
        started, calls, cpu = time.perf_counter(), threads.calls, cpu_seconds(server_pid)
        time.sleep(seconds)
        rate = ClosedLoopResult(threads.calls - calls, time.perf_counter() - started, cpu_seconds(server_pid) - cpu)
    threads.require_no_errors()
    if single_use and threads.has_exhausted_requests:
        raise MeasurementError(f"{len(requests)} requests were too few for {seconds:g} s")
    return rate


def closed_loop_latencies(target: str, requests: Sequence[Request], *, in_flight: int, seconds: float) -> list[float]:
    """Call for so long; the seconds that each call took. Raises MeasurementError for any wrong answer."""
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
        raise MeasurementError(f"wrong answers: {dict(errors)}")
    return [one for found in latencies for one in found]


def run_calls(
    target: str, requests: Sequence[Request], *, in_flight: int, calls_per_thread: int, identity: Identity = ANONYMOUS
) -> float:
    """Make `times` calls on each thread; the seconds until the last is answered. Raises as keep_calling."""
    threads = _ClientThreads(target, requests, in_flight, identity, calls_per_thread=calls_per_thread)
    started = time.perf_counter()
    with threads.running():
        threads.join()
        took = time.perf_counter() - started
    threads.require_no_errors()
    return took


def interleaved_latencies(target: str, requests: Sequence[Request], *, rounds: int) -> list[list[float]]:
    """How long each request takes, alone, in seconds: one list a request; the requests take turns.

    Raises MeasurementError for any wrong answer.
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
    """An answer that was right, and how long it took."""

    seconds: float
    body: bytes


def call_sequentially(target: str, requests: Sequence[Request]) -> list[TimedResponse]:
    """Make these calls of one method, one after another. Raises MeasurementError for any wrong answer."""
    with open_channel(target) as channel:
        call: Any = channel.unary_unary(requests[0].method)
        return [_timed_call(call, request) for request in requests]


def burst(target: str, requests: Sequence[Request]) -> int:
    """Make all these calls of one method at once, on a new channel; how many did not end OK."""
    with open_channel(target) as channel:
        call: Any = channel.unary_unary(requests[0].method)
        made = [call.future(request.body, timeout=DEADLINE_SECONDS) for request in requests]
        return sum(one.exception() is not None for one in made)


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of a list: which, the token that leads to it, and who is on it."""

    number: int
    token: str
    ids: list[int]


def first_and_deep_page(target: str, body: bytes, *, pages: int) -> list[ListPage]:
    """Go through a list from its first page; that one, and the last full one among so many pages, if there are.

    Raises MeasurementError for any wrong answer.
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
    """Ask health until it says SERVING. Raises MeasurementError when it does not within the deadline."""
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
    """The threads, with their channels and their counts."""

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
        """How many calls were answered."""
        return sum(self._counts)

    @property
    def has_exhausted_requests(self) -> bool:
        """Whether a thread made all calls that it was to make."""
        return self._calls_per_thread in self._counts

    @contextmanager
    def running(self) -> Iterator[None]:
        """The threads call while the block runs."""
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
        """Until all threads have ended."""
        for thread in self._threads:
            thread.join()

    def require_no_errors(self) -> None:
        """Raises MeasurementError for any answer that was not the right one."""
        if self._errors:
            raise MeasurementError(f"wrong answers among {self.calls} calls: {dict(self._errors)}")
        if not self.calls:
            raise MeasurementError("no call was answered")

    def _work(self, number: int, requests: Sequence[Request]) -> None:
        channel = self._channels[number % len(self._channels)]
        methods = {request.method for request in requests}
        calls: dict[str, Any] = {method: channel.unary_unary(method) for method in methods}
        start = number * len(requests) // len(self._threads)  # each thread begins elsewhere
        cycle = itertools.islice(itertools.cycle((*requests[start:], *requests[:start])), self._calls_per_thread)
        for request in cycle:
            if self._is_stopped.is_set():
                return
            error = call_error(calls[request.method], request, self._metadata)
            if error is not None:
                self._errors[error] += 1
            self._counts[number] += 1


def _timed_call(call: Callable[..., bytes], request: Request) -> TimedResponse:
    """Raises MeasurementError for any wrong answer."""
    started = time.perf_counter()
    raw = _call_ok(call, request.body)
    took = time.perf_counter() - started
    if not has_expected_users(request, raw):
        raise MeasurementError(f"{request.method} returned other users than were asked for")
    return TimedResponse(took, raw)


def _call_ok(call: Callable[..., bytes], body: bytes) -> bytes:
    """Raises MeasurementError for anything but OK: gRPC's own errors do not travel between processes."""
    try:
        return call(body, timeout=DEADLINE_SECONDS)
    except grpc.RpcError as error:
        raise MeasurementError(f"a call ended with {error.code().name}") from None


def call_error(
    call: Callable[..., Any], request: Request, metadata: Sequence[tuple[str, str]] | None = None
) -> str | None:
    """Call; what is wrong with the answer, None when nothing is."""
    try:
        raw = call(request.body, timeout=DEADLINE_SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        code = str(error.code().name)
        said = f"{request.method.rpartition('/')[2]} {code}: {error.details()}"
        return None if code == request.code else said
    if request.code != "OK":
        return f"OK instead of {request.code}"
    return None if has_expected_users(request, raw) else "other users"


def has_expected_users(request: Request, raw: bytes) -> bool:
    """Whether these are the users that were asked for."""
    return request.ids is None or _USER_IDS_OF[request.method](raw) == request.ids


def _allowed_user(response: ext_authz_pb2.CheckResponse) -> list[int]:
    """Whose request may pass; nobody's when it may not."""
    return [int(one.header.value) for one in response.ok_response.headers if one.header.key == "x-user-id"]


def _token_owner(token: session_pb2.IntrospectTokenResponse) -> list[int]:
    return [token.user_id] if token.active else []


def open_channel(target: str, identity: Identity = ANONYMOUS) -> grpc.Channel:
    """A channel with a connection of its own: equal channels share one otherwise."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    if identity.ca is None:
        return grpc.insecure_channel(target, options=options)
    private_key, chain = identity.certificate or (None, None)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(identity.ca, private_key, chain), options=options)
