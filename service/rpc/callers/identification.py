"""Identifying the caller of an RPC: by API key, or else by client certificate."""

from collections.abc import Callable

from service.base.clock import Clock
from service.base.errors import CredentialsMissingError
from service.core.callers.index import KnownCaller
from service.rpc.callers.api_keys import identify_by_api_key
from service.rpc.callers.client_certificates import client_certificate, identify_by_certificate
from service.rpc.callers.directory import CallerDirectory
from service.rpc.context import CallContext
from service.rpc.methods import ALL_SCOPES

Identify = Callable[[CallContext], KnownCaller]
"""Identifies the caller of an RPC. Raises the PersonaeError that says why it is refused."""


def assume_caller(name: str) -> Identify:
    """Attribute every call to one caller with all scopes: for development, and where CALLER_AUTH is off."""
    caller = KnownCaller(name, ALL_SCOPES)
    return lambda _call: caller


def identify_callers(
    directory: CallerDirectory, *, clock: Clock, accepts_certificates: bool, keys_require_loopback: bool
) -> Identify:
    """Identify callers by API key or client certificate. With an API key the certificate is not looked at,
    even if the key is refused.
    """

    def identify(call: CallContext) -> KnownCaller:
        if call.authorization is not None:
            return identify_by_api_key(
                call.authorization, call, directory, clock, requires_loopback=keys_require_loopback
            )
        certificate = client_certificate(call.context.auth_context()) if accepts_certificates else None
        if certificate is None:
            raise CredentialsMissingError
        return identify_by_certificate(certificate, call, directory, clock)

    return identify
