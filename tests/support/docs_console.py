"""The console blocks of the documentation: which commands they show, and whether the answers still look like that.

A block is fenced as ```console. A line that starts with `$ ` is a command; it goes on while a quote is open or the
line ends in a backslash. What follows is what the command prints. `…` stands for what differs each time: in a text for
any characters, on a line of its own for any other fields. Times are compared as times, whatever their value.

`$ NAME=start…` takes the value from the answer above: the one text in it that starts so; `$ NAME=…` its field `name`.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tests.support.docs_grpcurl import Answer, parse, printed, run

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ASSIGNMENT = re.compile(r"([A-Z_]+)=(\S+)(?:\s+#.*)?")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_MORE = "…"


@dataclass(frozen=True)
class Step:
    """One command with the output that the docs show for it."""

    line: int
    command: str
    output: str


def steps(path: Path) -> Iterator[Step]:
    """The commands of a page, in order."""
    page = path.read_text()
    for block in _BLOCK.finditer(page):
        lines = block[1].splitlines()
        number = page.count("\n", 0, block.start(1)) + 1
        at = 0
        while at < len(lines):
            start = at
            if not lines[at].startswith("$ "):
                raise ValueError(f"{path.name}:{number + at}: a block starts with a command")
            command = lines[at].removeprefix("$ ")
            at += 1
            while _goes_on(command):
                command += "\n" + lines[at]
                at += 1
            output_from = at
            while at < len(lines) and not lines[at].startswith("$ "):
                at += 1
            yield Step(number + start, command, "\n".join(lines[output_from:at]).strip("\n"))


def replay(path: Path, channel: grpc.Channel) -> list[str]:
    """Run the commands of a page in order on an empty server; what differs from the page."""
    variables: dict[str, str] = {}
    last = Answer()
    complaints: list[str] = []
    for step in steps(path):
        assignment = _ASSIGNMENT.fullmatch(step.command)
        if assignment:
            variables[assignment[1]] = _picked(assignment[1], assignment[2], last)
            continue
        expected = printed(step.output)
        last = run(parse(shlex.split(_expanded(step.command, variables))), channel)
        if not matches(vars(expected), vars(last)):
            complaints.append(f"{path.name}:{step.line}: {step.command}\nthe page says {expected}\nbut it is  {last}\n")
    return complaints


def matches(expected: Any, actual: Any) -> bool:
    """Whether an answer is as the page shows it."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        named = expected.keys() - {_MORE}
        is_complete = _MORE in expected or named == actual.keys()
        return is_complete and named <= actual.keys() and all(matches(expected[key], actual[key]) for key in named)
    if isinstance(expected, list) and isinstance(actual, list):
        return len(expected) == len(actual) and all(map(matches, expected, actual))
    if isinstance(expected, str) and isinstance(actual, str):
        if _TIME.fullmatch(expected):
            return _TIME.fullmatch(actual) is not None
        return re.fullmatch(".*".join(map(re.escape, expected.split(_MORE))), actual, re.DOTALL) is not None
    return bool(expected == actual)


def _goes_on(command: str) -> bool:
    if command.endswith("\\"):
        return True
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


def _expanded(command: str, variables: dict[str, str]) -> str:
    """The command with its `$NAME`s replaced, but for those in single quotes."""
    parts = command.replace("\\\n", " ").split("'")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"\$([A-Z_]+)", lambda found: variables[found[1]], parts[index])
    return "'".join(parts)


def _picked(name: str, shown: str, answer: Answer) -> str:
    if shown == _MORE:
        return str(answer.messages[0][name.lower()])
    if not shown.endswith(_MORE):
        return shown
    found = [text for text in _texts(answer.messages) if text.startswith(shown.removesuffix(_MORE))]
    if len(found) != 1:
        raise ValueError(f"{shown} stands for {len(found)} texts of the answer above it")
    return found[0]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
