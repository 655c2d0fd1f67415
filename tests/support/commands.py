"""Runs commands as an operator does, `python -m MODULE …`, and returns their exit code and output.

Starting Python with all imports takes a second, and the tests run hundreds of commands. So a command runs in a fork of
a process that has done all imports: this module, run as a program. A test whose variables change how Python starts gets
a new Python.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.support.databases import ROOT
from tests.support.processes import inherited
from tests.support.servers import KEY

_FORK = threading.Lock()
_STREAMS = ("stdin", "stdout", "stderr")


def run_module(
    *arguments: str | bytes, cwd: Path = ROOT, text: bytes = b"", environment: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, str]:
    """Run `python -m MODULE …`. Returns its exit code and its output."""
    settings = {"BCRYPT_COST": "4", "SECRET_KEYS": KEY, **inherited(), **environment}
    done = run_command(arguments, cwd=cwd, text=text, environment=settings)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def run_command(
    arguments: Sequence[str | bytes], *, environment: Mapping[str, str], cwd: Path = ROOT, text: bytes = b""
) -> "subprocess.CompletedProcess[bytes]":
    """Run `python -m` with these arguments and only this environment. text: standard input."""
    if any(name.startswith(("PYTHON", "LC_")) and value != str(ROOT) for name, value in environment.items()):
        environment = {"PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, input=text, capture_output=True, check=False)
    with tempfile.TemporaryDirectory() as directory, _FORK:
        files = [Path(directory, name) for name in _STREAMS]
        for path, content in zip(files, (text, b"", b""), strict=True):
            path.write_bytes(content)
        job = [directory, os.fspath(cwd), dict(environment), [os.fsdecode(argument) for argument in arguments]]
        forking = _forking()
        assert forking.stdin is not None
        assert forking.stdout is not None
        forking.stdin.write(json.dumps(job) + "\n")
        forking.stdin.flush()
        code = int(forking.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, files[1].read_bytes(), files[2].read_bytes())


def refused(answer: tuple[int, str]) -> str:
    """The message of a command that failed. It must be one line, without a traceback."""
    code, said = answer
    assert (code, said.count("\n"), said.startswith("personae: ")) == (1, 1, True), said
    return said.removeprefix("personae: ").rstrip()


@functools.cache
def _forking() -> "subprocess.Popen[str]":
    """Start the process that forks. It ends with this one, which has the other end of its pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _main() -> None:
    """Run the jobs on standard input, one per line, until it ends."""
    for module in ("service.cli.main", "service.server.server", "service.db.test_db", "alembic.config"):
        importlib.import_module(module)
    gc.freeze()  # or a fork would visit every object of this process when it ends, and so copy its memory
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for job in jobs:
        child = os.fork()
        if child == 0:
            _become(*json.loads(job))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(directory: str, cwd: str, environment: dict[str, str], arguments: list[str]) -> None:
    """Turn this process into `python -m` with these arguments."""
    for number, name in enumerate(_STREAMS):
        opened = os.open(Path(directory, name), os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
