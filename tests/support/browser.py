"""A headless Chromium with a virtual authenticator, driven by the DevTools protocol over pipes."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None
)
"""Debian's package chromium-headless-shell is the smallest of them."""
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Page:
    """A page whose authenticator verifies the person and consents without asking."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._ids = itertools.count(1)
        self._heard = b""
        self._session: str | None = None
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.command("Page.enable")
        self.command("WebAuthn.enable")
        options = {"protocol": "ctap2", "transport": "internal", "hasResidentKey": True, "hasUserVerification": True}
        options |= {"isUserVerified": True, "automaticPresenceSimulation": True}
        self._authenticator = self.command("WebAuthn.addVirtualAuthenticator", options=options)["authenticatorId"]

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Evaluate an expression, which may be a promise. Raises AssertionError with the exception that it throws."""
        answer = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"]["description"]
        return answer["result"].get("value")

    def verifies(self, *, is_verified: bool) -> None:
        """Set whether the authenticator verifies the person from now on."""
        self.command("WebAuthn.setUserVerified", authenticatorId=self._authenticator, isUserVerified=is_verified)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._heard:
            heard = os.read(self._from, 1 << 16)
            assert heard, "the browser has ended"
            self._heard += heard
        message, self._heard = self._heard.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """Start a browser with an empty profile."""
    assert PROGRAM is not None
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    # The protocol is spoken on the descriptors 3 and 4.
    command = f'exec "$0" "$@" 3<&{their_in} 4>&{their_out}'
    arguments = [*_FLAGS, f"--user-data-dir={profile}"]
    with subprocess.Popen(
        ["bash", "-c", command, PROGRAM, *arguments], pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL
    ) as process:
        os.close(their_in)
        os.close(their_out)
        try:
            yield Page(our_out, our_in)
        finally:
            process.terminate()
            os.close(our_out)
            os.close(our_in)
