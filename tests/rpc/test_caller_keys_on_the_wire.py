"""API keys in calls: which are accepted, and the reasons for refusals."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import grpc
import pytest

from service.base.clock import monotonic
from service.core.callers.api_keys import NewKey
from service.rpc.callers.api_keys import is_loopback_peer
from service.rpc.callers.directory import READS_PER_MAX_AGE
from tests.support.callers import LIST_USERS, Operator, bearer, connected, new_key, operating, other_address, told
from tests.support.databases import Postgres
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
CACHE_SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A server, the proxy to its database, and keys of callers that may list users."""

    server: RunningServer
    proxy: PostgresProxy
    operator: Operator
    key: NewKey
    revoked: NewKey
    short: NewKey
    """Valid for a day."""
    over: NewKey
    """Valid for a day, and revoked."""

    @property
    def channel(self) -> grpc.Channel:
        return self.server.channel


@pytest.fixture(scope="module")
def served(postgres: Postgres, template: str) -> Iterator[Served]:
    with postgres.scratch(template=template) as url, operating(url) as operator:
        key, revoked = operator.create_with_key("users.read"), operator.create_with_key("users.read")
        short, over = (operator.create_with_key("users.read", valid_for=timedelta(days=1)) for _ in range(2))
        operator.revoke(revoked)
        operator.revoke(over)
        with (
            PostgresProxy(url) as proxy,
            running(proxy.proxied, caller_auth="required", caller_cache_seconds=CACHE_SECONDS) as server,
        ):
            yield Served(server, proxy, operator, key, revoked, short, over)


