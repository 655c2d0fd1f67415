"""What an operator may write into DATABASE_URL -> what is said, and the exit code. Never a part of a password."""

import contextlib
import io
import os
import re
import signal
import socketserver
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import orjson
import pytest
from click.testing import CliRunner
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.base.errors import DatabaseUnavailableError
from service.base.settings import psycopg2_url
from service.cli.main import main
from service.db import test_db as database_test
from service.server.wiring import open_database
from tests.support.callers import bearer, new_key, told
from tests.support.certificates import new_ca, server_certificate
from tests.support.commands import run_module
from tests.support.database_urls import AT, LOCAL, SECRETS, SETTINGS, TLS, P, Q, is_clean
from tests.support.databases import libpq_url
from tests.support.errors import fails
from tests.support.processes import process
from tests.support.servers import running, settings_for

DRIVER = [  # what only the driver refuses, or what it meets
    (f"{LOCAL}?sslmode=bogus", "The driver refuses the option sslmode"),
    (f"{LOCAL}?target_session_attrs=bogus", "The driver refuses the option target_session_attrs"),
    (f"{LOCAL}?gssencmode=bogus", "The driver refuses the option gssencmode"),
    (f"{LOCAL}?channel_binding=bogus", "The driver refuses the option channel_binding"),
    (f"{LOCAL}?ssl_min_protocol_version=bogus", "The driver refuses the option ssl_min_protocol_version"),
    (f"{LOCAL}?sslmode=require&sslrootcert=system", "The two sides do not agree on TLS"),
    (f"{LOCAL}?ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2", "do not agree on TLS"),
    (f"postgresql:///d?sslmode=verify-full&service=nosuch&password={P}", "The service of DATABASE_URL or PGSERVICE"),
    (f"postgresql://ada:{P}@localhost/d?hostaddr=x&sslmode=verify-full", "The host name in DATABASE_URL is not known"),
    (f"postgresql://ada:{P}@no-such-host.invalid/d?sslmode=verify-full", "The host name in DATABASE_URL is not known"),
    (f"postgresql:///d?host=/{'x' * 150}&password={P}", "The driver cannot use DATABASE_URL"),
    (f"postgresql://ada:{P}@/d?host=/dev/null", "no server behind that socket"),
    (f"postgresql://ada:{P}@255.255.255.255:1/d?sslmode=verify-full", "The network does not lead there"),
    *(
        (f"{LOCAL}?{accepted}", "Nothing listens there")
        for accepted in (
            *("client_encoding=utf8", "client_encoding=UTF-8", "client_encoding=unicode", "application_name=web"),
            *("connect_timeout=1", "connect_timeout=10"),
        )
    ),
    (LOCAL, "Nothing listens there"),
    (f" {LOCAL}\r\n", "Nothing listens there"),
    (LOCAL.replace("postgresql", "POSTGRES"), "Nothing listens there"),
    (f"postgresql://ada:{P}/,{Q}:?#@127.0.0.1:1/d", "Nothing listens there"),
    (f"postgresql://ada:{P}%40{Q}@[::1]:1/d", "::1, port 1"),
    (f"postgresql://ada:{P}@127.0.0.1:1,[::1]:2/d", "127.0.0.1:1 and ::1:2"),
    (f"postgresql://ada:{P}@/d?host=127.0.0.1,127.0.0.2&port=1", "127.0.0.1:1 and 127.0.0.2:1"),
    (f"postgresql://ada:{P}@%2Fnowhere%2Fpg:5433/d", "no server behind that socket"),
    (f"postgresql://ada:{P}@/d?host=/nowhere/pg", "d on /nowhere/pg, port 5432, as ada"),
    (f"postgresql:///d?user=ada&password={P}&host=127.0.0.1&port=1", "d on 127.0.0.1, port 1, as ada"),
]
SERVER = [  # what the server of the tests says
    ({"options": "-c nosuch=1"}, "The server refuses a parameter that the connection sets"),
    ({"options": "-z"}, "The server refuses a parameter that the connection sets"),
    ({"options": "-c geqo=x"}, "The server refuses a parameter that the connection sets"),
    ({"options": "-c port=1"}, "The server refuses a parameter that the connection sets"),
    ({"target_session_attrs": "read-only"}, "target_session_attrs in DATABASE_URL asks for a server that cannot be"),
    ({"require_auth": "gss"}, "The server does not offer what DATABASE_URL requires"),
]
TLS_SERVER = [  # what a server with a certificate for localhost meets
    ("127.0.0.1", "keepalives=abc", "The driver refuses the option keepalives"),
    (
        "127.0.0.1",
        "sslmode=verify-full&sslrootcert=/nowhere/ca.pem",
        "The CA certificates for the server's certificate",
    ),
    ("127.0.0.1", "sslmode=verify-full&sslrootcert={other}", "not signed by the CA of sslrootcert"),
    ("127.0.0.1", "sslmode=verify-full&sslrootcert={ca}", "The server's certificate is for another host name"),
    (
        "localhost",
        "sslmode=require&sslcert={ca}&sslkey=/nowhere/key",
        "The client certificate of DATABASE_URL cannot be",
    ),
]
ENVIRONMENT = [  # libpq's own variables beside the URL
    (LOCAL, {"PGHOST": "10.0.0.1", "PGPORT": "7"}, "Nothing listens there"),
    (LOCAL, {"PGHOSTADDR": "127.0.0.9"}, "PGHOSTADDR in the environment would lead elsewhere"),
    (LOCAL, {"PGSERVICE": "prod"}, "PGSERVICE in the environment would lead elsewhere"),
    (LOCAL, {"PGSSLMODE": "bogus"}, "The driver refuses the option sslmode"),
    (f"postgresql://ada:{P}@/d", {"PGHOST": "10.0.0.1"}, "PGHOST in the environment would lead elsewhere"),
    (f"postgresql://ada:{P}@/d?host=/nowhere", {"PGPORT": "7"}, "d on /nowhere, port 5432"),
    (LOCAL, {"MIGRATION_DATABASE_URL": f"{LOCAL}?schema=x"}, "MIGRATION_DATABASE_URL: the option schema"),
    (f"postgresql://ada:{P}@10.0.0.1:1/d", {"INSECURE_PLAINTEXT_DATABASE": "perhaps"}, "INSECURE_PLAINTEXT_DATABASE: "),
    ("", {}, "DATABASE_URL is not set"),
]


