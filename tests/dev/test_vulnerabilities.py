"""The audit of dependencies: with a finding, without one, and without an answer."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest

from service.dev import vulnerabilities
from service.observability.wsgi_server import WsgiServer
from tests.support.scrapes import free_port

LOCK = "alembic==1.20.1 \\\n    --hash=sha256:00\n    # via personae\nuvicorn[standard]==0.30 ; python_version > '3'\n"
ROOT = Path(__file__).resolve().parents[2]


def audited(tmp_path: Path, answer: Callable[[int], bytes], status: str = "200 OK") -> int:
    """The exit code with a service that answers like this, given the number of queries."""

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        start_response(status, [("Content-Type", "application/json")])
        return [answer(len(json.loads(body)["queries"]))]

    lock = tmp_path / "some.lock"
    lock.write_text(LOCK)
    server = WsgiServer(serve, "127.0.0.1", 0)
    try:
        return vulnerabilities.main([str(lock)], f"http://127.0.0.1:{server.port}/")
    finally:
        server.close()


@pytest.mark.parametrize(
    "vulnerabilities, code, printed",
    [({}, 0, "2 packages, 0 known"), ({"vulns": [{"id": "GHSA-x"}]}, 1, "alembic 1.20.1: GHSA-x")],
)
def test_a_finding_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vulnerabilities: object, code: int, printed: str
) -> None:
    def answer(queries: int) -> bytes:
        return json.dumps({"results": [vulnerabilities, *[{}] * (queries - 1)]}).encode()

    assert audited(tmp_path, answer) == code
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer, status",
    [(b"", "500 Internal Server Error"), (b"<html>", "200 OK"), (b"{}", "200 OK"), (b'{"results": []}', "200 OK")],
)
def test_no_answer_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: bytes, status: str) -> None:
    """With a message: a service that is down fails no build."""
    assert audited(tmp_path, lambda _: answer, status) == 0
    assert "SKIPPED" in capsys.readouterr().out


def test_no_network_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert vulnerabilities.main([], f"http://127.0.0.1:{free_port()}/") == 0
    assert "SKIPPED" in capsys.readouterr().out


def test_every_pin_of_the_project_is_read() -> None:
    for lock in (ROOT / "requirements").glob("*.lock"):
        assert len(vulnerabilities.pins([lock])) == lock.read_text().count("==") - lock.read_text().count(" == ")