class TestForm:
    @pytest.mark.parametrize(
        "form", ["Bearer {}", "bearer {}", "BEARER {}", "bEaReR {}", "Bearer    {}", "Bearer {} ", "Bearer {}      "]
    )
    def test_accepted_forms(self, served: Served, form: str) -> None:
        """The scheme in any case (RFC 9110, 11.1), with spaces after it and at the end."""
        assert told(served.channel, form.format(served.key.text)) == "OK"

    @pytest.mark.parametrize(
        "form",
        [
            *("", " ", "{}", "Bearer", "Bearer ", "Bearer{}", "Bearer:{}", "Bearer: {}", "Basic {}", "Token {}"),
            *("ApiKey {}", "XBearer {}", "Bearer Bearer {}", "Bearer {} {}", "Bearer {},{}", "Bearer {}, Bearer {}"),
            *('Bearer "{}"', "Bearer '{}'", "Bearer <{}>", "Bearer {}.", "Bearer None"),
            *("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "Bearer " + "x" * 6000),
            *("Bearer" + " " * 6000 + "x y", "Bearer x" + " " * 6000),
        ],
        ids=lambda form: repr(form[:60]),
    )
    def test_malformed_forms(self, served: Served, form: str) -> None:
        """A valid key with another scheme, without one, twice, or with something around it."""
        assert told(served.channel, form.format(*[served.key.text] * 2)) == "KEY_MALFORMED"

    def test_two_headers_are_malformed(self, served: Served) -> None:
        """Even if one is valid, since it is unknown who added the other one."""
        right, wrong = bearer(served.key), bearer(new_key())
        for pair in itertools.product((right, wrong, "", "Basic YTpi"), repeat=2):
            assert told(served.channel, *pair) == "KEY_MALFORMED"
        assert told(served.channel, right, right, right) == "KEY_MALFORMED"

    def test_mistyped_keys_are_malformed_not_unknown(self, served: Served) -> None:
        """The checksum distinguishes them, which helps an operator to find the cause."""
        text = served.key.text
        mistyped = [text[:-1], text[1:], text.upper(), text.lower(), text.replace("pk_", "sk_"), text * 2]
        mistyped += [text[:20] + ("b" if text[20] == "a" else "a") + text[21:], text[:30], "x" * len(text)]

        for wrong in mistyped:
            assert told(served.channel, f"Bearer {wrong}") == "KEY_MALFORMED"
        assert told(served.channel, bearer(new_key())) == "KEY_UNKNOWN"

    def test_malformed_keys_cause_no_reads(self, served: Served) -> None:
        """Even those that are almost a key. The only reads are the regular ones, every 24 seconds."""
        wrong = ("", "Bearer", f"Basic {served.key.text}", bearer(served.key)[:-1], served.key.text)
        started = monotonic()
        del served.proxy.statements[:]
        for sent in wrong * 40:
            assert told(served.channel, sent) == "KEY_MALFORMED"
            assert told(served.channel) == "CREDENTIALS_MISSING"

        loads = [one for one in served.proxy.statements if "FROM caller_keys" in one]
        assert len(loads) <= 1 + (monotonic() - started) / (CACHE_SECONDS / READS_PER_MAX_AGE)


class TestState:
    def test_a_revoked_key(self, served: Served) -> None:
        """The answer differs from that for an unknown key, so that the owner of the key knows what to do."""
        assert told(served.channel, bearer(served.revoked)) == "KEY_REVOKED"
        assert told(served.channel, bearer(served.over)) == "KEY_REVOKED"

    def test_a_key_expires(self, served: Served) -> None:
        """At expires_at; a revoked key stays revoked."""
        assert told(served.channel, bearer(served.short)) == "OK"
        served.server.clock.advance(timedelta(hours=23, minutes=50))
        assert told(served.channel, bearer(served.short)) == "OK"
        served.server.clock.advance(timedelta(minutes=10))

        assert told(served.channel, bearer(served.short)) == "KEY_EXPIRED"
        assert told(served.channel, bearer(served.over)) == "KEY_REVOKED"
        assert told(served.channel, bearer(served.key)) == "OK"

    def test_the_scopes_of_a_refused_key_are_not_checked(self, served: Served) -> None:
        """Somebody who finds an old key does not learn its scopes."""
        for method in (LIST_USERS, "/personae.v1.UserService/PurgeUser"):
            assert told(served.channel, bearer(served.revoked), method=method) == "KEY_REVOKED"


class TestPlaintext:
    """A key that is sent over the network in clear text is refused, so that no caller depends on that."""

    @pytest.fixture
    def address(self) -> str:
        found = other_address()
        if found is None:
            pytest.skip("this machine has no address but loopback, so no call can come from another one")
        return found

    @pytest.mark.parametrize("host", ["0.0.0.0", "::"])
    def test_keys_from_other_machines_are_refused_unread(self, served: Served, address: str, host: str) -> None:
        """Whether valid or not. Calls from this machine are identified as usual."""
        key = served.key
        settings = {"grpc_host": host, "bcrypt_cost": 10, "insecure_plaintext": True, "caller_auth": "required"}
        with running(served.proxy.url, **settings) as server:
            with connected(f"{address}:{server.server.port}") as outside:
                for sent in (bearer(key), bearer(new_key()), f"Basic {key.text}", "", "Bearer"):
                    assert told(outside, sent) == "KEY_OVER_PLAINTEXT"
                assert told(outside) == "CREDENTIALS_MISSING"
            assert told(server.channel, bearer(key)) == "OK"

    def test_unless_the_operator_allows_it(self, served: Served, address: str) -> None:
        """INSECURE_PLAINTEXT_KEYS, for a mesh that encrypts."""
        key = served.key
        settings = {
            "grpc_host": "0.0.0.0",
            "bcrypt_cost": 10,
            "insecure_plaintext": True,
            "insecure_plaintext_keys": True,
        }
        with running(served.proxy.url, **settings, caller_auth="required") as server:
            with connected(f"{address}:{server.server.port}") as outside:
                assert told(outside, bearer(key)) == "OK"
                assert told(outside, bearer(new_key())) == "KEY_UNKNOWN"
                assert told(outside) == "CREDENTIALS_MISSING"

    def test_without_authentication_keys_are_ignored(self, served: Served) -> None:
        with running(served.proxy.url, caller_auth="off") as server:
            for sent in ("", "Bearer", bearer(new_key()), "Basic YTpi"):
                assert told(server.channel, sent) == "OK"

    @pytest.mark.parametrize(
        "peer, is_here",
        [
            ("ipv4:127.0.0.1:50051", True),
            ("ipv4:127.8.9.10:1", True),
            ("ipv6:%5B::1%5D:50051", True),
            ("ipv6:[::1]:50051", True),
            ("ipv6:%5B::ffff:127.0.0.1%5D:50051", True),
            ("unix:/run/personae.sock", True),
            ("unix:", True),
            ("ipv4:192.0.2.1:50051", False),
            ("ipv4:10.127.0.1:127", False),
            ("ipv4:0.0.0.0:1", False),
            ("ipv6:%5B::ffff:192.0.2.1%5D:50051", False),
            ("ipv6:%5B2001:db8::1%5D:50051", False),
            ("ipv6:%5Bfe80::1%25lo%5D:50051", False),
            ("ipv6:%5B::%5D:1", False),
            ("vsock:2:50051", False),
            ("ipv4:localhost:50051", False),
            ("127.0.0.1:50051", False),
            ("", False),
        ],
    )
    def test_which_peers_are_on_this_machine(self, peer: str, *, is_here: bool) -> None:
        """In gRPC's notation; an unknown notation is not this machine."""
        assert is_loopback_peer(peer) == is_here
