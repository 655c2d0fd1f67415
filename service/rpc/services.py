"""The services of the gRPC port, and the registration of what serves them."""

import grpc

from personae.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    authentication_pb2,
    authentication_pb2_grpc,
    credential_pb2,
    credential_pb2_grpc,
    factor_pb2,
    factor_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    signing_key_pb2,
    signing_key_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
)
from service.rpc.envoy import ext_authz_pb2, ext_authz_pb2_grpc
from service.rpc.methods import Response
from service.rpc.proxies.envoy import AuthorizationServicer
from service.rpc.servicers.audit import AuditServicer
from service.rpc.servicers.authentication import AuthenticationServicer
from service.rpc.servicers.credential import CredentialServicer
from service.rpc.servicers.factors.factor import FactorServicer
from service.rpc.servicers.session import SessionServicer
from service.rpc.servicers.signing_key import SigningKeyServicer
from service.rpc.servicers.users.user import UserServicer

SERVICES = (
    user_pb2.DESCRIPTOR.services_by_name["UserService"],
    authentication_pb2.DESCRIPTOR.services_by_name["AuthenticationService"],
    credential_pb2.DESCRIPTOR.services_by_name["CredentialService"],
    audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
    session_pb2.DESCRIPTOR.services_by_name["SessionService"],
    signing_key_pb2.DESCRIPTOR.services_by_name["SigningKeyService"],
    factor_pb2.DESCRIPTOR.services_by_name["FactorService"],
    ext_authz_pb2.DESCRIPTOR.services_by_name["Authorization"],
)
SERVICE_NAMES = tuple(service.full_name for service in SERVICES)
SERVED_METHODS = {
    f"/{service.full_name}/{method.name}": Response.STREAM if method.server_streaming else Response.MESSAGE
    for service in SERVICES
    for method in service.methods
}
"""The kind of response of each RPC, as the proto declares it."""

SESSION_SERVICE = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name


def add_to_server(
    server: grpc.Server,
    *,
    users: UserServicer,
    authentication: AuthenticationServicer,
    credentials: CredentialServicer,
    audit: AuditServicer,
    sessions: SessionServicer,
    signing_keys: SigningKeyServicer,
    factors: FactorServicer,
    authorization: AuthorizationServicer,
) -> None:
    """Serve each of SERVICES on this server."""
    user_pb2_grpc.add_UserServiceServicer_to_server(users, server)
    authentication_pb2_grpc.add_AuthenticationServiceServicer_to_server(authentication, server)
    credential_pb2_grpc.add_CredentialServiceServicer_to_server(credentials, server)
    audit_pb2_grpc.add_AuditServiceServicer_to_server(audit, server)
    session_pb2_grpc.add_SessionServiceServicer_to_server(sessions, server)
    signing_key_pb2_grpc.add_SigningKeyServiceServicer_to_server(signing_keys, server)
    factor_pb2_grpc.add_FactorServiceServicer_to_server(factors, server)
    ext_authz_pb2_grpc.add_AuthorizationServicer_to_server(authorization, server)
