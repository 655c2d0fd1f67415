"""The contract of CredentialService: one-time codes, for passwords that are reset and emails that are verified."""

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from tests.support.credentials import (
    NEW,
    OTHER,
    UNLIKE_ANY,
    by,
    change,
    counted,
    fail,
    outcome,
    reset,
    signing_in,
    start_reset,
    start_verification,
)
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_email, unique_name
from tests.support.servers import Services

NO_SUCH_ID = 2**63 - 1
CODE = re.compile(r"[A-Za-z0-9_-]{43}")


def proof(code: str, **options: Any) -> pb.CompleteEmailVerificationRequest:
    return pb.CompleteEmailVerificationRequest(code=code, **options)


def verify(api: Services, code: str, **options: Any) -> user_pb2.User:
    return api.credentials.CompleteEmailVerification(proof(code, **options))


def mark(api: Services, user: user_pb2.User, **options: Any) -> user_pb2.User:
    return api.credentials.MarkEmailVerified(pb.MarkEmailVerifiedRequest(user_id=user.id, email=user.email, **options))


def complete_reset(api: Services, code: str) -> user_pb2.User:
    return api.credentials.CompletePasswordReset(reset(code))


@dataclass(frozen=True)
class Kind:
    """A kind of code: how it is issued, and how it is used."""

    start: Callable[[Services, user_pb2.User], str]
    complete: Callable[[Services, str], user_pb2.User]


RESET = Kind(lambda api, user: start_reset(api, user).code, complete_reset)
PRESENT_EMAIL = Kind(lambda api, user: start_verification(api, user).code, verify)
NEW_EMAIL = Kind(lambda api, user: start_verification(api, user, unique_email()).code, verify)
KINDS = {"reset": RESET, "present email": PRESENT_EMAIL, "new email": NEW_EMAIL}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# ------------------------------------------------------------- what voids codes, and what leaves them as they are


def deactivate(api: Services, user: user_pb2.User) -> user_pb2.User:
    return api.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))


def activate(api: Services, user: user_pb2.User) -> user_pb2.User:
    return api.users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))


def delete(api: Services, user: user_pb2.User) -> user_pb2.User:
    return api.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))


def require_a_change(api: Services, user: user_pb2.User) -> None:
    api.credentials.RequirePasswordChange(pb.RequirePasswordChangeRequest(user_id=user.id))


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
        """What changes the email or the password, or stops the user, voids the code for good."""
        user = new_user(api.users, password=PASSWORD)
        code = kind.start(api, user)

        act(api, user)

        assert fails(kind.complete, api, code).reason == "INVALID_CODE"

    @every_kind
    @pytest.mark.parametrize("act", HARMLESS.values(), ids=HARMLESS)
    def test_not_void_after(self, api: Services, kind: Kind, act: Act) -> None:
        """What leaves email and password alone leaves the code alone."""
        user = new_user(api.users, password=PASSWORD)
        code = kind.start(api, user)

        act(api, user)

        assert kind.complete(api, code) == api.read(user)

    @every_kind
    def test_works_once_and_until_a_newer_one_is_issued(self, api: Services, kind: Kind) -> None:
        """A user has one open code of a purpose; other users and the other purpose do not matter."""
        user, another = new_user(api.users), new_user(api.users)
        older, newer = kind.start(api, user), kind.start(api, user)
        kind.start(api, another)
        (PRESENT_EMAIL if kind is RESET else RESET).start(api, user)

        assert fails(kind.complete, api, older).reason == "INVALID_CODE"
        assert kind.complete(api, newer).id == user.id
        assert fails(kind.complete, api, newer).reason == "INVALID_CODE"

    @every_kind
    def test_every_code_that_is_not_open_is_the_same_answer(self, api: Services, kind: Kind) -> None:
        """Truncated, mistyped, made up, for another purpose, used, replaced, void: nobody can tell them apart."""
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


