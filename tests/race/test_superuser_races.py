"""A user becomes a superuser while a caller without users.superuser changes the user: the change comes first, or is
refused.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2, user_pb2
from tests.support.credentials import outcome, reset, start_reset, start_verification
from tests.support.databases import wait_until_blocked
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.superusers import CHANGES, Tiers, tiers
from tests.support.threads import at_once
from tests.support.waiting import PATIENCE

Racer = Callable[[], object]
LOCKING = sorted(CHANGES.keys() - {"StartEmailVerification", "CreateSession"})
"""Issuing a code or a session locks no user: both are void once the user is a superuser."""


@pytest.fixture
def tiered(private_url: URL) -> Iterator[Tiers]:
    with tiers(private_url, rpc_timeout=600) as found:
        yield found


@pytest.mark.parametrize("name", LOCKING)
def test_the_locked_row_decides(tiered: Tiers, name: str) -> None:
    """The change waits for the grant, and is then refused."""
    user = new_user(tiered.strong.users, password=PASSWORD)
    call = CHANGES[name](tiered.strong, user)
    before = tiered.strong.read(user)

    with ThreadPoolExecutor(1) as pool, tiered.server.database.engine.connect() as granting:
        granting.execute(text("UPDATE users SET is_superuser = true WHERE id = :id"), {"id": user.id})
        ended = pool.submit(outcome, call, tiered.weak)
        wait_until_blocked(tiered.server.url)
        granting.commit()

        # A reset finds its code void, and does not look for the cause.
        assert ended.result(PATIENCE) == ("INVALID_CODE" if name == "CompletePasswordReset" else "SCOPE_MISSING")
    before.is_superuser = True
    assert tiered.strong.read(user) == before


def test_no_earlier_code_is_valid_for_a_superuser(tiered: Tiers) -> None:
    """Nor one that is issued at the same time, even where a caller with users.superuser completes it."""
    for _ in range(8):
        user = new_user(tiered.strong.users)
        grant = partial(tiered.strong.users.GrantSuperuser, user_pb2.GrantSuperuserRequest(id=user.id))
        verification = partial(start_verification, tiered.weak, user)
        racers: list[Racer] = [grant, *[partial(start_reset, tiered.weak, user)] * 3, *[verification] * 2]

        def race(index: int, racers: list[Racer] = racers) -> object:
            return racers[index]()

        _, *started = at_once(len(racers), race)

        for answer in started:
            match answer:
                case credential_pb2.StartPasswordResetResponse():
                    ended = fails(tiered.strong.credentials.CompletePasswordReset, reset(answer.code))
                case credential_pb2.StartEmailVerificationResponse():
                    request = credential_pb2.CompleteEmailVerificationRequest(code=answer.code)
                    ended = fails(tiered.strong.credentials.CompleteEmailVerification, request)
                case _:
                    continue
            assert ended.reason == "INVALID_CODE"
