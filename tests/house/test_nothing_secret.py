"""Nothing secret is said: in no line of the log, no error, no detail, through the whole suite. Runs last."""

import pytest

from personae.v1 import authentication_pb2 as pb
from personae.v1 import credential_pb2, user_pb2
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer
from tests.support.witness import WITNESS, Witness


@pytest.mark.last
def test_no_password_code_hash_or_address_was_logged_or_answered(server: RunningServer) -> None:
    """What every test has sent and got is looked for in what every server has logged and every failed call answered."""
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
    assert list(WITNESS.leaks()) == []


@pytest.mark.parametrize(
    "said",
    [
        "it was correct horse battery staple",
        "hash $2b$12$abcdefghijklmnopqrstuv",
        "DETAIL: Key (email)=(ada@example.com) already exists",
    ],
)
def test_the_witness_would_notice(said: str) -> None:
    """A leak of each kind is found: the test above can fail."""
    witness = Witness()
    witness.learn(user_pb2.CreateUserRequest(password="correct horse battery staple"))
    witness.hear("a harmless line", said)

    assert [leak for leak in witness.leaks() if leak.endswith(said)]
    assert not [leak for leak in witness.leaks() if "harmless" in leak]
