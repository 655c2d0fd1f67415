"""The table of schemes: what is refused before anything is computed, secrets that hashes name, wrapping, and time."""

import base64
import contextlib
import hashlib
import re

import bcrypt
import passlib.hash
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.base.errors import StoredHashError
from service.core.passwords import hash_password, hashing, is_match, renewal_cost
from service.core.passwords.schemes import (
    SCHEMES,
    HashError,
    Secrets,
    argon2_phc,
    is_fast,
    parse,
    require_affordable,
    sources,
    unix_crypt,
    wrap,
)

PASSWORD = "correct horse battery staple"
ID = "0123456789abcdef"
# The example of Firebase's own documentation (github.com/firebase/scrypt).
FIREBASE: Secrets = {
    ID: {
        "signer_key": base64.b64decode(
            "jxspr8Ki0RYycVU8zykbdLGjFQ3McFUH0uiiTvC8pVMXAn210wjLNmdZJzxUECKbm0QsEmYUSDzZvpjeJ9WmXA=="
        ),
        "salt_separator": b"\x07",
    }
}
FIREBASE_SALT = "42xEC+ixf3L2lw=="
FIREBASE_HASH = "lSrfV15cpx95/sZS2W9c9Kp6i/LVgQNDNC/qzrCnh1SAyZvqmZqAjTdn3aoItz+VHjoZilo78198JAdRuid5lQ=="
BCRYPT = "." * 22 + "x" * 31
B16, B32 = "A" * 22, "A" * 43


def reason_of(text: str) -> str:
    with pytest.raises(HashError) as caught:
        parse(text)
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!",
        "*",
        "!abcdef",
        "x",
        "plain text",
        "$2$04$" + BCRYPT,
        "$2x$04$" + BCRYPT,
        "{noop}secret",
        "{MD4}00",
        "$y$j9T$salt$" + "." * 43,
        "$7$",
        "md4$salt$00",
        "5f4dcc3b5aa765d61d8327deb882cf99",
        "😀",
        "\x00",
    ],
)
def test_what_no_scheme_claims_is_unsupported(text: str) -> None:
    """Locked accounts, an encoder that encodes nothing, a version of bcrypt with a flaw, a digest without its name."""
    assert reason_of(text) == "HASH_UNSUPPORTED"


@pytest.mark.parametrize(
    "text",
    [
        *("$2b$12$short", f"$2b$03${BCRYPT}", f"$2b$12${BCRYPT}x", f"$2b$12${BCRYPT}\n", f"$2b$1\u00b2${BCRYPT}"),
        *("$argon2id$", f"$argon2d$v=19$m=64,t=1,p=1${B16}${B32}", f"$argon2id$v=18$m=64,t=1,p=1${B16}${B32}"),
        *(f"$argon2id$v=19$m=8,t=1,p=2${B16}${B32}", f"$argon2id$v=19$m=64,t=0,p=1${B16}${B32}"),
        *(f"$argon2id$v=19$m=64,t=1,p=1$AA${B32}", f"$argon2id$v=19$m=64,t=1,p=1${B16}$AA"),
        *("pbkdf2_sha256$1000$$" + B32, "pbkdf2_sha256$1000$sa lt$" + B32, "pbkdf2_md5$1000$salt$" + B32),
        *("pbkdf2_sha256$0$salt$" + B32, "pbkdf2_sha256$1000$salt$AAAA", "pbkdf2_sha1$1000$salt$A" + B32 + "A"),
        *(f"$pbkdf2-sha256$i=1000,l=31${B16}${B32}", "pbkdf2:sha256:1000$salt$abc", "pbkdf2:sha256$salt$" + "ab" * 32),
        *(f"scrypt$1000$salt$8$1${B32}", f"$scrypt$ln=0,r=8,p=1${B16}${B32}", f"$scrypt$ln=14,r=0,p=1${B16}${B32}"),
        *(f"$scrypt$ln=16,r=1,p=1${B16}${B32}", f"scrypt$65536$salt$1$1${B32}", "{scrypt}$100101$" + B16 + "$" + B32),
        *(f"$firescrypt$ln=14,r=8,p=1${B16}${B32}", f"$firescrypt$k={ID},ln=14,r=8,p=1${B16}${B32}$Bw==${B32}"),
        *("$6$rounds=10$salt$" + "." * 86, "$6$salt$" + "." * 85, "$1$toolongsalt$" + "." * 22),
        *("$P$/" + "." * 30, "$S$D" + "." * 30, "{SSHA}AAAA", "{SHA}" + B32, "{SSHA}" + "A" * 27 + "="),
        *("md5$salt$00", "$sha1$pf=e1NBTFR9$c2FsdA==$" + "A" * 27, "A" * 68, f"$pepper$k=1$2b$12${BCRYPT}"),
        *("{pbkdf2}00", "{scrypt}$00801$" + B16 + "$" + B32, "$wrapped$md5$$$2b$12$short", "$wp$2y$10$short"),
    ],
)
def test_what_its_scheme_would_not_write_is_malformed(text: str) -> None:
    assert reason_of(text) == "HASH_MALFORMED"


