"""The services that are served: their names, and their servicers put together as the settings want them."""

from datetime import timedelta

import grpc

from personae.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    authentication_pb2,
    authentication_pb2_grpc,
    credential_pb2,
    credential_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
)
from service.base.clock import Clock
from service.base.settings import Settings
from service.core.lockout import LockoutKeys
from service.core.page_tokens import PageTokens
from service.core.passwords.policy import PasswordPolicy
from service.db.engine import Database
from service.rpc.admission.hashing import Hashing
from service.rpc.servicers.audit import AuditServicer
from service.rpc.servicers.authentication import AuthenticationServicer
from service.rpc.servicers.credential import CredentialRules, CredentialServicer
from service.rpc.servicers.sign_in import SignIn
from service.rpc.servicers.user import UserServicer
from service.rpc.servicers.user_requests import UserRules

SERVICES = (
    user_pb2.DESCRIPTOR.services_by_name["UserService"],
    authentication_pb2.DESCRIPTOR.services_by_name["AuthenticationService"],
    credential_pb2.DESCRIPTOR.services_by_name["CredentialService"],
    audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
)
SERVICE_NAMES = tuple(service.full_name for service in SERVICES)
METHODS = tuple(f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods)
HASHING_METHODS = {
    "/personae.v1.AuthenticationService/Authenticate": "rpc-hash",
    "/personae.v1.CredentialService/SetPassword": "rpc-hash",
    "/personae.v1.CredentialService/ChangePassword": "rpc-hash",
    "/personae.v1.CredentialService/CompletePasswordReset": "rpc-hash",
    # Apart from the others: most users are created without a password, and must not queue behind sign-ins.
    "/personae.v1.UserService/CreateUser": "rpc-create",
}
"""The RPCs that hash, and on which executor each runs: not on that of the cheap ones."""


def add_servicers(
    server: grpc.Server,
    database: Database,
    settings: Settings,
    *,
    clock: Clock,
    policy: PasswordPolicy,
    hashing: Hashing,
) -> None:
    """Have the server serve all of them. Raises SettingsError for missing SECRET_KEYS."""
    keys = settings.keys()
    lockout_keys = LockoutKeys(keys.derive("lockout"))
    page_tokens = PageTokens(keys.derive("page-token"))
    sign_in = SignIn(
        database,
        clock=clock,
        hashing=hashing,
        bcrypt_cost=settings.bcrypt_cost,
        lockout_keys=lockout_keys,
    )
    users = UserServicer(
        database,
        clock=clock,
        rules=UserRules(
            policy=policy,
            allow_special_domains=settings.email_allow_special_domains,
            purge_after=timedelta(days=settings.purge_after_days),
        ),
        hashing=hashing,
        bcrypt_cost=settings.bcrypt_cost,
        page_tokens=page_tokens,
        fingerprint_keys=keys.derive("request-fingerprint"),
    )
    authentication = AuthenticationServicer(
        database,
        clock=clock,
        sign_in=sign_in,
        lockout_keys=lockout_keys,
        allow_special_domains=settings.email_allow_special_domains,
    )
    credentials = CredentialServicer(
        database,
        clock=clock,
        rules=CredentialRules(
            policy=policy,
            bcrypt_cost=settings.bcrypt_cost,
            allow_special_domains=settings.email_allow_special_domains,
            reset_valid_for=timedelta(seconds=settings.password_reset_valid),
            verification_valid_for=timedelta(seconds=settings.email_verification_valid),
        ),
        sign_in=sign_in,
        hashing=hashing,
        lockout_keys=lockout_keys,
    )
    user_pb2_grpc.add_UserServiceServicer_to_server(users, server)
    authentication_pb2_grpc.add_AuthenticationServiceServicer_to_server(authentication, server)
    credential_pb2_grpc.add_CredentialServiceServicer_to_server(credentials, server)
    trail = AuditServicer(database, page_tokens=page_tokens)
    audit_pb2_grpc.add_AuditServiceServicer_to_server(trail, server)
