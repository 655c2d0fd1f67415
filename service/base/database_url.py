"""Database URLs with one host, or with several of which one is the primary.

Several hosts can be spelled in three ways: libpq's `//user@h1:5432,h2:5433/db`, its `?host=h1,h2&port=5432,5433`, and
SQLAlchemy's `?host=h1:5432&host=h2:5433`. All are turned into the second, which both libraries read.

What may be part of a password is never shown, and no reading of a URL is guessed where two are possible: the other one
could send the password to another host.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

import psycopg2
from psycopg2.extensions import parse_dsn
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

DEFAULT_PORT = "5432"
_DRIVERS = frozenset({"postgres", "postgresql", "postgresql+psycopg2"})
_EXPECTED = "not a database URL; expected postgresql://user:password@host:port/database"
_ENCODE = (
    "percent-encode what is special in user, password and options: @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, "
    "& as %26, % as %25"
)
# Up to the @ it is user and password, as SQLAlchemy has it: a password may hold commas and slashes. Hosts that are
# percent-encoded (sockets) are taken out as well: SQLAlchemy does not decode them.
_AUTHORITY = re.compile(r"(?P<scheme>[\w+]+://)(?>(?P<user>[^@]*@)?)(?P<hosts>[^/?]*[,%][^/?]*)(?P<rest>.*)", re.DOTALL)
_HOST = re.compile(r"(\[[^\]]+\]|[^:]+)(?::([0-9]*))?")
_IN_NO_HOST = re.compile(r"[\s\"'#%:?@/\\\[\]]")
_SOCKET = ("/", "@")
_COMPONENTS = {"user": "username", "password": "password", "dbname": "database"}
_UNKNOWN = "remove it; or, if it belongs to the value before it, write & as %26"
_SECRET_OPTIONS = frozenset({"password", "sslpassword"})
_SET_BY_PERSONAE = (
    "fallback_application_name",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)
_SCHEMA = "remove it, and give the role a search_path: ALTER ROLE … SET search_path = …"
_TIMEOUT = "remove it, and give it to the role: ALTER ROLE … SET …"
_REMEDIES = {
    **dict.fromkeys(_SET_BY_PERSONAE, "remove it: Personae sets it by itself"),
    **dict.fromkeys(("currentSchema", "schema", "search_path"), _SCHEMA),
    **dict.fromkeys(("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout"), _TIMEOUT),
    **dict.fromkeys(("ApplicationName", "applicationName"), "write application_name instead"),
    **dict.fromkeys(("charset", "encoding"), "remove it: Personae speaks UTF-8"),
    **dict.fromkeys(("connection_limit", "pool", "pool_size"), "remove it, and set DB_POOL_SIZE"),
    "max_overflow": "remove it, and set DB_MAX_OVERFLOW",
    "loginTimeout": "write connect_timeout instead",
    "pgbouncer": "remove it: Personae needs no option for PgBouncer",
    "pool_timeout": "remove it, and set DB_POOL_TIMEOUT",
    "replication": "remove it: such a connection runs no SQL",
    "requiressl": "write sslmode=verify-full instead",  # libpq would let it take the place of sslmode
    "ssl": "write sslmode=verify-full instead",
    "sslaccept": "write sslmode=verify-full instead",
}
"""What to do about an option that cannot be used; the others are to be removed."""
_MAX_CONNECT_SECONDS = 60


def parse_url(text: str) -> URL:
    """Parse a URL, with several hosts in one spelling. Of several hosts the writable one is used, unless the URL itself
    says which (`target_session_attrs`).

    Raises ValueError; its text says what to do, and shows nothing of the URL but the name of an option.
    """
    text = text.strip()  # the line end of a file
    _check_text(text)
    hosts: list[str] = []
    found = _AUTHORITY.fullmatch(text)
    if found is not None:
        hosts = found["hosts"].split(",")
        text = f"{found['scheme']}{found['user'] or ''}{found['rest']}"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(_EXPECTED) from None
    _check_database(text)
    _check_options(url)
    for option, component in _COMPONENTS.items():
        if option in url.query:
            url = url.set(**{component: url.query[option]}).difference_update_query([option])  # type: ignore[arg-type]
    repeated = url.query.get("host")
    if isinstance(repeated, tuple):
        hosts += repeated
    if hosts:
        spelled = _one_spelling(hosts)
        if "port" in spelled and "port" in url.query:
            raise ValueError("has ports beside its hosts and a port= as well: remove one")
        url = url.set(query={**url.query, **spelled})
    return _with_ports(url)


def connect_timeout_of(url: URL) -> int | None:
    """The seconds that the URL gives a connection, as libpq counts them: 1 means 2. None where it does not say."""
    value = url.query.get("connect_timeout")
    return None if value is None else max(2, int(str(value)))


def hosts_of(url: URL) -> list[str]:
    """All hosts in the URL, without ports."""
    return ([url.host] if url.host else []) + _listed(url, "host") + _listed(url, "hostaddr")


def is_local_host(host: str) -> bool:
    """Whether a host is this machine."""
    if host.lower() == "localhost" or host.startswith(_SOCKET):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local_database(url: URL) -> bool:
    """Whether every server that the URL names is on this machine."""
    if "service" in url.query:  # the host is in a service file
        return False
    return all(is_local_host(host) for host in hosts_of(url))


def overriding(url: URL, environment: Mapping[str, str]) -> list[str]:
    """Variables of libpq in the environment that would lead to another server than the URL."""
    said = {"PGSERVICE": "service" in url.query, "PGHOSTADDR": "hostaddr" in url.query, "PGHOST": bool(hosts_of(url))}
    return [name for name, is_in_url in said.items() if environment.get(name) and not is_in_url]


def described(url: URL) -> str:
    """The hosts and ports of the database, for people."""
    if "service" in url.query:
        return f"what the service {url.query['service']} says"
    hosts, ports = _listed(url, "hostaddr") or _hosts(url) or ["the local socket"], _ports(url)
    if len(hosts) == 1:
        return f"{hosts[0]}, port {ports[0]}"
    return " and ".join(f"{host}:{port}" for host, port in zip(hosts, ports, strict=True))


def _check_text(text: str) -> None:
    """Refuse what has no single reading."""
    if not text.isprintable():
        raise ValueError("has a line end, a control character or a byte that is not UTF-8 in it: take it out")
    if text.startswith(('"', "'")):
        raise ValueError("stands in quotes: take them off")
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise ValueError(_EXPECTED)
    if scheme.lower() not in _DRIVERS:
        raise ValueError(
            "only PostgreSQL is supported, by psycopg2; expected postgresql://user:password@host:port/database"
        )
    before, at, after = rest.partition("@")
    authority = re.split("[/?#]", before)[0]
    is_host = all(not host or _HOST.fullmatch(host) for host in authority.split(","))
    if "@" in after or (at and authority != before and is_host):
        raise ValueError(f"has an @ out of place: {_ENCODE}")
    try:
        is_encoded = re.search(r"%(?![0-9A-Fa-f]{2})", rest) is None and "\0" not in unquote(rest, errors="strict")
    except UnicodeDecodeError:
        is_encoded = False
    if not is_encoded:
        raise ValueError(f"has a % that begins no character in UTF-8: {_ENCODE}")


def _check_database(text: str) -> None:
    """Refuse a name of a database with options in it: a password among them would be shown."""
    location = text.partition("://")[2].rpartition("@")[2].partition("?")[0]
    if re.search("[&=]", location):
        raise ValueError(f"has an & or a = before its options, which begin with a ?: {_ENCODE}, = as %3D")


def _check_options(url: URL) -> None:
    """Refuse an option that libpq does not know, or that cannot have an effect."""
    is_shown = not _SECRET_OPTIONS & url.query.keys()  # else what follows an & may be the rest of a password
    for name, value in url.query.items():
        option = f"the option {name}" if is_shown and re.fullmatch("[A-Za-z0-9_]{1,63}", name) else "an option"
        if isinstance(value, tuple) and name != "host":
            raise ValueError(f"{option} is there twice: remove one")
        if not _is_known(name):
            raise ValueError(f"{option} is not one of PostgreSQL's: {_REMEDIES.get(name, _UNKNOWN)}")
        if name in _REMEDIES:
            raise ValueError(f"{option} cannot be used: {_REMEDIES[name]}")
        if name == "client_encoding" and re.sub("[^a-z0-9]", "", str(value).lower()) not in {"utf8", "unicode"}:
            raise ValueError("the option client_encoding cannot be used: remove it: Personae speaks UTF-8")
        if name == "connect_timeout" and not (
            re.fullmatch("[0-9]{1,2}", str(value), re.ASCII) and 1 <= int(str(value)) <= _MAX_CONNECT_SECONDS
        ):
            raise ValueError(f"the option connect_timeout is no number of seconds from 1 to {_MAX_CONNECT_SECONDS}")


def _is_known(option: str) -> bool:
    try:
        return re.fullmatch("[a-z_]+", option) is not None and bool(parse_dsn(f"{option}=x"))
    except psycopg2.ProgrammingError:
        return False


def _one_spelling(hosts: Iterable[str]) -> dict[str, str]:
    parts = [_HOST.fullmatch(unquote(host)) for host in hosts]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        raise ValueError("not a database URL; expected postgresql://user:password@host1:port1,host2:port2/database")
    spelled = {"host": ",".join(part[1].strip("[]") for part in known)}
    if any(part[2] for part in known):
        spelled["port"] = ",".join(part[2] or DEFAULT_PORT for part in known)
    return spelled


def _with_ports(url: URL) -> URL:
    """The URL with a port for each host. Raises ValueError: what stands for a host or a port is none."""
    hosts, addresses = _hosts(url), _listed(url, "hostaddr")
    if not all(map(_is_host, hosts + addresses)):
        raise ValueError(f"what stands for a host is none; put an IPv6 address in brackets, and {_ENCODE}")
    if addresses and hosts and len(addresses) != len(hosts):
        raise ValueError(f"names {len(addresses)} hostaddr for {len(hosts)} hosts: as many are needed")
    count = len(hosts or addresses) or 1
    ports = [port or DEFAULT_PORT for port in _ports(url)]
    if not all(re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16 for port in ports):
        raise ValueError("what stands for a port is no number from 1 to 65535")
    if len(ports) not in {0, 1, count}:
        raise ValueError(f"names {len(ports)} ports for {count} hosts: one for all, or one for each")
    if "service" in url.query and not ports:  # the service file says it
        return url
    if count == 1:
        return url if ports else url.set(port=int(DEFAULT_PORT))
    ports = ports if len(ports) == count else (ports or [DEFAULT_PORT]) * count
    return url.set(query={"target_session_attrs": "read-write", **url.query, "port": ",".join(ports)})


def _is_host(name: str) -> bool:
    if ":" in name and not name.startswith(_SOCKET):
        try:
            return bool(ipaddress.IPv6Address(name))
        except ValueError:
            return False
    return name.startswith(_SOCKET) or (name != "" and _IN_NO_HOST.search(name) is None)


def _hosts(url: URL) -> list[str]:
    """The hosts that the driver gets: those of the query win."""
    return _listed(url, "host") or ([url.host] if url.host else [])


def _ports(url: URL) -> list[str]:
    return _listed(url, "port") or ([] if url.port is None else [str(url.port)])


def _listed(url: URL, option: str) -> list[str]:
    value = url.query.get(option)
    return value.split(",") if isinstance(value, str) else []
