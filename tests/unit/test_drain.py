"""The drain of a stopping server."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.base.clock import monotonic
from service.base.errors import ServerStoppingError
from service.rpc.pipeline.drain import Drain


def call_from(peer: str) -> Any:
    return SimpleNamespace(context=SimpleNamespace(peer=lambda: peer))


@pytest.mark.parametrize(
    "peer, ports", [("ipv4:127.0.0.1:40001", {40001}), ("ipv6:[::1]:40002", {40002}), ("unix:", set()), ("", set())]
)
def test_the_ports_of_running_calls(peer: str, ports: set[int]) -> None:
    """GRPC has no peer for a call whose connection is closed: that must not break the drain."""
    drain, call = Drain(), call_from(peer)
    drain.enter(call)
    assert drain.peer_ports() == ports
    drain.leave(call)
    assert drain.peer_ports() == set()


def test_refuses_new_calls_once_begun() -> None:
    """Running calls are waited for; without one the wait ends at once."""
    drain, running = Drain(), call_from("")
    drain.enter(running)
    drain.begin()
    with pytest.raises(ServerStoppingError):
        drain.enter(call_from(""))
    assert not drain.wait_for_one(until=monotonic())
    drain.leave(running)
    assert not drain.wait_for_one(until=monotonic() + 60)
