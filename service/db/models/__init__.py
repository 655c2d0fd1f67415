"""All tables: importing this package is what lets migrations see every one of them."""

from service.db.models.audit_event import AuditEvent, AuditRetention
from service.db.models.base import Base, table_of
from service.db.models.caller import Caller, CallerIdentity, CallerKey
from service.db.models.code import Code
from service.db.models.factor import FactorFailure, Passkey, RecoveryCode, SignInTicket, TotpFactor
from service.db.models.import_scheme import ImportScheme
from service.db.models.lockout import Lockout
from service.db.models.request_id import RequestId
from service.db.models.session import Session
from service.db.models.signing_key import SigningKey
from service.db.models.user import User

__all__ = [
    "AuditEvent",
    "AuditRetention",
    "Base",
    "Caller",
    "CallerIdentity",
    "CallerKey",
    "Code",
    "FactorFailure",
    "ImportScheme",
    "Lockout",
    "Passkey",
    "RecoveryCode",
    "RequestId",
    "Session",
    "SignInTicket",
    "SigningKey",
    "TotpFactor",
    "User",
    "table_of",
]
