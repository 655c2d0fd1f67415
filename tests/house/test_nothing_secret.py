"""No test makes a server log or return a secret, or store one in clear text in the database that tests share.

Fixtures in tests/conftest.py search the output and the database when a process has run all its tests. These tests show
that they would find a leak.
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
from tests.support.leak_detector import DETECTOR, LeakDetector
from tests.support.servers import RunningServer, running
from tests.support.sessions import in_token, is_active, refresh, refreshing, sign_in, signed_in, step_up
from tests.support.signing_keys import kid_of


def test_api_keys_are_searched_for(private_url: URL) -> None:
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
    assert secrets | {secret.rsplit("_", 1)[1] for secret in secrets} <= DETECTOR.secrets
    said = "\n".join(DETECTOR.output)
    for expected in (
        f"'caller': '{name}', 'key': '{key.key_id}'",
        "'reason': 'KEY_UNKNOWN'",
        "There is no such API key.",
    ):
        assert expected in said


def test_no_password_code_hash_or_address_was_logged_or_answered(server: RunningServer) -> None:
    """The log of every server and every failed call are searched for what the tests have sent and received."""
    user = new_user(server.users, password=PASSWORD)
    started = server.credentials.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.email))
    taken = user_pb2.CreateUserRequest(user=user_pb2.User(email=user.email, username=unique_name()))
    fails(server.users.CreateUser, taken)
    wrong = pb.AuthenticateRequest(identifier=user.email, password="never said aloud")
    fails(server.authentication.Authenticate, wrong)
    with server.database.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE users SET hashed_password = '$2b$04$damaged' WHERE id = {user.id}")
    fails(server.authentication.Authenticate, pb.AuthenticateRequest(user_id=user.id, password="nor was this one"))

    assert {PASSWORD, started.code, user.email, "never said aloud", "nor was this one"} <= DETECTOR.secrets
    said = "\n".join(DETECTOR.output)
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
def test_a_leak_of_each_kind_is_found(said: str) -> None:
    """So the fixtures can fail."""
    detector = LeakDetector()
    detector.learn(user_pb2.CreateUserRequest(password="correct horse battery staple"))
    detector.learn_credentials(
        [("authorization", "Bearer pk_bbbbbbbb_0123456789abcdef"), ("x-request-id", "harmless line")]
    )
    detector.learn_credentials([("authorization", "Basic bm90OmEga2V5")])
    detector.record("a harmless line of the key aaaqeaye", said)

    assert [leak for leak in detector.leaks() if leak.endswith(said)]
    assert not [leak for leak in detector.leaks() if "harmless" in leak]


def test_no_token_was_logged_or_answered(server: RunningServer) -> None:
    """Neither a valid one nor one that is refused."""
    _, tokens = signed_in(server)
    newest = refresh(server, refresh(server, tokens.refresh_token).refresh_token)
    fails(server.sessions.RefreshSession, refreshing(tokens.refresh_token))
    fails(server.sessions.RefreshSession, refreshing(newest.refresh_token))
    assert not is_active(server, newest)

    assert {tokens.refresh_token, tokens.access_token, newest.refresh_token} <= DETECTOR.secrets
    for leak in (tokens.refresh_token, tokens.access_token, newest.access_token[:-60]):
        detector = LeakDetector()
        detector.record(f"a line with {leak} in it")
        assert list(detector.leaks())


def test_no_token_code_or_key_is_at_rest(private_url: URL) -> None:
    """A dump contains no token and no key that signs one, whatever was done with sessions and keys. Of the secrets in
    refresh tokens it has the hashes.
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
    assert list(dumped.leaks(DETECTOR)) == []
    refresh_tokens = {one.refresh_token for one in (first, newest, kept)}
    assert {PASSWORD, code, *refresh_tokens, kept.access_token} <= DETECTOR.secrets
    assert in_token(kept.refresh_token).secret_hash.decode("latin-1") in dumped.binary


@pytest.mark.parametrize("column", ["user_agent", "secret_hash"])
def test_a_leak_at_rest_would_be_found(private_url: URL, column: str) -> None:
    """As text or as bytes, whether or not the tests have sent or received it."""
    with running(private_url) as server:
        _, tokens = signed_in(server)
    assert list(dump(private_url).leaks(DETECTOR)) == []
    texts = [tokens.refresh_token, tokens.access_token[:500], new_key_of_a_caller().text, "-----BEGIN PRIVATE KEY-----"]
    found = [(text.encode(), LeakDetector()) for text in texts] + [(PASSWORD.encode(), DETECTOR)]
    if column == "secret_hash":
        found += [(new_key()[1], LeakDetector()), (in_token(tokens.refresh_token).secret, DETECTOR)]
    for secret, detector in found:
        value = secret.decode() if column == "user_agent" else secret
        run(private_url, f"UPDATE sessions SET {column} = %s", (value,))
        assert list(dump(private_url).leaks(detector)), secret


def test_secrets_of_second_factors_are_searched_for(server: RunningServer) -> None:
    """Those of apps, recovery codes, and tickets, which are in the details of a failed call."""
    person = enrol(server)
    ticket = challenged(server, person.user).ticket

    assert {person.app.secret, *person.recovery_codes, ticket} <= DETECTOR.secrets
    detector = LeakDetector()
    detector.record(f"a ticket {ticket}", f"a code {person.recovery_codes[0]}", "nothing")
    assert len(list(detector.leaks())) == 2
