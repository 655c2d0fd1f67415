"""Runs the verbs of `python -m service` in the documentation, each in a fork of a process that has done all imports.

To start Python and import everything takes most of a second, and the documentation has dozens of verbs. Run as a
program, this module is the process that forks; `Verbs` starts it and sends it the verbs.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Verbs:
    """A process that runs verbs, one after the other."""

    process: subprocess.Popen[str]

    def run(
        self, arguments: Sequence[str], *, directory: Path, environment: Mapping[str, str], printed: Path, said: Path
    ) -> int:
        """Run one verb. Returns its exit status. printed, said: files for its standard output and standard error."""
        job = [list(arguments), str(directory), dict(environment), str(printed), str(said)]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def verbs() -> Iterator[Verbs]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.docs_verbs"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Verbs(process)


def main() -> None:
    """Run the verbs on standard input, one per line, until it ends."""
    for module in ("service.cli.main", "service.server.server", "alembic.command"):
        importlib.import_module(module)  # so that the forks need not import it

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201  the answer


def _become(arguments: list[str], directory: str, environment: dict[str, str], printed: str, said: str) -> None:
    """Become `python -m service` with these arguments, and exit."""
    from service.cli.main import main as service  # noqa: PLC0415  it is there already

    status: Any = 1
    try:
        for path, descriptors in ((os.devnull, [0]), (printed, [1]), (said, [2])):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            for descriptor in descriptors:
                os.dup2(opened, descriptor)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        service.main(arguments, prog_name="python -m service", standalone_mode=True)
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
