"""Client certificates: which caller they identify, and which are refused."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from cryptography import x509
from sqlalchemy.engine import URL

from service.core.callers.api_keys import NewKey
from service.dev.certificates import Issued
from service.rpc.pipeline.status import DETAILS_KEY
from tests.support.callers import LIST_USERS, bearer, call, new_key, operating, other_address, tls_settings, told
from tests.support.certificates import LOCAL, Pair, channel, client_certificate, new_ca, server_certificate
from tests.support.databases import Postgres
from tests.support.leak_detector import Interceptor
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
DNS, URI = x509.DNSName, x509.UniformResourceIdentifier
WEB = "spiffe://prod.example/ns/shop/web"
UNKNOWN_URIS = (
    *(WEB[:-1], WEB + "2", WEB + "/", WEB + "/admin", WEB.rpartition("/")[0], f" {WEB}", f"{WEB}\n"),
    *("spiffe://prod.example", "spiffe://prod.example/", "spiffe://prod.example/*", f"https://prod.example/?{WEB}"),
    *("spiffe://prod.example/ns/shop/Web", "spiffe://prod.example/ns/shop/%77eb", "SPIFFE://prod.example/ns/shop/web"),
    *("spiffe://prod.example/ns/shop/../shop/web", "spiffe://prod.example.evil/ns/shop/web"),
    *("spiffe://evil.prod.example/ns/shop/web", "spiffe://prod.example:443/ns/shop/web"),
    *("spiffe://PROD.example/ns/shop/web", "https://billing.internal", "billing.internal"),
)
UNKNOWN_DNS_NAMES = (
    *("internal", "illing.internal", "billing.interna", "billing.internal.evil.example", "api.billing.internal"),
    *("evil-billing.internal", "billing.internal.", "billing..internal", " billing.internal", "*.internal", "*"),
    *("billing.internal\0.evil.example", "b*.internal", WEB),
)
GET_LOCKOUT = "/personae.v1.AuthenticationService/GetLockout"


@dataclass(frozen=True)
class Known:
    """A database with callers: web, billing and other have the scope users.read; idle has none.

    The key is of a caller without identities, which has the scope auth.lockout only.
    """

    url: URL
    web: str
    billing: str
    key: NewKey


@dataclass(frozen=True)
class Served:
    """A server on this database, and the CA that it trusts."""

    server: RunningServer
    ca: Issued
    known: Known

    @property
    def port(self) -> int:
        return self.server.server.port

    @property
    def key(self) -> str:
        return bearer(self.known.key)

    def told(self, *names: x509.GeneralName, common_name: str = "x") -> str:
        with self.showing(client_certificate(self.ca, *names, common_name=common_name)) as found:
            return told(found)

    @contextlib.contextmanager
    def showing(self, client: Issued | None, *, port: int | None = None) -> Iterator[grpc.Channel]:
        """A channel with a connection of its own, on which the client presents this certificate."""
        with channel(port or self.port, self.ca.certificate_pem, client) as found:
            yield grpc.intercept_channel(found, Interceptor())


@pytest.fixture(scope="module")
def known(postgres: Postgres, template: str) -> Iterator[Known]:
    with postgres.scratch(template=template) as url:
        with operating(url) as operator:
            web = operator.create("users.read", identities=[WEB])
            billing = operator.create("users.read", identities=["billing.internal", "billing-2.internal"])
            operator.create("users.read", identities=["other.internal", "spiffe://prod.example/other"])
            operator.create(identities=["idle.internal"])
            key = operator.create_with_key("auth.lockout")
        yield Known(url, web, billing, key)


@contextlib.contextmanager
def serving(
    known: Known, directory: Path, *, names: Sequence[x509.GeneralName] = LOCAL, **changes: object
) -> Iterator[Served]:
    ca, pair = new_ca(), Pair(directory)
    pair.write(server_certificate(ca, names=names), ca)
    with running(known.url, **tls_settings(pair, **changes)) as server:
        yield Served(server, ca, known)


@pytest.fixture(scope="module")
def served(known: Known, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(known, tmp_path_factory.mktemp("tls")) as found:
        yield found


class TestNames:
    @pytest.mark.parametrize(
        "names",
        [
            [URI(WEB)],
            [URI(WEB), DNS("unknown.internal")],
            [DNS("billing.internal")],
            [DNS("BILLING.internal")],
            [DNS("billing.internal"), DNS("billing-2.internal")],
            [DNS("unknown.internal"), DNS("billing.internal")],
            [DNS("*.internal"), DNS("billing.internal")],
            [URI("https://billing.internal/"), DNS("billing.internal")],
        ],
    )
    def test_names_that_identify_a_caller(self, served: Served, names: list[x509.GeneralName]) -> None:
        """An identity of the caller, also beside unknown names and other identities of the same caller."""
        assert served.told(*names) == "OK"

    @pytest.mark.parametrize(
        "names",
        [
            [],
            *([URI(uri)] for uri in UNKNOWN_URIS),
            *([DNS(name)] for name in UNKNOWN_DNS_NAMES),
            [x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "billing.internal")]))],
            [URI(WEB), URI("spiffe://prod.example/other")],
            [URI("spiffe://prod.example/unknown"), DNS("billing.internal")],
            [DNS("billing.internal"), DNS("other.internal")],
            [DNS("other.internal"), DNS("idle.internal"), DNS("billing.internal")],
        ],
        ids=str,
    )
    def test_names_that_identify_nobody(self, served: Served, names: list[x509.GeneralName]) -> None:
        """Part of an identity, more than it, another case, a wildcard, the identities of two callers."""
        assert served.told(*names) == "CERTIFICATE_UNKNOWN"

    @pytest.mark.parametrize("common_name", ["billing.internal", WEB, "admin"])
    def test_the_common_name_is_ignored(self, served: Served, common_name: str) -> None:
        assert served.told(common_name=common_name) == "CERTIFICATE_UNKNOWN"
        assert served.told(DNS("unknown.internal"), common_name=common_name) == "CERTIFICATE_UNKNOWN"

    def test_scopes_are_checked(self, served: Served) -> None:
        assert served.told(DNS("idle.internal")) == "SCOPE_MISSING users.read"
        with served.showing(client_certificate(served.ca, URI(WEB))) as found:
            assert told(found, method=GET_LOCKOUT) == "SCOPE_MISSING auth.lockout"

    def test_the_log_names_the_caller(self, served: Served) -> None:
        """By the name of the caller, not by the name in the certificate."""
        served.server.server.report_refusals()  # those of other tests
        with structlog.testing.capture_logs() as log:
            assert served.told(URI(WEB)) == "OK"
            assert served.told(DNS("billing.internal")) == "OK"
            assert served.told(DNS("unknown.internal")) == "CERTIFICATE_UNKNOWN"
        lines = [entry for entry in log if entry["event"] == "rpc"]
        assert [(line["caller"], line.get("reason")) for line in lines] == [
            (served.known.web, None),
            (served.known.billing, None),
            ("", "CERTIFICATE_UNKNOWN"),
        ]
        assert not any("key" in line for line in lines)
        assert "internal" not in str(lines)


class TestKeysBesideCertificates:
    """If a call has a key, its certificate is ignored."""

    def test_the_key_decides(self, served: Served) -> None:
        """The scopes of the key's caller count, not those of the certificate's caller."""
        with served.showing(client_certificate(served.ca, URI(WEB))) as found:
            assert told(found, served.key, method=LIST_USERS) == "SCOPE_MISSING users.read"
            assert told(found, served.key, method=GET_LOCKOUT) == "INVALID_FIELDS"
            assert told(found, method=LIST_USERS) == "OK"
            assert told(found, method=GET_LOCKOUT) == "SCOPE_MISSING auth.lockout"

    def test_a_bad_key_is_refused_all_the_same(self, served: Served) -> None:
        """A caller that sends an invalid key must learn of it."""
        with served.showing(client_certificate(served.ca, URI(WEB))) as found:
            for sent, reason in (
                (bearer(new_key()), "KEY_UNKNOWN"),
                (served.key[:-1], "KEY_MALFORMED"),
                ("Basic YTpi", "KEY_MALFORMED"),
                ("", "KEY_MALFORMED"),
            ):
                assert told(found, sent) == reason
            assert told(found) == "OK"

    def test_a_key_works_beside_an_unknown_certificate(self, served: Served) -> None:
        with served.showing(client_certificate(served.ca, DNS("unknown.internal"))) as found:
            assert told(found, served.key, method=GET_LOCKOUT) == "INVALID_FIELDS"


class TestTime:
    def test_a_certificate_expires_while_its_connection_is_open(self, known: Known, tmp_path: Path) -> None:
        """TLS verifies it once, the service at each call. A key still works."""
        with serving(known, tmp_path) as served:
            client = client_certificate(served.ca, URI(WEB), ends=timedelta(days=1))
            with served.showing(client) as found:
                assert told(found) == "OK"
                served.server.clock.advance(timedelta(hours=23))
                assert told(found) == "OK"
                served.server.clock.advance(timedelta(hours=2))  # the certificate was made after the server's clock
                assert told(found) == "CERTIFICATE_EXPIRED"
                assert told(found, method=GET_LOCKOUT) == "CERTIFICATE_EXPIRED"
                assert told(found, served.key, method=GET_LOCKOUT) == "INVALID_FIELDS"
            longer = client_certificate(served.ca, URI(WEB), ends=timedelta(days=2))
            with served.showing(longer) as found:
                assert told(found) == "OK"
            nobody = client_certificate(served.ca, DNS("unknown.internal"), ends=timedelta(days=1))
            with served.showing(nobody) as found:
                assert told(found) == "CERTIFICATE_EXPIRED"


def not_connected(found: grpc.Channel, *authorization: str) -> bool:
    """Whether a call fails because there is no connection."""
    with pytest.raises(grpc.RpcError) as caught:
        call(found, *authorization)
    error: Any = caught.value
    is_ours = any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())
    return error.code() is Code.UNAVAILABLE and not is_ours


class TestModes:
    @pytest.mark.parametrize("kind", ["none", "of another CA", "expired", "in clear text"])
    def test_required_lets_nobody_in_without_one(self, served: Served, kind: str) -> None:
        """Without a valid one of the right CA there is no connection, even for a call with a valid key."""
        key = served.key
        if kind == "in clear text":
            with grpc.insecure_channel(f"127.0.0.1:{served.port}") as found:
                assert not_connected(found, key)
            return
        client = {
            "none": None,
            "of another CA": client_certificate(new_ca(), URI(WEB)),
            "expired": client_certificate(served.ca, URI(WEB), ends=timedelta(hours=-1)),
        }[kind]
        with served.showing(client) as found:
            assert not_connected(found, key)

    def test_optional_has_a_port_for_each(self, known: Known, tmp_path: Path) -> None:
        """One port for keys, where certificates are not requested; one for certificates or keys."""
        with serving(known, tmp_path, tls_client_certificates="optional", grpc_mtls_port=0) as served:
            client, mtls_port = client_certificate(served.ca, URI(WEB)), served.server.server.mtls_port
            assert mtls_port not in {0, served.port}
            for shown in (None, client):
                with served.showing(shown) as found:
                    assert told(found) == "CREDENTIALS_MISSING"
                    assert told(found, bearer(new_key())) == "KEY_UNKNOWN"
                    assert told(found, served.key, method=GET_LOCKOUT) == "INVALID_FIELDS"
            with served.showing(client, port=mtls_port) as found:
                assert told(found) == "OK"
                assert told(found, served.key, method=GET_LOCKOUT) == "INVALID_FIELDS"
            with served.showing(None, port=mtls_port) as found:
                assert not_connected(found, served.key)

    def test_off_knows_keys_alone(self, known: Known, tmp_path: Path) -> None:
        with serving(known, tmp_path, tls_client_certificates="off", tls_client_ca_file=None) as served:
            assert served.server.server.mtls_port == 0
            for shown in (None, client_certificate(served.ca, URI(WEB))):
                with served.showing(shown) as found:
                    assert told(found) == "CREDENTIALS_MISSING"
                    assert told(found, served.key, method=GET_LOCKOUT) == "INVALID_FIELDS"

    def test_over_tls_keys_may_come_from_elsewhere(self, known: Known, tmp_path: Path) -> None:
        address = other_address()
        if address is None:
            pytest.skip("this machine has no address but loopback, so no call can come from another one")
        names, off = (
            [x509.IPAddress(ip_address(address))],
            {"tls_client_certificates": "off", "tls_client_ca_file": None},
        )
        with serving(known, tmp_path, names=names, grpc_host="0.0.0.0", bcrypt_cost=10, **off) as served:
            with channel(served.port, served.ca.certificate_pem, host=address) as found:
                assert told(found, served.key, method=GET_LOCKOUT) == "INVALID_FIELDS"
                assert told(found) == "CREDENTIALS_MISSING"
