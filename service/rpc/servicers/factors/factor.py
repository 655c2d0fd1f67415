"""FactorService: enrolling and removing second factors, and the second step of a sign-in."""

from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

import grpc

from personae.v1 import authentication_pb2, factor_pb2, factor_pb2_grpc, user_pb2
from service.base.clock import Clock
from service.base.randomness import random_token
from service.core.factors import enrolment, rows, totp
from service.core.factors.enrolment import Proof
from service.core.factors.passkeys import complete_passkey, require_site, start_passkey, start_passkey_sign_in
from service.core.factors.rows import FactorMaker, FactorRecord
from service.core.factors.rules import LABEL_MAX_BYTES
from service.core.factors.tickets import PREFIX, hash_ticket
from service.core.factors.webauthn import CHALLENGE_BYTES
from service.core.sessions.rules import ID_RANDOM_BYTES, new_session_id
from service.core.users import set_mfa_required
from service.db.engine import Database, reading
from service.rpc.context import current, rpc_scope
from service.rpc.factor_messages import KINDS
from service.rpc.servicers.factors.second_step import SecondStep
from service.rpc.servicers.tokens import Tokens, session_key_of
from service.rpc.servicers.wanted_session import wanted_session
from service.rpc.validation import (
    Violations,
    bounded_text,
    etag_version,
    require_id,
    to_timestamp,
    user_id_of,
    user_message,
)

_ID_LENGTH = 36
_NO_ID = UUID(int=0)
_Enrolling: TypeAlias = (
    factor_pb2.StartTotpEnrollmentRequest
    | factor_pb2.CompleteTotpEnrollmentRequest
    | factor_pb2.StartPasskeyEnrollmentRequest
)