class TestPasswordReset:
    def test_by_each_name_in_any_case(self, api: Services) -> None:
        """The code goes to the stored email, never to what was typed; nothing of the user changes."""
        name = unique_name()
        user = api.users.CreateUser(
            user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{name}@b\u00fccher.de", username=name))
        )
        typed = [user.email, f"{name.upper()}@B\u00dcCHER.DE", user.username, user.username.upper()]

        answers = [api.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=one)) for one in typed]

        assert [answer.deliver_to for answer in answers] == [f"{name}@xn--bcher-kva.de"] * 4
        assert len({answer.code for answer in answers}) == 4
        assert all(answer.HasField("expires_at") for answer in answers)
        assert api.read(user) == user

    def test_an_unknown_user_is_answered_like_a_known_one(self, api: Services) -> None:
        """Unknown, deleted, inactive, malformed: a code of the same form that opens nothing and goes nowhere."""
        deleted = new_user(api.users, password=PASSWORD)
        inactive = new_user(api.users, password=PASSWORD, inactive=True)
        delete(api, deleted)
        known = start_reset(api, new_user(api.users))
        nobodies = [one for user in (deleted, inactive) for one in (user.email, user.username)]
        nobodies += [unique_name(), unique_email(), "not an email@", "a@b@c", "no username!", "x" * 1024]

        for identifier in nobodies:
            answer = api.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=identifier))
            assert answer.deliver_to == "", identifier
            assert CODE.fullmatch(answer.code), identifier
            assert abs(answer.expires_at.seconds - known.expires_at.seconds) < 60
            assert fails(complete_reset, api, answer.code).reason == "INVALID_CODE"
        assert CODE.fullmatch(known.code)

    @pytest.mark.parametrize(
        "identifier, reason",
        [("", "REQUIRED"), ("nul\x00", "CONTROL_CHARACTER"), ("x" * 1025, "TOO_LONG"), ("x" * 3_000_000, "TOO_LONG")],
    )
    def test_what_no_person_types(self, api: Services, identifier: str, reason: str) -> None:
        failure = fails(api.credentials.StartPasswordReset, pb.StartPasswordResetRequest(identifier=identifier))

        assert failure.violations == {"identifier": [reason]}

    @pytest.mark.parametrize("password", [PASSWORD, None])
    def test_the_new_password_signs_in(self, api: Services, password: str | None) -> None:
        """It lifts a required change and the lockout. Only a first password moves etag and updated_at."""
        user = new_user(api.users, password=password)
        if password is not None:
            require_a_change(api, user)
        for name in (user.email, user.username):
            fail(api, by(name))
        code = start_reset(api, user).code
        assert counted(api, user) == (1, 1)

        changed = complete_reset(api, code)

        assert changed == api.read(user)
        assert changed.has_password
        assert (changed == user) is user.has_password
        assert (changed.etag == user.etag) is user.has_password
        assert counted(api, user) == (0, 0)
        assert signing_in(api, user, NEW) == "OK"
        assert signing_in(api, user, PASSWORD) == "INVALID_CREDENTIALS"

    @pytest.mark.parametrize("password", ["quite short", UNLIKE_ANY, "abc" * 10, "PasswordPassword", NEW + "\x00"])
    def test_a_password_is_judged_only_with_an_open_code(self, api: Services, password: str) -> None:
        """A bad choice with a wrong code is INVALID_CODE, as if it were a good one."""
        bad, good = (
            fails(api.credentials.CompletePasswordReset, reset(secrets.token_urlsafe(32), one))
            for one in (password, NEW)
        )

        assert bad.reason == "INVALID_CODE"
        assert bad.visible == good.visible

    def test_a_refused_password_does_not_use_up_the_code(self, api: Services) -> None:
        """The person chooses another one; until then the present one stays. All rules: unit/test_password_policy.py."""
        user = new_user(api.users, password=PASSWORD)
        code = start_reset(api, user).code
        refused = {
            "quite short": {"TOO_SHORT"},
            f"{user.username} 12": {"CONTAINS_USERNAME", "CONTAINS_EMAIL"},
        }

        for password, reasons in refused.items():
            violations = fails(api.credentials.CompletePasswordReset, reset(code, password)).violations
            assert {field: set(found) for field, found in violations.items()} == {"new_password": reasons}
        assert signing_in(api, user, PASSWORD) == "OK"
        assert complete_reset(api, code) == user

    def test_the_present_password_is_as_good_as_another(self, api: Services) -> None:
        """The answer does not tell whoever has a code what the present password is."""
        user = new_user(api.users, password=PASSWORD)
        require_a_change(api, user)

        answers = [
            api.credentials.CompletePasswordReset(reset(start_reset(api, user).code, password))
            for password in (PASSWORD, PASSWORD, NEW)
        ]

        assert answers == [user] * 3
        assert [signing_in(api, user, password) for password in (PASSWORD, NEW)] == ["INVALID_CREDENTIALS", "OK"]


