"""Where a person was seen: whatever a caller forwards is read as far as it can be, and refuses nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personae.v1 import authentication_pb2 as pb
from service.core.audit import UNKNOWN_CLIENT, Client
from service.rpc.servicers.client import client_of


@pytest.mark.parametrize(
    "sent, read",
    [
        *[
            (text, "192.0.2.1")
            for text in ("192.0.2.1", " 192.0.2.1\t", "192.0.2.1:5678", "192.0.2.1/32", '"192.0.2.1"')
        ],
        *[(text, "192.0.2.1") for text in ("::ffff:192.0.2.1", "[::ffff:c000:201]:443", "192.0.2.1, 198.51.100.2")],
        *[(text, "192.0.2.1") for text in ("For=192.0.2.1;proto=https", "\xa0192.0.2.1\u200b")],
        *[
            (text, "192.0.2.1")
            for text in ("unknown, 192.0.2.1", 'for="192.0.2.1:5678"', "192.0.2.1," + "x" * 3_000_000)
        ],
        *[(text, "2001:db8::1") for text in ("2001:db8::1", "2001:DB8:0:0::1", "[2001:db8::1]", "[2001:db8::1]:443")],
        *[(text, "2001:db8::1") for text in ('for="[2001:db8::1]:443"', "2001:db8::1/64", "2001:db8::1%1, 192.0.2.1")],
        *[("fe80::1%eth0", "fe80::1"), ("[::1]:443", "::1"), ("[fe80::1%25eth0]:1", "fe80::1"), ("::", "::")],
        *[
            (text, None)
            for text in ("", " ", ",", "somewhere", "192.0.2", "192.0.2.256", "1.2.3.4.5", "[", "%", "::1::")
        ],
        *[
            (text, None)
            for text in ("192.0.2.1\0", "\u0661.2.3.4", "unix:", "_hidden", "x" * 3_000_000, "," * 3_000_000)
        ],
    ],
    ids=lambda text: repr(text)[:40],
)
def test_addresses(sent: str, read: str | None) -> None:
    """Ports, brackets, zones, lists and mapped addresses are what proxies and sockets show."""
    assert client_of(pb.Client(ip_address=sent)) == Client(read, None)


@pytest.mark.parametrize(
    "sent, read",
    [
        ("Example/1.0", "Example/1.0"),
        ("x" * 513, "x" * 512),
        ("\U0001f600" * 3_000_000, "\U0001f600" * 512),
        (" a\x00b\r\nc\x9f ", "a b  c"),
        *[(text, None) for text in ("", "  ", "\0")],
    ],
    ids=range(7),
)
def test_user_agents(sent: str, read: str | None) -> None:
    """Cut to what the column holds, and without what no database stores or log shows."""
    assert client_of(pb.Client(user_agent=sent)) == Client(None, read)


@given(st.text(), st.text())
def test_anything_is_read_and_nothing_is_shown(address: str, agent: str) -> None:
    """No input raises, and the repr of a client holds nothing personal."""
    assert repr(client_of(pb.Client(ip_address=address, user_agent=agent))) == repr(UNKNOWN_CLIENT)
