"""Superusers are changed only by callers with the scope users.superuser, whatever other scopes a caller has."""

from collections.abc import Iterator

import grpc
import pytest

from personae.v1 import credential_pb2, user_pb2
from service.rpc.methods import METHODS
from tests.support.credentials import NEW, change, reset, signing_in, start_reset
from tests.support.databases import Postgres
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_email, unique_name
from tests.support.superusers import CHANGES, Change, Tiers, tiers
from tests.support.waiting import statements

READ = {"GetUser", "BatchGetUsers", "ListUsers", "GetLockout", "CheckPassword", "ListAuditEvents"}
READ |= {"GetSession", "ListSessions", "IntrospectToken", "Check", "GetJwks", "ListSigningKeys", "ListFactors"}
READ |= {"ExportUsers"}
OPEN = {"CreateUser", "Authenticate", "ChangePassword", "RefreshSession", "RevokeSession", "RevokeSessions"}
"""CreateUser creates no superuser; some need the person's password or a token. Ending sessions protects the user."""
OPEN |= {"RotateSigningKey", "RevokeSigningKey"}
OPEN |= {"StartTotpEnrollment", "CompleteTotpEnrollment", "StartPasskeyEnrollment", "CompletePasskeyEnrollment"}
OPEN |= {"GenerateRecoveryCodes", "DeleteFactor", "StartPasskeySignIn", "CompleteSecondFactor"}
"""These need a session, a ticket or a factor of the person."""
NO_CHANGE: dict[str, Change] = {
    "UpdateUser": lambda _, user: lambda api: api.update(user, email=user.email),
    "ActivateUser": lambda _, user: lambda api: api.users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id)),
    "DeleteUser": lambda strong, user: (
        strong.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id)),
        lambda api: api.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id, allow_missing=True)),
    )[1],
}
ALL = [*CHANGES.items(), *NO_CHANGE.items()]


@pytest.fixture(scope="module")
def tiered(postgres: Postgres, template: str) -> Iterator[Tiers]:
    with postgres.scratch(template=template) as url, tiers(url) as found:
        yield found


def test_every_rpc_is_listed() -> None:
    """A new RPC that changes users has to be added to CHANGES. ImportUsers refuses rows, and not the call
    (tests/rpc/test_user_transfer.py); a reset is started as for nobody (below).
    """
    others = {name.rpartition("/")[2] for name, row in METHODS.items() if row.scope != "users.superuser"}
    assert others == {*CHANGES, "ImportUsers", "StartPasswordReset", *READ, *OPEN}


@pytest.mark.parametrize("prepare", [pytest.param(prepare, id=name) for name, prepare in ALL])
def test_changes_of_superusers_need_the_scope(tiered: Tiers, prepare: Change) -> None:
    """Also if the call would change nothing. A refused call changes nothing and uses no code. Other users do not need
    the scope.
    """
    superuser = tiered.new_superuser()
    call = prepare(tiered.strong, superuser)
    before = tiered.strong.read(superuser)

    failure = fails(call, tiered.weak)

    assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
    assert failure.error_metadata == {"scope": "users.superuser"}
    assert tiered.strong.read(superuser) == before
    call(tiered.strong)
    prepare(tiered.strong, new_user(tiered.strong.users, password=PASSWORD))(tiered.weak)


def test_a_reset_is_started_as_for_an_unknown_user(tiered: Tiers) -> None:
    """Without the scope: the code is not valid and is not delivered, and an earlier one stays valid."""
    superuser = tiered.new_superuser()
    open_code = start_reset(tiered.strong, superuser)
    assert open_code.deliver_to == superuser.email

    sent = []
    for name in (superuser.email, superuser.username, unique_email(), unique_name()):
        request = credential_pb2.StartPasswordResetRequest(identifier=name)
        with statements(tiered.server) as made:
            answer = tiered.weak.credentials.StartPasswordReset(request)
        sent.append([one for one in made if "INSERT" in one])  # background jobs send others
        assert (answer.deliver_to, len(answer.code)) == ("", len(open_code.code))
        for api in (tiered.weak, tiered.strong):
            assert fails(api.credentials.CompletePasswordReset, reset(answer.code)).reason == "INVALID_CODE"
    assert sent[:2] == sent[2:]
    assert tiered.strong.credentials.CompletePasswordReset(reset(open_code.code)).has_password


def test_the_person_needs_no_scope(tiered: Tiers) -> None:
    """A superuser signs in and changes the password by any caller: the password is the proof."""
    superuser = tiered.new_superuser()

    assert fails(tiered.weak.credentials.ChangePassword, change(superuser, "wrong")).reason == "INVALID_CREDENTIALS"
    assert tiered.weak.credentials.ChangePassword(change(superuser, PASSWORD)) == superuser
    assert signing_in(tiered.weak, superuser, NEW) == "OK"
