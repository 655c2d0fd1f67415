"""Runs the code blocks of the documentation and compares the output with the one shown.

Blocks may be indented. In a ```console block a line that starts with `$ ` is a command; it continues while a quote is
open or the line ends in a backslash. The lines after it are its output. In an output `…` matches any characters, and on
a line by itself any further fields. Times match any other time.

`$ NAME=start…` sets the variable to the only text in the answer above that starts with `start`; `$ NAME=…` to its field
`name`.

A ```sh block runs in bash; a server that it starts runs until the terminal is closed. A ```sql block goes to psql.
"""

import contextlib
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from tests.support.docs_grpcurl import Answer, printed
from tests.support.docs_shell import Terminal
from tests.support.waiting import eventually

_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_ASSIGNMENT = re.compile(r"([A-Z_]+)=(\S+)(?:\s+#.*)?")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_MORE = "…"


@dataclass(frozen=True)
class Block:
    """A fenced block with the heading above it."""

    page: str
    line: int
    language: str
    chapter: str
    text: str


@dataclass(frozen=True)
class Step:
    """One command with its output in the docs."""

    page: str
    line: int
    command: str
    output: str


def blocks(path: Path, chapters: Collection[str] = ()) -> Iterator[Block]:
    """The blocks of a page, in order; if chapters are named, only those."""
    page = path.read_text()
    for found in _BLOCK.finditer(page):
        chapter = [heading[1] for heading in _HEADING.finditer(_without_blocks(page[: found.start()]))][-1]
        if not chapters or chapter in chapters:
            yield Block(path.name, page.count("\n", 0, found.start(3)) + 1, found[2], chapter, dedent(found[3]))


def steps(block: Block) -> Iterator[Step]:
    """The commands of a block, in order."""
    if block.language != "console":
        return
    lines = block.text.splitlines()
    at = 0
    while at < len(lines):
        start = at
        if not lines[at].startswith("$ "):
            raise ValueError(f"{block.page}:{block.line + at}: a block starts with a command")
        command = lines[at].removeprefix("$ ")
        at += 1
        while _goes_on(command):
            command += "\n" + lines[at]
            at += 1
        output_from = at
        while at < len(lines) and not lines[at].startswith("$ "):
            at += 1
        yield Step(block.page, block.line + start, command, "\n".join(lines[output_from:at]).strip("\n"))


def replay(found: Sequence[Block], terminal: Terminal) -> list[str]:
    """Run the console, sh and sql blocks in order. Returns a message for each output that differs from the docs."""
    last = Answer()
    complaints: list[str] = []
    for block in found:
        if block.language == "sh":
            terminal.source(block.text)
        if block.language == "sql":
            terminal.administer(block.text)
        for step in steps(block):
            assignment = _ASSIGNMENT.fullmatch(step.command)
            if assignment:
                terminal.variables[assignment[1]] = _picked(assignment[1], terminal.expanded(assignment[2]), last)
                continue
            last, complaint = _compared(step, terminal)
            complaints += complaint
    return complaints


def _compared(step: Step, terminal: Terminal) -> tuple[Answer, list[str]]:
    """Run a command. Returns its answer, and a message if the docs show another one."""
    expected = printed(step.output)
    answer = Answer()

    def is_as_shown() -> bool:
        nonlocal answer
        answer = terminal.type(step.command)
        return matches(vars(expected), vars(answer))

    if is_as_shown():
        return answer, []
    if terminal.is_settling(step.command):
        with contextlib.suppress(AssertionError):
            eventually(is_as_shown)
            return answer, []
    shown = f"{step.page}:{step.line}: {step.command}"
    return answer, [f"{shown}\nthe page says {expected}\nbut it is  {answer}\n"]


def matches(expected: Any, actual: Any) -> bool:
    """Whether an answer matches the one in the docs."""
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


def _without_blocks(text: str) -> str:
    """The text without its blocks, because a comment in a block looks like a heading."""
    return _BLOCK.sub("", text)


def _picked(name: str, shown: str, answer: Answer) -> str:
    if shown == _MORE:
        return str(answer.messages[0][name.lower()])
    if not shown.endswith(_MORE):
        return shown
    shown_texts = _texts([*answer.messages, *answer.details])
    found = [text for text in shown_texts if text.startswith(shown.removesuffix(_MORE))]
    if len(found) != 1:
        raise ValueError(f"{shown} stands for {len(found)} texts of the answer above it")
    return found[0]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
