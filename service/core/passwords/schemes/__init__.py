"""The table of the password hashes that are verified: those that this service writes, and those of other products.

Other products' hashes come in by an import. The first right password replaces them by one of this service. What they
may cost is bounded here, when they are parsed: before anything is computed, at the import and at each sign-in.
"""

import re

from service.core.passwords.schemes import (
    argon2_phc,
    bcrypt_variants,
    fast_digests,
    pbkdf2,
    phpass,
    scrypt,
    unix_crypt,
)
from service.core.passwords.schemes.stored_hash import (
    NO_SECRETS,
    SECRET_ID,
    HashError,
    Parameters,
    Scheme,
    Secrets,
    StoredHash,
)

__all__ = [
    "MAX_CHARACTERS",
    "NO_SECRETS",
    "SCHEMES",
    "HashError",
    "Parameters",
    "Scheme",
    "Secrets",
    "StoredHash",
    "is_fast",
    "parse",
    "require_affordable",
    "secret_in",
    "wrap",
]

SCHEMES: tuple[Scheme, ...] = (
    *bcrypt_variants.SCHEMES,
    *argon2_phc.SCHEMES,
    *pbkdf2.SCHEMES,
    *scrypt.SCHEMES,
    *unix_crypt.SCHEMES,
    *phpass.SCHEMES,
    *fast_digests.SCHEMES,
)
MAX_CHARACTERS = 255
"""What the column holds."""
MAX_REFERENCES = 4
"""How many times the work of a refused sign-in an imported hash may take. Django's own default is one to two."""
_MIN_WORK = 0.0005
"""In bcrypts of cost 12: some 500 iterations of PBKDF2, and less than what products ship with takes."""
_WRITTEN_OVER = (
    # What is only the name of another form, before that form.
    ("{ldap}{", "{"),  # Spring
    ("argon2$argon2", "$argon2"),  # Django
    ("bcrypt$$2", "$2"),
    *((f"{{{name}}}$", "$") for name in ("bcrypt", "argon2", "argon2@SpringSecurity_v5_8", "CRYPT", "crypt")),
    *((f"{{PBKDF2-{name}}}", f"$pbkdf2-{name.lower()}$") for name in ("SHA256", "SHA512")),  # OpenLDAP
    ("{PBKDF2}", "$pbkdf2$"),
    ("$md5-crypt$", "$1$"),  # Kratos
    ("$sha256-crypt$", "$5$"),
    ("$sha512-crypt$", "$6$"),
)
_SECRET = re.compile(rf"\$(pepper|firescrypt)\$k=({SECRET_ID})[,$]")
_KINDS = {"pepper": "pepper", "firescrypt": "firebase"}


def parse(text: str) -> StoredHash:
    """Parse a hash. Computes nothing. Raises HashError.

    The parsed hash has the text to store, which is the given one but for a prefix that says nothing.
    """
    if len(text) > MAX_CHARACTERS:
        raise HashError("HASH_MALFORMED")
    for start, other in _WRITTEN_OVER:
        if text.startswith(start):
            text = other + text.removeprefix(start)
    claimants = [scheme for scheme in SCHEMES if text.startswith(scheme.starts)]
    for scheme in claimants:
        if found := scheme.pattern.fullmatch(text):
            return StoredHash(scheme.name, text, scheme.read(found))
    raise HashError("HASH_MALFORMED" if claimants else "HASH_UNSUPPORTED")


def require_affordable(stored: StoredHash, *, reference_cost: int) -> None:
    """Raises HashError for a hash that is too costly to import. reference_cost: of bcrypt, that a refusal costs now.

    A bcrypt hash of higher cost would make every sign-in more expensive. Any other one only its own user's, who can be
    recognised by that until it is renewed.
    """
    limit = bcrypt_variants.work_of(reference_cost)
    if stored.recipe.work > (limit if stored.recipe.bcrypt_cost is not None else MAX_REFERENCES * limit):
        raise HashError("HASH_TOO_COSTLY")


def is_fast(stored: StoredHash) -> bool:
    """Whether it falls to millions of guesses a second: a digest, or a password hash with next to no iterations."""
    return stored.recipe.work < _MIN_WORK


def wrap(stored: StoredHash, cost: int) -> StoredHash:
    """The hash itself; or, if it is a fast digest, bcrypt of it, which takes the time of one bcrypt of this cost."""
    return stored if stored.recipe.fast is None else parse(fast_digests.wrapped(stored.recipe.fast, cost))


def secret_in(text: str) -> tuple[str, str] | None:
    """The id and the kind of the secret that a hash names."""
    found = _SECRET.match(text)
    return None if found is None else (found[2], _KINDS[found[1]])