@pytest.mark.parametrize(
    "text",
    [
        *(f"$2b$17${BCRYPT}", f"$2y$31${BCRYPT}", f"bcrypt_sha256$$2b$31${BCRYPT}", f"$wp$2y$31${BCRYPT}"),
        *(f"$argon2id$v=19$m=4194304,t=1,p=1${B16}${B32}", f"$argon2id$v=19$m=64,t=11,p=1${B16}${B32}"),
        f"$argon2id$v=19$m=1024,t=1,p=17${B16}${B32}",
        *(f"pbkdf2_sha256$2147483648$salt${B32}", f"$pbkdf2-sha512$2000001${B16}${B32}"),
        *(f"pbkdf2:sha1:9999999999$salt${'ab' * 20}", f"scrypt$262144$salt$8$1${B32}", f"scrypt$16384$salt$8$9${B32}"),
        *(f"$scrypt$ln=20,r=8,p=1${B16}${B32}", "{scrypt}$ff0801$" + B16 + "$" + B32),
        *("$6$rounds=1000001$salt$" + "." * 86, "$5$rounds=9999999999$salt$" + "." * 43),
        *("$P$F" + "." * 30, "$S$F" + "." * 51, "$wrapped$md5$$$2b$31$" + BCRYPT),
        "AQAAAAGAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==",
    ],
)
def test_what_would_take_too_long_is_too_costly(text: str) -> None:
    """Iterations, memory and lanes are bounded when a hash is parsed: nothing was computed."""
    assert reason_of(text) == "HASH_TOO_COSTLY"


@given(st.text(max_size=300))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for start in ("", "$2b$", "$argon2id$", "pbkdf2_sha256$", "{SSHA}", "AQAAAA", "$wrapped$md5$", "$firescrypt$"):
        with contextlib.suppress(HashError):
            parse(start + text)


def test_a_hash_that_does_not_fit_the_column_is_malformed() -> None:
    """255 characters; a hash of 4 kB costs no more than to look at its length."""
    assert reason_of("pbkdf2_sha256$1000$" + "s" * 193 + "$" + B32) == "HASH_MALFORMED"
    assert parse("pbkdf2_sha256$1000$" + "s" * 192 + "$" + B32).scheme == "django_pbkdf2"
    assert reason_of("$2b$12$" + "x" * 4096) == "HASH_MALFORMED"


def test_names_are_unique_and_patterns_read_by_postgresql() -> None:
    """No lookahead, no class by backslash, no non-capturing group: hash-report gives the patterns to the database."""
    assert len({scheme.name for scheme in SCHEMES}) == len(SCHEMES)
    for scheme in SCHEMES:
        assert not re.search(r"\\[dwsb]|\(\?(?!P<)", scheme.pattern.pattern), scheme.name


@pytest.mark.parametrize(
    "text, stored",
    [
        (f"bcrypt$$2b$12${BCRYPT}", f"$2b$12${BCRYPT}"),
        ("{bcrypt}$2a$10$" + BCRYPT, f"$2a$10${BCRYPT}"),
        ("{CRYPT}$6$salt$" + "." * 86, "$6$salt$" + "." * 86),
        ("{ldap}{CRYPT}$6$salt$" + "." * 86, "$6$salt$" + "." * 86),
        (f"argon2$argon2id$v=19$m=64,t=1,p=1${B16}${B32}", f"$argon2id$v=19$m=64,t=1,p=1${B16}${B32}"),
        ("{PBKDF2-SHA256}1000$" + B16 + "$" + B32, f"$pbkdf2-sha256$1000${B16}${B32}"),
    ],
)
def test_a_prefix_that_says_nothing_is_not_stored(text: str, stored: str) -> None:
    assert parse(text).text == stored
    assert parse(stored).text == stored


