"""What is wrong with a database, for an operator: one sentence on the problem, one on the remedy."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError


@dataclass(frozen=True, slots=True)
class Diagnosis:
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


class State(NamedTuple):
    """What a server says of itself. read_only: why a new connection like this one can write nothing; None: it can."""

    now: datetime
    read_only: Diagnosis | None


# libpq names the option whose name or value it refuses.
_REFUSED_OPTION = re.compile(
    r'(?:invalid connection option |for connection option |invalid )"?([a-z_]+)"?(?: value:|$)', re.MULTILINE
)
_STANDBY = Diagnosis("The server is a read-only standby", "Point DATABASE_URL at the primary.")
_READ_ONLY = Diagnosis(
    "The database is read-only: default_transaction_read_only is on",
    "Providers set it when the disk is full: give it space, then reset it where pg_settings or pg_db_role_setting says "
    "that it was set (ALTER DATABASE … RESET default_transaction_read_only). Reads go on meanwhile; sign-ins and "
    "changes do not.",
)

# What is set for the database or the role counts for new connections, not for those that are open. Of several such
# settings the most specific one counts, as in PostgreSQL; and all but an option of the connection's own.
_STATE = text(
    "SELECT clock_timestamp(), pg_is_in_recovery(), current_setting('transaction_read_only')::boolean OR coalesce("
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
    "session is not read-only|server is not in hot standby mode": Diagnosis(
        "target_session_attrs in DATABASE_URL asks for a server that cannot be written to", "Remove it."
    ),
    "session is read-only|server is in hot standby mode": Diagnosis(
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
    "could not translate host name|could not parse network address": Diagnosis(
        "The host name in DATABASE_URL is not known", "Check the name, and the DNS of this machine."
    ),
    "definition of service|service file": Diagnosis(
        "The service of DATABASE_URL or PGSERVICE is not defined",
        "Define it in ~/.pg_service.conf or the file of PGSERVICEFILE, or write the host into DATABASE_URL.",
    ),
    "root certificate": Diagnosis(
        "The CA certificates for the server's certificate cannot be read",
        "Name a file in DATABASE_URL that the service can read: sslrootcert=FILE.",
    ),
    "certificate verify failed": Diagnosis(
        "The server's certificate is not valid, or not signed by the CA of sslrootcert",
        "Name the CA that signs it in DATABASE_URL: sslrootcert=FILE.",
    ),
    "does not match host name|host name must be specified": Diagnosis(
        "The server's certificate is for another host name",
        "Write a name of the certificate into DATABASE_URL, or give the server a certificate for this host.",
    ),
    "certificate file|private key file|SSL certificate": Diagnosis(
        "The client certificate of DATABASE_URL cannot be used",
        "Check sslcert and sslkey: both files are needed, and the key may be read by its owner alone.",
    ),
    "configuration parameter|for parameter|command-line argument|startup parameter|cannot be changed|requires an? "
    "|conversion between": Diagnosis(
        "The server refuses a parameter that the connection sets",
        "Check options in DATABASE_URL, and PGOPTIONS; PgBouncer allows no options.",
    ),
    "channel binding|authentication method requirement|GSSAPI": Diagnosis(
        "The server does not offer what DATABASE_URL requires",
        "Check channel_binding, require_auth and gssencmode in it against the server's settings.",
    ),
    "Connection refused": Diagnosis(
        "Nothing listens there", "Start the server, or check host and port in DATABASE_URL."
    ),
    "terminating connection|server closed the connection|Connection reset|Broken pipe|could not (?:receive|send) data"
    "|SSL connection has been closed|EOF detected": Diagnosis(
        "The server ended the connection",
        "It restarts, or somebody ended the session, or it is no PostgreSQL: try again, and look into its log. What "
        "was not finished was not changed.",
    ),
    "unreachable|No route to host|Cannot assign requested address|Invalid argument|Connection timed out": Diagnosis(
        "The network does not lead there",
        "Check host and port in DATABASE_URL, and the routes and firewalls of this machine.",
    ),
    "expected authentication request|invalid response|SSL negotiation|not supported|unexpected message": Diagnosis(
        "What answers there does not speak as PostgreSQL does", "Check host and port in DATABASE_URL."
    ),
    "Permission denied": Diagnosis(
        "This user may not use that socket", "Check its directory's rights, or connect by TCP: host and port."
    ),
    "No such file or directory|Not a directory": Diagnosis(
        "There is no server behind that socket", "Start the server, or check the host in DATABASE_URL."
    ),
    "timeout expired": Diagnosis(
        "The server does not answer", "Check host, port and firewalls between here and there."
    ),
    "server does not support SSL|SSL error|SSL SYSCALL|weak sslmode|SSL protocol": Diagnosis(
        "The two sides do not agree on TLS", "Check sslmode in DATABASE_URL against the server's settings."
    ),
}
_NAME_TAKEN = Diagnosis(
    "The schema has a table, an index, a type or a function of the name of Personae's already",
    "Give Personae a database or a schema of its own. The migration that met it has changed nothing.",
)
_DAMAGED = Diagnosis("The server cannot read or write its files", "Look into its log, and at its disk.")
_IN_THE_WAY = Diagnosis("Another transaction was in the way", "Nothing was changed. Try it again.")
_BY_SQLSTATE = {
    "3F000": Diagnosis(
        "The search_path of this role names no schema that it may use",
        "GRANT USAGE, CREATE ON SCHEMA public TO this role, or set the search_path to a schema that is there.",
    ),
    "42501": Diagnosis(
        "The role may not do this",
        "Use the role that owns the tables (MIGRATION_DATABASE_URL for migrations), or GRANT this one what it lacks.",
    ),
    **dict.fromkeys(("42P07", "42710", "42723", "42809"), _NAME_TAKEN),
    **dict.fromkeys(("58030", "58P01", "XX001", "XX002"), _DAMAGED),
    **dict.fromkeys(("40001", "40P01"), _IN_THE_WAY),
    "53200": Diagnosis("The server has no memory left", "Give it more, or lower its max_connections and work_mem."),
    "P0001": Diagnosis("A trigger of this database refuses it", "Ask whoever set the trigger, or take it away."),
    "55P03": Diagnosis(
        "Somebody else holds a lock on a table", "End that transaction, or raise MIGRATION_LOCK_TIMEOUT, and migrate."
    ),
    "57014": Diagnosis("The statement took too long", "Raise MIGRATION_STATEMENT_TIMEOUT, or the role's timeout."),
    "22P05": Diagnosis(
        "The encoding of the database lacks a character", "Give Personae a database with ENCODING 'UTF8'."
    ),
    "25006": _READ_ONLY,
    "53100": Diagnosis("The disk of the database is full", "Give it space. Reads go on meanwhile."),
}
UNKNOWN = Diagnosis("The database cannot be used", "Look into the server's log.")
_NO_CONNECTION = Diagnosis(
    "The connection fails",
    "Check that PostgreSQL is what answers at host and port of DATABASE_URL; psql with the same URL says more.",
)
_NOT_REACHED = Diagnosis(
    "The driver cannot use DATABASE_URL", "Try the same URL with psql, which says why; the server was not reached."
)


def diagnose(error: DBAPIError) -> Diagnosis:
    """What a failed connection or statement means; UNKNOWN may be a bug. Shows nothing of the URL, and no value."""
    sqlstate = getattr(error.orig, "pgcode", None)
    if sqlstate in _BY_SQLSTATE:
        found = _BY_SQLSTATE[sqlstate]
        primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
        return Diagnosis(f"{found.what}: {primary}", found.remedy) if primary else found
    message = str(error.orig)
    option = _REFUSED_OPTION.search(message)
    if option is not None:
        return Diagnosis(
            f"The driver refuses the option {option[1]}",
            "Correct or remove it in DATABASE_URL, or in libpq's own variables (PG…) in the environment.",
        )
    if error.statement is not None or re.search("FATAL|ERROR|PANIC", message):
        fallback = UNKNOWN
    else:
        fallback = _NO_CONNECTION if "connection to server" in message else _NOT_REACHED
    return next((found for pattern, found in _BY_MESSAGE.items() if re.search(pattern, message)), fallback)


def state_of(connection: Connection) -> State:
    """Ask the server of this connection, in one statement."""
    now, is_standby, is_read_only = connection.execute(_STATE).one()
    return State(now, _STANDBY if is_standby else _READ_ONLY if is_read_only else None)
