"""What a reload does not take away."""

from pathlib import Path

import pytest
from sqlalchemy import make_url

from service.workers.protection import protection_of, weakened
from tests.support.servers import settings_for

ROOT = Path(__file__).resolve().parents[2]
REMOTE = make_url("postgresql://u@db.example/d?sslmode=verify-full")
KEYS = [f"{name}:{name * 43}" for name in "abc"]
BEFORE: dict[str, object] = {
    "tls_certificate_file": "server.pem",
    "tls_private_key_file": "server.key",
    "tls_client_ca_file": "ca.pem",
    "insecure_plaintext_database": True,
    "caller_auth": "required",
    "caller_rate_limit": 100,
    "caller_code_rate_limit": 10,
    "secret_keys": f"{KEYS[0]},{KEYS[1]}",
    "bcrypt_cost": 12,
    "password_blocklist_file": "names.txt",
}
WEAKER: dict[str, list[dict[str, object]]] = {
    "TLS_CERTIFICATE_FILE": [{"tls_certificate_file": None, "tls_private_key_file": None, "tls_client_ca_file": None}],
    "TLS_CLIENT_CERTIFICATES": [
        {"tls_client_ca_file": None},
        {"tls_client_certificates": "optional"},
        {"tls_client_certificates": "off", "tls_client_ca_file": None},
    ],
    "INSECURE_PLAINTEXT_KEYS": [{"insecure_plaintext_keys": True}],
    "INSECURE_ONE_ROLE": [{"insecure_one_role": True}],
    "CALLER_AUTH": [{"caller_auth": "off"}],
    "CALLER_RATE_LIMIT": [{"caller_rate_limit": 0}],
    "CALLER_CODE_RATE_LIMIT": [{"caller_code_rate_limit": 0}],
    "DATABASE_URL": [
        {"database_url": str(REMOTE.set(query=query))}
        for query in ({}, {"sslmode": "prefer"}, {"sslmode": "verify-ca"}, {"sslmode": "unheard-of"})
    ],
    "SECRET_KEYS": [{"secret_keys": KEYS[2]}, {"secret_keys": f"a:{'z' * 43}"}],
    "BCRYPT_COST": [{"bcrypt_cost": 11}],
    "PASSWORD_MIN_LENGTH": [{"password_min_length": 14}],
    "PASSWORD_BLOCKLIST_FILE": [{"password_blocklist_file": None}],
}


@pytest.mark.parametrize("name, change", [(name, change) for name, changes in WEAKER.items() for change in changes])
def test_what_protects_less_is_named(name: str, change: dict[str, object]) -> None:
    before, after = (protection_of(settings_for(REMOTE, **BEFORE | more)) for more in ({}, change))
    assert name in weakened(before, after)
    assert weakened(after, before) == ([name] if name == "SECRET_KEYS" else [])


def test_each_setting_that_is_compared_is_tried_and_documented() -> None:
    compared = protection_of(settings_for(REMOTE, **BEFORE)).keys()
    assert compared == WEAKER.keys()
    text = (ROOT / "docs/operations.md").read_text()
    [listed] = [line for line in text.splitlines() if "a reload refuses:" in line]
    assert {name for name in compared if f"`{name}`" in listed} == compared


@pytest.mark.parametrize(
    "change",
    [
        {"secret_keys": f"{KEYS[2]},{KEYS[1]}"},
        {"caller_rate_limit": 1000, "caller_cache_seconds": 10, "grpc_max_connection_age": 0, "log_level": "error"},
        {"database_url": "postgresql://u@127.0.0.1/d"},
    ],
    ids=["rotated keys", "tuning", "database on this machine"],
)
def test_what_protects_as_much_is_no_matter(change: dict[str, object]) -> None:
    before, after = (protection_of(settings_for(REMOTE, **BEFORE | more)) for more in ({}, change))
    assert weakened(before, after) == []


def test_names_that_one_release_alone_knows_are_not_compared() -> None:
    assert weakened({"OLD": 1, "BOTH": 2}, {"NEW": 0, "BOTH": 2}) == []
