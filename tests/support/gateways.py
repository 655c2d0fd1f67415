"""Envoy, nginx and Caddy with the configurations of deploy/, in front of a small service that echoes requests."""

import contextlib
import http.client
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any, Self

import orjson
import pytest
import yaml

from tests.support.databases import ROOT
from tests.support.envoy import running_envoy
from tests.support.scrapes import free_port
from tests.support.waiting import PATIENCE, eventually

IDENTITY = ("x-user-id", "x-session-id", "x-auth-acr", "x-user-roles")
AUDIENCE = "orders"
ISSUER = "https://id.example.com"
"""Both as the configurations have them."""


class _Service(BaseHTTPRequestHandler):
    """Answers with the request as it was received."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        received = {"path": self.path, "headers": [(name.lower(), value) for name, value in self.headers.items()]}
        body = orjson.dumps(received)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def service() -> Iterator[int]:
    """The port of the service behind the proxy."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True)
class Through:
    """The answer to a client, and the headers that the service has received; None: it has received nothing."""

    status: int
    challenge: str | None
    """WWW-Authenticate."""
    received: Mapping[str, str] | None = field(repr=False)
    path: str | None = None
    """The path that the service has received."""

    @property
    def identity(self) -> dict[str, str] | None:
        """The identity headers that the service has received."""
        return (
            None if self.received is None else {name: self.received[name] for name in IDENTITY if name in self.received}
        )


def through_of(answer: http.client.HTTPResponse) -> Through:
    """Parse the answer of the service, or of the proxy."""
    body = answer.read()
    received, seen_path = None, None
    if answer.status == http.client.OK:
        pairs, seen_path = (orjson.loads(body)[name] for name in ("headers", "path"))
        received = dict(pairs)
        assert len([name for name, _ in pairs if name in IDENTITY]) == len(set(received) & set(IDENTITY))
    return Through(answer.status, answer.headers["WWW-Authenticate"], received, seen_path)


class Client:
    """A client of the proxy with one connection, which reconnects when the proxy has closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(self, path: str, token: str | None = None, **headers: str) -> Through:
        """headers: with _ for -, and __ for _."""
        sent = {name.replace("__", "\0").replace("_", "-").replace("\0", "_"): value for name, value in headers.items()}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        self._connection.request("GET", path, headers=sent)
        return through_of(self._connection.getresponse())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Personae:
    """The addresses of Personae for the proxy. http: 0: none."""

    grpc: int
    http: int
    ca: Path
    key: str = field(repr=False)


Change = Callable[[dict[str, Any]], None]


def envoy_configuration(personae: Personae, service_port: int) -> dict[str, Any]:
    """deploy/envoy/envoy.yaml with the addresses and timeouts of the tests."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    resources = config["static_resources"]
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    ports = {"personae": personae.grpc, "personae_http": personae.http, "orders": service_port}
    for cluster in resources["clusters"]:
        [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"] = {
            "address": "127.0.0.1",
            "port_value": ports[cluster["name"]],
        }
        cluster["type"] = "STATIC"
        cluster["connect_timeout"] = f"{PATIENCE}s"
        if "transport_socket" in cluster:
            tls = cluster["transport_socket"]["typed_config"]
            tls["common_tls_context"]["validation_context"]["trusted_ca"]["filename"] = str(personae.ca)
    ext_authz(config)["grpc_service"]["timeout"] = f"{PATIENCE}s"
    return config


