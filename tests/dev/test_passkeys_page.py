"""examples/passkeys in a real browser against a real server."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from tests.support.browser import PROGRAM, Page, browsing
from tests.support.credentials import rows_of
from tests.support.databases import ROOT
from tests.support.factories import PASSWORD
from tests.support.scrapes import free_port
from tests.support.servers import RunningServer, running

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")


@contextlib.contextmanager
def site(server: RunningServer, port: int) -> Iterator[str]:
    """The example, until the test ends; its address."""
    environment = os.environ | {"PERSONAE": server.address, "PORT": str(port), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, ROOT / "examples/passkeys/server.py"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@pytest.fixture
def page(private_url: URL, tmp_path: Path) -> Iterator[Page]:
    port = free_port()
    origins = f"http://localhost:{port}"
    with (
        running(private_url, webauthn_rp_id="localhost", webauthn_origins=origins) as server,
        site(server, port) as address,
        browsing(tmp_path / "profile") as found,
    ):
        found.open(address)
        yield found


def fill(page: Page) -> None:
    for name, value in (("username", "ada"), ("email", "ada@example.com"), ("password", PASSWORD)):
        page.run(f"document.querySelector('[name={name}]').value = {value!r}")


def test_a_passkey_is_made_and_used(page: Page, private_url: URL) -> None:
    """Sign up by a password, add a passkey; then it is the second factor, and the only step."""
    fill(page)
    assert page.run("act('signUp')") == {"username": "ada", "acr": "aal1"}
    assert len(page.run("act('addPasskey')")["recovery_codes"]) == 10
    assert page.run("act('signIn')") == {"username": "ada", "acr": "aal2"}
    assert page.run("act('usePasskey')") == {"username": "ada", "acr": "aal2"}
    [stored] = rows_of(private_url, "passkeys")
    assert stored["last_used_at"] is not None


def test_who_is_not_recognised_does_not_sign_in(page: Page) -> None:
    """The authenticator does not verify the person: the browser refuses before Personae has to."""
    fill(page)
    page.run("act('signUp')")
    page.run("act('addPasskey')")
    page.verifies(is_verified=False)
    with pytest.raises(AssertionError, match="NotAllowedError"):
        page.run("act('usePasskey')")
