"""Common passwords: the shipped list, an operator's own list, and the look-up in both. No database.

NIST SP 800-63B-4, 3.1.1.2 and OWASP ASVS 5, 6.2.4 want new passwords compared with such a list.
`service/dev/common_passwords.py` names the source of the shipped one, and builds it.
"""

import codecs
import gzip
import zlib
from functools import cache
from pathlib import Path

from service.core.identifiers import to_nfc

SHIPPED = Path(__file__).with_name("common_passwords.txt.gz")

_GZIP_MAGIC = b"\x1f\x8b"


class PasswordListError(Exception):
    """The operator's list cannot be used. The text names the path and the line and is safe to print."""


class CommonPasswords:
    """Common and breached passwords.

    Each blob holds folded entries, sorted by their bytes, each followed by a line feed. Binary search needs a tenth of
    the memory that a set would take in every process.
    """

    def __init__(self, *blobs: bytes) -> None:
        self._blobs = blobs

    def is_listed(self, folded: str) -> bool:
        """Whether there is such an entry. For text in the form of `fold`."""
        entry = folded.encode()
        return any(_holds(blob, entry) for blob in self._blobs)


def fold(password: str) -> str:
    """The form in which passwords are listed and looked up: NFC, case-folded.

    Attackers try a common password in every case.
    """
    return to_nfc(to_nfc(password).casefold())  # folding the case can leave the normal form


def load(operator_file: Path | None) -> CommonPasswords:
    """The shipped list and the operator's own, if any: UTF-8 text, plain or gzipped, one password a line in any order.

    Raises PasswordListError.
    """
    if operator_file is None:
        return CommonPasswords(_shipped())
    return CommonPasswords(_shipped(), _operators(operator_file))


def to_blob(entries: set[str]) -> bytes:
    """Folded entries as a blob for CommonPasswords."""
    return b"".join(line + b"\n" for line in sorted(entry.encode() for entry in entries))


def _holds(blob: bytes, entry: bytes) -> bool:
    low, high = 0, len(blob)  # both are always the start of a line
    while low < high:
        middle = (low + high) // 2
        start = max(low, blob.rfind(b"\n", low, middle) + 1)
        end = blob.index(b"\n", middle)
        found = blob[start:end]
        if found == entry:
            return True
        if found < entry:
            low = end + 1
        else:
            high = start
    return False


@cache
def _shipped() -> bytes:
    return gzip.decompress(SHIPPED.read_bytes())


def _operators(path: Path) -> bytes:
    entries = set()
    for number, line in enumerate(_content(path).removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            entry = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError:  # whose own text would quote the line
            raise PasswordListError(f"{path}, line {number}: is not UTF-8") from None
        if entry:
            entries.add(fold(entry))
    return to_blob(entries)


def _content(path: Path) -> bytes:
    if path.is_fifo():
        raise PasswordListError(f"{path}: is a pipe, not a file")  # reading it would block
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PasswordListError(f"{path}: cannot be read: {error.strerror}") from None
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        raise PasswordListError(f"{path}: begins like a gzip file, but cannot be unpacked") from None