def db_test(url: str, **environment: str) -> tuple[int, str]:
    """The exit code of `python -m service.db.test_db`, and what it prints."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        for name, value in {"DATABASE_URL": url, **environment}.items():
            patch.setenv(name, value)
        return database_test.main(), printed.getvalue()


def verb(*arguments: str, **environment: str) -> tuple[int, str]:
    """A command as a process of its own, to its end."""
    return run_module(*arguments, environment=environment)


@pytest.fixture(autouse=True)
def _nothing_of_this_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.startswith("PG") or name in {"INSECURE_PLAINTEXT_DATABASE", "MIGRATION_DATABASE_URL"}:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # where there is no .env


@pytest.mark.parametrize("number", range(len(SETTINGS) + len(DRIVER)))
def test_the_database_test(number: int) -> None:
    """Says what is wrong and what to do, exits with 1, and shows nothing of a password."""
    url, words = [*SETTINGS, *DRIVER][number]

    code, printed = db_test(url)

    assert code == 1
    assert words in printed
    assert is_clean(printed)
    assert "what to do" in printed or re.search("DATABASE_URL(:| leads)", printed)


@pytest.mark.parametrize("number", range(len(ENVIRONMENT)))
def test_the_database_test_beside_other_variables(number: int) -> None:
    """A URL alone says where the database is."""
    url, variables, words = ENVIRONMENT[number]

    code, printed = db_test(url, **variables)

    assert (code, words in printed, is_clean(printed)) == (1, True, True), printed


@pytest.mark.parametrize("query, words", SERVER, ids=str)
def test_what_the_server_refuses(private_url: URL, query: dict[str, str], words: str) -> None:
    code, printed = db_test(libpq_url(private_url.update_query_dict(query)))

    assert (code, words in printed, "what to do" in printed) == (1, True, True), printed


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[str, Path]]]:
    """The port of a server that speaks TLS as PostgreSQL does, and no more; its CA, and another one."""
    directory, ca = tmp_path_factory.mktemp("tls"), new_ca()
    shown = server_certificate(ca, names=[x509.DNSName("localhost")])
    files = {"ca": ca.certificate_pem, "other": new_ca().certificate_pem, "server": shown.certificate_pem}
    for name, data in {**files, "key": shown.private_key_pem}.items():
        (directory / name).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server", directory / "key")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(8)  # SSLRequest
                self.request.sendall(b"S")
                context.wrap_socket(self.request, server_side=True).close()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1], {name: directory / name for name in files}
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host, query, words", TLS_SERVER)
def test_what_tls_refuses(tls_server: tuple[int, dict[str, Path]], host: str, query: str, words: str) -> None:
    port, files = tls_server

    code, printed = db_test(f"postgresql://ada:{P}@{host}:{port}/d?{query.format(**files)}")

    assert (code, words in printed, is_clean(printed)) == (1, True, True), printed


NOT_POSTGRESQL = [
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak as PostgreSQL does"),
    (b"J\0\0\0\n8.0", "does not speak as PostgreSQL does"),
    (bytes(64), "does not speak as PostgreSQL does"),
    (b"R\0\0\0\x08\0\0\0\x63", "does not speak as PostgreSQL does"),
    (b"Etoo many connections\n\0", "The connection fails"),
    (b"", "The server ended the connection"),
]


@pytest.mark.parametrize("answer, words", NOT_POSTGRESQL)
def test_what_is_no_postgresql(answer: bytes, words: str) -> None:
    """A web server, say, on that port: there is no server's log to look into."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(1024)
                self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        code, printed = db_test(f"postgresql://ada:{P}@127.0.0.1:{server.server_address[1]}/d?sslmode=disable")
        server.shutdown()
        thread.join()
    assert (code, words in printed, is_clean(printed)) == (1, True, True), printed


