"""Callers use only their own sessions, for the audiences that they were granted, within their scopes."""

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, session_pb2, user_pb2
from service.rpc.methods import ALL_SCOPES
from tests.support.callers import Operator, keyed, operating
from tests.support.commands import run_module
from tests.support.credentials import by_id
from tests.support.databases import libpq_url
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import RunningServer, Services, running
from tests.support.sessions import introspecting, is_active, refresh, refreshed, sign_in, signed_in, wanted
from tests.support.superusers import tiers


@pytest.fixture
def operator(private_url: URL) -> Iterator[Operator]:
    with operating(private_url) as found:
        yield found


@pytest.fixture
def server(private_url: URL) -> Iterator[RunningServer]:
    with running(private_url, caller_auth="required", caller_cache_seconds=60) as found:
        yield found


def caller(operator: Operator, server: RunningServer, *audiences: str) -> Services:
    """A caller with every scope and these audiences."""
    return Services(keyed(server.channel, operator.create_with_key(*ALL_SCOPES, audiences=audiences)))


def asking(user: user_pb2.User, *audience: str) -> authentication_pb2.AuthenticateRequest:
    request = by_id(user, PASSWORD)
    request.session.CopyFrom(wanted(audience=audience))
    return request


def test_a_session_is_its_callers_alone(operator: Operator, server: RunningServer) -> None:
    """Another caller that has the refresh token can neither use it nor end the session by trying."""
    shop, other = (caller(operator, server, "orders") for _ in range(2))
    user, tokens = signed_in(shop)
    newer = refresh(shop, tokens.refresh_token)
    for token in (tokens, newer):
        assert refreshed(other, token.refresh_token) == "SESSION_INVALID"
    request = by_id(user, PASSWORD)
    request.session_id = tokens.session.id
    assert fails(other.authentication.Authenticate, request).reason == "SESSION_INVALID"
    assert refreshed(shop, newer.refresh_token) == "OK"
    assert is_active(other, newer)


def test_audiences(operator: Operator, server: RunningServer) -> None:
    """Without a name the only one that was granted; one of several by name; never one that was not granted."""
    none, one, two = caller(operator, server), caller(operator, server, "a"), caller(operator, server, "a", "b")
    user = new_user(one.users, password=PASSWORD)
    assert list(sign_in(one, user).session.audience) == ["a"]
    assert list(sign_in(two, user, audience=("b", "b", "a")).session.audience) == ["b", "a"]
    refused = {
        none: (asking(user), asking(user, "a")),
        one: (asking(user, "b"), asking(user, "a", "b")),
    }
    for services, requests in refused.items():
        for request in requests:
            failure = fails(services.authentication.Authenticate, request)
            assert (failure.reason, list(failure.violations)) == ("AUDIENCE_NOT_ALLOWED", ["session.audience"])
    assert fails(two.authentication.Authenticate, asking(user)).violations == {"session.audience": ["REQUIRED"]}
    many = asking(user, *(str(number) for number in range(17)))
    assert fails(two.authentication.Authenticate, many).violations == {"session.audience": ["TOO_MANY"]}
    for bad in ("", "\0", "x" * 256, '"', "\\", "a b", "\u00e9"):
        failure = fails(two.authentication.Authenticate, asking(user, "a", bad))
        assert list(failure.violations) == ["session.audience[1]"]


def test_the_verbs(private_url: URL) -> None:
    """An operator grants and withdraws audiences; invalid ones are refused with a message."""

    def callers(*words: str) -> tuple[int, str]:
        return run_module("service", "callers", *words, environment={"DATABASE_URL": libpq_url(private_url)})

    assert callers("create", "shop", "--no-key", "--audience", "orders", "--audience", "https://b.example")[0] == 0
    assert "audiences   https://b.example, orders\n" in callers("show", "shop")[1]
    assert callers("grant", "shop", "--remove-audience", "orders") == (
        0,
        "shop has no scope. It may have tokens issued for https://b.example.\n",
    )
    for words in (("--audience", "a b"), ("--audience", ""), ("--audience", "\u00e9"), ("--remove-audience", "x")):
        code, said = callers("grant", "shop", *words)
        assert (code, said.count("\n"), "Traceback" in said) == (1, 1, False), said
    assert callers("grant", "shop", *(word for number in range(16) for word in ("--audience", str(number))))[0] == 1


def test_superusers(private_url: URL) -> None:
    """Creating a session for a superuser needs users.superuser; signing in with the password does not."""
    with tiers(private_url) as found:
        root = found.new_superuser()
        request = session_pb2.CreateSessionRequest(user_id=root.id, amr=["otp"])
        assert fails(found.weak.sessions.CreateSession, request).reason == "SCOPE_MISSING"
        assert found.strong.sessions.CreateSession(request).user == root
        tokens = sign_in(found.weak, root)
        assert found.weak.sessions.IntrospectToken(introspecting(tokens.access_token)).is_superuser
        every = session_pb2.RevokeSessionsRequest(user_id=root.id)
        assert found.weak.sessions.RevokeSessions(every).revoked_count == 2  # to protect one is not to change one
