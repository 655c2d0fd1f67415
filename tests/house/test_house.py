"""Rules of this project that no linter checks."""

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
    """The table of statuses is total, and has no other entries."""
    assert set(CODES) == error_classes()


def test_reasons_are_stable_names() -> None:
    """A reason is in UPPER_SNAKE_CASE, and each error has a sentence for people."""
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


HANDLED_BY_THE_STATEMENT = {"uq_callers_name", "uq_codes_subject_purpose", "uq_passkeys_credential_id"}
"""Constraints whose INSERT has ON CONFLICT, so that they never raise."""
RANDOM_VALUES = {"uq_caller_keys_key_id"}
"""A conflict of random ids is a bug, and may be an internal error."""


def test_every_unique_constraint_is_mapped() -> None:
    """A value that exists already is never an internal error, in any table."""
    tables = Base.metadata.tables.values()
    unique = {str(one.name) for table in tables for one in table.constraints if isinstance(one, UniqueConstraint)}
    unique |= {str(index.name) for table in tables for index in table.indexes if index.unique}

    assert unique == set(UNIQUE_CONSTRAINTS) | HANDLED_BY_THE_STATEMENT | RANDOM_VALUES


def test_records_and_columns_have_the_same_order() -> None:
    """UserRecord is filled by position."""
    assert tuple(column.name for column in COLUMNS) == UserRecord._fields


def test_modules_are_not_too_long() -> None:
    """600 lines at the most; a module of the service with more than 400 says why in its docstring."""
    for path in SOURCES:
        length = len(path.read_text().splitlines())
        assert length <= MODULE_CEILING, path
        if length > ARGUED_LENGTH and path.is_relative_to(ROOT / "service"):
            assert "400 lines" in (ast.get_docstring(ast.parse(path.read_text())) or ""), path


def test_folders_have_not_too_many_modules() -> None:
    """A folder of the service has 12 modules at the most, beside its packages."""
    modules = Counter(path.parent for path in (ROOT / "service").rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in modules.items() if count > FOLDER_CEILING} == {}


WAITS = {"wait", "wait_for", "acquire", "join", "get", "result", "exception", "poll", "select"}
SOCKETS = {"settimeout", "create_connection", "Connection", "HTTPConnection", "HTTPSConnection", "urlopen"}
"""Functions that take the timeout of a socket. That of an RPC is its deadline, and a test may let it pass."""


def test_tests_poll_in_one_place() -> None:
    """Only `eventually` sleeps; nothing else in the tests sleeps, or waits for less than a second."""
    found = [
        f"{path.relative_to(ROOT)}:{pause}"
        for path in (ROOT / "tests").rglob("*.py")
        if path != ROOT / "tests/support/waiting.py"
        for pause in pauses(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "line, is_pause",
    [
        ("time.sleep(1)", True),
        ("sleep(0.1)", True),
        ("done.wait(0.5)", True),
        ("done.wait(timeout=0.5)", True),
        ("thread.join(0.2)", True),
        ("sock.settimeout(1.2)", True),
        ("sock.settimeout(1)", True),
        ("socket.create_connection(address, 0.5)", True),
        ("http2.Connection(address, timeout=1.2)", True),
        ("done.wait(PATIENCE)", False),
        ("future.result(0)", False),
        ("sock.settimeout(0)", False),
        ("sock.settimeout(60)", False),
        ("http2.Connection(address, timeout=2)", False),
        ("users.GetUser(request, timeout=0.5)", False),
    ],
)
def test_a_pause_is_found(line: str, is_pause: bool) -> None:
    assert bool(pauses(line)) is is_pause


def pauses(source: str) -> list[str]:
    """The calls that wait for time to pass: sleeps, waits of less than a second, socket timeouts below two."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and is_pause(node)
    ]


def is_pause(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            pass
        case _:
            return False
    arguments = [*call.args, *(one.value for one in call.keywords if one.arg == "timeout")]
    numbers = [one.value for one in arguments if isinstance(one, ast.Constant) and isinstance(one.value, int | float)]
    longest = 1 if name in WAITS else 2 if name in SOCKETS else 0
    return name == "sleep" or any(0 < one < longest for one in numbers)


def test_alembic_is_not_a_package() -> None:
    """An __init__.py would shadow the library."""
    assert not list((ROOT / "alembic").rglob("__init__.py"))


def test_modules_of_the_service_have_docstrings() -> None:
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


def test_the_wheel_has_the_stubs_alone(tmp_path: Path) -> None:
    """Callers install the stubs with their types, and nothing of the server."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        cwd=tmp_path,
        check=True,
    )
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()

    assert {"personae/py.typed", "personae/v1/user_pb2.py", "personae/v1/user_pb2_grpc.pyi"} <= set(names)
    assert {name.split("/", 1)[0].split("-", 1)[0] for name in names} == {"personae"}
