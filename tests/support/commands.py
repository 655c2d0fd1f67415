"""Commands as an operator runs them: what they say, and their exit code."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.support.databases import ROOT
from tests.support.processes import inherited
from tests.support.servers import KEY


def run_module(
    *arguments: str | bytes, cwd: Path = ROOT, text: bytes = b"", environment: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, str]:
    """The exit code of `python -m MODULE …`, and all that it says."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "BCRYPT_COST": "4", "SECRET_KEYS": KEY, **inherited(), **environment},
        input=text,
        capture_output=True,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def refused(answer: tuple[int, str]) -> str:
    """What a command says that cannot do its work: one line, without a traceback."""
    code, said = answer
    assert (code, said.count("\n"), said.startswith("personae: ")) == (1, 1, True), said
    return said.removeprefix("personae: ").rstrip()
