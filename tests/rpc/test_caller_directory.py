"""The callers in memory: when they are read, how many reads strangers can cause, and outages of the database."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import grpc
import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2
from service.base.clock import monotonic, utc_now
from service.base.errors import DatabaseUnavailableError
from service.core.callers.api_keys import NewKey
from service.core.callers.index import ApiKey
from service.rpc.callers.directory import EXTRA_READS, READS_PER_MAX_AGE, CallerDirectory
from service.server.wiring import caller_directory
from tests.support.callers import LIST_USERS, Operator, bearer, call, call_until, new_key, operating, told
from tests.support.errors import fails
from tests.support.factories import PASSWORD
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running, settings_for
from tests.support.threads import at_once
from tests.support.waiting import PATIENCE, eventually

Code = grpc.StatusCode
CHECK_PASSWORD = "/personae.v1.CredentialService/CheckPassword"
CHECK = credential_pb2.CheckPasswordRequest(password=PASSWORD).SerializeToString()
"""A request that needs no database: if it is answered, the caller was identified."""


def loads(proxy: PostgresProxy) -> int:
    return len([one for one in proxy.statements if "FROM caller_keys" in one])


@contextlib.contextmanager
def silent_server(accepted: list[socket.socket]) -> Iterator[int]:
    """The port of a server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listening.accept()[0])

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join(PATIENCE)
            for connection in accepted:
                connection.close()


@dataclass(frozen=True)
class Proxied:
    """A server whose database can be made unavailable."""

    server: RunningServer
    proxy: PostgresProxy
    operator: Operator

    def told(self, *authorization: str, method: str = LIST_USERS, request: bytes = b"") -> str:
        return told(self.server.channel, *authorization, method=method, request=request)


class TestOutage:
    """While callers cannot be read, all calls are refused from CALLER_CACHE_SECONDS after the last read on."""

    AGE = 0.5

    @pytest.fixture
    def proxied(self, private_url: URL) -> Iterator[Proxied]:
        with PostgresProxy(private_url) as proxy, operating(private_url) as operator:
            with running(proxy.proxied, caller_auth="required", caller_cache_seconds=self.AGE) as server:
                yield Proxied(server, proxy, operator)

    def test_all_calls_are_refused_until_the_database_is_back(self, proxied: Proxied) -> None:
        """Known, unknown, revoked or without the scope: one answer, with pushback, also for RPCs without statements."""
        operator, proxy = proxied.operator, proxied.proxy
        key, idle = operator.create_with_key("credentials.check"), operator.create_with_key()
        revoked = operator.create_with_key("credentials.check")
        operator.revoke(revoked)
        usual = {
            bearer(key): "OK",
            bearer(idle): "SCOPE_MISSING credentials.check",
            bearer(revoked): "KEY_REVOKED",
            bearer(new_key()): "KEY_UNKNOWN",
        }

        def ask(sent: str) -> str:
            return proxied.told(sent, method=CHECK_PASSWORD, request=CHECK)

        for sent, expected in usual.items():
            eventually(lambda: ask(sent) == expected, expected)  # noqa: B023  called at once

        proxy.refuse()
        proxy.cut()
        gone = monotonic()
        for sent, expected in usual.items():
            last = call_until("DATABASE_UNAVAILABLE", lambda: ask(sent), before=expected)  # noqa: B023  called at once
            assert last <= gone + self.AGE, expected
            for _ in range(5):
                self.is_unavailable(proxied, sent)
        assert proxied.told() == "CREDENTIALS_MISSING"
        assert proxied.told(bearer(key)[:-1]) == "KEY_MALFORMED"

        proxy.refuse(refusing=False)
        for sent, expected in usual.items():
            eventually(lambda: ask(sent) == expected, expected)  # noqa: B023  called at once

    def is_unavailable(self, proxied: Proxied, sent: str) -> None:
        failure = fails(call, proxied.server.channel, sent, method=CHECK_PASSWORD, request=CHECK)
        assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
        assert failure.retry_after == timedelta(seconds=1)
        assert failure.error_metadata == {}

    def test_a_server_that_starts_without_a_database(self, private_url: URL) -> None:
        with operating(private_url) as operator, PostgresProxy(private_url) as proxy:
            key = operator.create_with_key("credentials.check")
            proxy.refuse()
            with running(proxy.proxied, caller_auth="required", caller_cache_seconds=self.AGE) as server:
                for sent in (bearer(key), bearer(new_key())):
                    assert told(server.channel, sent, method=CHECK_PASSWORD, request=CHECK) == "DATABASE_UNAVAILABLE"
                proxy.refuse(refusing=False)
                eventually(
                    lambda: told(server.channel, bearer(key), method=CHECK_PASSWORD, request=CHECK) == "OK", "OK"
                )