class TestSecrets:
    def test_firebase(self) -> None:
        """The published example, with its signer key and separator sealed elsewhere."""
        text = sources.firebase(FIREBASE_HASH, FIREBASE_SALT, secret_id=ID, rounds=8, mem_cost=14)
        parsed = parse(text)

        assert parsed.recipe.secret_id == ID
        assert parsed.verify("user1password", FIREBASE)
        assert not parsed.verify("user2password", FIREBASE)

    def test_supertokens_took_over_from_firebase(self) -> None:
        text = f"$f_scrypt${FIREBASE_HASH}${FIREBASE_SALT}$m=14$r=8$s=Bw=="

        assert parse(sources.supertokens_firebase(text, secret_id=ID)).verify("user1password", FIREBASE)
        for bad in ("$f_scrypt$a$b$m=14$r=8", "$scrypt$a$b$m=14$r=8$s=Bw==", "$f_scrypt$a$b$r=8$m=14$s=Bw=="):
            with pytest.raises(HashError):
                sources.supertokens_firebase(bad, secret_id=ID)

    def test_devise(self) -> None:
        """The bcrypt of password and pepper, cut off after 72 bytes as Ruby's bcrypt does."""
        for password in (PASSWORD, "x" * 60):
            pepper = b"p" * 40
            hashed = (
                bcrypt.hashpw((password.encode() + pepper)[:72], bcrypt.gensalt(4)).decode().replace("$2b$", "$2a$")
            )
            parsed = parse(sources.peppered(hashed, secret_id=ID))

            assert parsed.verify(password, {ID: {"pepper": pepper}})
            assert not parsed.verify(password, {ID: {"pepper": b"another"}})

    @pytest.mark.parametrize("secrets", [{}, {ID: {"pepper": b"of another kind"}}, {"f" * 16: FIREBASE[ID]}])
    def test_a_hash_without_its_secret_is_right_for_nobody(self, secrets: Secrets) -> None:
        text = sources.firebase(FIREBASE_HASH, FIREBASE_SALT, secret_id=ID, rounds=8, mem_cost=4)
        with pytest.raises(HashError):
            parse(text).verify("user1password", secrets)
        with pytest.raises(StoredHashError):
            is_match("user1password", text, reference_cost=4, secrets=secrets)


class TestKeycloak:
    SECRET = '{"value":"' + B32 + '=","salt":"' + B16 + '=="}'

    @pytest.mark.parametrize(
        "secret, data",
        [
            ("", "{}"),
            ("[]", "[]"),
            ("{", "{}"),
            (SECRET, '{"algorithm":"pbkdf2-sha256"}'),
            (SECRET, '{"algorithm":"pbkdf2-sha256","hashIterations":"1000"}'),
            (SECRET, '{"algorithm":"bcrypt-plugin","hashIterations":10}'),
            (SECRET, '{"algorithm":"argon2","hashIterations":5}'),
            (SECRET, '{"algorithm":"argon2","hashIterations":5,"additionalParameters":{"memory":"7168"}}'),
            ('{"value":1,"salt":2}', '{"algorithm":"pbkdf2","hashIterations":5}'),
            ("[" * 5000, "{}"),
            ("[" * 4000, "{}"),
            (r'{"value":"\ud800","salt":"AAAA"}', '{"algorithm":"pbkdf2","hashIterations":5}'),
            (SECRET, r'{"algorithm":"argon2","hashIterations":5,"additionalParameters":{"type":["\ud800"]}}'),
        ],
    )
    def test_fields_that_it_does_not_write_are_refused(self, secret: str, data: str) -> None:
        with pytest.raises(HashError):
            sources.keycloak(secret, data)

    @pytest.mark.parametrize(
        "secret, data",
        [
            (SECRET.replace("{", '{"value":"AAAA",'), '{"algorithm":"pbkdf2","hashIterations":5}'),
            (SECRET, '{"algorithm":"pbkdf2","hashIterations":5,"hashIterations":5}'),
            (
                SECRET,
                '{"algorithm":"argon2","hashIterations":5,"additionalParameters":{"memory":["9"],"memory":["8"]}}',
            ),
        ],
    )
    def test_a_name_that_comes_twice_is_refused(self, secret: str, data: str) -> None:
        """As in the file around it: readers of JSON differ in which of the two counts."""
        with pytest.raises(HashError) as caught:
            sources.keycloak(secret, data)
        assert caught.value.reason == "HASH_MALFORMED"

    def test_numbers_are_bounded_as_in_any_hash(self) -> None:
        for data in (
            '{"algorithm":"pbkdf2-sha512","hashIterations":2147483648}',
            '{"algorithm":"argon2","hashIterations":5,"additionalParameters":{"memory":["4194304"]}}',
        ):
            assert reason_of(sources.keycloak(self.SECRET, data)) == "HASH_TOO_COSTLY"


