"""The documentation is correct: its commands work, its tables match the code, its links and files exist."""

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest
from sqlalchemy.engine import URL

from service.base import errors
from service.base.errors import PersonaeError
from service.base.settings import Settings
from service.core.passwords.schemes.stored_hash import Reason as HashReason
from service.rpc.methods import METHODS, Retry
from service.rpc.pipeline.status import CODES
from service.rpc.services import SERVED_METHODS
from tests.support.docs_console import blocks, replay, steps
from tests.support.docs_grpcurl import ADDRESS, Servers
from tests.support.docs_shell import Terminal, terminal
from tests.support.servers import RunningServer

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
SESSION_CHAPTERS = {
    "OWASP ASVS 5, chapters V7 and V9",
    "RFC 9700: refresh tokens",
    "RFC 8725: JSON Web Tokens",
}
MIGRATION_TARGETS = {"migrate", "migrate-new", "migrate-down", "migrate-history", "migrate-check", "migrate-sql"}

# ------------------------------------------------------------------------------------------------- commands


def test_the_calls_of_the_cookbook_answer_as_shown(private_server: RunningServer, tmp_path: Path) -> None:
    found = [block for block in blocks(DOCS / "grpcurl.md") if block.language == "console"]
    typing = Terminal(tmp_path, Servers(private_server.channel), clock=private_server.clock)
    complaints = replay(found, typing)
    assert not complaints, "\n".join(complaints)


def test_the_commands_of_the_readme_answer_as_shown(private_server: RunningServer, tmp_path: Path) -> None:
    found = list(blocks(ROOT / "README.md", ["Create a user and sign in"]))
    assert found
    complaints = replay(found, Terminal(tmp_path, Servers(private_server.channel)))
    assert not complaints, "\n".join(complaints)


