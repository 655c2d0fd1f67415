"""How long connections of callers last, and how long it takes until the last of them has gone."""

from service.base.settings import Settings

_JITTER = 1.1
"""gRPC spreads the ages at which it sends connections away by a tenth."""
_BEYOND_RPC_TIMEOUT = 5.0


def age_grace(settings: Settings) -> float:
    """How many seconds calls go on that run when their connection is sent away: longer than any may take."""
    return settings.rpc_timeout + _BEYOND_RPC_TIMEOUT


def retirement_seconds(settings: Settings) -> float:
    """How many seconds it takes at the most until a server that takes no connections any more has none; 0 where they
    are never sent away.
    """
    age = settings.grpc_max_connection_age
    return age * _JITTER + age_grace(settings) if age else 0.0