def ext_authz(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the ext_authz filter, to change it."""
    [found] = [one["typed_config"] for one in filters_of(config) if one["name"] == "envoy.filters.http.ext_authz"]
    return found  # type: ignore[no-any-return]


def filters_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The HTTP filters, to change them."""
    found: list[dict[str, Any]] = manager_of(config)["http_filters"]
    return found


def manager_of(config: dict[str, Any]) -> dict[str, Any]:
    listener = config["static_resources"]["listeners"][0]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


@contextlib.contextmanager
def envoy_before(personae: Personae, directory: Path, change: Change = lambda _: None) -> Iterator[int]:
    """Start Envoy as deploy/ configures it. Yields its port. change: edits the configuration."""
    with service() as service_port:
        config = envoy_configuration(personae, service_port)
        change(config)
        with running_envoy(directory, config, PERSONAE_KEY=personae.key) as envoy:
            yield envoy.port


@contextlib.contextmanager
def nginx_before(personae: Personae, directory: Path) -> Iterator[int]:
    """Start nginx as deploy/ configures it. Yields its port. Skips the test if nginx is not installed."""
    program = _program("nginx")
    with service() as service_port:
        port = free_port()
        configuration = _changed(
            "nginx/nginx.conf",
            ("server personae:8080", f"server 127.0.0.1:{personae.http}"),
            ("server orders:8080", f"server 127.0.0.1:{service_port}"),
            ("listen 8000", f"listen 127.0.0.1:{port}"),
            ("http {", f"http {{ access_log off; {_temporary(directory)}"),
        )
        (directory / "nginx.conf").write_text(configuration)
        asking = (ROOT / "deploy/nginx/personae.conf").read_text()
        asking, timeouts = re.subn(r"(proxy_\w+_timeout) \w+;", rf"\1 {PATIENCE}s;", asking)
        assert timeouts == 3
        (directory / "personae.conf").write_text(asking)
        shutil.copy(personae.ca, directory / "personae-ca.pem")
        (directory / "personae-key.conf").write_text(f"proxy_set_header Personae-Key {personae.key};\n")
        # As the user of the tests, who owns the directory.
        options = f"daemon off; master_process off; pid {directory}/pid; error_log {directory}/log;"
        command: list[str | Path] = [
            program,
            "-p",
            directory,
            "-c",
            "nginx.conf",
            "-e",
            directory / "log",
            "-g",
            options,
        ]
        with _listening(command, port):
            yield port


@contextlib.contextmanager
def caddy_before(personae: Personae, directory: Path) -> Iterator[int]:
    """Start Caddy as deploy/ configures it. Yields its port. Skips the test if Caddy is not installed."""
    program = _program("caddy")
    with service() as service_port:
        port = free_port()
        configuration = _changed(
            "caddy/Caddyfile",
            ("https://personae:8080", f"https://127.0.0.1:{personae.http}"),
            ("orders:8080", f"127.0.0.1:{service_port}"),
            ("http://:8000 {", f"http://:{port} {{\nbind 127.0.0.1"),
            ("file personae-ca.pem", f"file {personae.ca}"),
            ("dial_timeout 250ms", f"dial_timeout {PATIENCE}s"),
            ("response_header_timeout 1s", f"response_header_timeout {PATIENCE}s"),
        )
        (directory / "Caddyfile").write_text(configuration)
        command: list[str | Path] = [program, "run", "--config", directory / "Caddyfile"]
        with _listening(command, port, PERSONAE_KEY=personae.key, HOME=str(directory)):
            yield port


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _changed(file: str, *changes: tuple[str, str]) -> str:
    """A configuration of deploy/ with these changes, each in one place."""
    text = (ROOT / "deploy" / file).read_text()
    for before, after in changes:
        assert text.count(before) == 1
        text = text.replace(before, after)
    return text


@contextlib.contextmanager
def _listening(command: list[str | Path], port: int, **environment: str) -> Iterator[None]:
    """Run a proxy that listens on this port."""
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: _listens(running, port), "the proxy listens")
        yield
    finally:
        running.terminate()
        running.wait(PATIENCE)


def _temporary(directory: Path) -> str:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)


def _listens(running: "subprocess.Popen[bytes]", port: int) -> bool:
    assert running.poll() is None
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def in_clear_text(config: dict[str, Any]) -> None:
    """Let Envoy connect to Personae without TLS."""
    for cluster in config["static_resources"]["clusters"]:
        cluster.pop("transport_socket", None)


class Requests:
    """Threads that send one request after another through a proxy until the block ends."""

    def __init__(self, port: int, path: str, token: str, *, threads: int = 4) -> None:
        self.statuses: Counter[int] = Counter()
        """The number of requests by status."""
        self._changed = Condition()
        self._is_over = Event()
        self._threads = [Thread(target=self._work, args=(port, path, token)) for _ in range(threads)]
        self._failures: list[BaseException] = []

    def wait_for(self, more: int, *, status: int = http.client.OK) -> None:
        """Wait until this many more requests have got this status."""
        with self._changed:
            wanted = self.statuses[status] + more
            assert self._changed.wait_for(lambda: self.statuses[status] >= wanted or self._failures, PATIENCE)
            assert not self._failures

    def _work(self, port: int, path: str, token: str) -> None:
        try:
            with Client(port) as client:
                while not self._is_over.is_set():
                    status = client.ask(path, token).status
                    with self._changed:
                        self.statuses[status] += 1
                        self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  for the thread of the test
            with self._changed:
                self._failures.append(error)
                self._changed.notify_all()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not self._failures