class TestWrapping:
    @pytest.mark.parametrize(
        "text",
        [
            *("{SSHA}AZKja92fbuuB9SpRlHqaoXxbTc43Mzc2MDM1Ng==", "{SHA}uJ6qx+YUFzQbcQtyd2gpTQ5qJ3s="),
            "sha1$fe76b$02d5916550edf7fc8c886f044887f4b1abf9b013",
            "{SSHA512}ALtwKGBdRgD+U0fPAy31C28RyKYx7+a8kmfksccsOeLknLHv2DBXYI7TDnTolQMBuPkWDISgZr2cHfnNPFjGZTEyNDU4OTkw",
        ],
    )
    def test_a_fast_digest_is_hashed_without_its_password(self, text: str) -> None:
        """Nothing of the digest is left; the same password is right."""
        wrapped = wrap(parse(text), 4)

        assert wrapped.scheme == "wrapped_digest"
        assert wrapped.verify("hashcat")
        assert not wrapped.verify("hashcats")
        assert text[-12:] not in wrapped.text
        assert wrap(wrapped, 4) == wrapped

    def test_a_password_hash_stays_as_it_is(self) -> None:
        stored = parse(f"$2b$12${BCRYPT}")
        assert wrap(stored, 4) is stored

    @pytest.mark.parametrize(
        "text",
        [
            f"$2b$04${BCRYPT}",
            "$1$salt$" + "." * 22,
            "$P$6" + "." * 30,
            "{sha256}" + "0" * 80,
            f"$pbkdf2-sha256$1000${B16}${B32}",
        ],
        ids=range(5),
    )
    def test_the_weakest_password_hashes_that_products_write_are_not_fast(self, text: str) -> None:
        """They come in as they are."""
        assert not is_fast(parse(text))


