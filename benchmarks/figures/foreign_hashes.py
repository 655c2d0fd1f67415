"""The effect of imported hashes on sign-ins: latency of users with bcrypt while such hashes are in the table, and
duration of a refusal by hash scheme.
"""

import contextlib
import hashlib
from base64 import b64encode
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from argon2.low_level import Type, hash_secret
from sqlalchemy.engine import URL

from benchmarks.accounts import Account, add_accounts
from benchmarks.bench import Bench
from benchmarks.data import COST, PASSWORD, WRONG_PASSWORD, connect, database
from benchmarks.load import Request, call_sequentially
from benchmarks.outcomes import sequential_outcomes
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import authenticate, authenticate_by_identifier
from benchmarks.rounds import ratio_per_round
from benchmarks.table import Findings, MeasurementError, spread
from service.core.passwords import hash_password

_LOW_COST = 4
"""Low, so that the look-up is a larger share of a sign-in."""
_USERS = 1_000
_FOREIGN_USERS = 300_000
_SIGN_INS = 200
"""Per round."""
_REFUSED = "UNAUTHENTICATED INVALID_CREDENTIALS"
_MILLI = 1e3
# Well-formed hashes that match no password. Salts differ, so that the rows spread over an index.
_INSERT_FOREIGN_USERS = f"""
    INSERT INTO users (email, username, hashed_password) SELECT 'f' || n || '@example.com', 'f' || n, CASE n % 4
        WHEN 0 THEN '$argon2id$v=19$m=65536,t=3,p=4$' || left(md5(n::text), 22) || '$' || left(sha256_of, 43)
        WHEN 1 THEN 'pbkdf2_sha256$1000000$' || left(md5(n::text), 22) || '$' || left(sha256_of, 43) || '='
        WHEN 2 THEN '$6$' || left(md5(n::text), 16) || '$' || left(sha256_of || sha256_of, 86)
        ELSE '$P$B' || left(sha256_of, 30) END
    FROM generate_series(1, {_FOREIGN_USERS}) AS n,
        LATERAL (SELECT encode(sha256(n::text::bytea), 'hex')) AS s (sha256_of)
"""


def measure(bench: Bench) -> Findings:
    """Compare sign-ins with and without imported hashes at a low cost; then refusals by scheme at the default cost."""
    findings = Findings()
    _add_look_ups(findings, bench)
    _add_refusals(findings, bench)
    return findings


def _add_look_ups(findings: Findings, bench: Bench) -> None:
    with ExitStack() as stack:
        servers = [_start_server(bench, stack, number) for number in (0, _FOREIGN_USERS)]
        without, with_them = _durations(bench, servers)
    findings.at_most(
        f"Authenticate p50 with {_FOREIGN_USERS:,} hashes of other products in the table / without",
        median(_flatten(with_them)) / median(_flatten(without)),
        1.05,
    )
    medians, medians_with = ([median(latencies) for latencies in rounds] for rounds in (without, with_them))
    findings.note(
        f"Authenticate at cost {_LOW_COST}, one at a time, p50 of {bench.sizes.rounds} rounds of {_SIGN_INS} "
        f"calls: without {spread(medians, scale=_MILLI, unit=' ms', digits=2)}, with "
        f"{spread(medians_with, scale=_MILLI, unit=' ms', digits=2)}; ratio within one round "
        f"{ratio_per_round(medians_with, medians)}."
    )


def _start_server(bench: Bench, stack: ExitStack, foreign: int) -> Server:
    url = stack.enter_context(database(bench.database_server, f"foreign_{foreign}", bench.directory, users=0))
    # A salt for each user, as in production: the query plan depends on the statistics of the column.
    add_accounts(url, [Account(f"u{number}", hash_password(PASSWORD, _LOW_COST)) for number in range(_USERS)])
    if foreign:
        _insert_foreign_users(url)
    settings = {"BCRYPT_COST": str(_LOW_COST)}
    return stack.enter_context(running(SERVICE, url, bench.directory, settings=settings, cores=bench.cores.server))


