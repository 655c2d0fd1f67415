"""The answers of the HTTP port, without a network: documents, caches and refusals."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from wsgiref.types import WSGIApplication
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from service.base.errors import DatabaseUnavailableError
from service.http.app import CONFIGURATION_PATH, JWKS_PATH, well_known

ISSUER = "https://id.example.com"
KEYS = b'{"keys":[{"kty":"EC","crv":"P-256","kid":"a"}]}'


@dataclass(frozen=True)
class Answer:
    status: str
    headers: dict[str, str]
    body: bytes


def ask(path: str, method: str = "GET", *, app: WSGIApplication | None = None, **variables: str) -> Answer:
    """What the application answers; that it keeps to the rules of WSGI (PEP 3333) is checked as well."""
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": ""}
    environ |= variables
    setup_testing_defaults(environ)
    told: list[tuple[str, dict[str, str]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Callable[[bytes], None]:
        assert len(dict(headers)) == len(headers)
        told.append((status, dict(headers)))
        return lambda _data: None

    answering = validator(app or well_known(ISSUER, lambda: KEYS))(environ, start_response)
    try:
        body = b"".join(answering)
    finally:
        answering.close()  # type: ignore[attr-defined]  # the validator insists on it
    ((status, found),) = told
    return Answer(status, found, body)


def test_the_keys() -> None:
    answer = ask(JWKS_PATH)

    assert (answer.status, answer.body) == ("200 OK", KEYS)
    assert {name: value for name, value in answer.headers.items() if name != "ETag"} == {
        "Content-Type": "application/jwk-set+json",
        "Content-Length": str(len(KEYS)),
        "Cache-Control": "public, max-age=300",
        "X-Content-Type-Options": "nosniff",
    }


def test_the_configuration() -> None:
    """What verifiers insist on, and no endpoint that does not exist."""
    answer = ask(CONFIGURATION_PATH)

    assert answer.status == "200 OK"
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "public, max-age=300"
    assert json.loads(answer.body) == {
        "issuer": ISSUER,
        "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
        "response_types_supported": ["none"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    }


@pytest.mark.parametrize("path", [JWKS_PATH, CONFIGURATION_PATH])
def test_the_head_of_an_answer(path: str) -> None:
    """HEAD: the headers of GET, and no body (RFC 9110, section 9.3.2)."""
    got, headed = ask(path), ask(path, "HEAD")

    assert (headed.status, headed.headers, headed.body) == (got.status, got.headers, b"")
    assert got.body


class TestCaching:
    def test_a_tag_is_strong_and_changes_with_the_keys(self) -> None:
        tag, other = (
            ask(JWKS_PATH).headers["ETag"],
            ask(JWKS_PATH, app=well_known(ISSUER, lambda: b"{}")).headers["ETag"],
        )

        assert tag != other
        assert tag == ask(JWKS_PATH).headers["ETag"]
        assert tag.startswith('"')

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', '"a,b" ,W/{},"c"', "*", ' W/"x",\t{} '])
    def test_what_the_client_has_is_not_sent_again(self, form: str, method: str) -> None:
        tag = ask(JWKS_PATH).headers["ETag"]
        answer = ask(JWKS_PATH, method, HTTP_IF_NONE_MATCH=form.format(tag))

        assert (answer.status, answer.body) == ("304 Not Modified", b"")
        assert answer.headers == {
            "ETag": tag,
            "Cache-Control": "public, max-age=300",
            "X-Content-Type-Options": "nosniff",
        }

    @pytest.mark.parametrize("form", ["", '"other"', "{bare}", '"{bare}', '"x{bare}"', "**", "W/", '"'])
    def test_what_the_client_has_not_is_sent(self, form: str) -> None:
        bare = ask(JWKS_PATH).headers["ETag"].strip('"')
        assert ask(JWKS_PATH, HTTP_IF_NONE_MATCH=form.format(bare=bare)).status == "200 OK"


class TestRefusals:
    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
    @pytest.mark.parametrize("path", ["", "/", "/authz", f"{JWKS_PATH}/", "/.well-known", "/.WELL-KNOWN/jwks.json"])
    def test_other_paths(self, path: str, method: str) -> None:
        answer = ask(path, method)

        assert answer.status == "404 Not Found"
        assert answer.body == (b"" if method == "HEAD" else b'{"error":"not_found"}')
        assert answer.headers["X-Content-Type-Options"] == "nosniff"

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
    def test_other_methods(self, method: str) -> None:
        answer = ask(JWKS_PATH, method)

        assert (answer.status, answer.headers["Allow"]) == ("405 Method Not Allowed", "GET, HEAD")
        assert "ETag" not in answer.headers

    @pytest.mark.parametrize("tag", ["", "*"])
    def test_keys_that_cannot_be_read_now(self, tag: str) -> None:
        """Nobody caches that; the configuration is answered all the same."""

        def unreadable() -> bytes:
            raise DatabaseUnavailableError

        app = well_known(ISSUER, unreadable)
        answer = ask(JWKS_PATH, app=app, HTTP_IF_NONE_MATCH=tag)

        assert (answer.status, answer.body) == ("503 Service Unavailable", b'{"error":"temporarily_unavailable"}')
        assert answer.headers["Retry-After"] == "1"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Type"] == "application/json"
        assert ask(CONFIGURATION_PATH, app=app).status == "200 OK"
