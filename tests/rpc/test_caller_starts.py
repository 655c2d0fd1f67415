"""Warnings at start about the authentication of callers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import structlog
from sqlalchemy.engine import URL

from personae.v1 import audit_pb2, audit_pb2_grpc, user_pb2_grpc
from service.base.settings import SettingsError, load_settings
from tests.dev.servers import forget
from tests.support.callers import connected, operating, told
from tests.support.databases import ROOT, libpq_url
from tests.support.factories import new_user
from tests.support.processes import Process, inherited, process
from tests.support.servers import KEY, running

NOT_ASKED, NOBODY = "callers are not authenticated", "no caller has a valid key or identity"


def warnings(server: Process) -> list[dict[str, object]]:
    """The warnings of a process, which must end without an error."""
    assert server.end() == 0
    server.close()
    lines = [orjson.loads(line) for line in server.lines if line.startswith("{")]
    return [line for line in lines if line["level"] == "warning"]


class TestServe:
    @pytest.mark.parametrize("setting", ["Required", ""])
    def test_requires_authentication_by_default(self, private_url: URL, setting: str) -> None:
        """It warns if no caller has a valid key or identity."""
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
            # Its clock stands still, so a server that takes long to start warns of a clock that differs.
            assert NOBODY not in [entry["event"] for entry in log]

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


class TestDev:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[Path]:
        yield tmp_path / "dev"
        forget(tmp_path / "dev")

    def test_requires_authentication_only_if_configured(self, directory: Path) -> None:
        """`make run` attributes all calls to `local`; with CALLER_AUTH=required a key is needed."""
        settings = {"DEV_DATA_DIR": str(directory)}
        with process("dev", **settings, CALLER_AUTH="") as server:
            with connected(f"127.0.0.1:{server.port}") as channel:
                user = new_user(user_pb2_grpc.UserServiceStub(channel))
                trail = audit_pb2_grpc.AuditServiceStub(channel).ListAuditEvents(audit_pb2.ListAuditEventsRequest())
            [warning] = warnings(server)
        assert (warning["event"], warning["all_are"]) == (NOT_ASKED, "local")
        assert [event.caller for event in trail.events if event.user_id == user.id] == ["local"]

        with process("dev", **settings, CALLER_AUTH="required") as server:
            with connected(f"127.0.0.1:{server.port}") as channel:
                assert told(channel) == "CREDENTIALS_MISSING"
                command = [sys.executable, "-m", "service", "callers", "create", "me", "--all-scopes"]
                environment = inherited() | settings | {"CALLER_AUTH": "", "SECRET_KEYS": KEY}
                key = subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip()
                assert told(channel, f"Bearer {key}") == "OK"
            assert [warning["event"] for warning in warnings(server)] == [NOBODY]
