"""A terminal for the documentation's commands: a directory, a shell, and the servers that the commands start.

grpcurl commands become calls (docs_grpcurl), oathtool is pyotp, `python -m service …` runs in a fork (commands), SQL
goes to psql, and everything else to bash. The directory looks like a checkout after `make setup`: it has
`.venv/bin/python` and the Makefile. Servers listen on free ports; the default ports in the docs stand for them.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pyotp
from sqlalchemy.engine import URL

from service.base.clock import Clock, utc_now
from service.base.settings import Settings
from service.dev.postgres import find_bindir
from tests.support.commands import run_command
from tests.support.databases import ROOT, libpq_url
from tests.support.docs_grpcurl import ADDRESS, MTLS_ADDRESS, Answer, Servers, parse, run
from tests.support.leak_detector import DETECTOR
from tests.support.servers import KEY

STARTS_WITHIN = 120.0
"""Seconds within which a server must listen."""
_VERB = re.compile(r"(?:([A-Z_]+)=\$\()?(?:\.venv/bin/)?python -m service ([^|;&<>()]+)\)?", re.DOTALL)
_APP = re.compile(r"([A-Z_]+)=\$\(oathtool --totp -b \$([A-Z_]+)\)")
_SERVES = re.compile(r"(make run|service serve)\s*$")
_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "PG_BINDIR")


class Terminal:
    """The state of one terminal: directory, environment, variables, servers."""

    def __init__(
        self,
        directory: Path,
        servers: Servers,
        *,
        environment: Mapping[str, str] | None = None,
        administered: URL | None = None,
        names: Mapping[str, str] | None = None,
        clock: Clock = utc_now,
    ) -> None:
        """administered: the database for SQL blocks. clock: that of the servers.

        names: replacements for names in the docs, such as roles, that are unique in a PostgreSQL cluster.
        """
        self.directory = directory
        self.environment = dict(environment or {})
        self.variables: dict[str, str] = {}
        self.servers = servers
        self._administered = administered
        self._names = dict(names or {})
        self._clock = clock
        self._has_changed_callers = False
        self._codes: Counter[str] = Counter()
        self._started = contextlib.ExitStack()

    def type(self, command: str) -> Answer:
        """Run one command. Returns its output."""
        command = command.replace("\\\n", " ")
        if command.startswith("grpcurl "):
            return run(parse(shlex.split(self.expanded(command))), self.servers)
        shown = _APP.fullmatch(command)
        if shown:
            self.variables[shown[1]] = self._code(self.variables[shown[2]])
            return Answer()
        verb = _VERB.fullmatch(command)
        if verb:
            return Answer(lines=self._verb(verb[2], verb[1]))
        return Answer(lines=self._shell(command, stderr=subprocess.STDOUT, check=False).splitlines())

    def is_settling(self, command: str) -> bool:
        """Whether callers were changed, so that the servers may not have read the change yet."""
        return command.startswith("grpcurl ") and self._has_changed_callers

    def source(self, block: str) -> None:
        """Run a block of commands and keep its exports. A server that the last command starts runs until `close`."""
        block = self._renamed(block)
        if _SERVES.search(block):
            listening = self._started.enter_context(_server(block, self.directory, self.environment))
            self.servers.tls[ADDRESS] = f"127.0.0.1:{listening['port']}"
            self.servers.tls[MTLS_ADDRESS] = f"127.0.0.1:{listening.get('mtls_port', 0)}"
            self.environment["GRPC_PORT"] = str(listening["port"])
            return
        exported = self._shell(f"set -e\n{block}\nenv -0", stderr=None, check=True)
        self.environment |= dict(pair.split("=", 1) for pair in exported.split("\0") if "=" in pair)

    def administer(self, statements: str) -> None:
        """Run statements with psql, as an administrator pastes them. Raises CalledProcessError."""
        assert self._administered is not None
        program = find_bindir(Settings(_env_file=None, secret_keys=None).pg_bindir) / "psql"
        subprocess.run(
            [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", libpq_url(self._administered)],
            cwd=self.directory,
            input=self._renamed(statements),
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def close(self) -> None:
        self._started.close()

    def _code(self, secret: str) -> str:
        """The output of oathtool for a person who waits for a new code each time: the codes of the previous step, of
        this one and of the next one, all of which are valid now.
        """
        self._codes[secret] += 1
        return str(pyotp.TOTP(secret).at(self._clock(), counter_offset=self._codes[secret] - 2))

    def _verb(self, words: str, variable: str | None) -> list[str]:
        """Run a verb. Returns the lines that the terminal shows: not those that `NAME=$(…)` takes."""
        arguments = shlex.split(self.expanded(words))
        environment = self.environment | self.variables
        done = run_command(("service", *arguments), cwd=self.directory, environment=environment)
        printed, said = done.stdout.decode(), done.stderr.decode()
        if variable:
            self.variables[variable] = printed.strip()
            printed = ""
        if arguments[0] == "callers":
            self._has_changed_callers = True
        return (printed + said).splitlines()

    def _shell(self, command: str, *, stderr: int | None, check: bool) -> str:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=self.environment | self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=check,
        ).stdout

    def _renamed(self, text: str) -> str:
        for documented, real in self._names.items():
            text = text.replace(documented, real)
        return text

    def expanded(self, command: str) -> str:
        """The command with `$NAME` and `${NAME%?}` replaced, except in single quotes."""
        parts = command.split("'")
        known = self.environment | self.variables
        for index in range(0, len(parts), 2):
            parts[index] = re.sub(r"\$\{([A-Z_]+)%\?\}", lambda found: known[found[1]][:-1], parts[index])
            parts[index] = re.sub(r"\$([A-Z_]+)", lambda found: known[found[1]], parts[index])
        return "'".join(parts)


@contextlib.contextmanager
def _server(block: str, directory: Path, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Run commands, the last of which starts a server. Yields its log line `listening`; stops it afterwards."""
    with subprocess.Popen(
        ["bash", "-ec", block],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        heard = _heard(process.stdout)
        rest = threading.Thread(target=deque, args=(heard, 0))
        giving_up = threading.Timer(STARTS_WITHIN, os.killpg, (process.pid, signal.SIGKILL))
        giving_up.start()
        try:
            said = [""]
            while '"listening"' not in said[-1]:
                said.append(next(heard, ""))
                assert said[-1], "no server has started:\n" + "".join(said)
            giving_up.cancel()
            rest.start()
            yield json.loads(said[-1])
        finally:
            giving_up.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            if rest.ident is not None:
                rest.join()


def _heard(stream: Iterable[str]) -> Iterator[str]:
    for line in stream:
        if line.startswith("{"):  # a log line; the example that `make run` prints holds an email
            DETECTOR.record(line)
        yield line


@contextlib.contextmanager
def terminal(
    directory: Path, url: URL, *, plaintext: grpc.Channel | None = None, names: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """A terminal in this directory whose commands and servers use this database.

    plaintext: a server without TLS for the default address. names: see Terminal.
    """
    environment = {name: value for name, value in os.environ.items() if name in _KEPT}
    environment |= {
        "PATH": f"{directory / '.venv/bin'}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": libpq_url(url),
        "SECRET_KEYS": KEY,
        "BCRYPT_COST": "4",
        "LOG_FORMAT": "json",
        "GRPC_PORT": "0",
        "GRPC_MTLS_PORT": "0",
        "GRPC_REFLECTION": "true",
        "CALLER_CACHE_SECONDS": "0.1",
        "PURGE_INTERVAL": "0",
        "SHUTDOWN_DRAIN": "0",
    }
    _set_up(directory)
    servers = Servers(plaintext, directory=directory)
    found = Terminal(directory, servers, environment=environment, administered=url, names=names)
    with contextlib.closing(found):
        yield found


def _set_up(directory: Path) -> None:
    """Make the directory look like a checkout after `make setup`."""
    python = directory / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    for name in ("Makefile", "requirements"):
        (directory / name).symlink_to(ROOT / name)
    (directory / ".venv/.installed").touch()
