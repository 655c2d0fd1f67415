"""Messages of second factors, and how their kinds are spelled on the wire."""

from personae.v1 import authentication_pb2
from service.core.factors.rules import FactorKind
from service.core.factors.second_step import Challenge
from service.rpc.validation import to_timestamp

KINDS = {
    FactorKind.TOTP: authentication_pb2.FACTOR_KIND_TOTP,
    FactorKind.RECOVERY_CODE: authentication_pb2.FACTOR_KIND_RECOVERY_CODE,
    FactorKind.PASSKEY: authentication_pb2.FACTOR_KIND_PASSKEY,
}


def challenge_message(challenge: Challenge) -> authentication_pb2.SecondFactorChallenge:
    """What the details of MFA_REQUIRED tell."""
    return authentication_pb2.SecondFactorChallenge(
        ticket=challenge.ticket,
        kinds=[KINDS[kind] for kind in challenge.kinds],
        expires_at=to_timestamp(challenge.expires_at),
        enrollment_required=challenge.is_enrolment,
        passkey_options_json=challenge.passkey_options,
    )
