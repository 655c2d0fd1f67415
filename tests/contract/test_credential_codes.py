"""The contract of CredentialService: what holds for codes of every kind."""

import secrets
from collections.abc import Callable

import pytest

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from tests.support.codes import (
    NEW_EMAIL,
    PRESENT_EMAIL,
    RESET,
    Kind,
    complete_reset,
    delete,
    mark,
    proof,
    require_a_change,
    verify,
)
from tests.support.credentials import NEW, OTHER, change, reset, signing_in
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_email, unique_name
from tests.support.servers import Services

KINDS = {"reset": RESET, "present email": PRESENT_EMAIL, "new email": NEW_EMAIL}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# ------------------------------------------------------------- what voids codes, and what leaves them as they are


def deactivate(api: Services, user: user_pb2.User) -> user_pb2.User:
    return api.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))


def activate(api: Services, user: user_pb2.User) -> user_pb2.User:
    return api.users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))


def choose_a_password_that_is_refused(api: Services, user: user_pb2.User) -> None:
    request = pb.SetPasswordRequest(user_id=user.id, password="quite short")
    assert fails(api.credentials.SetPassword, request).reason == "INVALID_FIELDS"
    for current, new, reason in ((PASSWORD, "quite short", "INVALID_FIELDS"), ("wrong", NEW, "INVALID_CREDENTIALS")):
        assert fails(api.credentials.ChangePassword, change(user, current, new)).reason == reason


Act = Callable[[Services, user_pb2.User], object]
VOIDING: dict[str, Act] = {
    "deactivate": deactivate,
    "deactivate and activate": lambda api, user: (deactivate(api, user), activate(api, user)),
    "delete": delete,
    "delete and undelete": lambda api, user: (
        delete(api, user),
        api.users.UndeleteUser(user_pb2.UndeleteUserRequest(id=user.id)),
    ),
    "purge": lambda api, user: (delete(api, user), api.users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))),
    "change the email": lambda api, user: api.update(user, email=unique_email()),
    "verify another email": lambda api, user: verify(api, NEW_EMAIL.start(api, user)),
    "set a password": lambda api, user: api.credentials.SetPassword(
        pb.SetPasswordRequest(user_id=user.id, password=OTHER)
    ),
    "change the password": lambda api, user: api.credentials.ChangePassword(change(user, PASSWORD)),
    "reset the password": lambda api, user: complete_reset(api, RESET.start(api, user)),
    "remove the password": lambda api, user: api.credentials.RemovePassword(pb.RemovePasswordRequest(user_id=user.id)),
    "remove what is not there": lambda api, user: [
        api.credentials.RemovePassword(pb.RemovePasswordRequest(user_id=user.id)) for _ in range(2)
    ],
    "prove an email and drop the password": lambda api, user: verify(
        api, PRESENT_EMAIL.start(api, user), drop_password=True
    ),
    "mark an email verified and drop the password": lambda api, user: mark(api, user, drop_password=True),
    "make a superuser": lambda api, user: api.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id)),
}
HARMLESS: dict[str, Act] = {
    "activate": activate,
    "change the username": lambda api, user: api.update(user, username=unique_name()),
    "send the same email": lambda api, user: api.update(user, email=user.email.upper()),
    "mark the email verified": mark,
    "mark a verified email again": lambda api, user: (mark(api, user), mark(api, user, drop_password=True)),
    "sign in, once wrongly": lambda api, user: (signing_in(api, user, "wrong"), signing_in(api, user, PASSWORD)),
    "require a change": require_a_change,
    "choose a password that is refused": choose_a_password_that_is_refused,
}


class TestEveryCode:
    @every_kind
    @pytest.mark.parametrize("act", VOIDING.values(), ids=VOIDING)
    def test_void_after(self, api: Services, kind: Kind, act: Act) -> None:
        """A change of the email or the password, a deactivation and a deletion void the code for ever."""
        user = new_user(api.users, password=PASSWORD)
        code = kind.start(api, user)

        act(api, user)

        assert fails(kind.complete, api, code).reason == "INVALID_CODE"

    @every_kind
    @pytest.mark.parametrize("act", HARMLESS.values(), ids=HARMLESS)
    def test_not_void_after(self, api: Services, kind: Kind, act: Act) -> None:
        """Other changes do not affect the code."""
        user = new_user(api.users, password=PASSWORD)
        code = kind.start(api, user)

        act(api, user)

        assert kind.complete(api, code) == api.read(user)

    @every_kind
    def test_works_once_and_until_a_newer_one_is_issued(self, api: Services, kind: Kind) -> None:
        """A user has one open code for each purpose, independent of other users."""
        user, another = new_user(api.users), new_user(api.users)
        older, newer = kind.start(api, user), kind.start(api, user)
        kind.start(api, another)
        (PRESENT_EMAIL if kind is RESET else RESET).start(api, user)

        assert fails(kind.complete, api, older).reason == "INVALID_CODE"
        assert kind.complete(api, newer).id == user.id
        assert fails(kind.complete, api, newer).reason == "INVALID_CODE"

    @every_kind
    def test_every_code_that_is_not_open_is_the_same_answer(self, api: Services, kind: Kind) -> None:
        """Truncated, mistyped, invented, for another purpose, used, replaced, void: the answers are identical."""
        user, void, used = new_user(api.users), new_user(api.users), new_user(api.users)
        void_code, used_code = kind.start(api, void), kind.start(api, used)
        deactivate(api, void)
        kind.complete(api, used_code)
        replaced, code = kind.start(api, user), kind.start(api, user)
        for_nobody = pb.StartPasswordResetRequest(identifier="nobody-has-this")
        codes = [
            code[:-1],
            code + code[-1],
            code.swapcase(),
            f" {code}",
            f"{code}\n",
            f"{code}=",
            secrets.token_urlsafe(32),
            (PRESENT_EMAIL if kind is RESET else RESET).start(api, user),
            api.credentials.StartPasswordReset(for_nobody).code,
            replaced,
            void_code,
            used_code,
            "x",
            "\x00" * 43,
            "\u00fc" * 64,
            "x" * 128,
        ]

        failures = [fails(kind.complete, api, one) for one in codes]

        assert failures[0].reason == "INVALID_CODE"
        assert [failure.visible for failure in failures] == [failures[0].visible] * len(codes)
        assert kind.complete(api, code).id == user.id

    @pytest.mark.parametrize(
        "code, reason",
        [("", "REQUIRED"), ("x" * 129, "TOO_LONG"), ("\u00fc" * 65, "TOO_LONG"), ("x" * 3_000_000, "TOO_LONG")],
    )
    def test_what_cannot_be_a_code(self, api: Services, code: str, reason: str) -> None:
        """It is the caller's mistake, and named together with a missing password."""
        resetting = fails(api.credentials.CompletePasswordReset, reset(code, ""))
        assert resetting.violations == {"code": [reason], "new_password": ["REQUIRED"]}
        assert fails(api.credentials.CompleteEmailVerification, proof(code)).violations == {"code": [reason]}
