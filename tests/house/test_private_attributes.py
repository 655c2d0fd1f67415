"""The service uses public interfaces only: no private attribute of another module's object is read, replaced or
overridden, and no private module or name is imported.
"""

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "service/rpc/envoy"
"""By the compiler, which checks the version of gRPC by a private function; as in personae/v1."""
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit"}
"""Documented names with an underscore: the methods of named tuples, and os._exit."""


def is_private(name: str) -> bool:
    """Whether the name has a leading underscore. `__dunder__` and the `_sunder_` names of enums are documented."""
    return name.startswith("_") and not name.endswith("_") and name not in DOCUMENTED


@functools.cache
def private_names(kind: type) -> frozenset[str]:
    """The private names that a class and its bases define, on the class or on `self`."""
    found = set()
    for base in kind.__mro__:
        found |= set(vars(base))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # written in C
            continue
        found |= assigned_on_self(tree)
    return frozenset(name for name in found if is_private(name))


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
    """Finds the violations in one module. namespace: the classes of the module by their names."""

    def __init__(self, tree: ast.Module, namespace: Mapping[str, object]) -> None:
        self.violations: list[tuple[int, str]] = []
        self._namespace = namespace
        self._own: set[str] = set()
        """The private names that the current class, or one of its bases in this project, defines."""
        self._foreign: set[str] | None = None
        """The private names of its bases from libraries; None when it has none."""
        self.visit(tree)

    def _report(self, node: ast.AST, what: str) -> None:
        self.violations.append((getattr(node, "lineno", 0), what))

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._require_public(node, name.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for name in node.names:
            self._require_public(node, f"{node.module}.{name.name}")

    def _require_public(self, node: ast.AST, path: str) -> None:
        if any(is_private(part) for part in path.split(".")):
            self._report(node, f"import {path}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self._own, self._foreign
        kind = self._namespace.get(node.name)
        if kind is None and node.bases:
            self._report(node, f"class {node.name} is not at the top of its module")
        bases = kind.__mro__[1:] if isinstance(kind, type) else ()
        ours = [one for one in bases if one.__module__.startswith("service.")]
        foreign = [one for one in bases if one not in ours and one.__module__ not in {"builtins", __name__}]
        defined = assigned_on_self(node) | {name for one in node.body for name in _defined(one)}
        self._own = {name for one in ours for name in private_names(one)} | defined
        self._foreign = {name for one in foreign for name in private_names(one)} if foreign else None
        for one in node.body:
            for name in _defined(one):
                if name in (self._foreign or ()):
                    self._report(one, f"class {node.name} overrides {name}")
        self.generic_visit(node)
        self._own, self._foreign = before

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if is_private(node.attr) and not self._is_ours(node.value, node.attr):
            self._report(node, ast.unparse(node))

    def _is_ours(self, owner: ast.expr, name: str) -> bool:
        if isinstance(owner, ast.Name) and isinstance(self._namespace.get(owner.id), type):
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


def classes_in(namespace: Mapping[str, object], module: str) -> dict[str, object]:
    """The classes that this module defines."""
    return {name: one for name, one in namespace.items() if getattr(one, "__module__", None) == module}


def violations(source: str) -> list[str]:
    source = textwrap.dedent(source)
    namespace: dict[str, object] = {"__name__": __name__}
    if "class " in source:
        exec(source, namespace)
    return [what for _, what in Checker(ast.parse(source), classes_in(namespace, __name__)).violations]


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
def test_private_names_of_our_own_are_allowed(source: str) -> None:
    assert violations(source) == []


def test_the_service_uses_public_interfaces_only() -> None:
    """Without exception. docs/performance.md names what is not done because of that, and its cost."""
    found = []
    for path in sorted((ROOT / "service").rglob("*.py")):
        if path.parent == GENERATED:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = vars(importlib.import_module(name)) if not name.endswith("__main__") else {}
        checker = Checker(ast.parse(path.read_text()), classes_in(module, name))
        found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in checker.violations]
    assert found == []
