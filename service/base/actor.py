"""Actors: for whom something is changed, as the audit trail records it, and whether they may change superusers."""

from typing import NamedTuple

SUPERUSER_SCOPE = "users.superuser"
"""What a caller needs to change a superuser, besides the scope of the RPC."""


class Actor(NamedTuple):
    """The actor of a session. Names and ids only; a session without an actor cannot change audited data."""

    caller: str
    """The name of the calling service, or of the part of Personae that acts by itself."""
    acting_user_id: int | None = None
    """The person behind the call, as the caller says; recorded, never trusted."""
    request_id: str = ""
    may_change_superusers: bool = False
    """Whether it may change the account and the credentials of a superuser."""
    operator: str = ""
    """Who runs a command, as the operating system or OPERATOR says."""


COMMAND_LINE = Actor("command-line", may_change_superusers=True)
"""An operator with the database's own credentials: `python -m service …`."""
SWEEPER = Actor("sweeper")
"""The server itself, when it deletes expired rows."""
DATABASE = "database"
"""The functions in the database that drop old months of the trail, whatever role calls them."""
LOCAL_CALLER = "local"
"""Every caller of a developer's server on loopback."""
ANONYMOUS_CALLER = "anonymous"
"""Every caller where CALLER_AUTH is off."""
RESERVED_NAMES = frozenset({COMMAND_LINE.caller, SWEEPER.caller, DATABASE, LOCAL_CALLER, ANONYMOUS_CALLER})
"""Not allowed as names of callers, so that the trail tells them apart."""
