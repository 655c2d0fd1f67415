"""The service uses public interfaces only: no private attribute of another module's object is read, replaced or
overridden, and no private module or name is imported.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit"}
"""What the standard library documents in spite of the underscore: the methods of named tuples, and os._exit."""


def is_private(name: str) -> bool:
    """Whether the name has a leading underscore. `__dunder__` and the `_sunder_` names of enums are documented."""
    return name.startswith("_") and not name.endswith("_") and name not in DOCUMENTED


def private_names(kind: type) -> set[str]:
    """The private names that a class and its bases define, on the class or on `self`."""
    found = set()
    for base in kind.__mro__:
        found |= set(vars(base))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # written in C
            continue
        found |= assigned_on_self(tree)
    return {name for name in found if is_private(name)}


def assigned_on_self(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


class Checker(ast.NodeVisitor):
    """Finds the violations in one module."""

    def __init__(self, tree: ast.Module) -> None:
        self.violations: list[tuple[int, str]] = []
        self._imported: dict[str, str] = {}
        self._classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self._own: set[str] = set()
        """The private names that the class at hand, or a class of ours above it, defines."""
        self._foreign: set[str] | None = None
        """The private names of its bases from libraries; None when it has none."""
        self.visit(tree)

    def _report(self, node: ast.AST, what: str) -> None:
        self.violations.append((getattr(node, "lineno", 0), what))

    # ---------------------------------------------------------------------------------------------- imports

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._imported[name.asname or name.name.partition(".")[0]] = (
                name.name if name.asname else name.name.partition(".")[0]
            )
            self._require_public(node, name.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for name in node.names:
            self._imported[name.asname or name.name] = f"{node.module}.{name.name}"
            self._require_public(node, f"{node.module}.{name.name}")

    def _require_public(self, node: ast.AST, path: str) -> None:
        if any(is_private(part) for part in path.split(".")):
            self._report(node, f"import {path}")

    # ---------------------------------------------------------------------------------------------- classes

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self._own, self._foreign
        self._own, self._foreign = self._names(node), self._foreign_names(node)
        for one in node.body:
            for name in _defined(one):
                if name in (self._foreign or ()):
                    self._report(one, f"class {node.name} overrides {name}")
        self.generic_visit(node)
        self._own, self._foreign = before

    def _names(self, node: ast.ClassDef) -> set[str]:
        """The names that a class of this module defines, with those of its bases that are ours."""
        found = assigned_on_self(node) | {name for one in node.body for name in _defined(one)}
        for base in self._bases(node):
            if isinstance(base, ast.ClassDef):
                found |= self._names(base)
            elif base.__module__.startswith("service."):
                found |= private_names(base)
        return found

    def _foreign_names(self, node: ast.ClassDef) -> set[str] | None:
        found: set[str] | None = None
        for base in self._bases(node):
            if isinstance(base, ast.ClassDef):
                names = self._foreign_names(base)
            elif base.__module__.startswith("service."):
                names = None
            else:
                names = private_names(base)
            if names is not None:
                found = (found or set()) | names
        return found

    def _bases(self, node: ast.ClassDef) -> Iterator[ast.ClassDef | type]:
        for base in node.bases:
            path = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            if path in self._classes:
                yield self._classes[path]
                continue
            found = self._resolve(path)
            if isinstance(found, type) and found.__module__ != "builtins":
                yield found

    def _resolve(self, path: str) -> object:
        first, *rest = path.split(".")
        names = [*self._imported.get(first, f"builtins.{first}").split("."), *rest]
        found: object = importlib.import_module(names[0])
        for index, name in enumerate(names[1:], 2):
            if not hasattr(found, name):
                importlib.import_module(".".join(names[:index]))
            found = getattr(found, name)
        return found

    # ------------------------------------------------------------------------------------------- attributes

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if is_private(node.attr) and not self._is_ours(node.value, node.attr):
            self._report(node, ast.unparse(node))

    def _is_ours(self, owner: ast.expr, name: str) -> bool:
        if isinstance(owner, ast.Name) and owner.id in self._classes:
            return True
        is_self = isinstance(owner, ast.Name) and owner.id in {"self", "cls"}
        is_super = isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
        if not is_self and not is_super:
            return False
        return self._foreign is None or (name in self._own and name not in self._foreign)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        named = isinstance(node.func, ast.Name) and node.func.id in {"getattr", "setattr", "delattr", "hasattr"}
        for argument in node.args[1:2] if named else ():
            if isinstance(argument, ast.Constant) and is_private(str(argument.value)):
                self._report(node, ast.unparse(node))


def _defined(statement: ast.stmt) -> list[str]:
    """The private names that a statement in the body of a class defines."""
    names: list[str] = []
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        names = [statement.name]
    elif isinstance(statement, ast.Assign):
        names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        names = [statement.target.id]
    return [name for name in names if is_private(name)]


def violations(source: str) -> list[str]:
    return [what for _, what in Checker(ast.parse(textwrap.dedent(source))).violations]


SUBCLASS = """
from concurrent import futures
class Pool(futures.ThreadPoolExecutor):
    {}
"""


@pytest.mark.parametrize(
    "source, expected",
    [
        ("server._state.active = False", ["server._state"]),
        ("with requests._state.condition: pass", ["requests._state"]),
        ("pool._work_queue.get()", ["pool._work_queue"]),
        ("self._call._state", ["self._call._state"]),
        ("getattr(call, '_state')", ["getattr(call, '_state')"]),
        ("setattr(call, '_state', None)", ["setattr(call, '_state', None)"]),
        ("from grpc import _channel", ["import grpc._channel"]),
        ("from grpc._channel import Channel", ["import grpc._channel.Channel"]),
        ("import concurrent.futures._base", ["import concurrent.futures._base"]),
        (SUBCLASS.format("def size(self): return len(self._threads)"), ["self._threads"]),
        (SUBCLASS.format("def take(self): self._work_queue = None"), ["self._work_queue"]),
        (SUBCLASS.format("def size(self): return self._nowhere_defined"), ["self._nowhere_defined"]),
        (SUBCLASS.format("def _adjust_thread_count(self): pass"), ["class Pool overrides _adjust_thread_count"]),
        (SUBCLASS.format("def end(self): super()._initializer_failed()"), ["super()._initializer_failed"]),
    ],
)
def test_a_violation_is_found(source: str, expected: list[str]) -> None:
    assert violations(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "class Own:\n    def __init__(self): self._x = 1\n    def read(self): return self._x",
        "class Own:\n    _count = 0\n    def add(self): Own._count += 1",
        "class Base:\n    def _x(self): pass\nclass Own(Base):\n    def read(self): return super()._x()",
        SUBCLASS.format("def count(self): self._mine = 1; return self._mine"),
        "row._replace(x=1)._asdict()",
        "module.__name__",
    ],
)
def test_what_is_our_own_is_none(source: str) -> None:
    assert violations(source) == []


def test_the_service_uses_public_interfaces_only() -> None:
    """There is no exception. What cannot be done without one is not done: docs/performance.md says what it costs."""
    found = []
    for path in sorted((ROOT / "service").rglob("*.py")):
        checker = Checker(ast.parse(path.read_text()))
        found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in checker.violations]
    assert found == []
