"""The contract of CredentialService: proving an email, by its code or by an operator's word."""

import secrets
from collections.abc import Callable

import pytest

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from tests.support.codes import (
    CODE,
    NEW_EMAIL,
    NO_SUCH_ID,
    PRESENT_EMAIL,
    complete_reset,
    delete,
    mark,
    require_a_change,
    verify,
)
from tests.support.credentials import NEW, by, change, outcome, signing_in, start_reset, start_verification
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_email, unique_name
from tests.support.servers import Services


class TestEmailVerification:
    @pytest.mark.parametrize("is_named", [False, True])
    def test_the_present_email(self, api: Services, is_named: bool) -> None:
        """The code is for the stored email. Its use changes etag and updated_at. An open reset code stays open."""
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
        """The code is for the new email, which then replaces the present one and is verified; the old one is free."""
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
        """If the caller asks for it. Then a reset by the verified email is the only way back."""
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
        """It is verified from now on, and etag and updated_at change. The second call changes nothing."""
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
