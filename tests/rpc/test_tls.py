"""TLS with real handshakes: the server's certificate when files change, and client certificates."""

import ssl
import threading
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc.experimental.session_cache import ssl_session_cache_lru

from service.dev.certificates import Issued
from service.rpc.tls import Certificates, TlsFiles
from tests.support.certificates import (
    HUNG_UP,
    Pair,
    TlsServer,
    become_pipe,
    call,
    channel,
    client_certificate,
    connected,
    method,
    new_ca,
    replace,
    server_certificate,
    serving,
    shown_by,
    tls_context,
)
from tests.support.clocks import MovableClock
from tests.support.threads import at_once
from tests.support.waiting import PATIENCE

Code = grpc.StatusCode
Events = list[MutableMapping[str, Any]]
DNS = x509.DNSName
URI = x509.UniformResourceIdentifier


@pytest.fixture(scope="module")
def ca() -> Issued:
    return new_ca()


@pytest.fixture(scope="module")
def other_ca() -> Issued:
    return new_ca()


@pytest.fixture
def log() -> Iterator[Events]:
    with structlog.testing.capture_logs() as found:
        yield found


@pytest.fixture
def pair(tmp_path: Path, ca: Issued) -> Pair:
    found = Pair(tmp_path)
    found.write(server_certificate(ca), ca)
    return found


@pytest.fixture
def server(pair: Pair, log: Events) -> Iterator[TlsServer]:
    with serving(pair.files, MovableClock()) as found:
        yield found


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, ca: Issued) -> Iterator[TlsServer]:
    pair = Pair(tmp_path_factory.mktemp("standing"))
    pair.write(server_certificate(ca), ca)
    with serving(pair.files, MovableClock()) as found:
        yield found


def of_certificates(log: Events) -> Events:
    """The events about certificates: another server of this process may log something meanwhile."""
    return [entry for entry in log if entry["event"].startswith("certificate")]


def events(log: Events, level: str | None = None) -> list[str]:
    return [entry["event"] for entry in of_certificates(log) if level in {None, entry["log_level"]}]


def refused(port: int, ca: Issued, client: Issued | None) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(port, ca, client)
    assert caught.value.code() is Code.UNAVAILABLE
    return str(caught.value.details())


def link(directory: Path, number: int) -> None:
    """Replace all files atomically by those in the folder of this number."""
    (directory / "..new").symlink_to(f"..{number}")
    (directory / "..new").replace(directory / "..data")


