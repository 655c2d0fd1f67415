"""Finds the actions that the code records in the audit trail: all values that reach audit.record, by its source."""

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

AUDIT = "service.core.audit"
RECORDERS = ("record", "record_many")
ROOT = Path(__file__).resolve().parents[2]
Function = ast.FunctionDef


class UnresolvedError(Exception):
    """The source does not show which values an action can have."""


def service_sources() -> dict[str, str]:
    """The source of each module below service/, by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in (ROOT / "service").rglob("*.py")
    }


def recorded_actions(sources: Mapping[str, str]) -> set[str]:
    """Every action that these modules pass to audit.record and audit.record_many. Raises UnresolvedError."""
    tree = _Tree({name: _module(name, source) for name, source in sources.items()})
    audit = tree.modules[AUDIT]
    for module in tree.modules.values():
        called = {call.func for call in module.calls}
        for node in module.within:
            if node not in called and any(module.names(node, audit, name, is_method=False) for name in RECORDERS):
                raise _unresolved(module, node)  # it may be called under another name
    return {action for name in RECORDERS for action in tree.arguments(audit, audit.functions[name], "action")}


@dataclass
class _Module:
    name: str
    tree: ast.Module
    functions: dict[str, Function] = field(default_factory=dict)
    """Also methods. Of two with one name the first is kept."""
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    """The dotted name behind each imported one."""
    within: dict[ast.AST, Function | None] = field(default_factory=dict)
    """The innermost function that contains each node."""
    calls: list[ast.Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._visit(self.tree, None)

    def _visit(self, node: ast.AST, function: Function | None) -> None:
        self.within[node] = function
        match node:
            case ast.FunctionDef():
                self.functions.setdefault(node.name, node)
                function = node
            case ast.ClassDef():
                self.classes.setdefault(node.name, node)
            case ast.ImportFrom():
                self.imports |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
            case ast.Import():
                self.imports |= {one.asname: one.name for one in node.names if one.asname}
            case ast.Call():
                self.calls.append(node)
        for child in ast.iter_child_nodes(node):
            self._visit(child, function)

    def names(self, node: ast.AST, owner: "_Module", name: str, *, is_method: bool) -> bool:
        """Whether this expression names a function or class of `owner`. is_method: or an attribute of any object."""
        full = f"{owner.name}.{name}"
        match node:
            case ast.Name(id=found):
                return self.imports.get(found) == full or (found == name and self is owner and not is_method)
            case ast.Attribute(value=value, attr=attribute) if attribute == name:
                path = ast.unparse(value)
                return is_method or self.imports.get(path, path) == owner.name
        return False


@functools.cache
def _module(name: str, source: str) -> _Module:
    return _Module(name, ast.parse(source))


@dataclass
class _Tree:
    modules: dict[str, _Module]

    def arguments(self, owner: _Module, function: Function, parameter: str) -> set[str]:
        """The values of this parameter in all calls of the function."""
        named = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
        is_method = named[:1] == ["self"]
        found: set[str] = set()
        for module, call in self._calls(owner, function.name, is_method=is_method):
            position = named.index(parameter) - is_method if parameter in named else None
            found |= self._values(module, _argument(module, call, parameter, position))
        return found

    def _fields(self, owner: _Module, name: str, attribute: str) -> set[str]:
        """The values of this field in all calls of the dataclass."""
        named = [one.target.id for one in owner.classes[name].body if _is_field(one)]  # type: ignore[attr-defined]
        found: set[str] = set()
        for module, call in self._calls(owner, name, is_method=False):
            found |= self._values(module, _argument(module, call, attribute, named.index(attribute)))
        return found

    def _calls(self, owner: _Module, name: str, *, is_method: bool) -> Iterator[tuple[_Module, ast.Call]]:
        for module in self.modules.values():
            for call in module.calls:
                if module.names(call.func, owner, name, is_method=is_method):
                    yield module, call

    def _values(self, module: _Module, node: ast.expr) -> set[str]:
        match node:
            case ast.Constant(value=str() as text):
                return {text}
            case ast.IfExp(body=first, orelse=second):
                return self._values(module, first) | self._values(module, second)
            case ast.Dict(values=several):
                return {text for one in several for text in self._values(module, one)}
            case ast.Subscript(value=table):
                return self._values(module, table)
            case ast.Name(id=name):
                return self._of_name(module, module.within[node], name, node)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                return self._of_attribute(module, name, attribute, node)
        raise _unresolved(module, node)

    def _of_name(self, module: _Module, function: Function | None, name: str, node: ast.expr) -> set[str]:
        """The values of a name: a parameter, a variable of the function, a constant of this or another module."""
        if function is not None:
            if any(one.arg == name for one in _parameters(function)):
                return self.arguments(module, function, name)
            assigned = [value for value in _assigned(ast.walk(function), name) if value is not node]
            if assigned:
                return {text for value in assigned for text in self._values(module, value)}
        constants = list(_assigned(module.tree.body, name))
        if constants:
            return {text for value in constants for text in self._values(module, value)}
        owner, _, original = module.imports.get(name, "").rpartition(".")
        if owner in self.modules:
            return self._of_name(self.modules[owner], None, original, node)
        raise _unresolved(module, node)

    def _of_attribute(self, module: _Module, name: str, attribute: str, node: ast.expr) -> set[str]:
        """The values of a constant of another module, or of a field of a parameter."""
        imported = self.modules.get(module.imports.get(name, ""))
        if imported is not None:
            return self._of_name(imported, None, attribute, node)
        function = module.within[node]
        kinds = [one.annotation for one in _parameters(function) if one.arg == name] if function else []
        for kind in kinds:
            for owner in self.modules.values():
                for found in owner.classes:
                    if kind is not None and module.names(kind, owner, found, is_method=False):
                        return self._fields(owner, found, attribute)
        raise _unresolved(module, node)


def _parameters(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _argument(module: _Module, call: ast.Call, name: str, position: int | None) -> ast.expr:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    if position is not None and position < len(call.args):
        return call.args[position]
    raise _unresolved(module, call)


def _assigned(nodes: Iterator[ast.AST] | list[ast.stmt], name: str) -> Iterator[ast.expr]:
    """The expressions that are assigned to this name, also by a loop over a tuple."""
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                yield value
            case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if found == name:
                yield value
            case ast.For(target=ast.Tuple(elts=targets), iter=ast.Tuple(elts=rows)):
                for index, target in enumerate(targets):
                    if isinstance(target, ast.Name) and target.id == name:
                        yield from (row.elts[index] for row in rows if isinstance(row, ast.Tuple))


def _unresolved(module: _Module, node: ast.AST) -> UnresolvedError:
    return UnresolvedError(f"{module.name}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
