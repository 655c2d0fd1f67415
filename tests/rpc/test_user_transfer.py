"""Imports and exports: scopes, audit events, metrics, and streams."""

import uuid
from functools import partial
from typing import Any

import grpc
import pytest
from sqlalchemy import event
from sqlalchemy.engine import URL

from personae.v1 import user_pb2 as pb
from service.core.passwords import hash_password
from service.rpc.methods import ALL_SCOPES, EXPORT_HASHES_SCOPE
from tests.contract.test_user_transfer import CREATED, HASH, UPDATE, UPDATED, imported, read, reasons, run_import
from tests.rpc.test_access_line import line_of
from tests.support.callers import bearer, operating
from tests.support.credentials import OTHER, signing_in
from tests.support.databases import run
from tests.support.errors import fails, failure_of
from tests.support.factories import PASSWORD, get_request, new_user
from tests.support.leak_detector import DETECTOR
from tests.support.proxy import serving_through_a_proxy
from tests.support.scrapes import free_port, scrape, value
from tests.support.servers import BCRYPT_COST, RunningServer, Services, running
from tests.support.superusers import tiers
from tests.support.threads import at_once, outcomes
from tests.support.waiting import eventually

OTHER_HASH = hash_password(OTHER, BCRYPT_COST)
FILLED_AT_ONCE = 4000
"""Users: far more than the server can send before a NARROW client reads, by pages of one."""

NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384))
"""A client with these options takes less than a page before it reads."""


def fill(url: URL, count: int, *, start: int = 1) -> None:
    """Insert users whose names are numbered from `start`."""
    names = "'user' || n || '@example.com', 'user' || n"
    numbers = f"generate_series({start}, {start + count - 1})"
    run(url, f"INSERT INTO users (email, username) SELECT {names} FROM {numbers} AS n")


class TestWhoMay:
    def test_superusers_need_their_scope(self, private_url: URL) -> None:
        """An import without users.superuser replaces no superuser's password, even if it was never used."""
        with tiers(private_url) as found:
            row = imported(hashed_password=HASH)
            [first] = run_import(found.weak, row)
            found.strong.users.GrantSuperuser(pb.GrantSuperuserRequest(id=first.user_id))
            row.hashed_password = OTHER_HASH

            [weak] = run_import(found.weak, row, on_conflict=UPDATE)
            [strong] = run_import(found.strong, row, on_conflict=UPDATE)

            assert (reasons(weak), strong.outcome) == ({"email": "SCOPE_MISSING"}, UPDATED)
            assert signing_in(found.strong, read(found.strong, first), OTHER) == "OK"

    def test_hashes_need_their_scope(self, private_url: URL) -> None:
        """users.export alone exports no hash."""
        with operating(private_url) as operator, running(private_url, caller_auth="required") as server:
            keys = [operator.create_with_key(*scopes) for scopes in (ALL_SCOPES, ALL_SCOPES - {EXPORT_HASHES_SCOPE})]
            metadata = [(("authorization", bearer(key)),) for key in keys]

            def export(who: int, **fields: Any) -> list[Any]:
                return list(server.users.ExportUsers(pb.ExportUsersRequest(**fields), metadata=metadata[who]))

            for who, fields in ((0, {"include_hashes": True}), (0, {}), (1, {})):
                assert len(export(who, **fields)) == 1
            failure = fails(export, 1, include_hashes=True)
            assert (failure.reason, failure.error_metadata) == ("SCOPE_MISSING", {"scope": EXPORT_HASHES_SCOPE})
            assert (
                fails(lambda: list(server.users.ExportUsers(pb.ExportUsersRequest()))).reason == "CREDENTIALS_MISSING"
            )


