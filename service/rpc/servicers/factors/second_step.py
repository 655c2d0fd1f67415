"""The second step of a sign-in, as Authenticate and CompleteSecondFactor make it."""

from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from personae.v1 import authentication_pb2, factor_pb2
from service.base.clock import Clock
from service.base.errors import PersonaeError
from service.base.errors.factors import MfaRequiredError
from service.base.randomness import random_token
from service.core.factors import second_step
from service.core.factors.passkeys import find_owner
from service.core.factors.recovery_codes import RANDOM_BYTES, code_of
from service.core.factors.rows import FactorMaker
from service.core.factors.rules import FactorKind
from service.core.factors.second_step import Completed, FactorAnswer
from service.core.factors.tickets import PREFIX, FirstStep, find_first_step, hash_ticket
from service.core.factors.webauthn import CHALLENGE_BYTES, RelyingParty
from service.core.lockout import LockoutKeys
from service.core.users import UserRecord
from service.db.engine import Database
from service.rpc.context import current
from service.rpc.pipeline.retries import retry_transaction
from service.rpc.servicers.sign_in import Subject
from service.rpc.servicers.wanted_session import SignInRequest, WantedSession


@dataclass(frozen=True)
class SecondStep:
    """Asks for second factors, and takes the answers."""

    database: Database
    clock: Clock
    maker: FactorMaker
    lockout_keys: LockoutKeys
    site: RelyingParty | None

    def answer_of(self, request: SignInRequest) -> FactorAnswer | None:
        """What the request answers with; None: it has no answer."""
        replacement = code_of(self.maker.random(RANDOM_BYTES))
        match request.WhichOneof("second_factor"):
            case "totp_code":
                return FactorAnswer(FactorKind.TOTP, request.totp_code, replacement)
            case "recovery_code":
                return FactorAnswer(FactorKind.RECOVERY_CODE, request.recovery_code, replacement)
            case "passkey_json" if isinstance(request, factor_pb2.CompleteSecondFactorRequest):
                return FactorAnswer(FactorKind.PASSKEY, request.passkey_json, replacement)
            case _:
                return None

    def complete(
        self, proved: FirstStep | str, answer: FactorAnswer, wanted: WantedSession
    ) -> authentication_pb2.AuthenticateResponse:
        """Take the answer. proved: the right password, or the ticket for it. Raises the errors of the second step."""
        call = current()
        call.factor = answer.kind

        def write(session: Session) -> Completed:
            first = self._first_step(session, proved, answer) if isinstance(proved, str) else proved
            return second_step.complete(
                session,
                first,
                answer,
                self.lockout_keys.of(first.counted_name, first.name) if first.has_password else (),
                sealer=self.maker.sealer,
                site=self.site,
                caller=call.caller,
                client=wanted.client,
                changes=wanted.changes,
                now=self.clock(),
                finish=wanted.settle,
            )

        # Alone: Authenticate has hashed and committed before.
        completed = retry_transaction(self.database, write, deadline=call.deadline, is_idempotent=False)
        response = wanted.response(completed.or_raise())
        if completed.recovery_codes is not None:
            response.recovery_code.CopyFrom(
                authentication_pb2.RecoveryCodeUse(
                    replacement_code=answer.replacement, remaining=completed.recovery_codes
                )
            )
        return response

    def _first_step(self, session: Session, ticket: str, answer: FactorAnswer) -> FirstStep:
        """What the ticket stands for. Only a passkey can be the first step itself."""
        caller, now, ticket_hash = current().caller, self.clock(), hash_ticket(ticket)
        alone = None
        if answer.kind is FactorKind.PASSKEY:
            alone = find_owner(session, ticket_hash, answer.typed, caller=caller, now=now)
        return alone or find_first_step(session, ticket_hash, caller=caller, now=now)


@dataclass(eq=False)
class AfterPassword:
    """What the right password leads to: the session, or the question for the second factor. `settle` runs in the
    transaction of the first step. Its repr shows no ticket and no email.
    """

    step: SecondStep
    subject: Subject
    wanted: WantedSession
    answer: FactorAnswer | None
    ticket: str = field(repr=False)
    nonce: bytes = field(repr=False)
    proved: FirstStep | None = field(default=None, repr=False)
    """Set when the answer is to be looked at next."""

    @classmethod
    def of(
        cls, step: SecondStep, subject: Subject, wanted: WantedSession, answer: FactorAnswer | None
    ) -> "AfterPassword":
        return cls(step, subject, wanted, answer, PREFIX + random_token(), step.maker.random(CHALLENGE_BYTES))

    def settle(self, session: Session, user: UserRecord, access_epoch: int) -> PersonaeError | None:
        """See authn.Finish."""
        if not user.needs_second_factor:
            return self.wanted.settle(session, user, access_epoch)
        is_by_username = self.subject.key is not None and self.subject.key.column == "username"
        first = FirstStep(
            user.id,
            access_epoch,
            "username" if is_by_username else "email",
            user.username if is_by_username else user.email,
        )
        if self.answer is not None and user.has_second_factor:
            self.proved = first
            return MfaRequiredError()
        return MfaRequiredError(
            second_step.challenge(
                session,
                user,
                first,
                ticket=self.ticket,
                ticket_hash=hash_ticket(self.ticket),
                site=self.step.site,
                nonce=self.nonce,
                caller=self.wanted.caller,
                now=self.step.clock(),
            )
        )
