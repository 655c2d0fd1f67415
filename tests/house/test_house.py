"""The house rules that no linter knows."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from sqlalchemy import UniqueConstraint

from service.base import errors
from service.base.errors import PersonaeError
from service.core.token_bucket import UNLIMITED
from service.core.users import COLUMNS, UserRecord
from service.db.error_mapping import UNIQUE_CONSTRAINTS
from service.db.models import Base
from service.rpc.admission.rate_limits import RateLimits
from service.rpc.callers.identification import assume_caller
from service.rpc.methods import METHODS, UnlistedMethodError, require_rows
from service.rpc.pipeline.drain import Drain
from service.rpc.pipeline.stages import stages
from service.rpc.pipeline.status import CODES
from service.server.wiring import SERVED_METHODS

ROOT = Path(__file__).resolve().parents[2]
MODULE_CEILING = 600
SOURCES = sorted(
    path
    for folder in ("service", "alembic", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


def error_classes() -> set[type[PersonaeError]]:
    return {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
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
    """A method without a row, or a row without a method, stops the server."""
    assert set(METHODS) == set(SERVED_METHODS)
    with pytest.raises(UnlistedMethodError, match="NewMethod"):
        require_rows([*SERVED_METHODS, "/personae.v1.UserService/NewMethod"])
    with pytest.raises(UnlistedMethodError):
        require_rows(SERVED_METHODS[1:])


def test_every_rpc_has_a_contract_test() -> None:
    """Each method is called in tests/contract."""
    text = "".join(path.read_text() for path in (ROOT / "tests" / "contract").glob("*.py"))

    names = [method.rsplit("/", 1)[1] for method in SERVED_METHODS]
    assert [name for name in names if not re.search(rf"\.{name}[(,)]", text)] == []


SETTLED_BY_THE_STATEMENT = {"uq_callers_name", "uq_codes_subject_purpose"}
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_of_a_size_to_read(path: Path) -> None:
    """No module passes the ceiling."""
    assert len(path.read_text().splitlines()) <= MODULE_CEILING


def test_alembic_is_no_package() -> None:
    """An __init__.py would shadow the library."""
    assert not list((ROOT / "alembic").rglob("__init__.py"))


def test_stages_are_named_and_explained() -> None:
    """The order of the pipeline is one tuple of functions that say what they are for."""
    limits = RateLimits(UNLIMITED)
    found = stages(Drain(), assume_caller("anybody"), limits=limits, code_limits=limits)
    assert [stage.__name__ for stage in found] == [
        "log_access",
        "answer_errors",
        "admit",
        "drain_calls",
        "authorise",
        "limit",
        "receive",
        "repeat",
    ]
    assert all(stage.__doc__ for stage in found)


def test_modules_of_the_service_say_what_they_own() -> None:
    """Every module with code in it has a docstring."""
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
