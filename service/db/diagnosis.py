"""What is wrong with a database, for an operator: one sentence on the problem, one on the remedy."""

import re
from dataclasses import dataclass

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError


@dataclass(frozen=True, slots=True)
class Diagnosis:
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


_STANDBY = Diagnosis("The server is a read-only standby", "Point DATABASE_URL at the primary.")
_READ_ONLY = Diagnosis(
    "The database is read-only: default_transaction_read_only is on",
    "Providers set it when the disk is full: give it space, then reset it where pg_settings or pg_db_role_setting says "
    "that it was set (ALTER DATABASE … RESET default_transaction_read_only). Reads go on meanwhile; sign-ins and "
    "changes do not.",
)
_BY_SQLSTATE = {
    "25006": _READ_ONLY,
    "53100": Diagnosis("The disk of the database is full", "Give it space. Reads go on meanwhile."),
}

_IS_STANDBY = text("SELECT pg_is_in_recovery()")
# What is set for the database or the role counts for new connections, not for those that are open. Of several such
# settings the most specific one counts, as in PostgreSQL; and all but an option of the connection's own.
_IS_READ_ONLY = text(
    "SELECT current_setting('transaction_read_only')::boolean OR coalesce("
    "(SELECT split_part(setting, '=', 2)::boolean FROM pg_db_role_setting, unnest(setconfig) AS setting"
    " WHERE setting LIKE 'default_transaction_read_only=%'"
    " AND setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = session_user))"
    " AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))"
    " ORDER BY setrole <> 0 DESC, setdatabase <> 0 DESC LIMIT 1)"
    " AND NOT EXISTS (SELECT FROM pg_settings WHERE name = 'default_transaction_read_only' AND source = 'client'),"
    " false)"
)

# libpq reports a failed connection without an SQLSTATE, so these are told apart by its messages, which have not changed
# for decades. The first pattern that is found in the message counts.
_BY_MESSAGE = {
    "password authentication failed": Diagnosis(
        "The server refused the password", "Check user and password in DATABASE_URL."
    ),
    "no password supplied": Diagnosis(
        "The server wants a password", "Put it into DATABASE_URL: postgresql://user:password@host/database"
    ),
    "no pg_hba.conf entry": Diagnosis(
        "The server does not let this user connect from this host", "Add a line to its pg_hba.conf and reload it."
    ),
    "role .*does not exist": Diagnosis(
        "The user does not exist", "Create it: CREATE ROLE … LOGIN PASSWORD …, or check DATABASE_URL."
    ),
    "database .*does not exist": Diagnosis(
        "The database does not exist", "Create it: createdb …, or check the name in DATABASE_URL."
    ),
    "session is read-only": Diagnosis(
        "No server of DATABASE_URL can be written to", "Wait for a standby to be promoted, or name the primary."
    ),
    "starting up": Diagnosis("The server is starting up", "Wait a moment."),
    "shutting down": Diagnosis("The server is shutting down", "Wait until it is back."),
    "recovery mode": Diagnosis("The server is recovering from a crash", "Wait a moment."),
    "too many clients|remaining connection slots": Diagnosis(
        "The server has no connection left", "Raise max_connections, or lower DB_POOL_SIZE and DB_MAX_OVERFLOW."
    ),
    "too many connections for": Diagnosis(
        "The role or the database has no connection left",
        "Raise its CONNECTION LIMIT, or lower DB_POOL_SIZE and DB_MAX_OVERFLOW.",
    ),
    "could not translate host name": Diagnosis(
        "The host name in DATABASE_URL is not known", "Check the name, and the DNS of this machine."
    ),
    "Connection refused": Diagnosis(
        "Nothing listens there", "Start the server, or check host and port in DATABASE_URL."
    ),
    "No such file or directory": Diagnosis(
        "There is no server behind that socket", "Start the server, or check the host in DATABASE_URL."
    ),
    "timeout expired": Diagnosis(
        "The server does not answer", "Check host, port and firewalls between here and there."
    ),
    "server does not support SSL": Diagnosis(
        "The two sides do not agree on TLS", "Check sslmode in DATABASE_URL against the server's settings."
    ),
}
UNKNOWN = Diagnosis("The database cannot be used", "Look into the server's log.")


def diagnose(error: DBAPIError) -> Diagnosis:
    """What a failed connection or statement means. Shows nothing of the URL."""
    known = _BY_SQLSTATE.get(getattr(error.orig, "pgcode", None) or "")
    message = str(error.orig)
    return known or next((found for pattern, found in _BY_MESSAGE.items() if re.search(pattern, message)), UNKNOWN)


def why_read_only(connection: Connection) -> Diagnosis | None:
    """Why nothing can be written by a new connection like this one; None when it can."""
    if connection.scalar(_IS_STANDBY):
        return _STANDBY
    return _READ_ONLY if connection.scalar(_IS_READ_ONLY) else None
