"""The HTTP answers for those who verify tokens and speak no gRPC (RFC 7517, RFC 8414, OpenID Connect Discovery).

    /.well-known/jwks.json              the public keys
    /.well-known/openid-configuration   where these are, as stock verifiers look for it

Both are public: there is no authentication.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import orjson

from service.base.errors import PersonaeError

JWKS_PATH = "/.well-known/jwks.json"
CONFIGURATION_PATH = "/.well-known/openid-configuration"
_CACHE_CONTROL = "public, max-age=300"
_ETAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')  # RFC 9110, section 8.8.3
_METHODS = ("GET", "HEAD")
_BUSY = orjson.dumps({"error": "temporarily_unavailable"})
_NOT_FOUND = orjson.dumps({"error": "not_found"})
_NOT_ALLOWED = orjson.dumps({"error": "method_not_allowed"})
_JSON = "application/json"

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Document:
    """What a path leads to."""

    content_type: str
    read: Callable[[], bytes]
    """Raises PersonaeError where it cannot be read now."""


def well_known(issuer: str, jwks: Callable[[], bytes]) -> WSGIApplication:
    """Make the application. issuer: the URL that tokens name. jwks: returns the JWK Set as JSON, and may raise
    PersonaeError.
    """
    configuration = _configuration(issuer)
    documents = {
        JWKS_PATH: Document("application/jwk-set+json", jwks),
        CONFIGURATION_PATH: Document(_JSON, lambda: configuration),
    }

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, headers, body = _answer(documents, environ)
        if status != "304 Not Modified":
            headers.append(("Content-Length", str(len(body))))
        start_response(status, [*headers, ("X-Content-Type-Options", "nosniff")])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


def _answer(documents: Mapping[str, Document], environ: WSGIEnvironment) -> tuple[str, Headers, bytes]:
    """The status, the headers and the body of a GET."""
    document = documents.get(environ["PATH_INFO"])
    if document is None:
        return "404 Not Found", [("Content-Type", _JSON)], _NOT_FOUND
    if environ["REQUEST_METHOD"] not in _METHODS:
        return "405 Method Not Allowed", [("Allow", ", ".join(_METHODS)), ("Content-Type", _JSON)], _NOT_ALLOWED
    try:
        body = document.read()
    except PersonaeError:
        busy = [("Retry-After", "1"), ("Cache-Control", "no-store"), ("Content-Type", _JSON)]
        return "503 Service Unavailable", busy, _BUSY
    etag = f'"{hashlib.sha256(body).hexdigest()}"'
    cached = [("Cache-Control", _CACHE_CONTROL), ("ETag", etag)]
    if _is_known(etag, environ.get("HTTP_IF_NONE_MATCH", "")):
        return "304 Not Modified", cached, b""
    return "200 OK", [*cached, ("Content-Type", document.content_type)], body


def _is_known(etag: str, if_none_match: str) -> bool:
    """Whether the client has the answer already, by weak comparison (RFC 9110, section 13.1.2)."""
    return if_none_match.strip() == "*" or etag in _ETAG.findall(if_none_match)


def _configuration(issuer: str) -> bytes:
    """What RFC 8414 and OpenID Connect Discovery require of a provider that has tokens to verify and no endpoints.

    Verifiers compare `issuer` and read `jwks_uri`; some insist on the lists that are required (Nimbus on the subject
    types), and go-oidc takes the algorithms from here. Clients get their tokens by gRPC: `none` is the response type
    that issues none, since a list may not be empty.
    """
    return orjson.dumps(
        {
            "issuer": issuer,
            "jwks_uri": issuer + JWKS_PATH,
            "response_types_supported": ["none"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        }
    )
