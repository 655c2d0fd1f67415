"""CredentialService: unpacks, judges and hashes a new password outside any transaction, changes, packs the user."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

import grpc
from sqlalchemy.orm import Session

from personae.v1 import credential_pb2, credential_pb2_grpc, user_pb2
from service.base.clock import Clock, monotonic
from service.base.errors import (
    InvalidFieldsError,
    PasswordChangeRequiredError,
    StoredHashError,
    UserNotFoundError,
    Violation,
)
from service.base.randomness import random_token
from service.core import audit, codes, credentials, users
from service.core.codes import CODE_MAX_BYTES, Purpose
from service.core.identifiers import to_nfc
from service.core.lockout import LockoutKeys
from service.core.passwords import hash_password, is_match, is_over_ceiling, parse_hash
from service.core.passwords.policy import Names, PasswordPolicy, unchanged
from service.core.users import Key, UserRecord
from service.db.engine import Database, reading
from service.rpc.admission.hashing import HashLimiter
from service.rpc.context import current, rpc_scope
from service.rpc.pipeline.retries import repeated
from service.rpc.servicers.sign_in import SETTLE_SECONDS, SignIn, Subject, subject_of
from service.rpc.validation import Violations, bounded_text, email_of, instant, require_id, stamp, user_message

_IDENTIFIER_MAX_BYTES = 1024
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CredentialRules:
    """The settings that decide which passwords and emails are taken, and how long codes are open."""

    policy: PasswordPolicy
    bcrypt_cost: int
    allow_special_domains: bool
    reset_valid_for: timedelta
    verification_valid_for: timedelta


@dataclass(frozen=True, slots=True)
class _NewPassword:
    user_id: int
    password: str = field(repr=False)
    is_change_required: bool
    expires_at: datetime | None


class CredentialServicer(credential_pb2_grpc.CredentialServiceServicer):
    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        rules: CredentialRules,
        sign_in: SignIn,
        hashing: HashLimiter,
        lockout_keys: LockoutKeys,
    ) -> None:
        self._database = database
        self._clock = clock
        self._rules = rules
        self._sign_in = sign_in
        self._hashing = hashing
        self._keys = lockout_keys

    # ------------------------------------------------------------------------------------------------- passwords

    def SetPassword(self, request: credential_pb2.SetPasswordRequest, context: grpc.ServicerContext) -> user_pb2.User:
        violations = Violations()
        new = _new_password(request, violations, now=self._clock())
        with rpc_scope(self._database) as session, reading(session):
            user = users.find_user(session, Key("id", new.user_id))
        if request.password:
            violations.found += self._violations(new.password, user, "password")
        violations.check()
        if user is None:
            raise UserNotFoundError
        users.require_live(user)
        hashed = self._hash(new.password)

        def settle(session: Session) -> UserRecord:
            return credentials.set_password(
                session,
                user,
                hashed,
                is_change_required=new.is_change_required,
                expires_at=new.expires_at,
                now=self._clock(),
                keys=self._keys,
            )

        return user_message(self._settled(settle, current().deadline))

    def RequirePasswordChange(
        self, request: credential_pb2.RequirePasswordChangeRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        violations.check()
        with rpc_scope(self._database) as session, session.begin():
            user = credentials.require_password_change(session, user_id)
        return user_message(user)

    def ChangePassword(
        self, request: credential_pb2.ChangePasswordRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        _check_present(request.new_password, "new_password", violations)
        violations.check()
        with self._hashing.permit() as hash_:
            candidate, outcome = self._sign_in.attempt(
                Subject(Key("id", user_id)),
                request.current_password,
                hash_,
                action="VerifyCurrentPassword",
                forgives=PasswordChangeRequiredError,  # this is what it is required for
                renews=False,
            )
            user = outcome.or_raise()
            self._check_changed(request, user)  # only now: what is wrong with it tells something of the user
            hashed = hash_(hash_password, request.new_password, self._rules.bcrypt_cost)

        def settle(session: Session) -> UserRecord:
            return credentials.change_password(
                session,
                user,
                hashed,
                changed_at=candidate.password_changed_at,
                now=self._clock(),
                keys=self._keys,
            )

        return user_message(self._settled(settle, current().deadline))

    def CheckPassword(
        self, request: credential_pb2.CheckPasswordRequest, context: grpc.ServicerContext
    ) -> credential_pb2.CheckPasswordResponse:
        user = None
        if request.HasField("user_id"):
            violations = Violations()
            key = Key("id", require_id(request.user_id, "user_id", violations))
            violations.check()
            with rpc_scope(self._database) as session, reading(session):
                user = users.get_user(session, key)
        return credential_pb2.CheckPasswordResponse(
            violations=[_violation_message(one) for one in self._violations(request.password, user, "password")]
        )

    # ------------------------------------------------------------------------------------------------- reset

    def StartPasswordReset(
        self, request: credential_pb2.StartPasswordResetRequest, context: grpc.ServicerContext
    ) -> credential_pb2.StartPasswordResetResponse:
        violations = Violations()
        if not request.identifier:
            violations.add("identifier", "REQUIRED", "must say whose password is to be reset")
        bounded_text(request.identifier, "identifier", violations, max_bytes=_IDENTIFIER_MAX_BYTES)
        violations.check()
        subject = subject_of(request.identifier, allow_special_domains=self._rules.allow_special_domains)
        code = random_token()
        expires_at = self._clock() + self._rules.reset_valid_for
        with rpc_scope(self._database) as session, session.begin():
            email = codes.start_for_name(
                session,
                Purpose.PASSWORD_RESET,
                subject.key,
                name_hash=self._keys.of(*subject.name)[0].hex()[:32],
                code_hash=codes.hash_code(code),
                expires_at=expires_at,
            )
        return credential_pb2.StartPasswordResetResponse(code=code, expires_at=stamp(expires_at), deliver_to=email)

    def CompletePasswordReset(
        self, request: credential_pb2.CompletePasswordResetRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        _check_present(request.new_password, "new_password", violations)
        _check_code(request.code, violations)
        if violations.found and request.new_password:  # nobody's code: all that can be said of the password as well
            violations.found += self._violations(request.new_password, None, "new_password")
        violations.check()
        with rpc_scope(self._database) as session, reading(session):
            code = codes.require_open(session, Purpose.PASSWORD_RESET, request.code, now=self._clock())
        _refuse(self._violations(request.new_password, code.user, "new_password"))
        # Whoever has a code could try by it what the present password is. So that is asked last and a few times only,
        # and whoever asks and is wrong has reset the password, in the open, also when the caller's time is over.
        with self._hashing.permit() as hash_:
            with rpc_scope(self._database) as session, session.begin():
                codes.count_try(session, code)
            hashed = hash_(_hash_another, request.new_password, code.stored_hash, self._rules.bcrypt_cost)
        if hashed is None:
            # Whoever did this knows the present password by now: that must be found out by more than the counter.
            self._settled(partial(_record_refusal, user_id=code.user.id), monotonic() + SETTLE_SECONDS)
            raise InvalidFieldsError([unchanged("new_password")])

        def settle(session: Session) -> UserRecord:
            return credentials.reset_password(session, code, hashed, now=self._clock(), keys=self._keys)

        return user_message(self._settled(settle, monotonic() + SETTLE_SECONDS))

    def _settled(self, settle: Callable[[Session], _T], until: float) -> _T:
        """Write what was hashed, in a transaction that is repeated alone: nothing is hashed or counted again."""

        def piece() -> _T:
            with rpc_scope(self._database, deadline=until) as session, session.begin():
                return settle(session)

        return repeated(piece, until=until)

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
        expires_at = self._clock() + self._rules.verification_valid_for
        with rpc_scope(self._database) as session, session.begin():
            email = credentials.start_email_verification(
                session, user_id, new_email, code_hash=codes.hash_code(code), expires_at=expires_at
            )
        return credential_pb2.StartEmailVerificationResponse(code=code, expires_at=stamp(expires_at), deliver_to=email)

    def CompleteEmailVerification(
        self, request: credential_pb2.CompleteEmailVerificationRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        _check_code(request.code, violations)
        violations.check()
        with rpc_scope(self._database) as session, session.begin():
            user = credentials.complete_email_verification(session, request.code, now=self._clock())
        return user_message(user)

    def MarkEmailVerified(
        self, request: credential_pb2.MarkEmailVerifiedRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        email = self._email(request.email, "email", violations)
        violations.check()
        with rpc_scope(self._database) as session, session.begin():
            user = credentials.mark_email_verified(session, user_id, email, now=self._clock())
        return user_message(user)

    # ------------------------------------------------------------------------------------------------- shared

    def _violations(self, password: str, user: UserRecord | None, field_name: str) -> list[Violation]:
        names = None if user is None else Names(user.email, user.username)
        return self._rules.policy.violations(password, names, field_name=field_name)

    def _check_changed(self, request: credential_pb2.ChangePasswordRequest, user: UserRecord) -> None:
        """Raises InvalidFieldsError for a new password that breaks the policy, or is the current one."""
        found = self._violations(request.new_password, user, "new_password")
        if not is_over_ceiling(request.new_password) and to_nfc(request.new_password) == to_nfc(
            request.current_password
        ):
            found.append(unchanged("new_password"))
        _refuse(found)

    def _hash(self, password: str) -> str:
        with self._hashing.permit() as hash_:
            return hash_(hash_password, password, self._rules.bcrypt_cost)

    def _email(self, typed: str, field_name: str, violations: Violations) -> str:
        return email_of(typed, field_name, violations, allow_special_domains=self._rules.allow_special_domains)


def _new_password(request: credential_pb2.SetPasswordRequest, violations: Violations, *, now: datetime) -> _NewPassword:
    user_id = require_id(request.user_id, "user_id", violations)
    _check_present(request.password, "password", violations)
    expires_at = None
    if request.HasField("expires_at"):
        expires_at = instant(request.expires_at, "expires_at", violations)
        if expires_at is not None and expires_at <= now:
            violations.add("expires_at", "NOT_IN_THE_FUTURE", "must lie in the future")
    return _NewPassword(user_id, request.password, request.require_change, expires_at)


def _hash_another(password: str, stored: str | None, cost: int) -> str | None:
    """The hash of a password that is another than the stored one; None when it is the same.

    A damaged hash is nobody's password: a reset is what heals it.
    """
    if stored is not None:
        with contextlib.suppress(StoredHashError):
            if is_match(password, stored, reference_cost=parse_hash(stored).cost):
                return None
    return hash_password(password, cost)


def _record_refusal(session: Session, *, user_id: int) -> None:
    audit.record(session, "CompletePasswordReset", target_user_id=user_id, refusal=InvalidFieldsError.reason)


def _check_present(password: str, field_name: str, violations: Violations) -> None:
    if not password:
        violations.add(field_name, "REQUIRED", "must be set")


def _check_code(code: str, violations: Violations) -> None:
    if not code:
        violations.add("code", "REQUIRED", "must be the code that was delivered")
    elif len(code) > CODE_MAX_BYTES or len(code.encode()) > CODE_MAX_BYTES:
        violations.add("code", "TOO_LONG", f"must not be longer than {CODE_MAX_BYTES} bytes")


def _refuse(violations: list[Violation]) -> None:
    if violations:
        raise InvalidFieldsError(violations)


def _violation_message(violation: Violation) -> credential_pb2.PasswordViolation:
    return credential_pb2.PasswordViolation(
        reason=credential_pb2.PasswordViolation.Reason.Value(f"REASON_{violation.reason}"),
        description=violation.description,
    )
