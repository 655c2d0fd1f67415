"""The contract of CredentialService, as callers see it: emails that are proved."""

import re
import secrets

import grpc
import pytest

from personae.v1 import authentication_pb2_grpc, credential_pb2_grpc, user_pb2_grpc
from personae.v1 import credential_pb2 as pb
from tests.contract.test_credential_codes import (
    HARMLESS,
    VOIDING,
    Act,
    assert_opens_nothing,
    assert_proves_nothing,
    deactivate,
    delete,
    proof,
    read,
    renamed,
    reset,
    signing_in,
    start_reset,
    start_verification,
    summary,
    unique_email,
)
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name

Code = grpc.StatusCode
Users = user_pb2_grpc.UserServiceStub
Authentication = authentication_pb2_grpc.AuthenticationServiceStub
Credentials = credential_pb2_grpc.CredentialServiceStub

NO_SUCH_ID = 2**63 - 1


class TestStartEmailVerification:
    def test_the_present_email(self, users: Users, credentials: Credentials) -> None:
        """The code goes to the stored email; nothing of the user changes."""
        user = new_user(users)

        answers = [start_verification(credentials, user, email) for email in (None, user.email.upper())]

        assert [answer.deliver_to for answer in answers] == [user.email] * 2
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", answer.code) for answer in answers)
        assert all(answer.expires_at.seconds > user.created_at.seconds for answer in answers)
        assert read(users, user) == user

    def test_a_new_email(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """The code goes to the new one, in stored form; until it comes back the present one stays."""
        user, name = new_user(users, password=PASSWORD), unique_name()

        answer = start_verification(credentials, user, f"{name.upper()}@B\u00dcCHER.de")

        assert answer.deliver_to == f"{name}@xn--bcher-kva.de"
        assert read(users, user) == user
        assert signing_in(authentication, user.email, PASSWORD) == "OK"
        assert signing_in(authentication, answer.deliver_to, PASSWORD) == "INVALID_CREDENTIALS"

    def test_an_email_that_is_taken(self, users: Users, credentials: Credentials) -> None:
        """Another user has it, perhaps a deleted one."""
        user, other, deleted = new_user(users), new_user(users), new_user(users)
        delete(users, deleted)

        for email in (other.email.upper(), deleted.email):
            request = pb.StartEmailVerificationRequest(user_id=user.id, new_email=email)
            failure = fails(credentials.StartEmailVerification, request)
            assert (failure.code, failure.reason) == (Code.ALREADY_EXISTS, "EMAIL_TAKEN")

    def test_a_refusal_leaves_the_open_code(self, users: Users, credentials: Credentials) -> None:
        """Only a newer code voids one."""
        user, other = new_user(users), new_user(users)
        code = start_verification(credentials, user).code
        request = pb.StartEmailVerificationRequest(user_id=user.id, new_email=other.email)
        assert fails(credentials.StartEmailVerification, request).reason == "EMAIL_TAKEN"

        assert credentials.CompleteEmailVerification(proof(code)).HasField("email_verified_at")

    def test_who_cannot_prove_anything(self, users: Users, credentials: Credentials) -> None:
        """Deactivated, deleted and unknown users, each with a reason of its own."""
        inactive, deleted, both = new_user(users, inactive=True), new_user(users), new_user(users, inactive=True)
        delete(users, deleted)
        delete(users, both)
        ids = [inactive.id, deleted.id, both.id, NO_SUCH_ID]

        failures = [
            fails(credentials.StartEmailVerification, pb.StartEmailVerificationRequest(user_id=one)) for one in ids
        ]

        assert [(failure.code, failure.reason) for failure in failures] == [
            (Code.FAILED_PRECONDITION, "USER_INACTIVE"),
            (Code.FAILED_PRECONDITION, "USER_DELETED"),
            (Code.FAILED_PRECONDITION, "USER_DELETED"),
            (Code.NOT_FOUND, "USER_NOT_FOUND"),
        ]

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
    def test_all_that_is_wrong_at_once(self, credentials: Credentials, user_id: int, email: str, reason: str) -> None:
        """An empty new_email is not an unset one."""
        failure = fails(
            credentials.StartEmailVerification, pb.StartEmailVerificationRequest(user_id=user_id, new_email=email)
        )

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"user_id": ["INVALID_ID"], "new_email": [reason]}


