"""Issues and uses one-time codes of each kind."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from tests.support.credentials import reset, start_reset, start_verification
from tests.support.factories import unique_email
from tests.support.servers import Services

NO_SUCH_ID = 2**63 - 1
CODE = re.compile(r"[A-Za-z0-9_-]{43}")


def proof(code: str, **options: Any) -> pb.CompleteEmailVerificationRequest:
    return pb.CompleteEmailVerificationRequest(code=code, **options)


def verify(api: Services, code: str, **options: Any) -> user_pb2.User:
    return api.credentials.CompleteEmailVerification(proof(code, **options))


def mark(api: Services, user: user_pb2.User, **options: Any) -> user_pb2.User:
    return api.credentials.MarkEmailVerified(pb.MarkEmailVerifiedRequest(user_id=user.id, email=user.email, **options))


def complete_reset(api: Services, code: str) -> user_pb2.User:
    return api.credentials.CompletePasswordReset(reset(code))


@dataclass(frozen=True)
class Kind:
    """The RPCs that issue and use a kind of code."""

    start: Callable[[Services, user_pb2.User], str]
    complete: Callable[[Services, str], user_pb2.User]


RESET = Kind(lambda api, user: start_reset(api, user).code, complete_reset)
PRESENT_EMAIL = Kind(lambda api, user: start_verification(api, user).code, verify)
NEW_EMAIL = Kind(lambda api, user: start_verification(api, user, unique_email()).code, verify)


def delete(api: Services, user: user_pb2.User) -> user_pb2.User:
    return api.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))


def require_a_change(api: Services, user: user_pb2.User) -> None:
    api.credentials.RequirePasswordChange(pb.RequirePasswordChangeRequest(user_id=user.id))
