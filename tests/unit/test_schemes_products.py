"""Hashes that other products make in this run, with salts that no earlier run had: an import accepts them, and they
verify. Programs that are not on this machine are skipped.
"""

import shutil
import subprocess
from collections.abc import Callable

import argon2
import pytest
from django.contrib.auth import hashers
from passlib import hash as passlib_hash
from werkzeug.security import generate_password_hash

from service.base.clock import utc_now
from service.core.passwords.schemes import parse
from service.core.transfer.rules import FastHashes, ImportRules, Row, SourceUser, check
from tests.support.foreign_hashes import PASSWORD

Make = Callable[[str], str]
"""From a password to its hash."""
RULES = ImportRules(allow_special_domains=False, bcrypt_cost=12, fast_hashes=FastHashes.WRAP)
SHIPPED = {
    one.algorithm: one for name, one in vars(hashers).items() if name.endswith("PasswordHasher") and one.algorithm
}
"""Django's hashers by their algorithms."""
DJANGO = {
    "pbkdf2_sha256": ("django_pbkdf2", {"iterations": 1000}),
    "pbkdf2_sha1": ("django_pbkdf2", {"iterations": 1000}),
    "argon2": ("argon2", {"memory_cost": 1024, "parallelism": 2}),
    "bcrypt_sha256": ("django_bcrypt_sha256", {"rounds": 4}),
    "bcrypt": ("bcrypt", {"rounds": 4}),
    "scrypt": ("django_scrypt", {"work_factor": 2**10}),
    "md5": ("django_digest", {}),
}
"""By the algorithm: our scheme, and what makes it cheap."""
LIBPASS = {
    "bcrypt": ("bcrypt", {"rounds": 4}),
    "bcrypt_sha256": ("bcrypt_sha256", {"rounds": 4}),
    "ldap_bcrypt": ("bcrypt", {"rounds": 4}),
    "django_bcrypt": ("bcrypt", {"rounds": 4}),
    "django_bcrypt_sha256": ("django_bcrypt_sha256", {"rounds": 4}),
    "argon2": ("argon2", {"memory_cost": 1024, "rounds": 2}),
    "django_argon2": ("argon2", {"memory_cost": 1024, "rounds": 2}),
    "pbkdf2_sha1": ("pbkdf2", {"rounds": 1000}),
    "pbkdf2_sha256": ("pbkdf2", {"rounds": 1000}),
    "pbkdf2_sha512": ("pbkdf2", {"rounds": 1000}),
    "ldap_pbkdf2_sha1": ("pbkdf2", {"rounds": 1000}),
    "ldap_pbkdf2_sha256": ("pbkdf2", {"rounds": 1000}),
    "ldap_pbkdf2_sha512": ("pbkdf2", {"rounds": 1000}),
    "django_pbkdf2_sha1": ("django_pbkdf2", {"rounds": 1000}),
    "django_pbkdf2_sha256": ("django_pbkdf2", {"rounds": 1000}),
    "scrypt": ("scrypt", {"rounds": 10}),
    "sha512_crypt": ("sha512_crypt", {"rounds": 1000}),
    "sha256_crypt": ("sha256_crypt", {"rounds": 1000}),
    "ldap_sha512_crypt": ("sha512_crypt", {"rounds": 1000}),
    "ldap_sha256_crypt": ("sha256_crypt", {"rounds": 1000}),
    "ldap_md5_crypt": ("md5_crypt", {}),
    "md5_crypt": ("md5_crypt", {}),
    "apr_md5_crypt": ("apr1", {}),
    "phpass": ("phpass", {"rounds": 8}),
    "ldap_md5": ("ldap_digest", {}),
    "ldap_sha1": ("ldap_digest", {}),
    "ldap_salted_md5": ("ldap_digest", {}),
    "ldap_salted_sha1": ("ldap_digest", {}),
    "ldap_salted_sha256": ("ldap_digest", {}),
    "ldap_salted_sha512": ("ldap_digest", {}),
    "django_salted_md5": ("django_digest", {}),
    "django_salted_sha1": ("django_digest", {}),
}
"""By its name in libpass: our scheme, and what makes it cheap."""
PHP = {
    "password_hash bcrypt": ("bcrypt", "password_hash($password, PASSWORD_BCRYPT, ['cost' => 4])"),
    "password_hash argon2id": ("argon2", "password_hash($password, PASSWORD_ARGON2ID, ['memory_cost' => 1024])"),
    "password_hash argon2i": ("argon2", "password_hash($password, PASSWORD_ARGON2I, ['memory_cost' => 1024])"),
    "crypt sha512": ("sha512_crypt", "crypt($password, '$6$rounds=1000$' . bin2hex(random_bytes(8)))"),
    "crypt sha256": ("sha256_crypt", "crypt($password, '$5$rounds=1000$' . bin2hex(random_bytes(8)))"),
    "crypt md5": ("md5_crypt", "crypt($password, '$1$' . bin2hex(random_bytes(4)))"),
    "as WordPress 6.8 does": (
        "wordpress_bcrypt",
        """'$wp' . password_hash(
            base64_encode(hash_hmac('sha384', trim($password), 'wp-sha384', true)), PASSWORD_BCRYPT, ['cost' => 4]
        )""",
    ),
}
"""Our scheme, and PHP that makes the hash."""


