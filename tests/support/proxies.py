"""Asks for authorization checks as Envoy and nginx do, and reads the answers."""

from dataclasses import dataclass, field
from typing import Any

from service.rpc.envoy import ext_authz_pb2 as pb
from tests.support.scrapes import get
from tests.support.servers import Services

OVERWRITE = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
NO_CREDENTIAL = "Bearer"
INVALID = 'Bearer error="invalid_token"'


@dataclass(frozen=True)
class Told:
    """The answer to a proxy: a status, headers to set, and headers to remove."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


REFUSED = Told(401, {"www-authenticate": INVALID})
NOBODY = Told(401, {"www-authenticate": NO_CREDENTIAL})
MISCONFIGURED = Told(500)
SAID = {"x-user-id", "x-session-id", "x-auth-acr", "x-user-roles", "authorization", "cookie", "www-authenticate"}
"""The headers of an answer of /authz that depend on the request."""


def insufficient(**parameters: str) -> Told:
    """RFC 9470, 3."""
    asked = "".join(f', {name}="{value}"' for name, value in parameters.items())
    return Told(401, {"www-authenticate": f'Bearer error="insufficient_user_authentication"{asked}'})


def checking(token: str | None = None, /, *, headers: dict[str, str] | None = None, **route: str) -> pb.CheckRequest:
    """A CheckRequest with this bearer token and these headers, for a route with these settings."""
    sent = {} if token is None else {"authorization": f"Bearer {token}"}
    return asking(sent | (headers or {}), {f"personae.{name}": value for name, value in route.items()})


def asking(headers: dict[str, str], extensions: dict[str, str]) -> pb.CheckRequest:
    request = pb.CheckRequest()
    request.attributes.request.http.headers.update(headers)
    request.attributes.context_extensions.update(extensions)
    return request


def raw(*headers: tuple[str, bytes], **route: str) -> pb.CheckRequest:
    """A CheckRequest as Envoy sends it with encode_raw_headers."""
    request = asking({}, {f"personae.{name}": value for name, value in route.items()})
    for name, value in headers:
        request.attributes.request.http.header_map.headers.add(key=name, raw_value=value)
    return request


def check(server: Services, token: str | None = None, /, **asked: Any) -> Told:
    return told(server, checking(token, **asked))


def told(server: Services, request: pb.CheckRequest) -> Told:
    """Call Check. Its headers must replace those of the client, and none may be both set and removed."""
    answer = server.proxies.Check(request)
    kind = answer.WhichOneof("http_response")
    assert (answer.status.code == 0) == (kind == "ok_response")
    response = answer.ok_response if kind == "ok_response" else answer.denied_response
    assert {one.append_action for one in response.headers} <= {OVERWRITE}
    headers = {one.header.key: one.header.value for one in response.headers}
    assert len(headers) == len(response.headers)
    if kind != "ok_response":
        return Told(answer.denied_response.status.code, headers)
    removed = tuple(answer.ok_response.headers_to_remove)
    assert not set(removed) & set(headers)  # Envoy removes last
    return Told(200, headers, removed)


def authz(port: int, query: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Ask as nginx does. Returns the status, the headers in SAID, and the body. headers: with _ for -."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    status, found, body = get(port, f"/authz{query}", **sent)
    assert found["Cache-Control"] == "no-store"
    told = {name.lower() for name in found} & SAID
    return status, {name: found[name] for name in told}, body
