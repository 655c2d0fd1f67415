"""The contract is tested while time stands still, where it can be stopped: no lock ends in the middle of a test."""

import os
from collections.abc import Iterator

import pytest

from tests.support.servers import RunningServer


@pytest.fixture(autouse=True)
def _time_stands_still(request: pytest.FixtureRequest) -> Iterator[None]:
    if "TARGET" in os.environ:
        yield
        return
    server: RunningServer = request.getfixturevalue("server")
    server.clock.stop()
    yield
    server.clock.go_on()