@dataclass(eq=False)
class FactorServicer(factor_pb2_grpc.FactorServiceServicer):
    database: Database
    clock: Clock
    tokens: Tokens
    maker: FactorMaker
    second_step: SecondStep

    # -------------------------------------------------------------------------------------------------- enrolling

    def StartTotpEnrollment(
        self, request: factor_pb2.StartTotpEnrollmentRequest, context: grpc.ServicerContext
    ) -> factor_pb2.StartTotpEnrollmentResponse:
        violations = Violations()
        proof = _proof(request, violations)
        label = bounded_text(request.label, "label", violations, max_bytes=LABEL_MAX_BYTES)
        violations.check()
        now = self.clock()
        factor_id = new_session_id(now, self.maker.random(ID_RANDOM_BYTES))
        secret = self.maker.random(totp.SECRET_BYTES)
        with rpc_scope(self.database) as session, session.begin():
            new = enrolment.start_totp(
                session, proof, self.maker, factor_id=factor_id, secret=secret, label=label, now=now
            )
        return factor_pb2.StartTotpEnrollmentResponse(
            factor_id=str(new.id),
            secret=totp.base32(new.secret),
            uri=totp.uri(new.secret, issuer=self.maker.issuer, account=new.user.email),
            expires_at=to_timestamp(new.expires_at),
        )

    def CompleteTotpEnrollment(
        self, request: factor_pb2.CompleteTotpEnrollmentRequest, context: grpc.ServicerContext
    ) -> factor_pb2.CompleteTotpEnrollmentResponse:
        violations = Violations()
        proof = _proof(request, violations)
        factor_id = _factor_id(request.factor_id, "factor_id", violations)
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            factor, codes = enrolment.complete_totp(
                session, proof, self.maker, factor_id, request.code, now=self.clock()
            )
        return factor_pb2.CompleteTotpEnrollmentResponse(factor=_message(factor), recovery_codes=codes)

    def StartPasskeyEnrollment(
        self, request: factor_pb2.StartPasskeyEnrollmentRequest, context: grpc.ServicerContext
    ) -> factor_pb2.StartPasskeyEnrollmentResponse:
        violations = Violations()
        proof = _proof(request, violations)
        violations.check()
        site, ticket = require_site(self.second_step.site), PREFIX + random_token()
        with rpc_scope(self.database) as session, session.begin():
            options, expires_at = start_passkey(session, proof, site, self.maker, ticket, now=self.clock())
        return factor_pb2.StartPasskeyEnrollmentResponse(
            ticket=ticket, options_json=options, expires_at=to_timestamp(expires_at)
        )

    def CompletePasskeyEnrollment(
        self, request: factor_pb2.CompletePasskeyEnrollmentRequest, context: grpc.ServicerContext
    ) -> factor_pb2.CompletePasskeyEnrollmentResponse:
        violations = Violations()
        label = bounded_text(request.label, "label", violations, max_bytes=LABEL_MAX_BYTES)
        violations.check()
        site, now = require_site(self.second_step.site), self.clock()
        passkey_id = new_session_id(now, self.maker.random(ID_RANDOM_BYTES))
        with rpc_scope(self.database) as session, session.begin():
            factor, codes = complete_passkey(
                session,
                request.ticket,
                request.credential_json,
                site,
                self.maker,
                passkey_id=passkey_id,
                label=label,
                caller=current().caller,
                now=now,
            )
        return factor_pb2.CompletePasskeyEnrollmentResponse(factor=_message(factor), recovery_codes=codes)

    def GenerateRecoveryCodes(
        self, request: factor_pb2.GenerateRecoveryCodesRequest, context: grpc.ServicerContext
    ) -> factor_pb2.GenerateRecoveryCodesResponse:
        violations = Violations()
        proof = _session_proof(request.session_id, violations)
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            codes = enrolment.generate_recovery_codes(session, proof, self.maker, now=self.clock())
        return factor_pb2.GenerateRecoveryCodesResponse(recovery_codes=codes)

    # ------------------------------------------------------------------------------------------- looking, removing

    def ListFactors(
        self, request: factor_pb2.ListFactorsRequest, context: grpc.ServicerContext
    ) -> factor_pb2.ListFactorsResponse:
        user_id = user_id_of(request.user_id)
        with rpc_scope(self.database) as session, reading(session):
            factors, left = rows.list_factors(session, user_id)
        return factor_pb2.ListFactorsResponse(factors=[_message(factor) for factor in factors], recovery_codes=left)

    def DeleteFactor(self, request: factor_pb2.DeleteFactorRequest, context: grpc.ServicerContext) -> user_pb2.User:
        violations = Violations()
        factor_id = _factor_id(request.id, "id", violations)
        proof = _session_proof(request.session_id, violations)
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            user = enrolment.delete_factor(session, proof, factor_id, now=self.clock())
        return user_message(user)

    def ResetFactors(self, request: factor_pb2.ResetFactorsRequest, context: grpc.ServicerContext) -> user_pb2.User:
        user_id = user_id_of(request.user_id)
        with rpc_scope(self.database) as session, session.begin():
            user = enrolment.reset_factors(session, user_id)
        return user_message(user)

    def SetMfaRequired(self, request: factor_pb2.SetMfaRequiredRequest, context: grpc.ServicerContext) -> user_pb2.User:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        version = etag_version(request.etag, "etag", violations)
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            user = set_mfa_required(session, user_id, is_required=request.is_mfa_required, version=version)
        return user_message(user)

    # -------------------------------------------------------------------------------------------------- signing in

    def StartPasskeySignIn(
        self, request: factor_pb2.StartPasskeySignInRequest, context: grpc.ServicerContext
    ) -> factor_pb2.StartPasskeySignInResponse:
        site, ticket = require_site(self.second_step.site), PREFIX + random_token()
        challenge = self.maker.random(CHALLENGE_BYTES)
        with rpc_scope(self.database) as session, session.begin():
            options, expires_at = start_passkey_sign_in(
                session, site, ticket, challenge, caller=current().caller, now=self.clock()
            )
        return factor_pb2.StartPasskeySignInResponse(
            ticket=ticket, options_json=options, expires_at=to_timestamp(expires_at)
        )

    def CompleteSecondFactor(
        self, request: factor_pb2.CompleteSecondFactorRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.AuthenticateResponse:
        violations = Violations()
        answer = self.second_step.answer_of(request)
        if answer is None:
            violations.add("totp_code", "REQUIRED", "or another answer must be given")
        wanted = wanted_session(request, self.tokens, self.clock, violations)
        if answer is None:
            raise AssertionError("a request without an answer has a violation")
        return self.second_step.complete(request.ticket, answer, wanted)


def _proof(request: _Enrolling, violations: Violations) -> Proof:
    """Who enrols."""
    match request.WhichOneof("proof"):
        case "ticket":
            return Proof(current().caller, ticket_hash=hash_ticket(request.ticket))
        case _:
            return _session_proof(request.session_id, violations)


def _session_proof(session_id: str, violations: Violations) -> Proof:
    return Proof(current().caller, session_key_of(session_id, "session_id", violations))


def _factor_id(text: str, field: str, violations: Violations) -> UUID:
    """The id of a factor; one that no factor has, for a text that is none."""
    if not text:
        violations.add(field, "REQUIRED", "must say which factor")
    try:
        return UUID(text) if len(text) == _ID_LENGTH else _NO_ID
    except ValueError:
        return _NO_ID


def _message(factor: FactorRecord) -> factor_pb2.Factor:
    return factor_pb2.Factor(
        id=str(factor.id),
        user_id=factor.user_id,
        kind=KINDS[factor.kind],
        label=factor.label,
        confirmed_at=to_timestamp(factor.confirmed_at),
        last_used_at=to_timestamp(factor.last_used_at),
        is_synced=factor.is_synced,
    )
