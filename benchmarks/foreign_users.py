"""Users to import from another system: names in random order, hashes of eight schemes, the same in every run."""

import io
import time
from collections.abc import Iterator

from sqlalchemy.engine import URL

from benchmarks.data import connect

_HASHES = (
    "$2b$12$l7qkP1ypw51JrQhg7BjCTeth6fruMwAleeH/KRFf1KqoJy8rVOYPa",
    "pbkdf2_sha256$1000000$rA1ddwjGIK48eJfqCXLgNo$a9DlNwhVtoZajaVa0JEbD8WkJSUpjoh7/9VTFJIHGD8=",
    "$argon2id$v=19$m=65536,t=3,p=4$2F7ds6HgkoI+RIYNDz6snw$utmhOha2tf9Ov6e3qXsPk/Oh5XyC5MMaJe95ZLmY+MY",
    "pbkdf2:sha256:1000000$gWPAiVLKvlC0RloR$857fd37c85914837da08cf6256f586193f2755c7c6bf6ad495f4f6c986a908f5",
    "$pbkdf2-sha256$29000$Uyql1HpvTQlhrBWCUCoFwA$qbEzeBFpIbHlQeD3DRKPC7zpxgYUKLy1fGKWM35EYsg",
    "$scrypt$ln=16,r=8,p=1$au29d87Zu1fKuTcmREjJGQ$xCXuzhwQ7wqf8ec0hIO7fQ7Tfc6P+ww6rg+hMYO9rw8",
    "$5$rounds=1000$tIMB5NOAS6nAvklq$5pOHvbENa/VeWt.KBOGsHD/itAB3w/TkUYIvuCSVbyD",
    "$P$6FY3cHAGJlhp3vOFX4NlLLqVLDqGEU/",
)


def foreign_users(numbers: range) -> Iterator[tuple[str, str, str]]:
    """Email, username and password hash of the users with these numbers."""
    for number in numbers:
        name = f"u{number * 2_654_435_761 % 2**32:08x}.{number}"
        yield f"{name}@{number % 300}.example.com", name, _HASHES[number % len(_HASHES)]


class Copier:
    """Loads these users into a database by COPY."""

    def __init__(self, url: URL) -> None:
        self._connection = connect(url)

    def copy(self, numbers: range) -> float:
        """COPY the users with these numbers. Returns seconds."""
        data = io.StringIO("".join("\t".join(row) + "\n" for row in foreign_users(numbers)))
        with self._connection.cursor() as cursor:
            began_at = time.monotonic()
            cursor.copy_expert("COPY users (email, username, hashed_password) FROM STDIN", data)
            return time.monotonic() - began_at

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
