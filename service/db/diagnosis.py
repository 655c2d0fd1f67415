"""What is wrong with a database, for an operator: one sentence on the problem, one on the remedy."""

import re
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError


@dataclass(frozen=True, slots=True)
class Diagnosis:
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


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
    "permission denied for database": Diagnosis(
        "The role may not connect to this database", "As its owner: GRANT CONNECT ON DATABASE … TO this role."
    ),
    "is not permitted to log in": Diagnosis("The role may not log in", "As a superuser: ALTER ROLE … LOGIN."),
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
_BY_SQLSTATE = {
    "3F000": Diagnosis(
        "The search_path of this role names no schema that it may use",
        "GRANT USAGE, CREATE ON SCHEMA public TO this role, or set the search_path to a schema that is there.",
    ),
    "42501": Diagnosis(
        "The role may not do this",
        "Use the role that owns the tables (MIGRATION_DATABASE_URL for migrations), or GRANT this one what it lacks.",
    ),
    "42P07": Diagnosis(
        "The schema has a table or an index of the name of Personae's already",
        "Give Personae a database or a schema of its own. Nothing was changed.",
    ),
    "55P03": Diagnosis(
        "Somebody else holds a lock on a table", "End that transaction, or raise MIGRATION_LOCK_TIMEOUT, and migrate."
    ),
    "57014": Diagnosis("The statement took too long", "Raise MIGRATION_STATEMENT_TIMEOUT, or the role's timeout."),
    "25006": Diagnosis(
        "The server, the database or the role is read-only", "Point DATABASE_URL at the primary; free the disk."
    ),
    "53100": Diagnosis("The server's disk is full", "Free the disk."),
}
UNKNOWN = Diagnosis("The database cannot be used", "Look into the server's log.")


def diagnose(error: DBAPIError) -> Diagnosis:
    """What a failed connection or statement means; UNKNOWN may be a bug. Shows nothing of the URL, and no value."""
    sqlstate = getattr(error.orig, "pgcode", None)
    if sqlstate in _BY_SQLSTATE:
        found = _BY_SQLSTATE[sqlstate]
        primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
        return Diagnosis(f"{found.what}: {primary}", found.remedy) if primary else found
    message = str(error.orig)
    return next((found for pattern, found in _BY_MESSAGE.items() if re.search(pattern, message)), UNKNOWN)
