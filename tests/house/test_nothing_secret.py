"""Nothing secret is logged or returned, in no line of the log, no error and no detail, through the whole suite; nor is
any in clear in the database that its tests share.

Fixtures in tests/conftest.py search both for leaks when a process has run all its tests. These tests show that they
would find one.
"""

import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as pb
from personae.v1 import credential_pb2, signing_key_pb2, user_pb2
from service.core.signing_keys.rules import new_key
from tests.support.at_rest import dump
from tests.support.callers import bearer, operating, told
from tests.support.callers import new_key as new_key_of_a_caller
from tests.support.databases import run
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.factors import challenged, enrol
from tests.support.servers import RunningServer, running
from tests.support.sessions import in_token, is_active, refresh, refreshing, sign_in, signed_in, step_up
from tests.support.signing_keys import kid_of
from tests.support.witness import WITNESS, Witness


def test_keys_are_looked_for(private_url: URL) -> None:
    """Valid, unknown and malformed ones, and the secret part of each."""
    with operating(private_url) as operator, running(private_url, caller_auth="required") as server:
        name = operator.create("users.read")
        key, unknown = operator.add_key(name), new_key_of_a_caller()
        nearly, bare = f"{bearer(key)}x", new_key_of_a_caller().text
        for sent, ended in (
            (bearer(key), "OK"),
            (bearer(unknown), "KEY_UNKNOWN"),
            (nearly, "KEY_MALFORMED"),
            (f"Basic {bare}", "KEY_MALFORMED"),
        ):
            assert told(server.channel, sent) == ended

    secrets = {key.text, unknown.text, bare, f"{key.text}x"}
    assert secrets | {secret.rsplit("_", 1)[1] for secret in secrets} <= WITNESS.secrets
    said = "\n".join(WITNESS.said)
    for expected in (
        f"'caller': '{name}', 'key': '{key.key_id}'",
        "'reason': 'KEY_UNKNOWN'",
        "There is no such API key.",
    ):
        assert expected in said


def test_no_password_code_hash_or_address_was_logged_or_answered(server: RunningServer) -> None:
    """What the tests have sent and received is searched for in the log of every server and in every failed call."""
    user = new_user(server.users, password=PASSWORD)
    started = server.credentials.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.email))
    taken = user_pb2.CreateUserRequest(user=user_pb2.User(email=user.email, username=unique_name()))
    fails(server.users.CreateUser, taken)
    wrong = pb.AuthenticateRequest(identifier=user.email, password="never said aloud")
    fails(server.authentication.Authenticate, wrong)
    with server.database.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE users SET hashed_password = '$2b$04$damaged' WHERE id = {user.id}")
    fails(server.authentication.Authenticate, pb.AuthenticateRequest(user_id=user.id, password="nor was this one"))

    assert {PASSWORD, started.code, user.email, "never said aloud", "nor was this one"} <= WITNESS.secrets
    said = "\n".join(WITNESS.said)
    for expected in ("internal error", "StoredHashError", "EMAIL_TAKEN", "Another user has this email", "'method'"):
        assert expected in said


@pytest.mark.parametrize(
    "said",
    [
        "it was correct horse battery staple",
        "hash $2b$12$abcdefghijklmnopqrstuv",
        "hash pbkdf2_sha256$1000000$salt$digest",
        "hash {SSHA}AZKja92fbuuB9SpRlHqaoXxbTc43Mzc2MDM1Ng==",
        "DETAIL: Key (email)=(ada@example.com) already exists",
        "{'key': 'pk_aaaqeaye_03MLGH5HKmc8V6ZykihvLeoDzMezpn4nc0hMnsL'}",
        "the secret of pk_bbbbbbbb is 0123456789abcdef",
        "authorization: Basic bm90OmEga2V5",
    ],
)
def test_the_witness_would_notice(said: str) -> None:
    """A leak of each kind is found: the test above can fail."""
    witness = Witness()
    witness.learn(user_pb2.CreateUserRequest(password="correct horse battery staple"))
    witness.learn_credentials(
        [("authorization", "Bearer pk_bbbbbbbb_0123456789abcdef"), ("x-request-id", "harmless line")]
    )
    witness.learn_credentials([("authorization", "Basic bm90OmEga2V5")])
    witness.hear("a harmless line of the key aaaqeaye", said)

    assert [leak for leak in witness.leaks() if leak.endswith(said)]
    assert not [leak for leak in witness.leaks() if "harmless" in leak]


