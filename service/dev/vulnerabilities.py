"""Asks OSV (https://osv.dev) for known vulnerabilities of the pinned packages: run by `make lint`.

One request for all packages, by the standard library: pip-audit would bring thirty packages of its own, and `uv audit`
reads uv.lock only. A service that cannot be asked is no failure, or builds would fail at random; a finding is one.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

URL = "https://api.osv.dev/v1/querybatch"
_TIMEOUT_SECONDS = 10
_PIN = re.compile(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
ACCEPTED: Mapping[str, str] = {}
"""Findings that do not concern this service: the id of each, and why."""


def pins(locks: Iterable[Path]) -> list[tuple[str, str]]:
    """Name and version of each package that the lock files pin."""
    return sorted({found for lock in locks for found in _PIN.findall(lock.read_text())})


def find_vulnerabilities(packages: list[tuple[str, str]], url: str = URL) -> list[str]:
    """A line for each known vulnerability. Raises OSError, HTTPException and ValueError where OSV gives no answer."""
    queries = [{"package": {"ecosystem": "PyPI", "name": name}, "version": version} for name, version in packages]
    request = Request(url, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310  the scheme is ours
        results = json.load(response)["results"]
    return [
        f"{name} {version}: {found['id']}, https://osv.dev/{found['id']}"
        for (name, version), result in zip(packages, results, strict=True)
        for found in result.get("vulns", ())
        if found["id"] not in ACCEPTED
    ]


def main(locks: list[str], url: str = URL) -> int:
    """Print what was found; return the exit code."""
    packages = pins(map(Path, locks))
    try:
        found = find_vulnerabilities(packages, url)
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        print(f"audit of dependencies SKIPPED: {url} gives no answer ({type(error).__name__})")
        return 0
    print(*found, f"audit of dependencies: {len(packages)} packages, {len(found)} known vulnerabilities", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
