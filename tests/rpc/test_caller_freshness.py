"""How soon a change is known: a new key at once, everything else within CALLER_CACHE_SECONDS, in every process."""

import threading
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
from tests.support.callers import (
    Operator,
    bearer,
    connected,
    operating,
    tls_settings,
    told,
)
from tests.support.certificates import Pair, channel, client_certificate, new_ca, server_certificate
from tests.support.databases import Postgres, libpq_url
from tests.support.processes import process
from tests.support.servers import running
from tests.support.threads import at_once

CACHE_SECONDS = 0.5
PROCESSES = 3
POLLS = 5000
LATE = "DATABASE_UNAVAILABLE"
"""What is said where a machine has so much to do that reading the callers takes longer than it counts."""
NEEDED = "SCOPE_MISSING users.read"


@dataclass(frozen=True)
class Fleet:
    """Several processes on one database, and an operator who tells none of them anything."""

    operator: Operator
    channels: Sequence[grpc.Channel]


@pytest.fixture(scope="module")
def fleet(postgres: Postgres, template: str) -> Iterator[Fleet]:
    with postgres.scratch(template=template) as url, operating(url) as operator, ExitStack() as stack:
        environment = {"DATABASE_URL": libpq_url(url), "CALLER_AUTH": "required"}
        environment["CALLER_CACHE_SECONDS"] = str(CACHE_SECONDS)
        servers = [stack.enter_context(process("serve", **environment)) for _ in range(PROCESSES)]
        channels = [stack.enter_context(connected(f"127.0.0.1:{server.port}")) for server in servers]
        yield Fleet(operator, channels)
        assert [server.end() for server in servers] == [0] * PROCESSES


def call_until(changed: str, call: Callable[[], str], *, before: str) -> tuple[float, float]:
    """Call until it ends in the new way. When the last call began that ended in the old way, and the one after it.

    Between calls there is a pause; how long all takes is bounded by the number of the calls.
    """
    pause = threading.Event()
    last = float("-inf")
    for _ in range(POLLS):
        began = monotonic()
        ended = call()
        if ended == changed:
            assert {call() for _ in range(20)} <= {changed, LATE}  # and never the old way again
            return last, began
        assert ended in {before, LATE}
        last = last if ended == LATE else began
        pause.wait(0.01)
    pytest.fail(f"still {before} after {POLLS} calls")


class TestEveryProcess:
    """What was changed is in force everywhere CACHE_SECONDS after its commit, however slow this machine is.

    A call that begins later is never answered by what was before: the moments are compared, nothing is timed. All
    processes of a machine share the clock.
    """

    def changed(
        self,
        fleet: Fleet,
        record: Callable[[str, object], None],
        *,
        change: Callable[[], object],
        authorization: str,
        before: str,
        after: str,
    ) -> None:
        """Make a change while each process is called all the time."""
        for channel_to_one in fleet.channels:
            call_until(before, lambda: told(channel_to_one, authorization), before="KEY_UNKNOWN")  # noqa: B023

        def run(index: int) -> tuple[float, float]:
            if index == PROCESSES:
                change()
                return monotonic(), 0
            return call_until(after, lambda: told(fleet.channels[index], authorization), before=before)

        *seen, committed = [one for one in at_once(PROCESSES + 1, run) if not isinstance(one, grpc.RpcError)]
        assert len(seen) == PROCESSES
        assert all(last <= committed[0] + CACHE_SECONDS for last, _ in seen)
        record(f"seconds until {before} was {after}", [round(first - committed[0], 3) for _, first in seen])

    def test_a_revoked_key(self, fleet: Fleet, record_testsuite_property: Callable[[str, object], None]) -> None:
        """One of two: the other goes on."""
        name = fleet.operator.create("users.read")
        key, other = fleet.operator.add_key(name), fleet.operator.add_key(name)
        self.changed(
            fleet,
            record_testsuite_property,
            change=lambda: fleet.operator.revoke(key),
            authorization=bearer(key),
            before="OK",
            after="KEY_REVOKED",
        )
        assert [told(found, bearer(other)) for found in fleet.channels] == ["OK"] * PROCESSES

    def test_a_revoked_caller(self, fleet: Fleet, record_testsuite_property: Callable[[str, object], None]) -> None:
        """Everything that it has."""
        name = fleet.operator.create("users.read")
        key = fleet.operator.add_key(name)

        def revoke() -> None:
            with fleet.operator.changing() as session:
                revoke_all(session, name, now=utc_now())

        self.changed(
            fleet, record_testsuite_property, change=revoke, authorization=bearer(key), before="OK", after="KEY_REVOKED"
        )

    def test_a_withdrawn_scope(self, fleet: Fleet, record_testsuite_property: Callable[[str, object], None]) -> None:
        """The key opens the rest as before."""
        name = fleet.operator.create("users.read", "users.write")
        key = fleet.operator.add_key(name)
        self.changed(
            fleet,
            record_testsuite_property,
            change=lambda: fleet.operator.change_scopes(name, remove=["users.read"]),
            authorization=bearer(key),
            before="OK",
            after=NEEDED,
        )

    def test_a_granted_scope(self, fleet: Fleet, record_testsuite_property: Callable[[str, object], None]) -> None:
        """As soon as a withdrawn one."""
        name = fleet.operator.create("users.write")
        key = fleet.operator.add_key(name)
        self.changed(
            fleet,
            record_testsuite_property,
            change=lambda: fleet.operator.change_scopes(name, add=["users.read"]),
            authorization=bearer(key),
            before=NEEDED,
            after="OK",
        )


class TestAtOnce:
    """What was not there is looked for anew: nobody waits for the next time that everything is read, a minute off."""

    def test_a_new_key(self, private_url: URL) -> None:
        """Of a new caller, and a further one of a caller that is known."""
        settings = {"caller_auth": "required", "caller_cache_seconds": 60}
        with running(private_url, **settings) as server, operating(private_url) as operator:
            name = operator.create("users.read")
            for _ in range(2):
                assert told(server.channel, bearer(operator.add_key(name))) == "OK"

    def test_a_new_name_in_certificates(self, private_url: URL, tmp_path: Path) -> None:
        """And one that is nobody's any more opens nothing within the age that the operator has set."""
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
                last, _ = call_until("CERTIFICATE_UNKNOWN", lambda: told(found), before="OK")
                assert last <= removed + CACHE_SECONDS


class TestForgotten:
    def test_a_key_that_was_over_for_thirty_days(self, private_url: URL) -> None:
        """Is told from one that never was until then, and not any more; its caller stays."""
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