class TestTime:
    def test_an_import_takes_no_hash_that_makes_all_sign_ins_slower(self) -> None:
        """As written here: up to the reference. What is renewed at the first sign-in: four times as much."""
        require_affordable(parse(f"$2b$12${BCRYPT}"), reference_cost=12)
        require_affordable(parse(f"bcrypt_sha256$$2b$14${BCRYPT}"), reference_cost=12)
        require_affordable(parse(f"pbkdf2_sha256$1200000$salt${B32}"), reference_cost=12)  # Django 6.0
        require_affordable(parse("$6$rounds=656000$salt$" + "." * 86), reference_cost=12)  # passlib's default
        for text in (
            "$6$rounds=1000000$salt$" + "." * 86,  # six times the reference with a password of 256 bytes
            f"$2b$13${BCRYPT}",
            f"bcrypt_sha256$$2b$15${BCRYPT}",
            f"$argon2id$v=19$m=262144,t=9,p=4${B16}${B32}",
        ):
            with pytest.raises(HashError, match="HASH_TOO_COSTLY"):
                require_affordable(parse(text), reference_cost=12)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.51, 0.9, 0.98, 1.0, 5.0])
    def test_a_refusal_is_topped_up_to_the_reference(self, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
        """By CPU time: a hash of another product takes its share, and dummies the rest. The clock is moved here."""
        rounds = 0.0

        def dummy(_secret: bytes, cost: int, _salt: str) -> bytes:
            nonlocal rounds
            rounds += 2**cost + 0.6
            return b""

        def pbkdf2(*_: object) -> bytes:
            nonlocal rounds
            rounds += 2**12 * share
            return b""

        def filling(_data: bytes) -> None:
            nonlocal rounds
            rounds += 0.5

        monkeypatch.setattr(hashing, "digest_of", dummy)
        monkeypatch.setattr(hashing, "sha512", filling)
        monkeypatch.setattr(hashing, "thread_seconds", lambda: rounds / 20_000)
        monkeypatch.setattr("hashlib.pbkdf2_hmac", pbkdf2)

        assert not is_match(PASSWORD, f"pbkdf2_sha256$1000$salt${B32}", reference_cost=12)
        assert 0 <= rounds / 2**12 - max(1, share + 2**-6) <= 2**-11

    @pytest.mark.parametrize("waited, spent", [(0.1, 0.1), (0.4, 0.4), (5.0, 0.786)])
    def test_threads_count_by_the_clock_up_to_their_work(
        self, monkeypatch: pytest.MonkeyPatch, waited: float, spent: float
    ) -> None:
        """Nobody knows the CPU time of Argon2's lanes. On a busy machine they wait for a core. The clocks are moved."""
        rounds = now = 0.0

        def dummy(_secret: bytes, cost: int, _salt: str) -> bytes:
            nonlocal rounds
            rounds += 2**cost + 0.6
            return b""

        def argon2(*_: object) -> bytes:
            nonlocal now
            now += waited
            return b""

        def filling(_data: bytes) -> None:
            nonlocal rounds
            rounds += 0.5

        monkeypatch.setattr(hashing, "digest_of", dummy)
        monkeypatch.setattr(hashing, "sha512", filling)
        monkeypatch.setattr(hashing, "thread_seconds", lambda: rounds / 2**12)
        monkeypatch.setattr(hashing, "monotonic", lambda: now)
        monkeypatch.setattr(argon2_phc, "hash_secret_raw", argon2)

        assert not is_match(PASSWORD, f"$argon2id$v=19$m=65536,t=3,p=4${B16}${B32}", reference_cost=12)
        assert abs(rounds / 2**12 - (1 - spent)) <= 2**-11

    def test_it_is_renewed_as_a_hash_of_this_service(self) -> None:
        """At the configured cost, whatever its own was."""
        assert renewal_cost(PASSWORD, f"pbkdf2_sha256$1000$salt${B32}", 5) == 5
        assert renewal_cost(PASSWORD, f"bcrypt_sha256$$2b$14${BCRYPT}", 5) == 5
        assert renewal_cost(PASSWORD, hash_password(PASSWORD, 5), 5) is None


def test_what_php_cut_off_is_not_asked_for() -> None:
    """`$2y$` and `$2a$` of a long password are of its first 72 bytes. A hash of this service never is."""
    long = "x" * 72 + " and more"
    written = bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode()

    assert is_match(long, written.replace("$2b$", "$2y$"), reference_cost=4)
    assert is_match(long, written.replace("$2b$", "$2a$"), reference_cost=4)
    assert not is_match(long, written, reference_cost=4)


@pytest.mark.parametrize("name", ["sha512_crypt", "sha256_crypt", "md5_crypt", "apr_md5_crypt"])
def test_the_crypt_family_hashes_no_long_password(name: str) -> None:
    """Each of its rounds hashes the password: 4,096 bytes took 7 seconds where a short one took 0.3."""
    hasher = getattr(passlib.hash, name)
    settings = {"rounds": 1000} if name.startswith("sha") else {}
    longest, longer = "x" * unix_crypt.MAX_BYTES, "x" * (unix_crypt.MAX_BYTES + 1)

    assert is_match(longest, hasher.using(**settings).hash(longest), reference_cost=4)
    assert not is_match(longer, hasher.using(**settings).hash(longest), reference_cost=4)
    assert not is_match(longer, hasher.using(**settings).hash(longer), reference_cost=4)


def test_what_was_typed_is_verified_and_not_its_normal_form() -> None:
    """Other products hash the bytes that they get: a password in decomposed letters is another one for them."""
    typed = "cafe\u0301 is a long word"
    digest = base64.b64encode(hashlib.pbkdf2_hmac("sha256", typed.encode(), b"salt", 10)).decode()

    assert is_match(typed, f"pbkdf2_sha256$10$salt${digest}", reference_cost=4)
    assert not is_match("caf\u00e9 is a long word", f"pbkdf2_sha256$10$salt${digest}", reference_cost=4)


def test_nothing_of_a_hash_is_in_its_repr() -> None:
    for text in ("{SSHA}AZKja92fbuuB9SpRlHqaoXxbTc43Mzc2MDM1Ng==", f"$pepper$k={ID}$2a$04${BCRYPT}"):
        assert not re.search(r"AZKja|7376|x{8}|b'", repr(parse(text)))
