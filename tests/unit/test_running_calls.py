"""The RPCs that run while a server stops."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.base.clock import monotonic
from service.base.errors import ServerStoppingError
from service.rpc.pipeline.running_calls import RunningCalls


def call_from(peer: str) -> Any:
    return SimpleNamespace(context=SimpleNamespace(peer=lambda: peer))


@pytest.mark.parametrize(
    "peer, ports", [("ipv4:127.0.0.1:40001", {40001}), ("ipv6:[::1]:40002", {40002}), ("unix:", set()), ("", set())]
)
def test_the_ports_of_running_calls(peer: str, ports: set[int]) -> None:
    """GRPC has no peer for a call whose connection is closed: that must not break the stop."""
    calls, call = RunningCalls(), call_from(peer)
    calls.enter(call)
    assert calls.peer_ports() == ports
    calls.leave(call)
    assert calls.peer_ports() == set()


def test_refuses_new_calls_once_begun() -> None:
    """Running calls are waited for; without one the wait ends at once."""
    calls, running = RunningCalls(), call_from("")
    calls.enter(running)
    calls.refuse_new()
    with pytest.raises(ServerStoppingError):
        calls.enter(call_from(""))
    assert not calls.wait_for_one(until=monotonic())
    calls.leave(running)
    assert not calls.wait_for_one(until=monotonic() + 60)
