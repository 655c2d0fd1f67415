"""What all callers are held in: read rarely, bounded against strangers, and silent when the database is."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import grpc
import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2
from service.base.clock import monotonic
from service.base.errors import DatabaseUnavailableError
from service.core.api_keys import NewKey
from service.rpc.callers.directory import _EXTRA_LOADS, REFRESHES_PER_AGE, CallerDirectory
from service.server.wiring import caller_directory
from tests.support.callers import LIST_USERS, PATIENCE, Operator, bearer, call, new_key, operating, told
from tests.support.errors import fails
from tests.support.factories import PASSWORD
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running, settings_for
from tests.support.threads import at_once

Code = grpc.StatusCode
CHECK_PASSWORD = "/personae.v1.CredentialService/CheckPassword"
CHECK = credential_pb2.CheckPasswordRequest(password=PASSWORD).SerializeToString()
"""A request that needs no database: who is answered it was let in."""
TRIES = 5000


def eventually(is_true: Callable[[], bool], what: str) -> None:
    """Look again and again, so many times at most."""
    pause = threading.Event()
    for _ in range(TRIES):
        if is_true():
            return
        pause.wait(0.01)
    pytest.fail(f"did not happen: {what}")


def loads(proxy: PostgresProxy) -> int:
    """How often all callers were read."""
    return len([one for one in proxy.statements if "FROM caller_keys" in one])


@contextlib.contextmanager
def silent_server(accepted: list[socket.socket]) -> Iterator[int]:
    """The port of a server that accepts connections and says nothing on them."""
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
    """A server with a database that can be taken away."""

    server: RunningServer
    proxy: PostgresProxy
    operator: Operator

    def told(self, *authorization: str, method: str = LIST_USERS, request: bytes = b"") -> str:
        return told(self.server.channel, *authorization, method=method, request=request)


class TestOutage:
    """While the database cannot say who may call, nobody may; a while is the age that the operator has set."""

    AGE = 0.1

    @pytest.fixture
    def proxied(self, private_url: URL) -> Iterator[Proxied]:
        with PostgresProxy(private_url) as proxy, operating(private_url) as operator:
            with running(proxy.proxied, caller_auth="required", caller_cache_seconds=self.AGE) as server:
                yield Proxied(server, proxy, operator)

    def test_nobody_may_call_and_everybody_again(self, proxied: Proxied) -> None:
        """Known, unknown, revoked, without the scope: one answer, with pushback. Also of RPCs that need no database."""
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
        began = {sent: self.last_but(sent, ask) for sent in usual}
        for sent, expected in usual.items():
            assert began[sent] <= gone + self.AGE, expected
            for _ in range(5):
                self.is_unavailable(proxied, sent)
        assert proxied.told() == "CREDENTIALS_MISSING"
        assert proxied.told(bearer(key)[:-1]) == "KEY_MALFORMED"

        proxy.refuse(refusing=False)
        for sent, expected in usual.items():
            eventually(lambda: ask(sent) == expected, expected)  # noqa: B023  called at once

    def last_but(self, sent: str, ask: Callable[[str], str]) -> float:
        """When the last call began that was not answered by DATABASE_UNAVAILABLE."""
        last = float("-inf")
        for _ in range(TRIES):
            began = monotonic()
            if ask(sent) == "DATABASE_UNAVAILABLE":
                return last
            last = began
        pytest.fail("answered without a database")

    def is_unavailable(self, proxied: Proxied, sent: str) -> None:
        failure = fails(call, proxied.server.channel, sent, method=CHECK_PASSWORD, request=CHECK)
        assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
        assert failure.retry_after == timedelta(seconds=1)
        assert failure.error_metadata == {}

    def test_a_server_that_starts_without_a_database(self, private_url: URL) -> None:
        """Lets nobody in, and everybody as soon as it is there."""
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
    def test_a_thousand_unknown_keys_cause_a_handful_of_looks(self, private_url: URL) -> None:
        """A few at once and one a second, whoever asks; and a caller that is known notices nothing."""
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
                allowed = _EXTRA_LOADS + elapsed + 1 + elapsed / (age / REFRESHES_PER_AGE)
                assert 1 <= loads(proxy) <= allowed
                # And a key that is made after all that is known as soon as the next look is due.
                late = operator.create_with_key("users.read")
                eventually(lambda: told(server.channel, bearer(late)) == "OK", "a new key is known")


class TestManyAtOnce:
    @pytest.fixture
    def proxy(self, private_url: URL) -> Iterator[PostgresProxy]:
        with PostgresProxy(private_url) as found:
            yield found

    def directory(self, url: URL, *, age: float = 60) -> CallerDirectory:
        return caller_directory(settings_for(url, caller_cache_seconds=age), url)

    def test_one_reads_for_all(self, private_url: URL, proxy: PostgresProxy) -> None:
        """64 threads that find nothing read yet: two statements, and 64 answers."""
        with operating(private_url) as operator:
            key = operator.create_with_key("users.read")
            name = operator.create("users.read", identities=["web.internal"])
        directory = self.directory(proxy.proxied)
        directory.start()
        del proxy.statements[:]
        directory._read_at = float("-inf")  # as if it had been read too long ago

        def ask(index: int) -> str:
            if index % 2:
                known = directory.key(key.key_hash, until=monotonic() + PATIENCE)
                assert known is not None
                return known.key_id
            (found,) = directory.identities(["elsewhere.internal", "web.internal"], until=monotonic() + PATIENCE)
            return found

        assert set(at_once(64, ask)) == {key.key_id, name}
        # Once more for those who asked while that was under way: they may know of something that it has not seen.
        assert len([one for one in proxy.statements if "FROM caller_keys" in one]) in {1, 2}
        assert directory.end(patience=PATIENCE)

    def test_many_who_bring_a_new_key_at_once_are_all_known(self, private_url: URL) -> None:
        """One look serves all who ask."""
        with operating(private_url) as operator:
            directory = self.directory(private_url)
            directory.start()
            key = operator.create_with_key("users.read")
            found = at_once(64, lambda _: directory.key(key.key_hash, until=monotonic() + PATIENCE))
            assert directory.end(patience=PATIENCE)
        assert found.count(None) == 0

    def test_nobody_queues_up_to_fail(self, private_url: URL) -> None:
        """A database that does not answer: who waited while one tried is told what that one was, and tries no more."""
        accepted: list[socket.socket] = []
        with silent_server(accepted) as port:
            directory = self.directory(private_url.set(host="127.0.0.1", port=port, query={"sslmode": "disable"}))

            def ask(index: int) -> str:
                if index == 0:
                    directory.start()
                    return "started"
                with pytest.raises(DatabaseUnavailableError):
                    directory.key(new_key().key_hash, until=monotonic() + PATIENCE)
                return "told"

            assert at_once(16, ask) == ["started"] + ["told"] * 15
            assert directory.end(patience=PATIENCE)
        assert 1 <= len(accepted) <= 3  # not 15: one for those who ask, and one that was begun for who came late

    def test_nobody_waits_once_one_has_failed(self, private_url: URL) -> None:
        """A database that does not answer: calls are told so while the next reading hangs, and hold no thread."""
        accepted: list[socket.socket] = []
        with silent_server(accepted) as port:
            directory = self.directory(private_url.set(host="127.0.0.1", port=port, query={"sslmode": "disable"}))
            directory.start()
            eventually(lambda: directory._is_failing, "a reading has failed")

            def is_told_while_it_hangs() -> bool:
                since = directory._reading_since
                with pytest.raises(DatabaseUnavailableError):
                    directory.key(new_key().key_hash, until=monotonic() + PATIENCE)
                return since is not None and since == directory._reading_since

            assert any(is_told_while_it_hangs() for _ in range(20))
            assert directory.end(patience=PATIENCE)

    def test_nobody_waits_longer_than_the_caller(self, private_url: URL) -> None:
        """A database that does not answer holds the thread that reads, and no call past its own time."""
        with operating(private_url) as operator:
            key = operator.create_with_key("credentials.check")
            directory = self.directory(private_url, age=0.1)
            directory.start()
            with operator.changing() as session:
                session.execute(text("LOCK TABLE callers IN ACCESS EXCLUSIVE MODE"))

                def is_refused() -> bool:
                    try:
                        directory.key(key.key_hash, until=monotonic() + 0.05)
                    except DatabaseUnavailableError:
                        return True
                    return False  # what was read before counts a moment longer

                eventually(is_refused, "nobody is known")
                assert is_refused()
            eventually(
                lambda: directory.key(key.key_hash, until=monotonic() + PATIENCE) is not None, "it is read again"
            )
            assert directory.end(patience=PATIENCE)


class TestLastUse:
    """When a key was last used is for people who clean up: known to the hour, at the cost of one write an hour."""

    def used(self, operator: Operator, key: NewKey, name: str) -> object:
        return next(one.last_used_at for one in operator.caller(name).keys if one.key_id == key.key_id)

    def test_is_written_once_an_hour(self, private_url: URL) -> None:
        """However often it is used, and whatever for; the next hour writes it again."""
        with PostgresProxy(private_url) as proxy, operating(private_url) as operator:
            name = operator.create("users.read")
            key, unused = operator.add_key(name), operator.add_key(name)
            with running(proxy.proxied, caller_auth="required", caller_cache_seconds=0.1) as server:

                def use_and_have_all_read(times: int) -> None:
                    for _ in range(times):
                        eventually(lambda: told(server.channel, bearer(key)) == "OK", "it is used")
                        told(server.channel, bearer(key), method=CHECK_PASSWORD, request=CHECK)
                    directory = server.server._directory
                    assert directory is not None
                    directory.write_uses(server.database)  # as it is done in the background
                    before = loads(proxy)
                    eventually(lambda: loads(proxy) >= before + 2, "callers are read anew")

                use_and_have_all_read(1)
                first = self.used(operator, key, name)
                assert first is not None
                server.clock.advance(timedelta(minutes=59))
                use_and_have_all_read(50)
                assert self.used(operator, key, name) == first

                server.clock.advance(timedelta(minutes=2))
                use_and_have_all_read(50)
                second = self.used(operator, key, name)
                server.clock.advance(timedelta(minutes=30))
                use_and_have_all_read(50)
                assert second == self.used(operator, key, name)
                assert second - first >= timedelta(hours=1)  # type: ignore[operator]  # both are times
                assert self.used(operator, unused, name) is None

    def test_is_written_at_stop(self, private_url: URL) -> None:
        """What has not been written by then. A refused key was not used."""
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