class TestStrangers:
    def test_a_thousand_unknown_keys_cause_a_few_reads(self, private_url: URL) -> None:
        """A burst, and then one a second, for any number of calls; a known caller is not affected."""
        age, threads, each = 60, 8, 125
        with PostgresProxy(private_url) as proxy, operating(private_url) as operator:
            key = operator.create_with_key("users.read")
            with running(proxy.proxied, caller_auth="required", caller_cache_seconds=age) as server:
                started = monotonic()
                del proxy.statements[:]

                def ask(_: int) -> set[str]:
                    with grpc.insecure_channel(server.address) as channel:
                        ended = {told(channel, bearer(new_key())) for _ in range(each)}
                        assert told(channel, bearer(key)) == "OK"
                    return ended

                assert at_once(threads, ask) == [{"KEY_UNKNOWN"}] * threads
                elapsed = monotonic() - started
                allowed = EXTRA_READS.burst + elapsed + 1 + elapsed / (age / READS_PER_MAX_AGE)
                assert 1 <= loads(proxy) <= allowed
                # A key that is created after that is known as soon as the rate limit allows the next read.
                late = operator.create_with_key("users.read")
                eventually(lambda: told(server.channel, bearer(late)) == "OK", "a new key is known")


def directory_of(url: URL, *, max_age: float = 60) -> CallerDirectory:
    return caller_directory(settings_for(url, caller_cache_seconds=max_age), url)


def find(directory: CallerDirectory, key: NewKey, *, seconds: float = PATIENCE) -> ApiKey | None:
    found = directory.find(lambda index: index.by_key_hash.get(key.key_hash), until=monotonic() + seconds)
    return None if found is None else found.key


def finds(directory: CallerDirectory, key: NewKey, *, seconds: float = PATIENCE) -> bool | None:
    """Whether the directory knows a key; None if the database is unavailable."""
    try:
        return find(directory, key, seconds=seconds) is not None
    except DatabaseUnavailableError:
        return None


class TestManyAtOnce:
    def test_one_read_serves_all(self, private_url: URL) -> None:
        """64 calls before the first read cause one read."""
        with operating(private_url) as operator, PostgresProxy(private_url) as proxy:
            key = operator.create_with_key("users.read")
            directory = directory_of(proxy.proxied)

            def ask(number: int) -> bool | None:
                if number == 0:
                    directory.start()
                return finds(directory, key)

            assert at_once(64, ask) == [True] * 64
            assert loads(proxy) == 1
            assert directory.end(timeout=PATIENCE)

    def test_a_new_key_is_accepted_in_many_calls_at_once(self, private_url: URL) -> None:
        with operating(private_url) as operator:
            directory = directory_of(private_url)
            directory.start()
            key = operator.create_with_key("users.read")
            assert at_once(64, lambda _: finds(directory, key)) == [True] * 64
            assert directory.end(timeout=PATIENCE)


