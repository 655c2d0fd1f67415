"""What an attacker who never tires gets out of a day: a number of answers that is known beforehand."""

from datetime import timedelta
from typing import Any

import grpc

from personae.v1 import authentication_pb2 as pb
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import RunningServer

DAY = timedelta(hours=24)


def test_at_most_112_guesses_are_answered_on_one_account_in_a_day(private_server: RunningServer) -> None:
    """Through email, username and id at once, each tried again the moment that it is allowed: 2 x 56 answers."""
    user = new_user(private_server.users, password=PASSWORD)
    clock = private_server.clock
    clock.stop()
    start, answered = clock(), 0
    ways: list[dict[str, Any]] = [{"identifier": user.email}, {"identifier": user.username}, {"user_id": user.id}]
    while clock() - start < DAY:
        waits = []
        for way in ways:
            try:
                private_server.authentication.Authenticate(pb.AuthenticateRequest(**way, password="not this one"))
            except grpc.RpcError as error:
                failure = failure_of(error)
                answered += failure.reason == "INVALID_CREDENTIALS"
                waits.append(failure.retry_after or timedelta())
        clock.advance(min(waits))

    assert answered == 112
    counted = private_server.authentication.GetLockout(pb.GetLockoutRequest(user_id=user.id))
    assert (counted.email.failures, counted.username.failures) == (56, 56)