class TestEmailVerification:
    @pytest.mark.parametrize("is_named", [False, True])
    def test_the_present_email(self, api: Services, is_named: bool) -> None:
        """The code goes to the stored email; etag and updated_at move with the proof. An open reset code stays open."""
        user = new_user(api.users, password=PASSWORD)
        answer = start_verification(api, user, user.email.upper() if is_named else None)
        assert answer.deliver_to == user.email
        assert CODE.fullmatch(answer.code)
        assert answer.HasField("expires_at")
        assert api.read(user) == user
        open_code = start_reset(api, user).code

        verified = verify(api, answer.code)

        assert verified.email == user.email
        assert abs(verified.email_verified_at.seconds - verified.updated_at.seconds) < 3600
        assert verified.etag != user.etag
        assert verified.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert complete_reset(api, open_code) == api.read(user) == verified

    def test_a_new_email(self, api: Services) -> None:
        """The code goes to the new email, which then replaces the present one, verified; the old one is free."""
        user, name = new_user(api.users, password=PASSWORD), unique_name()
        answer = start_verification(api, user, f"{name.upper()}@B\u00dcCHER.de")
        assert answer.deliver_to == f"{name}@xn--bcher-kva.de"
        assert api.read(user) == user
        assert outcome(api.authentication.Authenticate, by(answer.deliver_to, PASSWORD)) == "INVALID_CREDENTIALS"

        changed = verify(api, answer.code)

        assert (changed.id, changed.email, changed.username) == (user.id, answer.deliver_to, user.username)
        assert changed.HasField("email_verified_at")
        assert changed.etag != user.etag
        assert outcome(api.authentication.Authenticate, by(changed.email, PASSWORD)) == "OK"
        assert outcome(api.authentication.Authenticate, by(user.email, PASSWORD)) == "INVALID_CREDENTIALS"
        assert api.update(new_user(api.users), email=user.email).email == user.email

    def test_an_email_that_is_taken(self, api: Services) -> None:
        """By another user, perhaps a deleted one. The refusal leaves the open code."""
        user, other, deleted = new_user(api.users), new_user(api.users), new_user(api.users)
        delete(api, deleted)
        code = start_verification(api, user).code

        for email in (other.email.upper(), deleted.email):
            assert fails(start_verification, api, user, email).reason == "EMAIL_TAKEN"
        assert verify(api, code).HasField("email_verified_at")

    def test_who_cannot_verify_an_email(self, api: Services) -> None:
        inactive = new_user(api.users, inactive=True)
        deleted, both = new_user(api.users), new_user(api.users, inactive=True)
        delete(api, deleted)
        delete(api, both)
        users = [inactive, deleted, both, user_pb2.User(id=NO_SUCH_ID)]

        reasons = [fails(start_verification, api, user).reason for user in users]

        assert reasons == ["USER_INACTIVE", "USER_DELETED", "USER_DELETED", "USER_NOT_FOUND"]

    def test_a_verified_email_is_verified_again(self, api: Services) -> None:
        """The time is that of the last proof; a new email is verified though the one before was too."""
        user = new_user(api.users)

        verified = [verify(api, kind.start(api, user)) for kind in (PRESENT_EMAIL, PRESENT_EMAIL, NEW_EMAIL)]

        times = [one.email_verified_at.ToNanoseconds() for one in verified]
        assert times == sorted(set(times))

    def test_a_new_email_that_was_taken_meanwhile(self, api: Services) -> None:
        """EMAIL_TAKEN changes nothing and leaves the code: it works when the email is free again."""
        user, faster = new_user(api.users), new_user(api.users)
        email = unique_email()
        code, faster_code = (start_verification(api, one, email).code for one in (user, faster))
        verify(api, faster_code)

        assert fails(verify, api, code).reason == "EMAIL_TAKEN"

        assert api.read(user) == user
        api.update(faster, email=unique_email())
        assert verify(api, code).email == email

    def test_of_the_user_who_is_signed_in(self, api: Services) -> None:
        """The code of another user is like a mistyped one, and stays valid."""
        user, another = new_user(api.users), new_user(api.users)
        code = start_verification(api, user).code

        wrong = fails(verify, api, code, user_id=another.id)

        assert wrong.visible == fails(verify, api, secrets.token_urlsafe(32)).visible
        assert not api.read(user).HasField("email_verified_at")
        for user_id in (0, -1):
            assert fails(verify, api, "", user_id=user_id).violations == {
                "code": ["REQUIRED"],
                "user_id": ["INVALID_ID"],
            }
        assert verify(api, code, user_id=user.id).HasField("email_verified_at")


