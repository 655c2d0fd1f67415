"""All RPCs that change a user, and a server with a caller that may change superusers and one that may not."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, credential_pb2, factor_pb2, session_pb2, user_pb2
from service.rpc.methods import ALL_SCOPES
from tests.support.callers import keyed, operating
from tests.support.credentials import reset, start_reset, start_verification
from tests.support.factories import PASSWORD, new_user, unique_email
from tests.support.servers import RunningServer, Services, running

User = user_pb2.User
Call = Callable[[Services], object]
Change = Callable[[Services, User], Call]
"""Prepares a call that changes a user, as a caller with every scope."""


def update(_: Services, user: User) -> Call:
    return lambda api: api.update(user, email=unique_email())


def delete(_: Services, user: User) -> Call:
    return lambda api: api.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))


def undelete(strong: Services, user: User) -> Call:
    delete(strong, user)(strong)
    return lambda api: api.users.UndeleteUser(user_pb2.UndeleteUserRequest(id=user.id))


def purge(strong: Services, user: User) -> Call:
    delete(strong, user)(strong)
    return lambda api: api.users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))


def deactivate(_: Services, user: User) -> Call:
    return lambda api: api.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))


def activate(strong: Services, user: User) -> Call:
    deactivate(strong, user)(strong)
    return lambda api: api.users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))


def clear_lockout(_: Services, user: User) -> Call:
    return lambda api: api.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=user.id))


def set_password(_: Services, user: User) -> Call:
    request = credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD)
    return lambda api: api.credentials.SetPassword(request)


def require_change(_: Services, user: User) -> Call:
    request = credential_pb2.RequirePasswordChangeRequest(user_id=user.id)
    return lambda api: api.credentials.RequirePasswordChange(request)


def remove_password(_: Services, user: User) -> Call:
    return lambda api: api.credentials.RemovePassword(credential_pb2.RemovePasswordRequest(user_id=user.id))


def complete_reset(strong: Services, user: User) -> Call:
    request = reset(start_reset(strong, user).code)
    return lambda api: api.credentials.CompletePasswordReset(request)


def verify_email(_: Services, user: User) -> Call:
    return lambda api: start_verification(api, user)


def complete_verification(strong: Services, user: User) -> Call:
    request = credential_pb2.CompleteEmailVerificationRequest(code=start_verification(strong, user).code)
    return lambda api: api.credentials.CompleteEmailVerification(request)


def mark_verified(_: Services, user: User) -> Call:
    request = credential_pb2.MarkEmailVerifiedRequest(user_id=user.id, email=user.email)
    return lambda api: api.credentials.MarkEmailVerified(request)


def create_session(_: Services, user: User) -> Call:
    request = session_pb2.CreateSessionRequest(user_id=user.id, amr=["otp"])
    return lambda api: api.sessions.CreateSession(request)


def reset_factors(_: Services, user: User) -> Call:
    return lambda api: api.factors.ResetFactors(factor_pb2.ResetFactorsRequest(user_id=user.id))


def demand_factor(_: Services, user: User) -> Call:
    request = factor_pb2.SetMfaRequiredRequest(user_id=user.id, is_mfa_required=True)
    return lambda api: api.factors.SetMfaRequired(request)


CHANGES: dict[str, Change] = {
    "ResetFactors": reset_factors,
    "SetMfaRequired": demand_factor,
    "CreateSession": create_session,
    "UpdateUser": update,
    "DeleteUser": delete,
    "UndeleteUser": undelete,
    "PurgeUser": purge,
    "ActivateUser": activate,
    "DeactivateUser": deactivate,
    "ClearLockout": clear_lockout,
    "SetPassword": set_password,
    "RequirePasswordChange": require_change,
    "RemovePassword": remove_password,
    "CompletePasswordReset": complete_reset,
    "StartEmailVerification": verify_email,
    "CompleteEmailVerification": complete_verification,
    "MarkEmailVerified": mark_verified,
}
"""By the name of the RPC."""


@dataclass(frozen=True)
class Tiers:
    """A server that authenticates its callers. `strong` has every scope, `weak` all but users.superuser."""

    server: RunningServer
    strong: Services
    weak: Services

    def new_superuser(self) -> User:
        user = new_user(self.strong.users, password=PASSWORD)
        return self.strong.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))


@contextlib.contextmanager
def tiers(url: URL, **settings: object) -> Iterator[Tiers]:
    """Start such a server, and create a superuser, because the last one cannot be removed."""
    with operating(url) as operator, running(url, caller_auth="required", **settings) as server:
        keys = (
            operator.create_with_key(*scopes, audiences=["orders"])
            for scopes in (ALL_SCOPES, ALL_SCOPES - {"users.superuser"})
        )
        strong, weak = (Services(keyed(server.channel, key)) for key in keys)
        found = Tiers(server, strong, weak)
        found.new_superuser()
        yield found
