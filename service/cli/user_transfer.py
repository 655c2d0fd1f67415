"""`python -m service users import` and `users export`: moving users in and out."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import click

from service.base.actor import Actor
from service.base.clock import monotonic, utc_now
from service.base.errors import PersonaeError
from service.base.randomness import random_bytes
from service.base.settings import Settings
from service.base.text import read_text
from service.cli.common import command_line, fail, settings_or_fail, working_database

if TYPE_CHECKING:
    from service.cli.imports.formats.options import FirebaseProject
    from service.cli.imports.progress import Progress
    from service.cli.imports.run import Import
    from service.core.passwords.schemes import Parameters
    from service.core.transfer.hash_secrets import SecretKind
    from service.db.engine import Database

SOME_REFUSED = 3
"""Exit code: all of the file was read, and some rows were refused."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of any program."""
_PAGE = 1000
_PAGE_SECONDS = 60.0
FORMAT_NAMES = (
    *("ndjson", "csv", "django", "keycloak", "auth0", "firebase", "kratos", "supertokens", "wordpress", "htpasswd"),
)


@click.group()
def users() -> None:
    """Users: moving them in and out (docs/migrating.md)."""


@users.command("import")
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--format", "format_name", type=click.Choice(FORMAT_NAMES), required=True, help="What wrote the file.")
@click.option(
    "--on-conflict",
    type=click.Choice(["fail", "skip", "update-password"]),
    default="fail",
    show_default=True,
    help="What to do with a row whose email a user has.",
)
@click.option(
    "--usernames",
    type=click.Choice(["refuse", "derive"]),
    default="refuse",
    show_default=True,
    help="Of a row without a username, or with one that cannot be one here, such as an email. refuse: refuse the row. "
    "derive: make a username of its email.",
)
@click.option("--email-domain", default="", help="Of the emails, where the file has names only (htpasswd).")
@click.option(
    "--firebase-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the password hash parameters of the project, as the Firebase console shows them.",
)
@click.option(
    "--pepper-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the pepper behind each password in a bcrypt hash (Devise).",
)
@click.option(
    "--fast-digests",
    type=click.Choice(["wrap", "keep"]),
    default="wrap",
    show_default=True,
    help="wrap: store MD5 and SHA in bcrypt, which takes as long as a sign-in for each. keep: as they are.",
)
@click.option("--dry-run", is_flag=True, help="Check every row, and change nothing.")
@click.option("--restart", is_flag=True, help="Begin again where an earlier run was stopped.")
@click.option("--refused", type=click.Path(dir_okay=False, path_type=Path), help="Where to write refused rows.")
def import_(
    *,
    path: Path,
    format_name: str,
    on_conflict: str,
    usernames: str,
    email_domain: str,
    firebase_config: Path | None,
    pepper_file: Path | None,
    fast_digests: str,
    dry_run: bool,
    restart: bool,
    refused: Path | None,
) -> None:
    """Import the users in FILE, with their password hashes.

    A run that was stopped goes on where it stopped when the same command is run again. Exit code 0: every row was
    imported or skipped. 3: some were refused; they are in FILE.refused.ndjson with the reasons, to be mended and
    imported with --format ndjson. 1: the import could not go on. 130: Ctrl-C.
    """
    from service.cli.imports.formats import FORMATS, Options
    from service.cli.imports.progress import Progress
    from service.cli.imports.run import Import
    from service.core.transfer.rules import FastHashes, ImportRules, OnConflict

    if refused is not None and refused.exists() and refused.samefile(path):
        fail("--refused names the file that is imported.")
    settings = settings_or_fail()
    actor = command_line(settings)
    with path.open("rb") as file, working_database(settings) as database:
        secrets = _Secrets(settings, database, actor, is_dry_run=dry_run)
        job = Import(
            FORMATS[format_name],
            Options(
                utc_now(),
                email_domain=email_domain,
                firebase=secrets.firebase(firebase_config),
                pepper_id=secrets.pepper(pepper_file),
            ),
            ImportRules(settings.email_allow_special_domains, settings.bcrypt_cost, FastHashes(fast_digests)),
            OnConflict(on_conflict),
            derives_usernames=usernames == "derive",
        )
        if dry_run:
            rejects = refused or path.with_name(f"{path.name}.would-be-refused.ndjson")
            if refused is None:
                rejects.unlink(missing_ok=True)
            _require_empty(rejects)
            progress = Progress.begin(file)
            _run(job, file, database, actor=actor, progress=progress, rejects=rejects, state=None)
        else:
            rejects = refused or path.with_name(f"{path.name}.refused.ndjson")
            state = path.with_name(f"{path.name}.import-progress")
            progress = _begin(file, state, rejects, restart=restart)
            _run(job, file, database, actor=actor, progress=progress, rejects=rejects, state=state)
            state.unlink(missing_ok=True)
    click.echo(f"{'Would be: ' if dry_run else ''}{_summary(progress)}.")
    if progress.counts["refused"]:
        click.echo(f"The refused rows and the reasons are in {rejects}.")
        sys.exit(SOME_REFUSED)


