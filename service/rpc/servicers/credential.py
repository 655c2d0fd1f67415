"""CredentialService: passwords, their reset, and email verification. Passwords are hashed outside any transaction."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import grpc
from sqlalchemy.orm import Session

from personae.v1 import credential_pb2, credential_pb2_grpc, user_pb2
from service.base.clock import Clock
from service.base.errors import (
    InvalidFieldsError,
    PasswordChangeRequiredError,
    UserNotFoundError,
    Violation,
)
from service.base.randomness import random_token
from service.core import codes, credentials, users
from service.core.codes import CODE_MAX_BYTES, CodePurpose
from service.core.identifiers import to_nfc, without_blanks
from service.core.lockout import LockoutKeys
from service.core.passwords import hash_password, is_over_ceiling
from service.core.passwords.policy import Names, unchanged
from service.core.users import UserKey, UserRecord
from service.db.engine import Database, reading
from service.rpc.admission.hashing import HashLimiter
from service.rpc.context import current, rpc_scope
from service.rpc.pipeline.retries import retry_transaction
from service.rpc.servicers.rules import Rules
from service.rpc.servicers.sign_in import SignIn, Subject, subject_of
from service.rpc.servicers.tokens import session_key_of
from service.rpc.validation import (
    Violations,
    bounded_text,
    email_of,
    require_id,
    to_datetime,
    to_timestamp,
    user_id_of,
    user_message,
)

_IDENTIFIER_MAX_BYTES = 1024


@dataclass(eq=False)
class CredentialServicer(credential_pb2_grpc.CredentialServiceServicer):
    database: Database
    clock: Clock
    rules: Rules
    hashing: HashLimiter
    sign_in: SignIn
    lockout_keys: LockoutKeys

    # ------------------------------------------------------------------------------------------------- passwords

    def SetPassword(self, request: credential_pb2.SetPasswordRequest, context: grpc.ServicerContext) -> user_pb2.User:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        _check_present(request.password, "password", violations)
        expires_at = _expires_at(request, violations, now=self.clock())
        with rpc_scope(self.database) as session, reading(session):
            user = users.find_user(session, UserKey("id", user_id))
            if user is not None:
                users.require_may_change(session, user)
        if request.password:
            violations.found += self._violations(request.password, user, "password")
        violations.check()
        if user is None:
            raise UserNotFoundError
        users.require_live(user)
        hashed = self.hashing.run(hash_password, request.password, self.rules.bcrypt_cost)

        def write(session: Session) -> UserRecord:
            return credentials.set_password(
                session,
                user,
                hashed,
                is_change_required=request.require_change,
                expires_at=expires_at,
                now=self.clock(),
                keys=self.lockout_keys,
            )

        return user_message(retry_transaction(self.database, write, deadline=current().deadline))

    def RequirePasswordChange(
        self, request: credential_pb2.RequirePasswordChangeRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        user_id = user_id_of(request.user_id)
        with rpc_scope(self.database) as session, session.begin():
            user = credentials.require_password_change(session, user_id)
        return user_message(user)

    def RemovePassword(
        self, request: credential_pb2.RemovePasswordRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        user_id = user_id_of(request.user_id)
        with rpc_scope(self.database) as session, session.begin():
            user = credentials.remove_password(session, user_id, now=self.clock())
        return user_message(user)

    def ChangePassword(
        self, request: credential_pb2.ChangePasswordRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        _check_present(request.new_password, "new_password", violations)
        kept = _kept_session(request, violations)
        violations.check()
        with self.hashing.permit() as hash_:
            candidate, outcome = self.sign_in.attempt(
                Subject(UserKey("id", user_id)),
                request.current_password,
                hash_,
                action="VerifyCurrentPassword",
                forgives=PasswordChangeRequiredError,  # the caller is about to meet the requirement
                renews=False,
            )
            user = outcome.or_raise()
            self._check_new_password(request, user)  # not earlier: the violations reveal data of the user
            hashed = hash_(hash_password, request.new_password, self.rules.bcrypt_cost)

        def write(session: Session) -> UserRecord:
            return credentials.change_password(
                session,
                user,
                hashed,
                changed_at=candidate.password_changed_at,
                keep_session=kept,
                now=self.clock(),
                keys=self.lockout_keys,
            )

        return user_message(retry_transaction(self.database, write, deadline=current().deadline))

    def CheckPassword(
        self, request: credential_pb2.CheckPasswordRequest, context: grpc.ServicerContext
    ) -> credential_pb2.CheckPasswordResponse:
        user = None
        if request.HasField("user_id"):
            key = UserKey("id", user_id_of(request.user_id))
            with rpc_scope(self.database) as session, reading(session):
                user = users.get_user(session, key)
        return credential_pb2.CheckPasswordResponse(
            violations=[
                credential_pb2.PasswordViolation(
                    reason=credential_pb2.PasswordViolation.Reason.Value(f"REASON_{violation.reason}"),
                    description=violation.description,
                )
                for violation in self._violations(request.password, user, "password")
            ]
        )

    # ------------------------------------------------------------------------------------------------- reset

    def StartPasswordReset(
        self, request: credential_pb2.StartPasswordResetRequest, context: grpc.ServicerContext
    ) -> credential_pb2.StartPasswordResetResponse:
        violations = Violations()
        identifier = without_blanks(request.identifier)
        if not identifier:
            violations.add("identifier", "REQUIRED", "must say whose password is to be reset")
        bounded_text(identifier, "identifier", violations, max_bytes=_IDENTIFIER_MAX_BYTES)
        violations.check()
        subject = subject_of(identifier, allow_special_domains=self.rules.allow_special_domains)
        code = random_token()
        expires_at = self.clock() + self.rules.reset_valid_for
        with rpc_scope(self.database) as session, session.begin():
            email = codes.start_for_name(
                session,
                CodePurpose.PASSWORD_RESET,
                subject.key,
                name_hash=self.lockout_keys.of(*subject.name)[0].hex()[:32],
                code_hash=codes.hash_code(code),
                expires_at=expires_at,
            )
        return credential_pb2.StartPasswordResetResponse(
            code=code, expires_at=to_timestamp(expires_at), deliver_to=email
        )

    def CompletePasswordReset(
        self, request: credential_pb2.CompletePasswordResetRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        _check_present(request.new_password, "new_password", violations)
        _check_code(request.code, violations)
        if violations.found and request.new_password:  # no lookup follows, so report the password's violations now
            violations.found += self._violations(request.new_password, None, "new_password")
        violations.check()
        with rpc_scope(self.database) as session, reading(session):
            code = codes.require_open(session, CodePurpose.PASSWORD_RESET, request.code, now=self.clock())
        violations.found += self._violations(request.new_password, code.user, "new_password")
        violations.check()
        # Not compared with the present password: the answer would tell anybody with a code what that is.
        hashed = self.hashing.run(hash_password, request.new_password, self.rules.bcrypt_cost)

        def write(session: Session) -> UserRecord:
            return credentials.reset_password(session, code, hashed, now=self.clock(), keys=self.lockout_keys)

        return user_message(retry_transaction(self.database, write, deadline=current().deadline))

    # ------------------------------------------------------------------------------------------------- emails

    def StartEmailVerification(
        self, request: credential_pb2.StartEmailVerificationRequest, context: grpc.ServicerContext
    ) -> credential_pb2.StartEmailVerificationResponse:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        new_email = None
        if request.HasField("new_email"):
            new_email = self._email(request.new_email, "new_email", violations)
        violations.check()
        code = random_token()
        expires_at = self.clock() + self.rules.verification_valid_for
        with rpc_scope(self.database) as session, session.begin():
            email = credentials.start_email_verification(
                session, user_id, new_email, code_hash=codes.hash_code(code), expires_at=expires_at
            )
        return credential_pb2.StartEmailVerificationResponse(
            code=code, expires_at=to_timestamp(expires_at), deliver_to=email
        )

    def CompleteEmailVerification(
        self, request: credential_pb2.CompleteEmailVerificationRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        _check_code(request.code, violations)
        user_id = require_id(request.user_id, "user_id", violations) if request.HasField("user_id") else None
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            user = credentials.complete_email_verification(
                session, request.code, of=user_id, drops_password=request.drop_password, now=self.clock()
            )
        return user_message(user)

    def MarkEmailVerified(
        self, request: credential_pb2.MarkEmailVerifiedRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        email = self._email(request.email, "email", violations)
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            user = credentials.mark_email_verified(
                session, user_id, email, drops_password=request.drop_password, now=self.clock()
            )
        return user_message(user)

    # ------------------------------------------------------------------------------------------------- shared

    def _violations(self, password: str, user: UserRecord | None, field_name: str) -> list[Violation]:
        names = None if user is None else Names(user.email, user.username)
        return self.rules.policy.violations(password, names, field_name=field_name)

    def _check_new_password(self, request: credential_pb2.ChangePasswordRequest, user: UserRecord) -> None:
        """Raises InvalidFieldsError for a new password that violates the policy or equals the current one."""
        found = self._violations(request.new_password, user, "new_password")
        if not is_over_ceiling(request.new_password) and to_nfc(request.new_password) == to_nfc(
            request.current_password
        ):
            found.append(unchanged("new_password"))
        if found:
            raise InvalidFieldsError(found)

    def _email(self, typed: str, field_name: str, violations: Violations) -> str:
        return email_of(typed, field_name, violations, allow_special_domains=self.rules.allow_special_domains)


def _expires_at(
    request: credential_pb2.SetPasswordRequest, violations: Violations, *, now: datetime
) -> datetime | None:
    if not request.HasField("expires_at"):
        return None
    expires_at = to_datetime(request.expires_at, "expires_at", violations)
    if expires_at is not None and expires_at <= now:
        violations.add("expires_at", "NOT_IN_THE_FUTURE", "must lie in the future")
    return expires_at


def _kept_session(request: credential_pb2.ChangePasswordRequest, violations: Violations) -> UUID | None:
    if not request.keep_session_id:
        return None
    key = session_key_of(request.keep_session_id, "keep_session_id", violations)
    if key.user_id not in {0, request.user_id}:
        violations.add("keep_session_id", "INVALID_ID", "must be the id of a session of this user")
    return key.id


def _check_present(password: str, field_name: str, violations: Violations) -> None:
    if not password:
        violations.add(field_name, "REQUIRED", "must be set")


def _check_code(code: str, violations: Violations) -> None:
    if not code:
        violations.add("code", "REQUIRED", "must be the code that was delivered")
    elif len(code) > CODE_MAX_BYTES or len(code.encode()) > CODE_MAX_BYTES:
        violations.add("code", "TOO_LONG", f"must not be longer than {CODE_MAX_BYTES} bytes")