def test_reads_that_take_longer_than_the_maximum_age(private_url: URL) -> None:
    """The age is the time between the start of the read and the arrival of the call, however long the read took."""
    with operating(private_url) as operator:
        key = operator.create_with_key("users.read")
        directory = CallerDirectory(operator.database, max_age=1e-6)
        directory.start()
        assert finds(directory, key)
        assert directory.end(timeout=PATIENCE)


class TestHungDatabase:
    def test_calls_are_refused_at_once(self, private_url: URL) -> None:
        """Many calls are refused during one attempt to read, so they hold no threads; they cause no more attempts."""
        accepted: list[socket.socket] = []
        with silent_server(accepted) as port:
            options = {"sslmode": "disable", "connect_timeout": "2"}
            directory = directory_of(private_url.set(host="127.0.0.1", port=port, query=options))
            directory.start()
            assert at_once(16, lambda _: finds(directory, new_key())) == [None] * 16

            def are_refused_during_one_attempt() -> bool:
                attempts = len(accepted)
                assert [finds(directory, new_key()) for _ in range(20)] == [None] * 20
                return attempts == len(accepted)

            assert any(are_refused_during_one_attempt() for _ in range(20))
            assert directory.end(timeout=PATIENCE)

    def test_no_call_waits_beyond_its_deadline(self, private_url: URL) -> None:
        """And when the database answers again, callers are known again."""
        with operating(private_url) as operator:
            key = operator.create_with_key("credentials.check")
            directory = directory_of(private_url, max_age=0.1)
            directory.start()
            with operator.changing() as session:
                session.execute(text("LOCK TABLE callers IN ACCESS EXCLUSIVE MODE"))
                eventually(lambda: finds(directory, key, seconds=0.05) is None, "the key is unknown")
            eventually(lambda: finds(directory, key) is True, "the key is known again")
            assert directory.end(timeout=PATIENCE)


class TestLastUse:
    """The last use of a key is stored with a precision of an hour, at the cost of one write an hour."""

    def test_is_written_once_an_hour(self, private_url: URL) -> None:
        with operating(private_url) as operator:
            name = operator.create("users.read")
            key = operator.add_key(name)
            directory = directory_of(private_url, max_age=2)
            directory.start()
            started_at = utc_now()

            def known_key() -> ApiKey:
                found = find(directory, key)
                assert found is not None
                return found

            def stored_after_uses(*, at: timedelta) -> datetime | None:
                for _ in range(50):
                    directory.record_use(known_key(), started_at + at)
                directory.write_uses(operator.database)
                [stored] = operator.last_used_at(name)
                eventually(lambda: known_key().last_used_at == stored, "what is stored is read")
                return stored

            hour = timedelta(hours=1)
            assert stored_after_uses(at=timedelta()) == started_at
            assert stored_after_uses(at=hour - timedelta(minutes=1)) == started_at
            assert stored_after_uses(at=hour + timedelta(minutes=1)) == started_at + hour + timedelta(minutes=1)
            assert directory.end(timeout=PATIENCE)

    def test_is_written_at_stop(self, private_url: URL) -> None:
        """What was not written before. A refused key was not used."""
        with operating(private_url) as operator:
            names = [operator.create("users.read") for _ in range(4)]
            keys = [operator.add_key(name, valid_for=timedelta(days=1)) for name in names[:3]]
            keys.append(operator.add_key(names[3]))
            operator.revoke(keys[1])
            with running(private_url, caller_auth="required", caller_cache_seconds=60) as server:
                assert told(server.channel, bearer(keys[0])) == "OK"
                assert told(server.channel, bearer(keys[1])) == "KEY_REVOKED"
                server.clock.advance(timedelta(days=1))
                assert told(server.channel, bearer(keys[2])) == "KEY_EXPIRED"
                assert told(server.channel, bearer(keys[3]), method=CHECK_PASSWORD).startswith("SCOPE_MISSING")
                now = server.clock()
            used = [operator.last_used_at(name)[0] for name in names]

        assert (used[1], used[2]) == (None, None)
        assert [moment is not None and moment <= now for moment in (used[0], used[3])] == [True, True]