class _Secrets:
    """Stores what the hashes of a file have in common, and are worth nothing without. A dry run does not store it."""

    def __init__(self, settings: Settings, database: "Database", actor: Actor, *, is_dry_run: bool) -> None:
        self._settings, self._database, self._actor, self._is_dry_run = settings, database, actor, is_dry_run

    def firebase(self, path: Path | None) -> "FirebaseProject | None":
        from service.cli.imports.formats.options import BadParametersError, FirebaseProject, firebase_parameters

        if path is None:
            return None
        try:
            secret, rounds, mem_cost = firebase_parameters(read_text(path))
            return FirebaseProject(self._id_of("firebase", secret), rounds, mem_cost)
        except BadParametersError as error:
            fail(f"{path} holds no password hash parameters of Firebase: {error}.")
        except (OSError, ValueError) as error:
            fail(f"{path} cannot be used: {error}.")

    def pepper(self, path: Path | None) -> str:
        if path is None:
            return ""
        try:
            return self._id_of("pepper", {"pepper": read_text(path).rstrip("\r\n").encode()})
        except (OSError, ValueError) as error:
            fail(f"{path} cannot be used: {error}.")

    def _id_of(self, kind: "SecretKind", secret: "Parameters") -> str:
        from service.core.transfer.hash_secrets import HashSecrets

        secrets = HashSecrets(self._settings.keys(), random_bytes)
        if self._is_dry_run:
            return secrets.id_of(kind, secret)
        with self._database.scope(actor=self._actor) as session, session.begin():
            return secrets.store(session, kind, secret)


def _begin(file: BinaryIO, state: Path, rejects: Path, *, restart: bool) -> "Progress":
    """The progress of the run that was stopped, or of a new one. Ends the command where neither may begin."""
    from service.cli.imports.progress import Progress, ProgressError, load, lock

    try:
        lock(file)
        new = Progress.begin(file)
        stored = None if restart else load(state)
    except ProgressError as error:
        fail(str(error))
    if stored is None:
        _require_empty(rejects)
        return new
    if stored.file != new.file:
        fail(f"The file has changed since its import stopped after {stored.done:,} rows. --restart begins again.")
    if stored.refused_bytes > (rejects.stat().st_size if rejects.exists() else 0):
        fail(f"{rejects} lacks rows that this import has refused: name the file that holds them with --refused.")
    click.echo(f"Going on after {stored.done:,} rows.", err=True)
    return stored


def _require_empty(rejects: Path) -> None:
    if rejects.exists() and rejects.stat().st_size:
        fail(f"{rejects} holds rows that an earlier run refused: move it away, or name another one with --refused.")


