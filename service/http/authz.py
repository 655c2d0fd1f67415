"""GET /authz: may this request pass? For proxies that ask over HTTP.

The proxy sends the headers of the request, names its route by the query, and proves who it is by an API key. It gets
200, with who the person is; 401, with what a client has to do; or 5xx, with which it must let nothing pass.
"""

from collections.abc import Callable, Iterable
from urllib.parse import parse_qsl
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import orjson

from service.observability.cpu_share import exempt_from_throttling
from service.rpc.proxies.forward_auth import READ_HEADERS, HttpCheckRequest, HttpCheckResponse

AUTHZ_PATH = "/authz"
_METHODS = ("GET", "HEAD")
_VARIABLES = {name: "HTTP_" + name.upper().replace("-", "_") for name in READ_HEADERS}


def with_authz(others: WSGIApplication, ask: Callable[[HttpCheckRequest], HttpCheckResponse]) -> WSGIApplication:
    """Make the application that answers this path, and leaves all others to another application."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != AUTHZ_PATH:
            return others(environ, start_response)
        method = environ["REQUEST_METHOD"]
        if method not in _METHODS:
            start_response("405 Method Not Allowed", [("Allow", ", ".join(_METHODS)), ("Content-Length", "0")])
            return []
        found = ask(_question(environ))
        if found.is_authenticated:
            exempt_from_throttling()
        body = b"" if found.reason is None else orjson.dumps({"error": found.reason})
        headers = [("-".join(map(str.capitalize, name.split("-"))), value) for name, value in found.headers]
        headers += [("Cache-Control", "no-store"), ("Content-Length", str(len(body)))]
        if body:
            headers.append(("Content-Type", "application/json"))
        start_response(f"{found.status.value} {found.status.phrase}", headers)
        return [] if method == "HEAD" else [body]

    return answer


def _question(environ: WSGIEnvironment) -> HttpCheckRequest:
    headers = {name: environ[variable] for name, variable in _VARIABLES.items() if variable in environ}
    address, port = environ.get("REMOTE_ADDR", ""), environ.get("REMOTE_PORT", "")
    peer = f"ipv6:[{address}]:{port}" if ":" in address else f"ipv4:{address}:{port}"
    query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    return HttpCheckRequest(headers, query, peer)
