"""The HTTP server beside gRPC: idle, slow and large requests, and closing."""

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from threading import Event, Thread
from typing import Any

import psutil
import pytest

from service.observability.wsgi_server import MAX_CONNECTIONS, WsgiServer
from tests.support.scrapes import free_port, get, request
from tests.support.waiting import PATIENCE, eventually


def hello(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


@contextmanager
def served(app: Any = hello, host: str = "127.0.0.1", *, idle_seconds: int = 1) -> Iterator[WsgiServer]:
    server = WsgiServer(app, host, 0, idle_seconds=idle_seconds)
    try:
        yield server
    finally:
        server.close()


def connection(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def peers() -> set[Any]:
    """The addresses to which this process has connections."""
    return {one.raddr for one in psutil.Process().net_connections("tcp")}


def test_idle_clients_do_not_exclude_others() -> None:
    """As many idle clients as allowed are closed after a while, and the next client is answered."""
    with served() as server, ExitStack() as stack:
        idle = [stack.enter_context(closing(connection(server.port))) for _ in range(MAX_CONNECTIONS)]
        assert get(server.port, "/")[0] == 200
        assert idle[0].recv(1) == b""


@pytest.mark.parametrize("begun", [b"", b"GET / HT"])
def test_idle_clients_are_closed_for_others_at_once(begun: bytes) -> None:
    """Whether or not they have begun a request: a health probe cannot wait until they are closed for being idle."""
    with served(idle_seconds=3600) as server, ExitStack() as stack:
        for _ in range(3 * MAX_CONNECTIONS):
            stack.enter_context(closing(connection(server.port))).sendall(begun)
        assert get(server.port, "/")[0] == 200


def test_slow_clients_are_closed() -> None:
    """A request that arrives byte by byte does not keep its connection open."""
    sent = 0
    with served() as server, closing(connection(server.port)) as slow:
        with contextlib.suppress(ConnectionError):
            while True:  # ends, or the suite's own limit ends it
                sent += slow.send(b"G")
                assert get(server.port, "/")[0] == 200  # takes a while
    assert sent < 16_384, "closed for being slow, not for being large"


def ask_for_ever(client: socket.socket) -> None:
    while True:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n" * 500)


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_clients_that_read_no_answer_are_closed(size: int) -> None:
    """They send requests until the answers fill all buffers. Otherwise a few could hold all connections, or all
    threads, for ever.
    """

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return [b"".join(hello(environ, start_response)) * (size // 5)]

    with served(app) as server:
        for greedy in [connection(server.port) for _ in range(8)]:
            with closing(greedy), pytest.raises(ConnectionError):
                ask_for_ever(greedy)
        assert get(server.port, "/")[0] == 200


@pytest.mark.parametrize("target", ["http://[", "http://[x]/", "//[", "http://[::1"])
def test_a_target_that_is_no_url(target: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is not logged: strangers could fill the disk with the log."""
    with served() as server, closing(connection(server.port)) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\n\r\n".encode())
        client.recv(1)
        assert get(server.port, "/")[0] == 200
    assert caplog.records == []


@pytest.mark.parametrize(
    "method, header, value, status",
    [("GET", "Accept", "*/*", 200), ("POST", "Content-Length", "100000", 413), ("GET", "X-Large", "x" * 17_000, 431)],
)
def test_large_requests_are_refused(method: str, header: str, value: str, status: int) -> None:
    """They would fill the memory or the disk. No answer names the software that serves."""
    with served() as server:
        found, headers, body = request(server.port, "/", method=method, headers={header: value})
    assert (found, headers["Server"], b"waitress" in body) == (status, "personae", False)


def test_ipv6() -> None:
    with served(host="[::1]") as server, closing(socket.create_connection(("::1", server.port), timeout=PATIENCE)):
        assert server.port > 0


def test_the_request_of_a_client_that_has_left_is_not_begun() -> None:
    """It waited for a thread. A proxy that gave up would only keep others waiting."""
    may_end, begun = Event(), list[str]()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        begun.append(environ["PATH_INFO"])
        may_end.wait(60)
        return hello(environ, start_response)

    with served(slow) as server, ExitStack() as stack:
        for number in range(4):  # as many as there are threads
            client = stack.enter_context(closing(connection(server.port)))
            client.sendall(b"GET /stays HTTP/1.0\r\n\r\n")
            eventually(lambda: len(begun) > number)  # noqa: B023  it is called now
        with closing(connection(server.port)) as leaving:
            leaving.sendall(b"GET /leaves HTTP/1.0\r\n\r\n")
            address = leaving.getsockname()
            eventually(lambda: address in peers(), "it is accepted")
        eventually(lambda: address not in peers(), "it is closed here as well")
        may_end.set()
        assert get(server.port, "/comes")[0] == 200
    assert begun == [*["/stays"] * 4, "/comes"]


def test_closing_finishes_running_requests() -> None:
    """A running request gets its answer; then the port and idle connections are closed."""
    is_running, may_end = Event(), Event()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        is_running.set()
        may_end.wait(PATIENCE)
        return hello(environ, start_response)

    server = WsgiServer(slow, "127.0.0.1", free_port())  # which nobody else gets when it is closed
    idle = connection(server.port)
    answers: list[int] = []
    client = Thread(target=lambda: answers.append(get(server.port, "/")[0]))
    client.start()
    assert is_running.wait(PATIENCE)
    closer = Thread(target=server.close, args=(PATIENCE,))
    closer.start()
    may_end.set()
    closer.join()
    client.join()

    assert answers == [200]
    assert idle.recv(1) == b""
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        connection(server.port)


def test_closing_answers_requests_that_wait_for_a_thread() -> None:
    """More requests than there are threads have arrived before."""
    may_end = Event()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        may_end.wait(PATIENCE)
        return hello(environ, start_response)

    server = WsgiServer(slow, "127.0.0.1", 0)
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(connection(server.port))) for _ in range(12)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
        assert {client.recv(1000) for client in clients} == {b"HTTP/1.1 100 Continue\r\n\r\n"}
        closer = Thread(target=server.close, args=(PATIENCE,))
        closer.start()
        for client in clients:
            client.sendall(b"x")
        may_end.set()
        answers = {client.makefile("rb").read() for client in clients}
        closer.join()

    assert {answer.split(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