def _run(
    job: "Import",
    file: BinaryIO,
    database: "Database",
    *,
    actor: Actor,
    progress: "Progress",
    rejects: Path,
    state: Path | None,
) -> None:
    from service.cli.imports.progress import RefusedRows
    from service.cli.imports.records import BrokenFileError
    from service.cli.imports.run import run

    refused = RefusedRows(rejects, progress.refused_bytes)
    so_far = progress.done
    try:
        with _bar(os.fstat(file.fileno()).st_size) as update:
            run(
                job,
                file,
                database,
                actor,
                progress,
                state=state,
                refused=refused,
                clock=utc_now,
                on_batch=lambda: update(file.tell(), progress.done - so_far),
            )
    except BrokenFileError as error:
        fail(f"{error} The rows of whole batches before it are done: {_summary(progress)}.")
    except (PersonaeError, OSError, KeyboardInterrupt) as error:
        click.echo(f"Stopped after {progress.done:,} rows: {_summary(progress)}.", err=True)
        if state is not None:
            click.echo("The same command goes on from here.", err=True)
        _end_stopped(error, rejects)


def _end_stopped(error: PersonaeError | OSError | KeyboardInterrupt, path: Path) -> NoReturn:
    """End a command that was stopped. path: of the file that an OSError without a name is about."""
    if isinstance(error, PersonaeError):
        raise error
    if isinstance(error, OSError):
        fail(f"{error.filename or path}: {error.strerror}.")
    sys.exit(INTERRUPTED)


@contextmanager
def _bar(length: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left, on a terminal; called with the position and how many users are done."""
    began_at = monotonic()

    def shown(users_done: int | None) -> str:
        seconds = max(monotonic() - began_at, 0.001)
        return f"{users_done or 0:,} users, {(users_done or 0) / seconds:,.0f}/s"

    bar: Any = click.progressbar(
        length=length, item_show_func=shown, file=sys.stderr, hidden=not sys.stderr.isatty(), label="users"
    )
    with bar:
        yield lambda position, users_done: bar.update(position - bar.pos, users_done)


def _summary(progress: "Progress") -> str:
    return ", ".join(f"{rows:,} {outcome}" for outcome, rows in progress.counts.items())


@users.command("export")
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--include-hashes", is_flag=True, help="With the password hashes: with them passwords can be guessed.")
@click.option("--resume", is_flag=True, help="Go on behind the last user in FILE, where an earlier run was stopped.")
def export(*, path: Path, include_hashes: bool, resume: bool) -> None:
    """Export the users that are not deleted to FILE, one JSON object on each line, in the order of their ids.

    Only you may read the file. It is what `users import --format ndjson` reads. A run that was stopped goes on with
    --resume. Exit code 1: the export could not go on. 130: Ctrl-C.
    """
    from service.cli.imports.progress import exported_line, last_exported, open_private
    from service.core.transfer import exporting
    from service.db.engine import reading
    from service.rpc.pipeline.retries import retry

    settings = settings_or_fail()
    if path.exists() and not resume:
        fail(f"{path} exists. --resume goes on behind the last user in it.")
    try:
        opened = open_private(path, is_new=not path.exists())
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}.")
    with opened as file, working_database(settings) as database:
        try:
            after: int | None = last_exported(file)
        except ValueError:
            fail(f"{path} was not written by `users export`.")
        with database.scope(actor=command_line(settings)) as session, session.begin():
            exporting.record_export(session, has_hashes=include_hashes)
            last = exporting.last_id(session)

        def page(after: int) -> exporting.Page:
            with database.scope() as session, reading(session):
                return exporting.export_users(session, after=after, size=_PAGE, has_hashes=include_hashes)

        exported = 0
        try:
            with _bar(last) as update:
                while after is not None:
                    found = retry(partial(page, after), until=monotonic() + _PAGE_SECONDS)
                    file.write(b"".join(map(exported_line, found.entries)))
                    file.flush()
                    exported += len(found.entries)
                    after = found.next
                    update(last if after is None else min(after, last), exported)
            os.fsync(file.fileno())
        except (PersonaeError, OSError, KeyboardInterrupt) as error:
            click.echo(f"Stopped after {exported:,} users. The same command with --resume goes on from here.", err=True)
            with suppress(OSError):  # what is buffered may be what the disk has no room for
                file.close()
            _end_stopped(error, path)
    click.echo(f"{exported:,} users exported to {path}.")