def assert_accepted(made: str, scheme: str) -> None:
    """An import stores the hash, and as this scheme it verifies the right password and no other."""
    row = check(SourceUser("ada@example.com", "ada", made), RULES, now=utc_now())

    assert isinstance(row, Row), row
    assert row.hashed_password is not None
    stored = parse(row.hashed_password)
    assert stored.scheme == scheme
    assert stored.verify(PASSWORD)
    assert not stored.verify("not " + PASSWORD)


def output(*command: str) -> str:
    """What a program prints that reads the password. Skips the test when the program is missing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on this machine")
    done = subprocess.run(command, input=PASSWORD.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_all_hashers_of_django_are_tried() -> None:
    assert SHIPPED.keys() == DJANGO.keys()


@pytest.mark.parametrize("algorithm", DJANGO)
def test_django(algorithm: str) -> None:
    scheme, cheap = DJANGO[algorithm]
    hasher = type("Cheap", (SHIPPED[algorithm],), cheap)()

    assert_accepted(hasher.encode(PASSWORD, hasher.salt()), scheme)


@pytest.mark.parametrize(
    "method, scheme",
    [
        ("scrypt", "werkzeug_scrypt"),
        ("scrypt:1024:8:1", "werkzeug_scrypt"),
        ("pbkdf2:sha256:1000", "werkzeug_pbkdf2"),
        ("pbkdf2:sha512:1000", "werkzeug_pbkdf2"),
        ("pbkdf2:sha1:1000", "werkzeug_pbkdf2"),
    ],
)
def test_werkzeug(method: str, scheme: str) -> None:
    assert_accepted(generate_password_hash(PASSWORD, method), scheme)


@pytest.mark.parametrize("kind", [argon2.Type.ID, argon2.Type.I], ids=["id", "i"])
def test_argon2_cffi(kind: argon2.Type) -> None:
    assert_accepted(argon2.PasswordHasher(time_cost=2, memory_cost=1024, type=kind).hash(PASSWORD), "argon2")


def test_argon2_cffi_with_its_defaults() -> None:
    assert_accepted(argon2.PasswordHasher().hash(PASSWORD), "argon2")


@pytest.mark.parametrize("name", LIBPASS)
def test_libpass(name: str) -> None:
    scheme, cheap = LIBPASS[name]

    assert_accepted(getattr(passlib_hash, name).using(**cheap).hash(PASSWORD), scheme)


@pytest.mark.parametrize("call", PHP)
def test_php(call: str) -> None:
    scheme, program = PHP[call]

    assert_accepted(output("php", "-r", f"$password = stream_get_contents(STDIN); echo {program};"), scheme)


@pytest.mark.parametrize(
    "option, scheme",
    [("-BC4", "bcrypt"), ("-m", "apr1"), ("-s", "ldap_digest"), ("-2", "sha256_crypt"), ("-5", "sha512_crypt")],
)
def test_htpasswd(option: str, scheme: str) -> None:
    name, _, made = output("htpasswd", "-ni", option, "ada").partition(":")

    assert name == "ada"
    assert_accepted(made, scheme)


@pytest.mark.parametrize(
    "option, scheme", [("-6", "sha512_crypt"), ("-5", "sha256_crypt"), ("-1", "md5_crypt"), ("-apr1", "apr1")]
)
def test_openssl(option: str, scheme: str) -> None:
    assert_accepted(output("openssl", "passwd", option, "-stdin"), scheme)
