"""On whose behalf something is changed: what the audit trail says of the one who did it."""

from typing import NamedTuple


class Actor(NamedTuple):
    """Who is behind a session. Names and ids only; a session without an actor cannot change what is audited."""

    caller: str
    """The name of the service that calls, or of the part of Personae that acts by itself."""
    acting_user_id: int | None = None
    """Who pressed the button, as the caller says; recorded, never trusted."""
    request_id: str = ""


COMMAND_LINE = Actor("command-line")
"""An operator with the database's own credentials: `python -m service …`."""
SWEEPER = Actor("sweeper")
"""The server itself, when it removes what is due."""
DATABASE = "database"
"""The functions in the database that drop old months of the trail, whoever calls them."""
LOCAL_CALLER = "local"
"""Everybody who reaches a developer's server on loopback."""
ANONYMOUS_CALLER = "anonymous"
"""Everybody, where CALLER_AUTH is off."""
RESERVED_NAMES = frozenset({COMMAND_LINE.caller, SWEEPER.caller, DATABASE, LOCAL_CALLER, ANONYMOUS_CALLER})
"""What no caller may be named, so that the trail tells them apart."""
