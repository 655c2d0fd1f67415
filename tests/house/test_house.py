"""The house rules that no linter knows."""

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_type_hints
from zipfile import ZipFile

import pytest
from sqlalchemy import UniqueConstraint

from service.base import errors
from service.base.errors import PersonaeError
from service.base.errors import factors as factor_errors
from service.core.users import COLUMNS, UserRecord
from service.db.error_mapping import UNIQUE_CONSTRAINTS
from service.db.models import Base
from service.rpc.methods import Response, UnlistedMethodError, require_rows
from service.rpc.pipeline.status import CODES
from service.rpc.services import SERVED_METHODS
from tests.support.servers import Services

ROOT = Path(__file__).resolve().parents[2]
MODULE_CEILING = 600
ARGUED_LENGTH = 400
FOLDER_CEILING = 12
SOURCES = sorted(
    path
    for folder in ("service", "alembic", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


def error_classes() -> set[type[PersonaeError]]:
    return {
        kind
        for module in (errors, factor_errors)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, PersonaeError) and kind is not PersonaeError
    }


def test_every_error_has_a_code() -> None:
    """The table of statuses is total, and holds nothing that is not raised."""
    assert set(CODES) == error_classes()


def test_reasons_are_stable_names() -> None:
    """A reason is UPPER_SNAKE_CASE, and says one thing; each error says something to a person."""
    for kind in error_classes():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]{1,61}[A-Z0-9]", kind.reason), kind
        assert kind.text.endswith("."), kind


def test_every_rpc_has_a_method_row() -> None:
    """A method without a row, a row without a method, or one with another kind of response stops the server."""
    require_rows(SERVED_METHODS)
    with pytest.raises(UnlistedMethodError, match="NewMethod"):
        require_rows({**SERVED_METHODS, "/personae.v1.UserService/NewMethod": Response.MESSAGE})
    with pytest.raises(UnlistedMethodError, match="GetUser"):
        require_rows({name: kind for name, kind in SERVED_METHODS.items() if not name.endswith("/GetUser")})
    with pytest.raises(UnlistedMethodError, match="ListUsers"):
        require_rows({**SERVED_METHODS, "/personae.v1.UserService/ListUsers": Response.STREAM})


def contract_calls() -> set[str]:
    """The RPCs that tests/contract calls, as `<api>.<property of Services>.<RPC>`; without their packages."""
    stubs = {
        name: get_type_hints(found.fget)["return"].__name__.removesuffix("Stub")
        for name, found in vars(Services).items()
        if isinstance(found, property)
    }
    return {
        f"{stubs[node.value.attr]}/{node.attr}"
        for path in (ROOT / "tests/contract").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr in stubs
    }


def test_every_rpc_has_a_contract_test() -> None:
    """Each method of the descriptors is called in tests/contract, and nothing else is."""
    assert contract_calls() == {method.rpartition(".")[2] for method in SERVED_METHODS}


SETTLED_BY_THE_STATEMENT = {"uq_callers_name", "uq_codes_subject_purpose", "uq_passkeys_credential_id"}
"""Constraints that an INSERT … ON CONFLICT settles, so that they never raise."""
RANDOM_VALUES = {"uq_caller_keys_key_id"}
"""A conflict of random ids is a bug, and may be an internal error."""


def test_every_unique_constraint_is_mapped() -> None:
    """A value that is taken is never an internal error, in any table."""
    tables = Base.metadata.tables.values()
    unique = {str(one.name) for table in tables for one in table.constraints if isinstance(one, UniqueConstraint)}
    unique |= {str(index.name) for table in tables for index in table.indexes if index.unique}

    assert unique == set(UNIQUE_CONSTRAINTS) | SETTLED_BY_THE_STATEMENT | RANDOM_VALUES


def test_records_and_columns_are_in_step() -> None:
    """UserRecord is filled by position."""
    assert tuple(column.name for column in COLUMNS) == UserRecord._fields


def test_modules_are_of_a_size_to_read() -> None:
    """600 lines at the most; a module of the service with more than 400 says why in its docstring."""
    for path in SOURCES:
        length = len(path.read_text().splitlines())
        assert length <= MODULE_CEILING, path
        if length > ARGUED_LENGTH and path.is_relative_to(ROOT / "service"):
            assert "400 lines" in (ast.get_docstring(ast.parse(path.read_text())) or ""), path


def test_folders_are_of_a_size_to_read() -> None:
    """A folder of the service has 12 modules at the most, beside its packages."""
    modules = Counter(path.parent for path in (ROOT / "service").rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in modules.items() if count > FOLDER_CEILING} == {}


def test_tests_poll_in_one_place() -> None:
    """Only `eventually` sleeps: no other test sleeps, or waits a moment for nothing."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in (ROOT / "tests").rglob("*.py")
        if path != ROOT / "tests/support/waiting.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_pause(node.func.attr, node.args)
    ]
    assert found == []


def is_pause(name: str, arguments: list[ast.expr]) -> bool:
    if name == "sleep":
        return True
    seconds = [one.value for one in arguments if isinstance(one, ast.Constant) and isinstance(one.value, float)]
    return name == "wait" and any(0 < one < 1 for one in seconds)


def test_alembic_is_no_package() -> None:
    """An __init__.py would shadow the library."""
    assert not list((ROOT / "alembic").rglob("__init__.py"))


def test_modules_of_the_service_say_what_they_own() -> None:
    for path in (ROOT / "service").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not tree.body or ast.get_docstring(tree), path


def test_help_needs_no_grpc() -> None:
    """`python -m service --help` loads neither gRPC nor SQLAlchemy's ORM nor alembic."""
    script = (
        "import sys, service.cli.main; print([m for m in ('grpc', 'alembic', 'sqlalchemy.orm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_the_dist_is_light(tmp_path: Path) -> None:
    """What callers install holds the stubs with their types, and nothing of the server."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        cwd=tmp_path,
        check=True,
    )
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()

    assert {"personae/py.typed", "personae/v1/user_pb2.py", "personae/v1/user_pb2_grpc.pyi"} <= set(names)
    assert {name.split("/", 1)[0].split("-", 1)[0] for name in names} == {"personae"}
