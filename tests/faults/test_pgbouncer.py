"""A PgBouncer in transaction mode in front of the database: each transaction may run on another connection."""

import uuid

from sqlalchemy.engine import URL

from personae.v1 import audit_pb2, user_pb2
from personae.v1 import credential_pb2 as pb
from service.rpc.methods import ALL_SCOPES
from service.server.sweeper import make_audit_months
from tests.support.callers import bearer, operating, told
from tests.support.credentials import NEW, signing_in
from tests.support.databases import run
from tests.support.factories import PASSWORD, creation, new_user, unique_name
from tests.support.pgbouncer import running_pgbouncer
from tests.support.servers import running
from tests.support.threads import at_once

CALLERS = 12


def test_everything_works_through_it(private_url: URL) -> None:
    """For many callers on three connections. No setting of a transaction remains for the next one."""
    with running_pgbouncer(private_url, servers=3) as url, running(url) as server:

        def use(_: int) -> str:
            user, name = new_user(server.users, password=PASSWORD), unique_name()
            for _ in range(5):
                assert server.read(user) == user
            assert signing_in(server, user, PASSWORD) == "OK"
            assert signing_in(server, user, "wrong") == "INVALID_CREDENTIALS"
            server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))
            server.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))
            assert server.update(user, username=name).username == name
            created = creation(request_id=str(uuid.uuid4()))
            assert server.users.CreateUser(created).id == server.users.CreateUser(created).id
            return signing_in(server, user, NEW)

        assert at_once(CALLERS, use) == ["OK"] * CALLERS
        assert len(server.users.ListUsers(user_pb2.ListUsersRequest(page_size=100)).users) == 2 * CALLERS
        assert server.audit.ListAuditEvents(audit_pb2.ListAuditEventsRequest(page_size=10)).events
        make_audit_months(server.database)
        assert server.sweep().keys() >= {"purged_users", "dropped_audit_months"}
        assert [run(url, "SHOW statement_timeout") for _ in range(10)] == [[("0",)]] * 10


def test_callers_are_read_through_it(private_url: URL) -> None:
    """As without PgBouncer."""
    with running_pgbouncer(private_url, servers=3) as url, operating(url) as operator:
        key = operator.create_with_key(*ALL_SCOPES)
        with running(url, caller_auth="required", caller_cache_seconds=0.2) as server:
            assert told(server.channel, bearer(key)) == "OK"