class TestAPasswordThatSomebodyElseMayHaveSet:
    """Somebody registers another person's email with a password of their own, or enters it as their new one."""

    @pytest.mark.parametrize(
        "prove",
        [
            lambda api, user, **how: verify(api, PRESENT_EMAIL.start(api, user), **how),
            lambda api, user, **how: verify(api, NEW_EMAIL.start(api, user), **how),
            lambda api, user, **how: (mark(api, user), verify(api, NEW_EMAIL.start(api, user), **how))[1],
            mark,
        ],
        ids=["present email", "new email", "new email after a verified one", "marked"],
    )
    def test_goes_with_the_first_proof_of_the_email(self, api: Services, prove: Callable[..., user_pb2.User]) -> None:
        """If the caller asks for it. Then only a reset leads back, by the email that was proved."""
        user, kept = (new_user(api.users, password=PASSWORD) for _ in range(2))
        require_a_change(api, user)

        proved = prove(api, user, drop_password=True)

        assert proved == api.read(user)
        assert proved.HasField("email_verified_at")
        assert not proved.has_password
        assert signing_in(api, user, PASSWORD) == "INVALID_CREDENTIALS"
        assert fails(api.credentials.ChangePassword, change(user, PASSWORD)).reason == "INVALID_CREDENTIALS"
        assert start_reset(api, user).deliver_to == proved.email
        assert complete_reset(api, start_reset(api, user).code).has_password
        assert signing_in(api, user, NEW) == "OK"
        assert prove(api, kept).has_password
        assert signing_in(api, kept, PASSWORD) == "OK"

    def test_stays_when_the_email_was_proved_before(self, api: Services) -> None:
        user = new_user(api.users, password=PASSWORD)
        mark(api, user)

        assert verify(api, start_verification(api, user).code, drop_password=True).has_password
        assert mark(api, user, drop_password=True).has_password
        assert signing_in(api, user, PASSWORD) == "OK"

    def test_may_be_missing(self, api: Services) -> None:
        assert not verify(api, PRESENT_EMAIL.start(api, new_user(api.users)), drop_password=True).has_password


class TestMarkEmailVerified:
    def test_the_present_email_in_any_case(self, api: Services) -> None:
        """It is verified from now on, and etag and updated_at move. The second time nothing moves."""
        user = new_user(api.users, inactive=True)
        request = pb.MarkEmailVerifiedRequest(user_id=user.id, email=user.email.upper())

        marked = api.credentials.MarkEmailVerified(request)

        assert (marked.email, marked.is_active) == (user.email, False)
        assert abs(marked.email_verified_at.seconds - marked.updated_at.seconds) < 3600
        assert marked.etag != user.etag
        assert marked.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert api.credentials.MarkEmailVerified(request) == marked == api.read(user)

    def test_refusals(self, api: Services) -> None:
        user, deleted, other = new_user(api.users), new_user(api.users), new_user(api.users)
        delete(api, deleted)
        changed = api.update(user, email=unique_email())

        for user_id, email, reason in (
            (user.id, user.email, "EMAIL_MISMATCH"),
            (user.id, other.email, "EMAIL_MISMATCH"),
            (user.id, unique_email(), "EMAIL_MISMATCH"),
            (deleted.id, deleted.email, "USER_DELETED"),
            (deleted.id, unique_email(), "USER_DELETED"),
            (NO_SUCH_ID, user.email, "USER_NOT_FOUND"),
        ):
            request = pb.MarkEmailVerifiedRequest(user_id=user_id, email=email)
            assert fails(api.credentials.MarkEmailVerified, request).reason == reason
        assert api.read(user) == changed


@pytest.mark.parametrize("user_id", [0, -1])
@pytest.mark.parametrize(
    "email, reason",
    [
        ("", "INVALID_EMAIL"),
        ("not an email", "INVALID_EMAIL"),
        ("\u212a@example.com", "INVALID_EMAIL"),
        ("a@localhost", "INVALID_EMAIL"),
        ("nul\x00@example.com", "CONTROL_CHARACTER"),
        ("x" * 3_000_000, "TOO_LONG"),
    ],
)
def test_bad_emails_and_ids_are_named_together(api: Services, user_id: int, email: str, reason: str) -> None:
    """An empty email is not an unset one."""
    starting = pb.StartEmailVerificationRequest(user_id=user_id, new_email=email)
    assert fails(api.credentials.StartEmailVerification, starting).violations == {
        "user_id": ["INVALID_ID"],
        "new_email": [reason],
    }
    marking = pb.MarkEmailVerifiedRequest(user_id=user_id, email=email)
    assert fails(api.credentials.MarkEmailVerified, marking).violations == {
        "user_id": ["INVALID_ID"],
        "email": [reason],
    }