def test_the_commands_of_the_tour_and_of_tls_answer_as_shown(
    private_server: RunningServer,
    private_url: URL,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tour; then, with the users it made, the page on TLS; then the Python example that calls over TLS."""
    with terminal(tmp_path, private_url, plaintext=private_server.channel) as typing:
        complaints = replay([*blocks(DOCS / "tour.md"), *blocks(DOCS / "tls-and-callers.md")], typing)
        assert not complaints, "\n".join(complaints)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PERSONAE_KEY", typing.variables["NEW_KEY"])
        assert_prints_as_promised(all_fenced("python", DOCS / "python.md")[1], typing.servers.tls)


def test_the_cookbook_shows_every_rpc() -> None:
    shown = {step.command.split()[-1] for block in blocks(DOCS / "grpcurl.md") for step in steps(block)}
    assert {method.removeprefix("/") for method in SERVED_METHODS} <= shown


def test_the_first_python_example_runs(private_server: RunningServer) -> None:
    block = all_fenced("python", DOCS / "python.md")[0]
    assert_prints_as_promised(block, {ADDRESS: private_server.address})


def test_every_make_target_in_the_docs_exists() -> None:
    known = make_targets()
    for page in PAGES:
        code = [*re.findall(r"`([^`\n]+)`", page.read_text()), *all_fenced("sh", page), *all_fenced("console", page)]
        named = {name for text in code for name in re.findall(r"(?:^|\$ |\d )make ([a-z-]+)", text, re.MULTILINE)}
        assert named <= known, page.name


def test_the_database_page_has_every_migration_target() -> None:
    assert make_targets() >= MIGRATION_TARGETS
    text = (DOCS / "database.md").read_text()
    assert not [name for name in MIGRATION_TARGETS if f"make {name}" not in text]


def test_links_between_the_pages_lead_to_a_file_and_a_heading() -> None:
    for page in PAGES:
        for link, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            if "://" not in link:
                target = page.parent / link if link else page
                assert target.exists(), f"{page.name}: {link}"
                assert not heading or heading in anchors(target), f"{page.name}: {link}#{heading}"


def test_files_that_the_docs_name_exist() -> None:
    """Decisions are history: they may name files that a later decision removed."""
    for page in PAGES:
        if page.parent.name != "decisions" and page.name != "CHANGELOG.md":
            named = re.findall(r"`((?:alembic|benchmarks|deploy|examples|service|tests)/[\w/.]+\w)`", page.read_text())
            assert not [path for path in named if "NNNN" not in path and not (ROOT / path).exists()], page.name


# --------------------------------------------------------------------------------------------------- tables


def test_every_setting_is_described_once_with_its_default() -> None:
    described = sorted((row[0], row[1]) for row in rows(DOCS / "settings.md"))
    assert described == sorted((name.upper(), shown_default(name)) for name in Settings.model_fields)


def test_the_env_example_names_only_what_is_read() -> None:
    named = set(re.findall(r"^#? ?([A-Z][A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    read = {name.upper() for name in Settings.model_fields} | set(compose_variables())
    assert named
    assert named <= read
    assert set(compose_variables()) <= named


def test_every_error_is_described_with_its_code_and_pushback() -> None:
    described = {(row[0], row[1], row[2]) for row in rows(DOCS / "errors.md") if len(row) == 5}
    assert described == {(error.reason, code.name, shown_pushback(error)) for error, code in CODES.items()}


def test_every_rpc_is_listed_by_whether_it_may_be_repeated() -> None:
    chapter = (DOCS / "errors.md").read_text().split("## Repeat after COMMIT_OUTCOME_UNKNOWN")[1].split("\n\n## ")[0]
    items = [item.split("\n\n")[0] for item in chapter.split("\n- ")[1:]]
    retries = {method.split("/")[-1]: row.retry for method, row in METHODS.items()}
    safe, depends, unsafe, never = (set(re.findall(r"\w+", item)) & set(retries) for item in items)
    for retry, named in ((Retry.SAFE, safe | never), (Retry.DEPENDS, depends), (Retry.UNSAFE, unsafe)):
        assert {name for name in retries if retries[name] is retry} <= named, retry
    assert not safe & (depends | unsafe | never)


def test_every_reason_of_a_bad_field_is_described() -> None:
    described = {row[0] for row in rows(DOCS / "errors.md") if len(row) == 2}
    assert described == set(violation_reasons())


def test_every_direct_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["server"],
        *project["project"]["optional-dependencies"]["dev"],
        *(line for line in (ROOT / "requirements/proto.in").read_text().splitlines() if not line.startswith("#")),
    ]
    names = {found[0] for one in wanted if (found := re.match(r"[A-Za-z0-9-]+", one)) is not None}
    assert {row[0] for row in rows(DOCS / "dependencies.md")} == names


def test_decisions_are_numbered_without_gaps_and_have_the_same_parts() -> None:
    pages = sorted((DOCS / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        headings = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert headings == ["Context", "Choice", "Rejected", "Cost"], page.name


def test_every_test_that_the_security_page_names_exists() -> None:
    """Each is named, since a file alone does not show which test is meant."""
    named = re.findall(r"`(tests/.*?)`", (DOCS / "security.md").read_text())
    assert named
    assert [one for one in named if not is_a_test(one)] == []


@pytest.mark.parametrize(
    "name",
    [
        "tests/unit/test_lockout.py",
        "tests/unit/test_lockout.py::test_that_is_not_there",
        "tests/unit/test_not_there.py::test_the_schedule",
        "tests/unit/test_session_tokens.py::TestSealing::test_acr",
        "tests/unit/test_session_tokens.py::check",
    ],
)
def test_a_name_without_a_test_is_found(name: str) -> None:
    assert not is_a_test(name)


def test_every_clause_about_sessions_names_a_test() -> None:
    """Also those that are left to callers or are not met: the test shows what the service does."""
    clauses = list(clauses_about_sessions())
    assert len(clauses) > 50
    for clause, is_met, _, shown in clauses:
        assert is_met, clause
        assert re.fullmatch(r"(`tests/[^`]+`(, |$))+", shown), clause


# ------------------------------------------------------------------------------------------------- reading


def all_fenced(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def assert_prints_as_promised(block: str, addresses: Mapping[str, str]) -> None:
    """Run a block of Python with the addresses of the servers under test; it must print what its comments show."""
    printed: list[str] = []
    code = re.sub("|".join(map(re.escape, addresses)), lambda found: addresses[found[0]], block)
    exec(compile(code, "docs/python.md", "exec"), {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    promised = re.findall(r"print\(.*\)  # (.*)", block)
    assert promised
    assert printed == promised


def is_a_test(name: str) -> bool:
    """Whether this is a test, or a class of tests, as pytest names it: file::class::function."""
    path, *names = name.split("::")
    if not (ROOT / path).exists():
        return False
    scope: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    for one in names:
        found = [node for node in scope if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == one]
        if not found or not one.lower().startswith("test"):
            return False
        scope = found[0].body
    return bool(names)


def clauses_about_sessions() -> Iterator[list[str]]:
    """The rows of the security page about sessions and tokens: clause, whether it is met, how, and the tests."""
    chapters = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (DOCS / "security.md").read_text(), re.MULTILINE | re.DOTALL)
    for title, text in chapters:
        for row in re.findall(r"^\| (\d.*) \|$", text, re.MULTILINE):
            if title in SESSION_CHAPTERS or (title.startswith("NIST") and row.startswith("2.")):
                yield [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]


def rows(page: Path) -> Iterator[list[str]]:
    """The table rows of a page whose first cell is code. A cell that is only code loses its backticks."""
    for line in page.read_text().splitlines():
        if line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            yield [re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in cells]


def shown_default(name: str) -> str:
    """The default of a setting as docs/settings.md shows it."""
    value = Settings.model_fields[name].default
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def shown_pushback(error: type[PersonaeError]) -> str:
    """The pushback of an error as docs/errors.md shows it."""
    if error is errors.RateLimitedError:
        return "as told"
    if error.pushback_ms is None:
        return "none"
    return "never" if error.pushback_ms < 0 else f"{error.pushback_ms} ms"


def violation_reasons() -> Iterator[str]:
    """Every reason that the code uses for an invalid field."""
    yield errors.RequestIdReusedError.reason
    yield from get_args(HashReason)
    for path in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"add", "Violation", "BadIdentifierError", "BadRecordError"}:
                values = [one.value for one in node.args if isinstance(one, ast.Constant)]
                yield from (one for one in values if isinstance(one, str) and re.fullmatch(r"[A-Z][A-Z0-9_]+", one))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def compose_text() -> str:
    """docker-compose.yml without its comments."""
    return re.sub(r"^\s*#.*\n", "", (ROOT / "docker-compose.yml").read_text(), flags=re.MULTILINE)


def compose_variables() -> list[str]:
    return re.findall(r"\$\{([A-Z_]+)", compose_text())
