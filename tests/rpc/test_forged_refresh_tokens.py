"""Refresh tokens with a good MAC that nobody was given: what somebody can write who has SECRET_KEYS and no database."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.core.sessions.refresh_tokens import RefreshToken
from service.core.sessions.rules import SessionKey
from tests.support.servers import RunningServer, running
from tests.support.sessions import CODEC, in_token, refreshed, sessions_of, sign_in, signed_in

Forge = Callable[[RefreshToken, RefreshToken], RefreshToken]
FORGERIES: dict[str, Forge] = {
    "another secret": lambda own, _: replace(own, secret=b"another secret!!"),
    "the secret of another session": lambda own, other: replace(own, secret=other.secret),
    "the session of another user": lambda own, other: replace(own, session=other.session),
    "another user": lambda own, other: replace(own, session=SessionKey(other.session.user_id, own.session.id)),
    "a user whom nobody can be": lambda own, _: replace(own, session=SessionKey(2**63 - 1, own.session.id)),
    "a generation to come": lambda own, _: own.of_generation(own.generation + 1),
    "the last generation": lambda own, _: own.of_generation(2**32 - 1),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_it_refreshes_nothing_and_ends_nothing(server: RunningServer, forge: Forge) -> None:
    user, tokens = signed_in(server)
    other, others = signed_in(server)
    forged = forge(in_token(tokens.refresh_token), in_token(others.refresh_token))
    assert refreshed(server, CODEC.write(forged)) == "SESSION_INVALID"
    assert [len(sessions_of(server, one)) for one in (user, other)] == [1, 1]
    assert [refreshed(server, one.refresh_token) for one in (tokens, others)] == ["OK", "OK"]


def test_of_a_user_who_is_gone(private_url: URL) -> None:
    with running(private_url) as server:
        user, tokens = signed_in(server)
        other = sign_in(server, user)
        server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        assert refreshed(server, tokens.refresh_token) == "SESSION_INVALID"
        server.users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))
        assert [refreshed(server, one.refresh_token) for one in (tokens, other)] == ["SESSION_INVALID"] * 2