class TestCompleteEmailVerification:
    @pytest.mark.parametrize("is_named", [False, True])
    def test_the_present_email(self, users: Users, credentials: Credentials, is_named: bool) -> None:
        """It is verified from now on, and etag and updated_at move; an open reset code stays open."""
        user = new_user(users, password=PASSWORD)
        code = start_verification(credentials, user, user.email.upper() if is_named else None).code
        open_code = start_reset(credentials, user.email).code

        proved = credentials.CompleteEmailVerification(proof(code))

        assert proved.email == user.email
        assert abs(proved.email_verified_at.seconds - proved.updated_at.seconds) < 60
        assert proved.etag != user.etag
        assert proved.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert read(users, user) == proved
        assert credentials.CompletePasswordReset(reset(open_code)) == proved

    def test_a_new_email(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """It replaces the present one, verified; the new one signs in, and the old one is free."""
        user = new_user(users, password=PASSWORD)
        answer = start_verification(credentials, user, unique_email())

        changed = credentials.CompleteEmailVerification(proof(answer.code))

        assert (changed.id, changed.email, changed.username) == (user.id, answer.deliver_to, user.username)
        assert changed.HasField("email_verified_at")
        assert changed.etag != user.etag
        assert changed.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert signing_in(authentication, changed.email, PASSWORD) == "OK"
        assert signing_in(authentication, user.email, PASSWORD) == "INVALID_CREDENTIALS"
        assert renamed(users, new_user(users), email=user.email).email == user.email

    def test_a_new_email_voids_an_open_reset(self, users: Users, credentials: Credentials) -> None:
        """That code lies in a mailbox that is not the user's any more."""
        user = new_user(users, password=PASSWORD)
        open_code = start_reset(credentials, user.email).code

        credentials.CompleteEmailVerification(proof(start_verification(credentials, user, unique_email()).code))

        assert_opens_nothing(credentials, open_code)

    def test_a_verified_email_is_proved_again(self, users: Users, credentials: Credentials) -> None:
        """The time is that of the last proof; a new email is verified though the one before was too."""
        user = new_user(users)
        first = credentials.CompleteEmailVerification(proof(start_verification(credentials, user).code))

        again = credentials.CompleteEmailVerification(proof(start_verification(credentials, user).code))
        changed = credentials.CompleteEmailVerification(
            proof(start_verification(credentials, user, unique_email()).code)
        )

        times = [one.email_verified_at.ToNanoseconds() for one in (first, again, changed)]
        assert times == sorted(set(times))

    def test_a_new_email_that_was_taken_meanwhile(self, users: Users, credentials: Credentials) -> None:
        """EMAIL_TAKEN changes nothing and leaves the code: when the email is free again it works."""
        user = new_user(users)
        answer = start_verification(credentials, user, unique_email())
        faster = renamed(users, new_user(users), email=answer.deliver_to)

        failure = fails(credentials.CompleteEmailVerification, proof(answer.code))

        assert (failure.code, failure.reason) == (Code.ALREADY_EXISTS, "EMAIL_TAKEN")
        assert read(users, user) == user
        renamed(users, faster, email=unique_email())
        assert credentials.CompleteEmailVerification(proof(answer.code)).email == answer.deliver_to

    def test_the_first_of_two_gets_the_email(self, users: Users, credentials: Credentials) -> None:
        """Two users may have the same new email pending; who proves it first has it."""
        one, two, email = new_user(users), new_user(users), unique_email()
        codes = [start_verification(credentials, user, email).code for user in (one, two)]

        assert credentials.CompleteEmailVerification(proof(codes[1])).id == two.id
        assert fails(credentials.CompleteEmailVerification, proof(codes[0])).reason == "EMAIL_TAKEN"

    def test_a_newer_code_voids_the_older(self, users: Users, credentials: Credentials) -> None:
        """The email that is pending is the last one that was asked for."""
        user = new_user(users)
        older = start_verification(credentials, user, unique_email())
        newer = start_verification(credentials, user)

        assert_proves_nothing(credentials, older.code)
        assert credentials.CompleteEmailVerification(proof(newer.code)).email == user.email

    def test_every_code_that_proves_nothing_is_the_same_answer(self, users: Users, credentials: Credentials) -> None:
        """Truncated, made up, for another purpose, used, replaced, void: nobody can tell them apart."""
        user, used, void = new_user(users), new_user(users), new_user(users)
        used_code, void_code = start_verification(credentials, used).code, start_verification(credentials, void).code
        credentials.CompleteEmailVerification(proof(used_code))
        deactivate(users, void)
        replaced, code = start_verification(credentials, user).code, start_verification(credentials, user).code
        codes = [
            code[:-1],
            code.swapcase(),
            secrets.token_urlsafe(32),
            start_reset(credentials, user.email).code,
            used_code,
            void_code,
            replaced,
            "\x00" * 43,
            "x" * 128,
        ]

        failures = [fails(credentials.CompleteEmailVerification, proof(one)) for one in codes]

        assert (failures[0].code, failures[0].reason) == (Code.FAILED_PRECONDITION, "INVALID_CODE")
        assert [summary(failure) for failure in failures] == [summary(failures[0])] * len(codes)
        assert credentials.CompleteEmailVerification(proof(code)).id == user.id

    @pytest.mark.parametrize("code, reason", [("", "REQUIRED"), ("x" * 129, "TOO_LONG"), ("x" * 3_000_000, "TOO_LONG")])
    def test_what_cannot_be_a_code(self, credentials: Credentials, code: str, reason: str) -> None:
        """No code, or a book, is the caller's mistake."""
        failure = fails(credentials.CompleteEmailVerification, proof(code))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"code": [reason]}

    @pytest.mark.parametrize("act", VOIDING, ids=lambda act: act.__name__)
    @pytest.mark.parametrize("is_new", [False, True])
    def test_void_after(self, users: Users, credentials: Credentials, act: Act, is_new: bool) -> None:
        """Neither the present email nor a new one is proved by a code from before."""
        user = new_user(users)
        code = start_verification(credentials, user, unique_email() if is_new else None).code

        act(users, user)

        assert_proves_nothing(credentials, code)

    @pytest.mark.parametrize("act", HARMLESS, ids=lambda act: act.__name__)
    def test_not_void_after(self, users: Users, credentials: Credentials, act: Act) -> None:
        """What leaves email and password alone leaves the code alone."""
        user = new_user(users)
        answer = start_verification(credentials, user, unique_email())

        act(users, user)

        assert credentials.CompleteEmailVerification(proof(answer.code)).email == answer.deliver_to