def test_what_the_url_says_of_the_connection_counts(shared_url: URL) -> None:
    """Its name and its timeout; DB_CONNECT_TIMEOUT is for a URL that says nothing. As in libpq 1 second means 2."""
    url = psycopg2_url(libpq_url(shared_url.update_query_dict({"application_name": "web", "client_encoding": "utf8"})))
    for found, name in ((url, "web"), (shared_url, "personae")):
        with open_database(settings_for(shared_url), found).scope() as session:
            assert session.scalar(text("SELECT current_setting('application_name')")) == name
            assert session.scalar(text("SHOW client_encoding")) == "UTF8"
    settings = settings_for(shared_url, db_connect_timeout=7)
    for query, seconds in (("", 7), ("?connect_timeout=30", 30), ("?connect_timeout=1", 2)):
        assert settings.connect_timeout(psycopg2_url(LOCAL + query)) == seconds


@given(
    st.lists(st.one_of(st.sampled_from(SECRETS), st.sampled_from("@/?#%:&,+=; []'\"\\\n\udcff")), max_size=8),
    st.booleans(),
)
def test_no_part_of_a_password_is_shown(parts: list[str], is_option: bool) -> None:
    """However it is written into the URL."""
    password = "".join(parts)
    url = (
        f"postgresql://127.0.0.1:1/d?password={password}" if is_option else f"postgresql://ada:{password}@127.0.0.1:1/d"
    )

    code, printed = db_test(url)

    assert (code, is_clean(printed)) == (1, True), printed


@pytest.mark.parametrize("words_of_verb", ["migrate", "serve", "dev", "callers list", "purge-deleted"])
def test_every_verb_refuses_the_same(words_of_verb: str) -> None:
    """With the same text, on standard error."""
    kept = signal.getsignal(signal.SIGHUP)
    for url, words in SETTINGS:
        done = CliRunner().invoke(main, words_of_verb.split(), env={"DATABASE_URL": url})
        assert (done.exit_code, words in done.stderr, is_clean(done.output)) == (1, True, True), done.output
    signal.signal(signal.SIGHUP, kept)  # which `serve` ignores


@pytest.mark.parametrize(
    "command, url, expected, words",
    [
        (("service.db.test_db",), f"postgresql://ada:{P}\udcff{Q}@127.0.0.1/d", 1, "not UTF-8"),
        (("service", "serve"), f"postgresql://ada:{P}\udcff{Q}@127.0.0.1/d", 1, "not UTF-8"),
        (("service", "migrate"), f"{LOCAL}?sslmode=bogus", 1, "The driver refuses the option sslmode"),
        (("service", "callers", "list"), f"{LOCAL}?sslmode=bogus", 1, "The driver refuses the option sslmode"),
        (("alembic", "current"), f"postgresql://ada:{P}@{Q}@127.0.0.1/d", 1, AT),
        (("alembic", "current"), f"{LOCAL}?sslmode=bogus", 1, "The driver refuses the option sslmode"),
    ],
)
def test_commands_as_processes(command: tuple[str, ...], url: str, expected: int, words: str) -> None:
    code, printed = verb(*command, DATABASE_URL=url)

    assert (code, words in printed, is_clean(printed)) == (expected, True, True), printed


def test_a_server_says_it_and_waits() -> None:
    """As with every database that cannot be used: it logs why, and its health is NOT_SERVING."""
    with process("serve", DATABASE_URL=f"{LOCAL}?sslmode=bogus") as server:
        logged = orjson.loads(server.wait_for("database cannot be used"))
        assert logged["problem"] == "The driver refuses the option sslmode"
        assert "DATABASE_URL" in logged["remedy"]
        assert server.end() == 0
        assert is_clean("\n".join(server.lines))


@pytest.mark.parametrize("query", ["sslmode=bogus", "target_session_attrs=bogus", "service=nosuch&sslmode=verify-full"])
def test_a_call_is_unavailable(query: str) -> None:
    """And never INTERNAL, with and without callers."""
    url = psycopg2_url(f"postgresql:///d?password={P}&{query}")
    with running(url) as server:
        failure = fails(server.users.ListUsers, user_pb2.ListUsersRequest())
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    with running(url, caller_auth="required") as server:
        assert told(server.channel, bearer(new_key())) == "DATABASE_UNAVAILABLE"


def test_an_option_that_the_driver_does_not_know_is_unavailable(shared_url: URL) -> None:
    """Also where it got past the settings."""
    database = open_database(settings_for(shared_url), shared_url.update_query_dict({"pgbouncer": "true"}))
    with pytest.raises(DatabaseUnavailableError), database.scope() as session:
        session.execute(text("SELECT 1"))


def test_a_reload_is_validated_as_a_start() -> None:
    """A new worker that would reach the database in clear text does not start, which ends the reload."""
    options = [word for name in ("number", "channel", "workers") for word in (f"--{name}", "0")]
    code, printed = verb(
        *("service", "worker", *options, "--kept", "{}", "--protection", "{}"),
        DATABASE_URL=f"postgresql://a:{P}@db.internal/d",
    )
    assert (code, TLS in printed, is_clean(printed)) == (os.EX_CONFIG, True, True), printed
