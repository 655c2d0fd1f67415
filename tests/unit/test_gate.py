"""The gate: who is inside when the server ends."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.rpc.pipeline.drain import Gate


@pytest.mark.parametrize(
    "peer, ports",
    [("ipv4:127.0.0.1:40001", {40001}), ("ipv6:[::1]:40002", {40002}), ("unix:", set()), ("", set())],
)
def test_the_ports_of_those_inside(peer: str, ports: set[int]) -> None:
    """GRPC names nobody at all for a call whose connection has gone, which must not end the end of the server."""
    gate = Gate()
    seen: list[frozenset[int]] = []

    def handler(_request: Any, _call: Any) -> None:
        seen.append(gate.peer_ports())

    call: Any = SimpleNamespace(context=SimpleNamespace(peer=lambda: peer))
    method: Any = None
    gate.gate(handler, method)(None, call)

    assert seen == [ports]
