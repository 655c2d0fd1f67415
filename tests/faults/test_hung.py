"""A database that hangs: it accepts data and answers nothing, and no connection ends."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
from sqlalchemy.engine import URL

from tests.support.callers import bearer, keyed, operating, told
from tests.support.errors import failure_of
from tests.support.factories import get_request, new_user, unique_name
from tests.support.leak_detector import Log
from tests.support.proxy import PostgresProxy, serving_through_a_proxy
from tests.support.servers import NOT_SERVING, SERVING, Services, running
from tests.support.waiting import PATIENCE, eventually

THREADS = 4


def ended(call: Callable[[], object]) -> str:
    """Call, and return OK, the reason of the failure, or DEADLINE_EXCEEDED if the caller gave up first."""
    try:
        call()
    except grpc.RpcError as error:
        code = error.code()
        return str(code.name) if code is grpc.StatusCode.DEADLINE_EXCEEDED else failure_of(error).reason
    return "OK"


def test_a_database_that_hangs(private_url: URL) -> None:
    """Calls end, health is NOT_SERVING, an open commit has an unknown outcome. Afterwards all threads serve again."""
    settings = {"caller_auth": "required", "caller_cache_seconds": 1, "grpc_threads": THREADS, "rpc_timeout": 5}
    settings |= {"db_connect_timeout": 2}  # how long a call waits for a connection that hangs
    with operating(private_url) as operator:
        key = operator.create_with_key("users.read", "users.write")
        with serving_through_a_proxy(private_url, health_probe_interval=0.05, **settings) as hanging:
            server, proxy = hanging.server, hanging.proxy
            api = Services(keyed(server.channel, key))
            user, health = new_user(api.users), server.health()
            get = get_request(user)
            assert next(health) == SERVING
            with ThreadPoolExecutor(THREADS) as pool:
                proxy.hang_at = "COMMIT"
                changing = pool.submit(ended, partial(api.update, user, username=unique_name()))
                eventually(proxy.is_hanging, "the commit is under way")
                proxy.hang()
                read = partial(api.users.GetUser, get, timeout=0.5)
                reading = [pool.submit(ended, read) for _ in range(THREADS - 1)]
                assert next(health) == NOT_SERVING
                assert changing.result(PATIENCE) == "COMMIT_OUTCOME_UNKNOWN"
                # most callers gave up; on a busy machine a call may arrive when the server knows of the outage
                assert {one.result(PATIENCE) for one in reading} <= {"DEADLINE_EXCEEDED", "DATABASE_UNAVAILABLE"}

            read = partial(api.users.GetUser, get, timeout=PATIENCE)
            assert ended(read) == "DATABASE_UNAVAILABLE"
            proxy.hang(hanging=False)

            assert next(health) == SERVING
            eventually(lambda: told(server.channel, bearer(key)) == "OK", "a call is let in")
            with ThreadPoolExecutor(THREADS) as pool:
                again = [pool.submit(ended, read) for _ in range(THREADS)]
                assert {one.result(PATIENCE) for one in again} == {"OK"}
            late = operator.create_with_key("users.read")  # callers are read again as well
            eventually(lambda: told(server.channel, bearer(late)) == "OK", "a new caller is known")


def test_callers_that_cannot_be_read(private_url: URL) -> None:
    """A server that cannot read the callers reports NOT_SERVING, so that clients use another one."""
    with PostgresProxy(private_url) as proxy, operating(private_url) as operator:
        key, log = operator.create_with_key("users.read"), Log()
        with running(proxy.proxied, caller_auth="required", caller_cache_seconds=1) as server:
            health = server.health()
            assert next(health) == SERVING
            proxy.answer("FROM caller_keys", "42501", times=1_000_000)
            assert next(health) == NOT_SERVING
            assert "who may call" in log
            assert told(server.channel, bearer(key)) == "DATABASE_UNAVAILABLE"
            proxy.forgive()
            assert next(health) == SERVING
