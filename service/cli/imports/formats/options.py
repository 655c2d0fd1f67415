"""What an import is told beside the file."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

_PARAMETER = re.compile(r"[\"']?(\w+)[\"']?\s*[:=]\s*[\"']?([A-Za-z0-9+/=_-]+)")


class BadParametersError(ValueError):
    """The file is not what a product shows. Its text says what is missing."""


@dataclass(frozen=True, slots=True)
class FirebaseProject:
    """How a project hashes. secret_id: of its signer key and salt separator."""

    secret_id: str
    rounds: int
    mem_cost: int


@dataclass(frozen=True, slots=True)
class Options:
    """now: when an email counts as verified whose product only says that it is. email_domain: makes emails of the names
    in a file without emails; "" for none. firebase: None where it is not known. pepper_id: of the pepper that is behind
    each password in a bcrypt hash; "" for none.
    """

    now: datetime
    email_domain: str = ""
    firebase: FirebaseProject | None = None
    pepper_id: str = ""

    @property
    def secrets(self) -> set[tuple[str, str]]:
        """Id and kind of the secrets that come along."""
        firebase = set() if self.firebase is None else {(self.firebase.secret_id, "firebase")}
        return firebase | ({(self.pepper_id, "pepper")} if self.pepper_id else set())


def firebase_parameters(shown: str) -> tuple[Mapping[str, bytes], int, int]:
    """The secret of a project, its rounds and its mem_cost, from what the Firebase console shows:
    `hash_config { algorithm: SCRYPT, base64_signer_key: …, base64_salt_separator: Bw==, rounds: 8, mem_cost: 14, }`.

    Raises BadParametersError.
    """
    found = dict(_PARAMETER.findall(shown))
    try:
        secret = {
            name: base64.b64decode(found[f"base64_{name}"], validate=True) for name in ("signer_key", "salt_separator")
        }
        return secret, int(found["rounds"]), int(found["mem_cost"])
    except KeyError as error:
        raise BadParametersError(f"it lacks {error.args[0]}") from None
    except ValueError:
        raise BadParametersError("a value is no base64 or no number") from None