class TestReplacing:
    def test_new_handshakes_use_the_new_certificate(
        self, server: TlsServer, pair: Pair, ca: Issued, log: Events
    ) -> None:
        shown = server_certificate(ca)
        before = shown_by(server.requesting_none, ca)
        pair.write(shown, ca)

        assert before != shown.certificate
        for port in (server.requesting_none, server.requiring, server.requesting_none, server.requiring):
            assert shown_by(port, ca) == shown.certificate
        assert server.certificates.chain == shown.certificate_pem
        assert events(log) == ["certificate loaded"] * 2
        assert of_certificates(log)[-1] == {
            "event": "certificate loaded",
            "log_level": "info",
            "serial": f"{shown.certificate.serial_number:x}",
            "not_after": shown.certificate.not_valid_after_utc,
            "dns_names": ["localhost"],
        }
        assert "PRIVATE KEY" not in str(log) + repr(server.certificates)

    def test_open_connections_stay_open(self, server: TlsServer, pair: Pair, ca: Issued) -> None:
        """No RPC of a client under load fails while the certificate is replaced several times."""
        is_over, answered = threading.Event(), threading.Semaphore(0)

        def load(found: grpc.Channel) -> None:
            while not is_over.is_set():
                method(found)(b"", timeout=PATIENCE)
                answered.release()

        with ThreadPoolExecutor(1) as pool, channel(server.requesting_none, ca.certificate_pem) as found:
            loading = pool.submit(load, found)
            try:
                for _ in range(5):
                    shown = server_certificate(ca)
                    pair.write(shown, ca)
                    assert shown_by(server.requesting_none, ca) == shown.certificate
                    for _ in range(20):
                        assert answered.acquire(timeout=PATIENCE)
            finally:
                is_over.set()
            loading.result(PATIENCE)
        assert len({client.address for client in server.seen}) == 1

    @pytest.mark.parametrize("first", ["server.pem", "server.key"])
    def test_a_pair_is_loaded_when_it_is_complete(
        self, server: TlsServer, pair: Pair, ca: Issued, log: Events, first: str
    ) -> None:
        """While only one of the two files is new, the old certificate stays in use, and one error is logged."""
        before, shown = shown_by(server.requesting_none, ca), server_certificate(ca)
        pems = {"server.pem": shown.certificate_pem, "server.key": shown.private_key_pem}
        replace(pair.directory / first, pems.pop(first))

        for port in (server.requesting_none, server.requiring, server.requesting_none):
            assert shown_by(port, ca) == before
        assert events(log, "error") == ["certificate not replaced"]

        [(second, pem)] = pems.items()
        replace(pair.directory / second, pem)
        assert shown_by(server.requesting_none, ca) == shown.certificate
        assert events(log, "error") == ["certificate not replaced"]

    @pytest.mark.parametrize(
        "name, damage",
        [
            ("server.pem", lambda path: path.write_bytes(path.read_bytes()[:-40])),
            ("server.pem", Path.unlink),
            ("server.key", lambda path: replace(path, b"\x00\xff garbage")),
            ("ca.pem", become_pipe),
        ],
        ids=["truncated", "missing", "garbage", "pipe"],
    )
    def test_a_broken_file_is_logged_once_and_not_used(
        self, server: TlsServer, pair: Pair, ca: Issued, log: Events, *, name: str, damage: Callable[[Path], object]
    ) -> None:
        """Not for each connection. The last valid certificate stays in use until there is a new one."""
        before, shown = shown_by(server.requesting_none, ca), server_certificate(ca)
        path = pair.directory / name
        damage(path)

        for port in (server.requesting_none, server.requiring, server.requesting_none):
            assert shown_by(port, ca) == before
        assert call(server.requiring, ca, client_certificate(ca)) == ""
        assert events(log, "error") == ["certificate not replaced"]
        assert str(path) in of_certificates(log)[-1]["problem"]

        pair.write(shown, ca)
        assert shown_by(server.requesting_none, ca) == shown.certificate
        assert events(log, "error") == ["certificate not replaced"]

    def test_many_clients_at_once_see_the_same_certificate(
        self, server: TlsServer, pair: Pair, ca: Issued, log: Events
    ) -> None:
        """It is logged once, whether it is good or bad."""
        ports = [server.requesting_none, server.requiring] * 4
        before = shown_by(server.requesting_none, ca)
        replace(pair.files.certificate, b"")
        assert at_once(8, lambda index: shown_by(ports[index], ca)) == [before] * 8

        shown = server_certificate(ca)
        pair.write(shown, ca)
        assert at_once(8, lambda index: shown_by(ports[index], ca)) == [shown.certificate] * 8
        assert events(log) == [
            "certificate loaded",
            "certificate not replaced",
            "certificate loaded",
        ]

    def test_files_that_change_together_are_read_together(self, tmp_path: Path, ca: Issued, log: Events) -> None:
        """As in Kubernetes volumes, where a symbolic link is replaced, and so all files at once."""
        issued = [server_certificate(ca) for _ in range(100)]
        for number, one in enumerate(issued):
            (tmp_path / f"..{number}").mkdir()
            Pair(tmp_path / f"..{number}").write(one, ca)
        link(tmp_path, 0)
        for name in ("server.pem", "server.key", "ca.pem"):
            (tmp_path / name).symlink_to(f"..data/{name}")
        certificates = Certificates(Pair(tmp_path).files, clock=MovableClock())

        with ThreadPoolExecutor(1) as pool:
            swapping = pool.submit(lambda: list(map(link, repeat(tmp_path), range(1, len(issued)))))
            while not swapping.done():
                certificates.refresh()
            swapping.result(PATIENCE)
        certificates.refresh()
        assert certificates.chain == issued[-1].certificate_pem
        assert events(log, "error") == []

    def test_the_whole_chain_is_sent(self, tmp_path: Path, ca: Issued) -> None:
        pair, shown = Pair(tmp_path), server_certificate(ca)
        pair.write(shown, ca)
        replace(pair.files.certificate, b"as text\n" + shown.certificate_pem + ca.certificate_pem)
        with serving(pair.files, MovableClock()) as server:
            assert server.certificates.chain == shown.certificate_pem + ca.certificate_pem
            assert shown_by(server.requesting_none, ca) == shown.certificate


class TestClientCa:
    def test_the_new_one_decides(self, server: TlsServer, pair: Pair, ca: Issued, other_ca: Issued) -> None:
        """From the next handshake on; open connections stay open. Meanwhile the file may contain both."""
        old, new = client_certificate(ca, DNS("old")), client_certificate(other_ca, DNS("new"))
        with channel(server.requiring, ca.certificate_pem, old) as found:
            assert method(found)(b"", timeout=PATIENCE) == b"old"
            refused(server.requiring, ca, new)

            replace(pair.directory / "ca.pem", ca.certificate_pem + other_ca.certificate_pem)
            assert [call(server.requiring, ca, client) for client in (old, new)] == ["old", "new"]

            replace(pair.directory / "ca.pem", other_ca.certificate_pem)
            assert call(server.requiring, ca, new) == "new"
            refused(server.requiring, ca, old)
            assert method(found)(b"", timeout=PATIENCE) == b"old"

    def test_earlier_tls_sessions_are_not_resumed(
        self, server: TlsServer, pair: Pair, ca: Issued, other_ca: Issued
    ) -> None:
        """A client that resumes a session is not verified again, so sessions must end with their CA."""
        context = tls_context(ca, client_certificate(ca), version=ssl.TLSVersion.TLSv1_2)
        with connected(server.requiring, context) as first:
            session = first.session
        with connected(server.requiring, context, session) as second:
            assert second.session_reused
        replace(pair.directory / "ca.pem", other_ca.certificate_pem)

        with pytest.raises(OSError, match=HUNG_UP), connected(server.requiring, context, session):
            pass

    def test_without_one_no_certificate_can_be_required(self, pair: Pair) -> None:
        """Nothing could verify it."""
        files = TlsFiles(pair.files.certificate, pair.files.private_key, None)
        certificates = Certificates(files, clock=MovableClock())

        certificates.credentials(requires_client_certificate=False)
        with pytest.raises(ValueError, match="client CA"):
            certificates.credentials(requires_client_certificate=True)


