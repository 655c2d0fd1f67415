"""What an import is told beside the file."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Options:
    """now: when an email counts as verified whose product only says that it is. email_domain: makes emails of the names
    in a file without emails; "" for none. firebase_prefix: how the hashes of the project begin; ""
    when that is not known.
    """

    now: datetime
    email_domain: str = ""
    firebase_prefix: str = ""