class TestImport:
    def test_the_trail(self, private_server: RunningServer) -> None:
        """An event for each user with what was set; none for rows that changed nothing."""
        row = imported(hashed_password=HASH)
        results = run_import(private_server, row, imported(inactive=True), imported(email="x"))
        row.hashed_password = OTHER_HASH
        run_import(private_server, row, on_conflict=UPDATE)

        ids = [results[0].user_id, results[1].user_id]
        events = "SELECT target_user_id, changed_fields FROM audit_events ORDER BY id"
        assert run(private_server.url, events) == [
            (ids[0], ["email", "username", "password"]),
            (ids[1], ["email", "username", "is_active"]),
            (ids[0], ["password"]),
        ]

    def test_ids_that_are_taken(self, private_server: RunningServer) -> None:
        """Rows with ids ahead of the sequence were inserted before: the import skips these ids."""
        run(
            private_server.url,
            "INSERT INTO users (id, email, username) OVERRIDING SYSTEM VALUE"
            " SELECT n, n || '@example.org', 'other' || n FROM generate_series(2, 5) AS n",
        )

        results = run_import(private_server, *(imported() for _ in range(10)))

        assert {one.outcome for one in results} == {CREATED}
        assert not {one.user_id for one in results} & set(range(2, 6))

    def test_a_repeated_import_uses_no_ids(self, private_server: RunningServer) -> None:
        """The rows exist already."""
        rows = [imported() for _ in range(50)]
        run_import(private_server, *rows)

        for _ in range(3):
            run_import(private_server, *rows)

        assert new_user(private_server.users).id == 51

    def test_statements(self, private_url: URL) -> None:
        """A batch without conflicts is one INSERT, and one for its events."""
        with serving_through_a_proxy(private_url) as proxied:
            request = pb.ImportUsersRequest(users=[imported() for _ in range(500)])
            sent = proxied.sent_by(proxied.server.users.ImportUsers, request)

            assert sent == ["BEGIN", "INSERT", "INSERT", "COMMIT"]

    def test_a_batch_does_not_read_the_table(self, private_server: RunningServer) -> None:
        """Each name is looked up by an index, so that the time of a batch does not grow with the number of users."""
        fill(private_server.url, 4000)
        run(private_server.url, "ANALYZE users")
        plans: list[str] = []

        def explain(connection: Any, _cursor: object, statement: str, parameters: object, *_: object) -> None:
            if statement.startswith("INSERT INTO users"):
                with connection.connection.dbapi_connection.cursor() as cursor:
                    cursor.execute(f"EXPLAIN {statement}", parameters)
                    plans.append("\n".join(line for (line,) in cursor.fetchall()))

        event.listen(private_server.database.engine, "before_cursor_execute", explain)
        run_import(private_server, *(imported() for _ in range(500)))
        event.remove(private_server.database.engine, "before_cursor_execute", explain)

        [plan] = plans
        assert "using uq_users_email on users" in plan
        assert "Seq Scan" not in plan

    def test_rows_are_counted(self, private_url: URL) -> None:
        port = free_port()
        with running(private_url, metrics_port=port) as server:
            rows = [imported(), imported(), imported(email="x")]
            run_import(server, *rows, validate_only=True)
            assert value(scrape(port), "personae_imported_rows_total") == 0
            run_import(server, *rows)
            counted = scrape(port)

        found = {name: value(counted, "personae_imported_rows_total", outcome=name) for name in ("created", "refused")}
        assert found == {"created": 2, "refused": 1}

    def test_two_imports_of_the_same_rows(self, private_server: RunningServer) -> None:
        """At once, one in reverse order: no deadlock reaches a caller, and each user is created once."""
        rows = [imported() for _ in range(300)]
        batches = [rows, rows[::-1], rows[150:], rows[:150]]

        results: list[Any] = at_once(4, lambda index: run_import(private_server, *batches[index]))

        assert outcomes(results) == {"OK": 4}
        assert sum(one.outcome == CREATED for batch in results for one in batch) == 300

    def test_one_request_id_at_once(self, private_server: RunningServer) -> None:
        """All callers get the results of the first one."""
        rows = [imported() for _ in range(20)]
        request_id = "7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1"

        results: list[Any] = at_once(4, lambda _: run_import(private_server, *rows, request_id=request_id))

        assert all(one == results[0] for one in results)
        assert {one.outcome for one in results[0]} == {CREATED}

    def test_a_sign_in_at_the_same_moment(self, private_server: RunningServer) -> None:
        """Either the sign-in came first, and its password stays; or the import, and the old one is wrong."""
        for _ in range(10):
            row = imported(hashed_password=HASH)
            [first] = run_import(private_server, row)
            user = read(private_server, first)
            row.hashed_password = OTHER_HASH

            calls: list[Any] = [
                partial(signing_in, private_server, user, PASSWORD),
                partial(run_import, private_server, row, on_conflict=UPDATE),
            ]

            results: list[Any] = at_once(2, lambda index, calls=calls: calls[index]())  # type: ignore[misc]  # bound at once

            if results[1][0].outcome == UPDATED:
                assert signing_in(private_server, user, OTHER) == "OK"
            else:
                assert (results[0], reasons(results[1][0])) == ("OK", {"hashed_password": "PASSWORD_IN_USE"})
                assert signing_in(private_server, user, PASSWORD) == "OK"


