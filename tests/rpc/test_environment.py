"""What a command says, and its exit code, whatever surrounds it: environment variables, `.env`, files, streams."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from service.base.settings import Settings, SettingsError, load_settings
from service.core.passwords import is_match
from tests.support.commands import refused, run_module
from tests.support.databases import ROOT, libpq_url, run
from tests.support.factories import PASSWORD
from tests.support.processes import inherited
from tests.support.servers import KEY

LATIN_1 = "k\u00e9y".encode("latin-1")
BOM = b"\xef\xbb\xbf"
CREATE = ("create-superuser", "--email", "ada@example.com", "--username", "ada", "--password-stdin")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


class TestDotEnv:
    @pytest.mark.parametrize(
        "make, words",
        [
            (written(b"# ok\nGRPC_HOST=" + LATIN_1 + b"\n"), ".env: line 2 is not UTF-8"),
            (written("GRPC_PORT=1\n".encode("utf-16")), ".env: line 1 is not UTF-8"),
            (written("GRPC_PORT=1\n".encode("utf-16-le")), ".env: line 1 has a NUL byte"),
            (written(b"GRPC_PORT=1\nGRPC_HOST=a\0b\n"), ".env: line 2 has a NUL byte"),
            (written(b'GRPC_PORT=1\nGRPC_HOST="127.0.0.1\n'), ".env: line 2 is not of the form NAME=value"),
            (written(b"GRPC_PORT=1\nGRPC HOST\n=2\n"), ".env: line 2 is not of the form NAME=value"),
            (Path.mkdir, ".env is not a file"),
            (pipe, ".env is not a file"),
        ],
    )
    def test_one_that_would_be_ignored_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], words: str
    ) -> None:
        """With the line and nothing of what it holds."""
        make(tmp_path / ".env")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SettingsError) as caught:
            load_settings()
        assert str(caught.value).startswith(words)

    @pytest.mark.parametrize("command", [("health",), ("serve",), ("migrate",), CREATE, ("callers", "list"), ("dev",)])
    def test_every_command_says_it_in_one_line(self, tmp_path: Path, command: tuple[str, ...]) -> None:
        (tmp_path / ".env").write_bytes(LATIN_1)
        assert refused(run_module("service", *command, cwd=tmp_path)) == ".env: line 1 is not UTF-8"

    @pytest.mark.parametrize(
        "content",
        [
            BOM + b"GRPC_PORT=9\n",
            b"GRPC_PORT=9\r\nGRPC_HOST=127.0.0.1\r\n",
            b"export GRPC_PORT=9",
            b"GRPC_PORT='9'\n",
            b'GRPC_PORT = "9" # the port\n',
            b"GRPC_PORT=8\nGRPC_PORT=9\nUNKNOWN_NAME=1\nWITHOUT_VALUE\n",
        ],
    )
    def test_every_usual_form_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
        """Of two lines with one name the last counts; names that the service does not know are of others."""
        (tmp_path / ".env").write_bytes(content)
        monkeypatch.chdir(tmp_path)
        assert load_settings().grpc_port == 9

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_one_that_may_not_be_read(self, tmp_path: Path) -> None:
        (tmp_path / ".env").touch(mode=0o600)
        script = f"import os; from service.base.settings import load_settings; os.chdir({str(tmp_path)!r})"
        script += "; os.setuid(65534); load_settings()"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=inherited(), capture_output=True, check=False
        )
        assert b"SettingsError: .env cannot be read: Permission denied" in done.stderr


@pytest.mark.parametrize(
    "content, words",
    [
        (LATIN_1, "line 1 is not UTF-8"),
        (KEY.encode("utf-16"), "line 1 is not UTF-8"),
        (KEY.encode("utf-16-be"), "line 1 has a NUL byte"),
        (b"", "there is no key"),
        (Path.mkdir, "Is a directory"),
        (KEY.replace(":", ":\u00e9").encode(), "is not base64"),
        (BOM + KEY.encode() + b"\r\n", ""),
    ],
)
@pytest.mark.parametrize("setting", ["secret_keys_file", "dev_data_dir"])
def test_files_of_secret_keys(
    tmp_path: Path, content: bytes | Callable[[Path], object], words: str, setting: str
) -> None:
    """The operator's file and the generated one; nothing of them is shown."""
    path = tmp_path / "secret_keys"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    path.chmod(0o600)
    settings = load_settings(_env_file=None, **{setting: path if setting == "secret_keys_file" else tmp_path})
    if not words:
        assert settings.keys().keys
        return
    with pytest.raises(SettingsError) as caught:
        settings.keys()
    assert words in str(caught.value)
    assert "MDEy" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_a_variable_that_is_not_utf8_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name.upper(), os.fsdecode(LATIN_1))
    with pytest.raises(SettingsError, match=f"^{name.upper()}: is not UTF-8"):
        load_settings(_env_file=None)


def test_a_pipe_of_secret_keys_is_refused(tmp_path: Path) -> None:
    """Each worker reads them: a pipe has them once, and would hold up the start for ever."""
    pipe(tmp_path / "keys")
    with pytest.raises(SettingsError, match="is a pipe, not a file"):
        load_settings(_env_file=None, secret_keys_file=tmp_path / "keys").keys()