class TestMarkEmailVerified:
    def test_the_present_email_in_any_case(self, users: Users, credentials: Credentials) -> None:
        """It is verified from now on, and etag and updated_at move; codes stay open. The second time nothing moves."""
        user = new_user(users, inactive=True)
        request = pb.MarkEmailVerifiedRequest(user_id=user.id, email=user.email.upper())

        marked = credentials.MarkEmailVerified(request)

        assert (marked.email, marked.is_active) == (user.email, False)
        assert abs(marked.email_verified_at.seconds - marked.updated_at.seconds) < 60
        assert marked.etag != user.etag
        assert marked.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert credentials.MarkEmailVerified(request) == marked == read(users, user)

    def test_voids_no_code(self, users: Users, credentials: Credentials) -> None:
        """The email is still the same one."""
        user = new_user(users, password=PASSWORD)
        code = start_reset(credentials, user.email).code

        marked = credentials.MarkEmailVerified(pb.MarkEmailVerifiedRequest(user_id=user.id, email=user.email))

        assert credentials.CompletePasswordReset(reset(code)) == marked

    def test_another_email(self, users: Users, credentials: Credentials) -> None:
        """What was proved is not what the user has, or not any more; nothing is changed."""
        user, other = new_user(users), new_user(users)
        changed = renamed(users, user, email=unique_email())

        for email in (user.email, other.email, unique_email()):
            failure = fails(credentials.MarkEmailVerified, pb.MarkEmailVerifiedRequest(user_id=user.id, email=email))
            assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "EMAIL_MISMATCH")
        assert read(users, user) == changed

    def test_deleted_and_unknown_users(self, users: Users, credentials: Credentials) -> None:
        """A deleted user has to be restored first, whatever email was proved."""
        user = new_user(users)
        delete(users, user)
        requests = [
            pb.MarkEmailVerifiedRequest(user_id=user.id, email=user.email),
            pb.MarkEmailVerifiedRequest(user_id=user.id, email=unique_email()),
            pb.MarkEmailVerifiedRequest(user_id=NO_SUCH_ID, email=user.email),
        ]

        failures = [fails(credentials.MarkEmailVerified, request) for request in requests]

        assert [(failure.code, failure.reason) for failure in failures] == [
            (Code.FAILED_PRECONDITION, "USER_DELETED"),
            (Code.FAILED_PRECONDITION, "USER_DELETED"),
            (Code.NOT_FOUND, "USER_NOT_FOUND"),
        ]

    @pytest.mark.parametrize("user_id", [0, -1])
    @pytest.mark.parametrize(
        "email, reason",
        [
            ("", "INVALID_EMAIL"),
            ("not an email", "INVALID_EMAIL"),
            ("nul\x00@example.com", "CONTROL_CHARACTER"),
            ("x" * 3_000_000, "TOO_LONG"),
        ],
    )
    def test_all_that_is_wrong_at_once(self, credentials: Credentials, user_id: int, email: str, reason: str) -> None:
        """An impossible id and no possible email are named together."""
        failure = fails(credentials.MarkEmailVerified, pb.MarkEmailVerifiedRequest(user_id=user_id, email=email))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"user_id": ["INVALID_ID"], "email": [reason]}