def _insert_foreign_users(url: URL) -> None:
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(_INSERT_FOREIGN_USERS)
        cursor.execute("VACUUM (ANALYZE, FREEZE) users")


def _durations(bench: Bench, servers: list[Server]) -> list[list[list[float]]]:
    """The seconds of successful sign-ins, per server and round. Rounds are interleaved."""
    rounds: list[list[list[float]]] = [[] for _ in servers]
    requests = [authenticate(user_id, PASSWORD) for user_id in range(1, _SIGN_INS + 1)]
    for round_number in range(bench.sizes.rounds + 1):
        for server, latencies in zip(servers, rounds, strict=True):
            outcomes = bench.load_generator.run(call_sequentially, server.target, requests)
            if round_number:  # the first one warms up
                latencies.append([outcome.seconds for outcome in outcomes])
    return rounds


def _add_refusals(findings: Findings, bench: Bench) -> None:
    """Measure refused sign-ins, interleaved by hash scheme, each of another user."""
    times = 2 * bench.sizes.sign_ins + 1
    classes = _classes()
    with database(bench.database_server, "foreign_refusals", bench.directory, users=0) as url:
        accounts = [
            replace(account, username=_username(number, attempt))
            for number, account in enumerate(classes.values())
            for attempt in range(times)
        ]
        add_accounts(url, accounts)
        with running(
            SERVICE, url, bench.directory, settings={"BCRYPT_COST": str(COST)}, cores=bench.cores.server
        ) as server:
            requests: list[Request] = [
                authenticate_by_identifier(_username(number, attempt), WRONG_PASSWORD)
                for attempt in range(times)
                for number in range(len(classes))
            ]
            outcomes = bench.load_generator.run(sequential_outcomes, server.target, requests)
    if {outcome.name for outcome in outcomes} != {_REFUSED}:
        raise MeasurementError(f"not all outcomes are {_REFUSED}")
    latencies = {
        name: [outcome.seconds for outcome in outcomes[number :: len(classes)]] for number, name in enumerate(classes)
    }
    (_, reference), *others = latencies.items()
    each = ", ".join(f"{name} {median(durations) / median(reference):.3f}" for name, durations in others)
    findings.note(
        f"A refused Authenticate of a user with a hash of another product / with bcrypt of cost {COST} "
        f"({spread(reference, scale=_MILLI, unit=' ms')}), medians of {times}, on one core: {each}."
    )


def _classes() -> dict[str, Account]:
    def pbkdf2(iterations: int) -> str:
        digest = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), b"salt", iterations)
        return f"pbkdf2_sha256${iterations}$salt${b64encode(digest).decode()}"

    def argon2(kibibytes: int, passes: int, lanes: int) -> str:
        return hash_secret(PASSWORD.encode(), b"some salt", passes, kibibytes, lanes, 32, Type.ID).decode()

    scrypt = hashlib.scrypt(PASSWORD.encode(), salt=b"salt", n=1 << 14, r=8, p=5, maxmem=1 << 26, dklen=64)
    hashes = {
        "bcrypt": hash_password(PASSWORD, COST),
        "PBKDF2, 29,000 iterations": pbkdf2(29_000),
        "PBKDF2, 600,000 iterations": pbkdf2(600_000),
        "PBKDF2, 1,000,000 iterations": pbkdf2(1_000_000),
        "PBKDF2, 2,000,000 iterations": pbkdf2(2_000_000),
        "scrypt of Django": f"scrypt$16384$salt$8$5${b64encode(scrypt).decode()}",
        "Argon2 with one lane, 19 MiB": argon2(19_456, 2, 1),
        "Argon2 with four lanes, 64 MiB": argon2(65_536, 3, 4),
        "sha512_crypt": "$6$saltstring$" + "." * 86,
        "phpass": "$P$B" + "." * 30,
    }
    return {name: Account("", stored) for name, stored in hashes.items()}


def _username(number: int, attempt: int) -> str:
    return f"c{number:02}-{attempt:04}"


def _flatten(rounds: list[list[float]]) -> list[float]:
    return [seconds for latencies in rounds for seconds in latencies]
