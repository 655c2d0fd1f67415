"""What the log says at start about the authentication of callers."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import orjson
import pytest
import structlog
from sqlalchemy.engine import URL

from personae.v1 import audit_pb2, audit_pb2_grpc, user_pb2_grpc
from service.base.settings import SettingsError, load_settings
from tests.dev.servers import forget
from tests.support.callers import PATIENCE, connected, operating, told
from tests.support.databases import ROOT, libpq_url
from tests.support.factories import new_user
from tests.support.processes import Process, process
from tests.support.servers import KEY, running
from tests.support.witness import WITNESS

NOT_ASKED, NOBODY = "callers are not authenticated", "nobody can call yet"


def warnings(server: Process) -> list[dict[str, object]]:
    """The warnings of a process, which must end without an error."""
    assert server.end() == 0
    server.close()
    lines = [orjson.loads(line) for line in server.lines if line.startswith("{")]
    return [line for line in lines if line["level"] == "warning"]


class TestServe:
    @pytest.mark.parametrize("setting", ["Required", ""])
    def test_requires_authentication_by_default(self, private_url: URL, setting: str) -> None:
        """And warns while no caller can be identified."""
        with process("serve", DATABASE_URL=libpq_url(private_url), CALLER_AUTH=setting) as server:
            with connected(f"127.0.0.1:{server.port}") as channel:
                assert told(channel) == "CREDENTIALS_MISSING"
            [warning] = warnings(server)
        assert warning["event"] == NOBODY
        assert "callers create" in str(warning["remedy"])

    def test_does_not_warn_when_a_caller_exists(self, private_url: URL) -> None:
        for identities in ([], ["web.internal"]):
            with operating(private_url) as operator, structlog.testing.capture_logs() as log:
                name = operator.create(identities=identities)
                if not identities:
                    operator.add_key(name)
                with running(private_url, caller_auth="required"):
                    pass
            assert [entry["event"] for entry in log if entry["log_level"] == "warning"] == []

    def test_off_must_be_explicit_and_is_logged(self, private_url: URL) -> None:
        """All calls are attributed to one caller, which the audit trail names."""
        with process("serve", DATABASE_URL=libpq_url(private_url), CALLER_AUTH="OFF") as server:
            with connected(f"127.0.0.1:{server.port}") as channel:
                user = new_user(user_pb2_grpc.UserServiceStub(channel))
                trail = audit_pb2_grpc.AuditServiceStub(channel).ListAuditEvents(audit_pb2.ListAuditEventsRequest())
            [warning] = warnings(server)
        assert (warning["event"], warning["all_are"], warning["why"]) == (NOT_ASKED, "anonymous", "CALLER_AUTH=off")
        assert [(event.caller, event.user_id) for event in trail.events] == [("anonymous", user.id)]

    @pytest.mark.parametrize("value", ["0", "0.09", "-1", "60.1", "nan", "inf", "soon"])
    def test_a_cache_age_out_of_range(self, value: str) -> None:
        with pytest.raises(SettingsError, match="CALLER_CACHE_SECONDS"):
            load_settings(_env_file=None, caller_cache_seconds=value)


@dataclass
class Developer:
    """A developer on a machine without a database."""

    directory: Path
    log: list[dict[str, object]] = field(default_factory=list)

    def environment(self, caller_auth: str = "") -> dict[str, str]:
        found = {"PATH": os.environ["PATH"], "DEV_DATA_DIR": str(self.directory), "GRPC_PORT": "0"}
        found |= {name: os.environ[name] for name in ("PG_BINDIR", "LD_LIBRARY_PATH") if name in os.environ}
        return found | {"CALLER_AUTH": caller_auth, "LOG_FORMAT": "json", "SECRET_KEYS": KEY}

    @contextlib.contextmanager
    def running(self, caller_auth: str) -> Iterator[grpc.Channel]:
        """The server of `make run`. Its standard output shows an email and is not part of the log."""
        with subprocess.Popen(
            [sys.executable, "-m", "service", "dev"],
            cwd=ROOT,
            env=self.environment(caller_auth),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            bufsize=0,  # what was read beyond a line would be lost to `communicate`
        ) as server:
            try:
                with connected(f"127.0.0.1:{self._port(server)}") as channel:
                    yield channel
            finally:
                server.terminate()
                try:
                    self._hear(server.communicate(timeout=PATIENCE)[1])
                finally:
                    server.kill()
        assert server.returncode == 0

    def create_caller(self) -> str:
        command = [sys.executable, "-m", "service", "callers", "create", "me", "--all-scopes"]
        done = subprocess.run(command, cwd=ROOT, env=self.environment(), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    @property
    def warnings(self) -> list[dict[str, object]]:
        return [line for line in self.log if line["level"] == "warning"]

    def _port(self, server: "subprocess.Popen[bytes]") -> int:
        assert server.stderr is not None
        self.log.clear()
        while not self.log or self.log[-1]["event"] != "listening":
            line = server.stderr.readline()
            assert line, self.log
            self._hear(line)
        return int(str(self.log[-1]["port"]))

    def _hear(self, lines: bytes) -> None:
        WITNESS.hear(lines.decode())
        self.log += [orjson.loads(line) for line in lines.splitlines()]


class TestDev:
    @pytest.fixture
    def developer(self, tmp_path: Path) -> Iterator[Developer]:
        yield Developer(tmp_path / "dev")
        forget(tmp_path / "dev")

    def test_requires_authentication_only_when_told_to(self, developer: Developer) -> None:
        """`make run`: all calls are attributed to `local`. With CALLER_AUTH=required a key is needed, which the
        next command creates.
        """
        with developer.running("") as channel:
            user = new_user(user_pb2_grpc.UserServiceStub(channel))
            trail = audit_pb2_grpc.AuditServiceStub(channel).ListAuditEvents(audit_pb2.ListAuditEventsRequest())
        [warning] = developer.warnings
        assert (warning["event"], warning["all_are"]) == (NOT_ASKED, "local")
        assert [(event.caller, event.user_id) for event in trail.events] == [("local", user.id)]

        with developer.running("required") as channel:
            assert told(channel) == "CREDENTIALS_MISSING"
            assert told(channel, f"Bearer {developer.create_caller()}") == "OK"
        assert [warning["event"] for warning in developer.warnings] == [NOBODY]
