"""One run of `users import`: batches of the file, each committed and then noted as done."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from service.base.actor import Actor
from service.base.clock import Clock, monotonic
from service.base.cores import usable_cores
from service.cli.imports.formats import Format, Options
from service.cli.imports.progress import Progress, RefusedRows, count, refused_line, store
from service.cli.imports.records import BadRecordError, Record
from service.core.identifiers import BadIdentifierError, normalise_username
from service.core.passwords.schemes.sources import peppered
from service.core.transfer.importing import ACTION, import_users, preview
from service.core.transfer.rules import (
    MAX_ROWS,
    Checked,
    FastHashes,
    ImportRules,
    OnConflict,
    Result,
    Row,
    RowOutcome,
    SourceUser,
    check,
    wrap,
)
from service.core.users import RequestKey
from service.db.engine import Database, reading
from service.rpc.pipeline.retries import retry

_BATCH_SECONDS = 60.0
_STEM_LENGTH = 40
_STEM_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


@dataclass(frozen=True, slots=True)
class Import:
    """What is imported, and how. derives_usernames: for rows whose username is missing or none here."""

    format: Format
    options: Options
    rules: ImportRules
    on_conflict: OnConflict
    derives_usernames: bool


class _Row(NamedTuple):
    number: int
    source: SourceUser | None
    checked: Checked


def run(
    job: Import,
    file: BinaryIO,
    database: Database,
    actor: Actor,
    progress: Progress,
    *,
    state: Path | None,
    refused: RefusedRows,
    clock: Clock,
    on_batch: Callable[[], None],
) -> None:
    """Import the file from where the progress says, and keep that up to date.

    state: where it is stored; None: a dry run, which changes nothing. on_batch: called after each batch. Raises
    BrokenFileError, PersonaeError; what was committed until then is noted.
    """
    if state is not None:
        store(state, progress)  # before the first batch, which may be committed when this process is killed
    records = job.format.read(file)
    for _ in islice(records, progress.done):  # done in an earlier run
        pass
    while batch := list(islice(records, MAX_ROWS)):
        rows = list(_rows(job, batch, now=clock()))
        if job.rules.fast_hashes is FastHashes.WRAP and state is not None:
            rows = _wrapped(rows, job.rules.bcrypt_cost)
        results = _import(job, database, actor, rows, progress, is_dry_run=state is None, now=clock())
        lines = [
            refused_line(row.number, row.source, result.refusals)
            for row, result in zip(rows, results, strict=True)
            if result.outcome is RowOutcome.REFUSED
        ]
        progress.refused_bytes = refused.add(lines)
        progress.done += len(batch)
        count(progress.counts, results)
        if state is not None:
            store(state, progress)
        on_batch()


def _rows(job: Import, records: list[Record], *, now: datetime) -> Iterator[_Row]:
    for record in records:
        if record.fields is None:
            yield _Row(record.number, None, () if record.violation is None else (record.violation,))
            continue
        try:
            source = job.format.adapt(record.fields, job.options)
        except BadRecordError as error:
            yield _Row(record.number, None, (error.violation,))
            continue
        if source is not None:
            source = _with_username(source) if job.derives_usernames else source
            if job.options.pepper_id and source.hashed_password.startswith("$2"):
                source = replace(
                    source, hashed_password=peppered(source.hashed_password, secret_id=job.options.pepper_id)
                )
            yield _Row(record.number, source, check(source, job.rules, now=now))


def _wrapped(rows: list[_Row], cost: int) -> list[_Row]:
    """The rows, with fast digests in bcrypt: on all cores, since each takes as long as a sign-in."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(lambda row: row._replace(checked=_wrap(row.checked, cost)), rows))


def _wrap(row: Checked, cost: int) -> Checked:
    return wrap(row, cost) if isinstance(row, Row) else row


def _with_username(source: SourceUser) -> SourceUser:
    """The user with a username of its email, where it has none that can be one here: `ada-4f2a9c1b`.

    Always the same for the same email, so that an import can be repeated.
    """
    try:
        normalise_username(source.username)
    except BadIdentifierError:
        email = source.email.lower()
        stem = "".join(one for one in email.partition("@")[0] if one in _STEM_CHARACTERS).strip("._-")
        suffix = hashlib.sha256(email.encode()).hexdigest()[:8]
        return replace(source, username=f"{stem[:_STEM_LENGTH] or 'user'}-{suffix}")
    return source


def _import(
    job: Import,
    database: Database,
    actor: Actor,
    rows: list[_Row],
    progress: Progress,
    *,
    is_dry_run: bool,
    now: datetime,
) -> list[Result]:
    checked = [row.checked for row in rows]
    request = RequestKey(actor.caller, ACTION, progress.request_id(), (progress.file.encode(),))
    until = monotonic() + _BATCH_SECONDS

    def attempt() -> list[Result]:
        with database.scope(deadline=until, actor=actor, is_idempotent=True) as session:
            if is_dry_run:
                with reading(session):
                    return preview(session, checked, job.on_conflict, secrets=job.options.secrets)
            with session.begin():
                return import_users(session, checked, job.on_conflict, request=request, now=now)

    return retry(attempt, until=until)