class TestStream:
    def test_ends_itself_before_its_deadline(self, private_url: URL) -> None:
        """OK with a token, before RPC_TIMEOUT: the rest comes with the next call, nobody twice.

        There are always more users than this client was sent, so that only the time ends the stream. Where a machine
        stands still for the last fifth of the time, the stream fails: then it is read once more.
        """
        count = FILLED_AT_ONCE
        fill(private_url, count)
        with running(private_url, rpc_timeout=3) as server, grpc.insecure_channel(server.address, NARROW) as channel:
            users = Services(channel).users

            def stream() -> list[pb.ExportUsersResponse]:
                """All messages of one call; none when it failed by its deadline."""
                nonlocal count
                got = []
                try:
                    for message in users.ExportUsers(pb.ExportUsersRequest(page_size=1)):
                        got.append(message)
                        if count - len(got) < FILLED_AT_ONCE / 2:
                            fill(private_url, FILLED_AT_ONCE, start=count + 1)
                            count += FILLED_AT_ONCE
                except grpc.RpcError as error:
                    assert failure_of(error).reason == "DEADLINE_OVER"  # noqa: PT017  it may also not be raised
                    return []
                return got

            messages = eventually(stream, "a stream that ends itself")
            assert messages[-1].resume_token
        with running(private_url) as server:
            while token := messages[-1].resume_token:
                messages += server.users.ExportUsers(pb.ExportUsersRequest(page_size=1000, resume_token=token))

        ids = [entry.user.id for message in messages for entry in message.entries]
        assert ids == list(range(1, count + 1))

    @pytest.mark.parametrize("users", [3000, 1000], ids=["more pages", "last page"])
    def test_a_client_that_does_not_read(self, private_url: URL, users: int) -> None:
        """The stream holds no connection of the pool while it waits, and is cancelled. The log does not say OK."""
        fill(private_url, users)
        request_id = uuid.uuid4().hex

        def is_cancelled() -> bool:
            """By the line of this call: other servers of this process may log something as well."""
            return any(request_id in text and "CALLER_GONE" in text for text in DETECTOR.output)

        with running(private_url, db_pool_size=1, db_max_overflow=0, rpc_timeout=300) as server:
            with grpc.insecure_channel(server.address, NARROW) as channel:
                stream = Services(channel).users.ExportUsers(
                    pb.ExportUsersRequest(page_size=1000), metadata=(("x-request-id", request_id),)
                )
                user = server.users.ListUsers(pb.ListUsersRequest(page_size=1)).users[0]
                for _ in range(20):
                    assert server.users.GetUser(get_request(user)).id == user.id

                eventually(is_cancelled, "cancelled")
                with pytest.raises(grpc.RpcError) as caught:
                    list(stream)
                assert caught.value.code() == grpc.StatusCode.CANCELLED

    def test_a_connection_that_is_lost_between_two_pages(self, private_url: URL) -> None:
        """The page is read again, and the client does not notice."""
        fill(private_url, 30)
        with serving_through_a_proxy(private_url) as proxied:
            proxied.proxy.answer("users.id > 20", "57P01")
            messages = list(proxied.server.users.ExportUsers(pb.ExportUsersRequest(page_size=10)))

        assert [entry.user.id for message in messages for entry in message.entries] == list(range(1, 31))

    def test_a_database_that_is_away(self, private_url: URL) -> None:
        """The stream ends with the error; the client continues with the last token."""
        fill(private_url, 30)
        with serving_through_a_proxy(private_url) as proxied:
            proxied.proxy.answer("users.id > 20", "57P01", times=9)
            got: list[Any] = []
            stream = proxied.server.users.ExportUsers(pb.ExportUsersRequest(page_size=10))
            assert fails(lambda: got.extend(stream)).reason == "DATABASE_UNAVAILABLE"
            proxied.proxy.forgive()
            got += proxied.server.users.ExportUsers(pb.ExportUsersRequest(resume_token=got[-1].resume_token))

        assert [entry.user.id for message in got for entry in message.entries] == list(range(1, 31))

    def test_users_who_change_meanwhile(self, private_url: URL) -> None:
        """A user who exists from the start to the end is sent once, whatever is changed or created meanwhile."""
        fill(private_url, 300)
        with running(private_url) as server:
            ids: list[int] = []
            for message in server.users.ExportUsers(pb.ExportUsersRequest(page_size=10)):
                ids += [entry.user.id for entry in message.entries]
                server.users.UpdateUser(pb.UpdateUserRequest(user=pb.User(id=len(ids) + 1, username=f"new{len(ids)}")))
                new_user(server.users)

        assert ids[:300] == list(range(1, 301))
        assert len(set(ids)) == len(ids)

    def test_the_log_has_a_line(self, private_server: RunningServer) -> None:
        """As for any other call, when it ends."""
        fill(private_server.url, 3)
        line = line_of(lambda *a, **k: list(private_server.users.ExportUsers(*a, **k)), pb.ExportUsersRequest())

        assert (line["code"], line["method"], line["statements"]) == ("OK", "/personae.v1.UserService/ExportUsers", 2)

    def test_the_metrics_name_the_kind(self, private_url: URL) -> None:
        port = free_port()
        with running(private_url, metrics_port=port) as server:
            list(server.users.ExportUsers(pb.ExportUsersRequest()))
            counted = scrape(port)

        assert value(counted, "grpc_server_handled_total", grpc_type="server_stream", grpc_code="OK") == 1

    def test_the_trail(self, private_server: RunningServer) -> None:
        """One event for each call; it says whether hashes were exported."""
        for include in (False, True):
            list(private_server.users.ExportUsers(pb.ExportUsersRequest(include_hashes=include)))

        events = "SELECT action, changed_fields, caller FROM audit_events ORDER BY id"
        assert run(private_server.url, events) == [
            ("ExportUsers", [], "anonymous"),
            ("ExportUsers", ["hashed_password"], "anonymous"),
        ]
