"""The part of a core that threads may use together."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import pytest

from service.observability.cpu_share import CpuShare, exempt_from_throttling
from service.observability.wsgi_server import WsgiServer
from tests.support.scrapes import get


class Moment:
    def __init__(self) -> None:
        self.seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


def test_what_was_used_is_waited_for() -> None:
    """A tenth: after 0.2 s of work 2 s have to pass, of which half a second had passed before."""
    share = CpuShare(0.1, Moment())
    assert share.charge(0.2) == pytest.approx(1.5)
    assert share.charge(0.1) == pytest.approx(2.5), "the threads share it"


def test_a_little_now_and_then_waits_for_nothing() -> None:
    now = Moment()
    share = CpuShare(0.1, now)
    for _ in range(100):
        assert share.charge(0.05) == 0
        now.seconds += 0.5


def test_what_was_not_used_is_not_saved_up() -> None:
    now = Moment()
    share = CpuShare(0.1, now)
    now.seconds += 3_600
    assert share.charge(0.2) == pytest.approx(1.5)


def test_only_cpu_time_counts() -> None:
    """The wait for a client or a database costs gRPC nothing. (Reading it takes a few microseconds itself.)"""
    now = Moment()
    share = CpuShare(0.1, now)
    with share.used():
        now.seconds += 60
    assert share.charge(0.05) < 0.5


def test_work_that_is_exempt() -> None:
    """What the thread does next is charged."""
    now = Moment()
    share = CpuShare(1e-9, now)
    with share.used():
        sum(range(100_000))
        exempt_from_throttling()
    assert share.charge(0) == 0
    share.close()
    with share.used():
        sum(range(100_000))
    assert share.charge(0) > 0


def test_a_closed_one_holds_nobody_up() -> None:
    share = CpuShare(1e-9)
    share.close()
    with share.used():
        sum(range(100_000))


def test_an_http_server_uses_a_tenth_of_a_core() -> None:
    """20 answers that cost 5 ms each take a second at the least, less what was free, and what its threads begin.

    This is a lower bound, which holds on any machine: a busy one takes longer.
    """

    def app(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            continue
        start_response("200 OK", [])
        return [b"slow"]

    with closing(WsgiServer(app, "127.0.0.1", 0)) as server:
        begin = time.monotonic()
        assert [get(server.port, "/")[0] for _ in range(20)] == [200] * 20
        assert time.monotonic() - begin > 0.2