@pytest.mark.parametrize(
    "names, values, words",
    [
        (
            ("GRPC_HOST", "METRICS_HOST"),
            (
                "127.0.0.1:50051",
                "http://127.0.0.1",
                "*",
                ":",
                "a..b",
                "a" * 64,
                "a.b" * 99,
                "-x",
                "/tmp/s",
                '""',
                "a,b",
            ),
            "is no IP address and no host name",
        ),
        (
            ("DB_POOL_PING_IDLE", "PURGE_INTERVAL", "MIGRATION_WAIT", "MIGRATION_LOCK_TIMEOUT"),
            ("inf", "nan", "1e400", "1e9", "-1", "1s"),
            "Input should be",
        ),
        (("MIGRATION_LOCK_TIMEOUT", "MIGRATION_STATEMENT_TIMEOUT"), ("0", "0.0001", "inf", "1e300"), "Input should be"),
        (("SECRET_KEYS",), ("k1:\u00e9", "k1:*", "k1:MDEy:x"), "is not base64"),
    ],
)
def test_values_that_cannot_be_meant(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], values: tuple[str, ...], words: str
) -> None:
    for name in names:
        for value in values:
            monkeypatch.setenv(name, value)
            with pytest.raises(SettingsError, match=f"^{name}: .*{words}"):
                load_settings(_env_file=None)
            monkeypatch.delenv(name)


def test_blanks_around_a_value_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run --env-file` keeps them."""
    for name, value in {
        "GRPC_HOST": " 127.0.0.9\t",
        "DB_ECHO": " true ",
        "LOG_LEVEL": "debug\r",
        "GRPC_PORT": "7 ",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(_env_file=None)
    assert (settings.grpc_host, settings.db_echo) == ("127.0.0.9", True)
    assert (settings.log_level, settings.grpc_port) == ("debug", 7)


@pytest.mark.parametrize(
    "command", [("callers", "create", LATIN_1), ("generate-key", "--id", LATIN_1), ("health", "--address", LATIN_1)]
)
def test_an_argument_that_is_not_utf8_is_refused(command: tuple[str | bytes, ...]) -> None:
    assert refused(run_module("service", *command)).startswith("An argument is not text")


@pytest.mark.parametrize(
    "command, code, words",
    [
        ("with-database /nowhere/program", 127, "/nowhere/program cannot be run: No such file or directory"),
        ("with-database /etc/passwd", 127, "/etc/passwd cannot be run: Permission denied"),
        ("with-database sh -c exit$IFS$9", 0, ""),
        ("with-database sh -c kill$IFS-9$IFS$$", 128 + 9, ""),
        ("generate-key --id a:b", 1, "--id: an id has 1 to 32 letters"),
        ("generate-key --id \u00e9", 1, "--id: an id has 1 to 32 letters"),
        ("generate-key --file /", 1, "Is a directory\n"),
        ("health --timeout -1", 1, "--timeout is a number of seconds"),
        ("health --timeout nan", 1, "--timeout is a number of seconds"),
        ("health --timeout inf", 1, "--timeout is a number of seconds"),
    ],
)
def test_arguments_that_cannot_be_used(command: str, code: int, words: str) -> None:
    environment = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/d"}
    found, said = run_module("service", *command.split(), environment=environment)
    assert (found, words in said, "Traceback" in said) == (code, True, False), said


class TestStreams:
    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
    @pytest.mark.parametrize("line", [LATIN_1 * 9 + b"\n", PASSWORD.encode("utf-16-le")])
    def test_a_password_that_is_not_utf8_is_refused_and_not_shown(self, line: bytes, encoding: str) -> None:
        said = refused(run_module("service", *CREATE, text=line, environment={"PYTHONIOENCODING": encoding}))
        assert said == "The password is not UTF-8."

    def test_a_password_is_what_was_typed(self, private_url: URL) -> None:
        """In UTF-8, whatever the terminal speaks; neither a line end nor a byte order mark is part of it."""
        password = "correct horse b\u00e4ttery staple"
        text = f"\ufeff{password}\r\n".encode()
        environment = {"DATABASE_URL": libpq_url(private_url), "PYTHONIOENCODING": "latin-1"}
        created = run_module("service", *CREATE, text=text, environment=environment)
        assert created == (0, "Created superuser ada with id 1.\n")
        stored = run(private_url, "SELECT hashed_password FROM users")[0][0]
        assert is_match(password, stored, reference_cost=4)

    @pytest.mark.parametrize(
        "command, closed",
        [(CREATE, one) for one in ("<&-", ">&-", "2>&-")]
        + [(command, "<&- >&- 2>&-") for command in (CREATE, ("health",), ("generate-key",), ("serve",))],
    )
    def test_closed_streams(self, command: tuple[str, ...], closed: str) -> None:
        """A verb neither raises, nor writes into what has got the number of a closed stream."""
        line = f'exec "$0" -m service "$@" {closed}'
        environment = inherited() | {"DATABASE_URL": "postgresql://u@127.0.0.1:1/d", "SECRET_KEYS": KEY}
        done = subprocess.run(
            ["/bin/sh", "-c", line, sys.executable, *command],
            cwd=ROOT,
            env=environment | {"GRPC_HOST": "nowhere"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (0 if command == ("generate-key",) else 1)
        assert "Traceback" not in done.stderr + done.stdout