class TestExpiry:
    def test_is_logged_once_when_it_is_near_and_once_when_it_has_come(
        self, tmp_path: Path, ca: Issued, log: Events
    ) -> None:
        """Also for a certificate that was valid for long when the server started; and again for the next one."""
        pair, clock = Pair(tmp_path), MovableClock()
        pair.write(server_certificate(ca, days=20), ca)
        with serving(pair.files, clock) as server:
            for _ in range(4):
                for _ in range(2):
                    shown_by(server.requesting_none, ca)
                clock.advance(timedelta(days=7))
            pair.write(server_certificate(ca, days=33), ca)
            shown_by(server.requesting_none, ca)
        assert events(log) == [
            *("certificate loaded", "certificate expires soon", "certificate has expired"),
            *("certificate loaded", "certificate expires soon"),
        ]

    @pytest.mark.parametrize(
        "days, ahead, event", [(-1, 0, "certificate has expired"), (60, -365, "certificate is not valid yet")]
    )
    def test_an_invalid_certificate_is_used_and_logged(
        self, tmp_path: Path, ca: Issued, log: Events, *, days: float, ahead: int, event: str
    ) -> None:
        """A server with a wrong clock is better than none."""
        pair, clock = Pair(tmp_path), MovableClock()
        clock.advance(timedelta(days=ahead))
        pair.write(server_certificate(ca, days=days), ca)
        Certificates(pair.files, clock=clock)

        assert events(log, "warning") == [event]


class TestClients:
    @pytest.mark.parametrize(
        "new_client",
        [
            lambda ca, other: None,
            lambda ca, other: client_certificate(other, DNS("client")),
            lambda ca, other: client_certificate(ca, DNS("client"), ends=timedelta(hours=-1)),
            lambda ca, other: client_certificate(ca, DNS("client"), starts=timedelta(hours=1)),
            lambda ca, other: client_certificate(ca, DNS("client"), usage=ExtendedKeyUsageOID.SERVER_AUTH),
        ],
        ids=["none", "of another CA", "expired", "not valid yet", "of a server"],
    )
    def test_without_a_valid_certificate_no_rpc_is_served(
        self, server: TlsServer, ca: Issued, other_ca: Issued, new_client: Callable[[Issued, Issued], Issued | None]
    ) -> None:
        """Where one is required. With one, the same RPC does."""
        assert "Socket closed" in refused(server.requiring, ca, new_client(ca, other_ca))
        assert server.seen == []

        assert call(server.requiring, ca, client_certificate(ca, DNS("client"))) == "client"

    def test_where_none_is_required_none_is_used(self, standing: TlsServer, ca: Issued) -> None:
        """Clients are not asked for one, so that no unverified certificate identifies a caller."""
        assert call(standing.requesting_none, ca, client_certificate(ca, DNS("client"))) == "nobody"
        assert call(standing.requesting_none, ca) == "nobody"
        with grpc.insecure_channel(f"127.0.0.1:{standing.plaintext}") as found:
            assert method(found)(b"", timeout=PATIENCE) == b"nobody"

    def test_a_resumed_session_has_the_certificate_too(self, standing: TlsServer, ca: Issued) -> None:
        """It is not verified again, so the service must be able to check whether it has expired."""
        client = client_certificate(ca, DNS("client"))
        cache = ssl_session_cache_lru(1)  # type: ignore[no-untyped-call]  # the stubs do not know it
        options = [("grpc.ssl_session_cache", cache)]
        for _ in range(2):
            with channel(standing.requiring, ca.certificate_pem, client, host="localhost", options=options) as found:
                assert method(found)(b"", timeout=PATIENCE) == b"client"

        first, second = standing.seen[-2:]
        assert (first.is_resumed, second.is_resumed) == (False, True)
        assert second.certificate == first.certificate
        assert second.certificate is not None
        assert second.certificate.not_after == client.certificate.not_valid_after_utc