def test_no_token_was_logged_or_answered(server: RunningServer) -> None:
    """Neither a good one nor one that is refused."""
    _, tokens = signed_in(server)
    newest = refresh(server, refresh(server, tokens.refresh_token).refresh_token)
    fails(server.sessions.RefreshSession, refreshing(tokens.refresh_token))
    fails(server.sessions.RefreshSession, refreshing(newest.refresh_token))
    assert not is_active(server, newest)

    assert {tokens.refresh_token, tokens.access_token, newest.refresh_token} <= WITNESS.secrets
    for leak in (tokens.refresh_token, tokens.access_token, newest.access_token[:-60]):
        witness = Witness()
        witness.hear(f"a line with {leak} in it")
        assert list(witness.leaks())


def test_no_token_code_or_key_is_at_rest(private_url: URL) -> None:
    """Whatever happens to sessions and keys: nothing in a dump forges a token, or is one. Of the secret in refresh
    tokens it has the hash.
    """
    with running(private_url) as server:
        user, first = signed_in(server)
        newest = refresh(server, refresh(server, first.refresh_token).refresh_token)
        fails(server.sessions.RefreshSession, refreshing(first.refresh_token))
        kept = step_up(server, user, sign_in(server, user).session.id)
        code = server.credentials.StartPasswordReset(
            credential_pb2.StartPasswordResetRequest(identifier=user.email)
        ).code
        server.signing_keys.RotateSigningKey(signing_key_pb2.RotateSigningKeyRequest(immediately=True))
        server.signing_keys.RevokeSigningKey(signing_key_pb2.RevokeSigningKeyRequest(kid=kid_of(kept.access_token)))
        signed_in(server)
    dumped = dump(private_url)
    assert list(dumped.leaks(WITNESS)) == []
    assert {PASSWORD, code, *(one.refresh_token for one in (first, newest, kept)), kept.access_token} <= WITNESS.secrets
    assert in_token(kept.refresh_token).secret_hash.decode("latin-1") in dumped.binary


@pytest.mark.parametrize("column", ["user_agent", "secret_hash"])
def test_a_leak_at_rest_would_be_found(private_url: URL, column: str) -> None:
    """As text or as bytes, of what the tests have seen and of what they have not."""
    with running(private_url) as server:
        _, tokens = signed_in(server)
    assert list(dump(private_url).leaks(WITNESS)) == []
    texts = [tokens.refresh_token, tokens.access_token[:500], new_key_of_a_caller().text, "-----BEGIN PRIVATE KEY-----"]
    found = [(text.encode(), Witness()) for text in texts] + [(PASSWORD.encode(), WITNESS)]
    if column == "secret_hash":
        found += [(new_key()[1], Witness()), (in_token(tokens.refresh_token).secret, WITNESS)]
    for secret, witness in found:
        value = secret.decode() if column == "user_agent" else secret
        run(private_url, f"UPDATE sessions SET {column} = %s", (value,))
        assert list(dump(private_url).leaks(witness)), secret


def test_secrets_of_second_factors_are_looked_for(server: RunningServer) -> None:
    """Those of apps, recovery codes, and tickets, which come in the details of a failed call."""
    person = enrol(server)
    ticket = challenged(server, person.user).ticket

    assert {person.app.secret, *person.recovery_codes, ticket} <= WITNESS.secrets
    witness = Witness()
    witness.hear(f"a ticket {ticket}", f"a code {person.recovery_codes[0]}", "nothing")
    assert len(list(witness.leaks())) == 2
