"""How far an import has got, in a file beside the one that is imported; and the rows that it refused, in another.

After each batch, when it is committed: first its refused rows are written, then how far the import is. Killed between
any two of these steps, the next run does the last batch again under the same request id, and gets the same results.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self
from uuid import UUID, uuid5

from service.base.randomness import random_bytes
from service.core.transfer.exporting import Exported
from service.core.transfer.rules import Result, RowOutcome, SourceUser

_HEAD = 1 << 16
_MODE = 0o600


class ProgressError(Exception):
    """The import cannot begin or go on here. The text says why and what to do."""


@dataclass(slots=True)
class Progress:
    """How far an import has got. file: the length of the file and a digest of its beginning. refused_bytes: of the file
    of refused rows.
    """

    run: str
    file: str
    done: int = 0
    refused_bytes: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RowOutcome, 0))

    @classmethod
    def begin(cls, file: BinaryIO) -> Self:
        """Of a run that has not done anything."""
        head = file.read(_HEAD)
        file.seek(0)
        identity = f"{os.fstat(file.fileno()).st_size}:{hashlib.sha256(head).hexdigest()}"
        return cls(UUID(bytes=random_bytes(16)).hex, identity)

    def request_id(self) -> UUID:
        """Of the batch that begins here."""
        return uuid5(UUID(self.run), str(self.done))


def lock(file: BinaryIO) -> None:
    """Raises ProgressError when another process imports this file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ProgressError("Another process imports this file.") from None


def load(path: Path) -> Progress | None:
    """The progress that was stored; None where there is none. Raises ProgressError."""
    try:
        return Progress(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError):
        raise ProgressError(f"{path} cannot be read. --restart begins the import again.") from None


def store(path: Path, progress: Progress) -> None:
    """Replace the stored progress, whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, _MODE), "w") as file:
        json.dump(asdict(progress), file)
    draft.replace(path)


def open_private(path: Path, *, is_new: bool) -> BinaryIO:
    """Open a file of hashes for reading and writing, so that from now on nobody but its owner may read it.

    is_new: make it. Raises OSError; FileExistsError where a new one is there: another user may have put it there.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if is_new else 0)
    descriptor = os.open(path, flags, _MODE)
    os.fchmod(descriptor, _MODE)
    return os.fdopen(descriptor, "r+b")


class RefusedRows:
    """The file of refused rows: one JSON object on each line, to be mended and imported as ndjson.

    It has the password hashes of the rows, so nobody else may read it.
    """

    def __init__(self, path: Path, size: int) -> None:
        """size: how much of it belongs to batches that are done; what follows is written again."""
        self.path = path
        self._size = size

    def add(self, lines: list[dict[str, Any]]) -> int:
        """Append these; how large the file is now."""
        if not lines:
            return self._size
        if self._size == 0:
            self.path.unlink(missing_ok=True)  # an empty one, or of a batch that is done again
        with open_private(self.path, is_new=self._size == 0) as file:
            file.truncate(self._size)
            file.seek(0, os.SEEK_END)
            file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
            self._size = file.tell()
        return self._size


def refused_line(number: int, source: SourceUser | None, refusals: Any) -> dict[str, Any]:
    """A refused row as ndjson, with the reasons in `_refused`. source: None for what could not be read."""
    row: dict[str, Any] = {} if source is None else row_of(source)
    reasons = [{"field": one.field, "reason": one.reason, "description": one.description} for one in refusals]
    return row | {"_row": number, "_refused": reasons}


def row_of(source: SourceUser) -> dict[str, Any]:
    """A user in the format of `users export`. What has its default is left out, but for the names."""
    optional: dict[str, Any] = {
        "hashed_password": source.hashed_password or None,
        "is_active": None if source.is_active else False,
        "is_superuser": source.is_superuser or None,
        "email_verified_at": source.email_verified_at and source.email_verified_at.isoformat(),
        "created_at": source.created_at and source.created_at.isoformat(),
    }
    names = {"email": source.email, "username": source.username}
    return names | {name: value for name, value in optional.items() if value is not None}


def count(counts: dict[str, int], results: list[Result]) -> None:
    """Add the outcomes of a batch."""
    for outcome, rows in Counter(result.outcome for result in results).items():
        counts[outcome] = counts.get(outcome, 0) + rows


def exported_line(entry: Exported) -> bytes:
    """A line of `users export`."""
    user, hashed = entry
    source = SourceUser(
        user.email,
        user.username,
        hashed or "",
        is_active=user.is_active,
        is_superuser=user.is_superuser,
        email_verified_at=user.email_verified_at,
        created_at=user.created_at,
    )
    return json.dumps({"id": user.id} | row_of(source), ensure_ascii=False).encode() + b"\n"


def last_exported(file: BinaryIO) -> int:
    """The id on the last whole line of such a file, of which nothing is kept behind that line; 0 for an empty file.

    Raises ValueError for another file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _HEAD))
    tail = file.read()
    whole = tail.rpartition(b"\n")[0]
    if not whole:
        if size >= _HEAD:
            raise ValueError
        file.truncate(0)
        file.seek(0)
        return 0
    try:
        last_id = json.loads(whole.rpartition(b"\n")[2])["id"]
    except (TypeError, KeyError, RecursionError):
        raise ValueError from None
    if not isinstance(last_id, int):
        raise ValueError  # noqa: TRY004  as for any other content
    file.truncate(size - len(tail) + len(whole) + 1)
    file.seek(0, os.SEEK_END)
    return last_id
