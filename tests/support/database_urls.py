"""Database URLs that every command refuses before it connects, with the error message."""

from service.db.connections import connect_arguments

SECRETS = ("Sesame", "Hush42")
P, Q = SECRETS
"""The parts of the password in every URL here."""
AT = "percent-encode what is special"
NOT_A_URL = "not a database URL; expected postgresql://"
TLS = "INSECURE_PLAINTEXT_DATABASE=true"
LOCAL = f"postgresql://ada:{P}@127.0.0.1:1/d"

SETTINGS = [  # refused by the settings, so by every command
    # not a URL
    ("   ", NOT_A_URL),
    ("127.0.0.1", NOT_A_URL),
    (f"host=127.0.0.1 password={P}", NOT_A_URL),
    (f"ada:{P}@127.0.0.1/d", NOT_A_URL),
    (f"postgresql:/ada:{P}@127.0.0.1/d", NOT_A_URL),
    (f'"{LOCAL}"', "quotes"),
    (f"'{LOCAL}'", "quotes"),
    (f"mysql://ada:{P}@127.0.0.1/d", "only PostgreSQL is supported"),
    (f"jdbc:postgresql://ada:{P}@127.0.0.1/d", "only PostgreSQL is supported"),
    (f"postgresql+asyncpg://ada:{P}@127.0.0.1/d", "by psycopg2; expected postgresql://"),
    (f"postgresql+psycopg://ada:{P}@127.0.0.1/d", "by psycopg2; expected postgresql://"),
    # not text
    (f"postgresql://ada:{P}\udcff{Q}@127.0.0.1/d", "not UTF-8"),
    (f"postgresql://ada:{P}\n{Q}@127.0.0.1/d", "line end"),
    (f"postgresql://ada:{P}\r@127.0.0.1/d", "line end"),
    (f"postgresql://ada:{P}\x1b[2J@127.0.0.1/d", "control character"),
    (f"\ufeff{LOCAL}", "control character"),
    (f"postgresql://ada:{P}%00{Q}@127.0.0.1/d", AT),
    (f"postgresql://ada:{P}%ff{Q}@127.0.0.1/d", AT),
    # a password that is not encoded
    (f"postgresql://ada:{P}@{Q}@127.0.0.1/d", AT),
    (f"postgresql://ada@{P}:{Q}@127.0.0.1/d", AT),
    (f"postgresql://ada:{P}@{Q}/@127.0.0.1/d", AT),
    (f"postgresql://ada:@{P}@127.0.0.1,127.0.0.2/d", AT),
    (f"postgresql://ada:{P}%zz{Q}@127.0.0.1/d", AT),
    (f"postgresql://ada:{P}%@127.0.0.1/d", AT),
    (f"postgresql://ada/{P}@127.0.0.1/d", AT),
    (f"postgresql://ada:12345/{P}@127.0.0.1/d", AT),
    (f"postgresql:///{P}@127.0.0.1/d", AT),
    (f"postgresql://127.0.0.1:5432/d?password={P}@{Q}", AT),
    (f"postgresql://127.0.0.1/d?password={P}&{Q}=x", "write & as %26"),
    (f"postgresql://ada:{P}", NOT_A_URL),
    # hosts and ports
    (f"postgresql://ada:{P}@127.0.0.1:99999/d", "port is no number from 1 to 65535"),
    (f"postgresql://ada:{P}@127.0.0.1:0/d", "port is no number from 1 to 65535"),
    (f"postgresql://ada:{P}@127.0.0.1:-1/d", "port is no number from 1 to 65535"),
    (f"postgresql://ada:{P}@127.0.0.1:x/d", NOT_A_URL),
    (f"postgresql://ada:{P}@127.0.0.1:5432:5433/d", NOT_A_URL),
    (f"postgresql://ada:{P}@127.0.0.1:{'9' * 5000}/d", NOT_A_URL),
    (f"postgresql://ada:{P}@/d?host=127.0.0.1&port=x", "port is no number from 1 to 65535"),
    (f"postgresql://ada:{P}@/d?host=127.0.0.1,127.0.0.2&port=1,2,3", "3 ports for 2 hosts"),
    (f"postgresql://ada:{P}@127.0.0.1,127.0.0.2/d?port=1,2,3", "3 ports for 2 hosts"),
    (f"postgresql://ada:{P}@127.0.0.1:1,127.0.0.2/d?port=2", "remove one"),
    (f"postgresql://ada:{P}@127.0.0.1/d?port=1,2", "2 ports for 1 hosts"),
    (f"postgresql://ada:{P}@127.0.0.1,127.0.0.2/d?hostaddr=127.0.0.1", "1 hostaddr for 2 hosts"),
    (f"postgresql://ada:{P}@127.0.0.1,/d", NOT_A_URL),
    (f"postgresql://ada:{P}@::1/d", NOT_A_URL),
    (f"postgresql://ada:{P}@[::x]/d", "what stands for a host is none"),
    (f"postgresql://ada:{P}@127.0.0.1#d", "what stands for a host is none"),
    (f"postgresql://ada:{P}@/d?host=127.0.0.1:5432", "what stands for a host is none"),
    # options
    (f"{LOCAL}?pgbouncer=true", "the option pgbouncer is not one of PostgreSQL's: remove it"),
    (f"{LOCAL}?schema=public", "the option schema is not one of PostgreSQL's: remove it, and give the role a search"),
    (f"{LOCAL}?ssl=true", "the option ssl is not one of PostgreSQL's: write sslmode=verify-full"),
    (
        f"{LOCAL}?connection_limit=5",
        "the option connection_limit is not one of PostgreSQL's: remove it, and set DB_POO",
    ),
    *(
        (f"{LOCAL}?sslmode=disable&{name}=1", f"the option {name} is not one of PostgreSQL's: remove it")
        for name in ("nosuch", "plugin", "dsn", "async", "async_", "connection_factory", "isolation_level", "SSLMODE")
    ),
    (f"{LOCAL}?a%20b%3d=1", "an option is not one of PostgreSQL's: remove it"),
    (f"{LOCAL}?{'x' * 100}=1", "an option is not one of PostgreSQL's: remove it"),
    *(
        (f"{LOCAL}?{name}=abc", f"the option {name} cannot be used: remove it")
        for name in connect_arguments(2)
        if name != "connect_timeout"
    ),
    *(
        (f"{LOCAL}?connect_timeout={seconds}", "the option connect_timeout is no number of seconds from 1 to 60")
        for seconds in ("0", "61", "1.5", "-1", "10s", "\u0661", "9" * 5000)
    ),
    (f"{LOCAL}?search_path=x", "remove it, and give the role a search_path"),
    (f"{LOCAL}?statement_timeout=5000", "give it to the role"),
    (f"{LOCAL}?pool_size=5", "set DB_POOL_SIZE"),
    (f"{LOCAL}?ApplicationName=x", "write application_name"),
    (f"{LOCAL}&sslmode=disable", "before its options, which begin with a ?"),
    (f"postgresql://127.0.0.1:1/d&user=ada&password={P}", "before its options, which begin with a ?"),
    (f"postgresql://127.0.0.1;user=ada;password={P}", "before its options, which begin with a ?"),
    (f"{LOCAL}?replication=true", "the option replication cannot be used: remove it"),
    (f"{LOCAL}?sslmode=verify-full&requiressl=0", "the option requiressl cannot be used: write sslmode=verify-full"),
    (f"{LOCAL}?sslmode=disable&sslmode=require", "the option sslmode is there twice"),
    # another machine
    (f"postgresql://ada:{P}@db.example.com/d", TLS),
    (f"postgres://ada:{P}@10.0.0.1/d?sslmode=require", TLS),
    (f"postgresql://ada:{P}@127.0.0.1,10.0.0.1/d", TLS),
    (f"postgresql:///d?service=nosuch&password={P}", TLS),
]


def is_clean(printed: str) -> bool:
    return "Traceback" not in printed and not any(secret in printed for secret in SECRETS)
