"""When a change of callers takes effect: a new key at once, all else within CALLER_CACHE_SECONDS, in every process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from sqlalchemy.engine import URL

from service.base.clock import monotonic, utc_now
from service.core.callers.administration import remove_identity, revoke_all
from service.core.callers.api_keys import NewKey
from tests.support.callers import Operator, bearer, call_until, connected, operating, tls_settings, told
from tests.support.certificates import Pair, channel, client_certificate, new_ca, server_certificate
from tests.support.databases import Postgres, libpq_url
from tests.support.processes import process
from tests.support.servers import running
from tests.support.threads import at_once

CACHE_SECONDS = 0.5
PROCESSES = 3


@dataclass(frozen=True)
class Processes:
    """Several server processes on one database. The operator's changes notify none of them."""

    operator: Operator
    channels: Sequence[grpc.Channel]

    def require_change(self, key: NewKey, change: Callable[[], object], *, before: str, after: str) -> None:
        """Make a change while each process is called without a pause. No call that begins CACHE_SECONDS after the
        commit may be answered as before. A slow machine changes nothing: only the order of moments counts.
        """
        for channel_to_one in self.channels:
            call_until(before, lambda: told(channel_to_one, bearer(key)), before="KEY_UNKNOWN")  # noqa: B023

        def run(index: int) -> float:
            if index < PROCESSES:
                return call_until(after, lambda: told(self.channels[index], bearer(key)), before=before)
            change()
            return monotonic()

        *last_before, committed_at = at_once(PROCESSES + 1, run)
        assert all(last <= committed_at + CACHE_SECONDS for last in last_before)  # type: ignore[operator]


@pytest.fixture(scope="module")
def processes(postgres: Postgres, template: str) -> Iterator[Processes]:
    with postgres.scratch(template=template) as url, operating(url) as operator, ExitStack() as stack:
        environment = {"DATABASE_URL": libpq_url(url), "CALLER_AUTH": "required"}
        environment["CALLER_CACHE_SECONDS"] = str(CACHE_SECONDS)
        servers = [stack.enter_context(process("serve", **environment)) for _ in range(PROCESSES)]
        channels = [stack.enter_context(connected(f"127.0.0.1:{server.port}")) for server in servers]
        yield Processes(operator, channels)
        assert [server.end() for server in servers] == [0] * PROCESSES


class TestEveryProcess:
    """A change takes effect in every process within CALLER_CACHE_SECONDS after its commit."""

    def test_a_revoked_key(self, processes: Processes) -> None:
        operator = processes.operator
        name = operator.create("users.read")
        key, other = operator.add_key(name), operator.add_key(name)
        processes.require_change(key, lambda: operator.revoke(key), before="OK", after="KEY_REVOKED")
        assert [told(found, bearer(other)) for found in processes.channels] == ["OK"] * PROCESSES

    def test_a_revoked_caller(self, processes: Processes) -> None:
        operator = processes.operator
        name = operator.create("users.read")
        key = operator.add_key(name)

        def revoke() -> None:
            with operator.changing() as session:
                revoke_all(session, name, now=utc_now())

        processes.require_change(key, revoke, before="OK", after="KEY_REVOKED")

    def test_a_withdrawn_scope(self, processes: Processes) -> None:
        operator = processes.operator
        name = operator.create("users.read", "users.write")
        key, needed = operator.add_key(name), "SCOPE_MISSING users.read"
        withdraw, grant = (
            lambda: operator.change_scopes(name, remove=["users.read"]),
            lambda: operator.change_scopes(name, add=["users.read"]),
        )
        processes.require_change(key, withdraw, before="OK", after=needed)
        processes.require_change(key, grant, before=needed, after="OK")


class TestAtOnce:
    """An unknown key or identity causes another read, so that a new one is accepted before the next regular read."""

    def test_a_new_identity(self, private_url: URL, tmp_path: Path) -> None:
        """A removed one is unknown within CALLER_CACHE_SECONDS."""
        ca, pair = new_ca(), Pair(tmp_path)
        pair.write(server_certificate(ca), ca)
        client = client_certificate(ca, x509.DNSName("new.internal"))
        settings = tls_settings(pair, caller_cache_seconds=CACHE_SECONDS)
        with running(private_url, **settings) as server, operating(private_url) as operator:
            with channel(server.server.port, ca.certificate_pem, client) as found:
                assert told(found) == "CERTIFICATE_UNKNOWN"
                name = operator.create("users.read", identities=["new.internal"])
                assert told(found) == "OK"
                with operator.changing() as session:
                    remove_identity(session, name, "new.internal")
                removed = monotonic()
                last = call_until("CERTIFICATE_UNKNOWN", lambda: told(found), before="OK")
                assert last <= removed + CACHE_SECONDS


class TestDeleted:
    def test_a_key_thirty_days_after_its_end(self, private_url: URL) -> None:
        """It is then unknown; its caller remains."""
        with operating(private_url) as operator:
            revoked = operator.create_with_key("users.read")
            expired = operator.create_with_key("users.read", valid_for=timedelta(days=1))
            operator.revoke(revoked)
            with running(private_url, caller_auth="required", caller_cache_seconds=1) as server:
                server.clock.advance(timedelta(days=29, hours=23))
                assert server.sweep()["forgotten_caller_keys"] == 0
                assert told(server.channel, bearer(revoked)) == "KEY_REVOKED"
                server.clock.advance(timedelta(hours=2))
                assert server.sweep()["forgotten_caller_keys"] == 1
                call_until("KEY_UNKNOWN", lambda: told(server.channel, bearer(revoked)), before="KEY_REVOKED")
                assert told(server.channel, bearer(expired)) == "KEY_EXPIRED"
                server.clock.advance(timedelta(days=1))
                assert server.sweep()["forgotten_caller_keys"] == 1
                call_until("KEY_UNKNOWN", lambda: told(server.channel, bearer(expired)), before="KEY_EXPIRED")
