"""Access tokens of a key that the server has not read."""

from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import grpc
from sqlalchemy import event
from sqlalchemy.engine import URL

from service.rpc.signing_keys import SigningKeys
from service.server.wiring import key_maker
from tests.support.credentials import outcome
from tests.support.errors import fails
from tests.support.forgeries import UNKNOWN_KID, signed
from tests.support.proxies import check, checking
from tests.support.proxy import Hold, serving_through_a_proxy
from tests.support.servers import running, settings_for
from tests.support.sessions import introspecting, signed_in
from tests.support.threads import at_once
from tests.support.waiting import eventually, is_of_a_job

THREADS = 2


def test_many_unknown_keys_at_once_cause_few_reads(private_url: URL) -> None:
    """Strangers cannot multiply statements by the header of a token. The server's job reads the keys as well."""
    with running(private_url) as server:
        keys = SigningKeys(server.database, key_maker(settings_for(private_url)), server.clock)
        reads: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            reads.extend(["read"] * is_of_a_job(statement))

        event.listen(server.database.engine, "before_cursor_execute", note)
        assert at_once(32, lambda _: keys.find("x" * 43)) == [None] * 32
        assert len(reads) < 8


def test_while_keys_cannot_be_read_an_unknown_one_is_not_invalid(private_url: URL) -> None:
    """Its token may be valid: IntrospectToken is UNAVAILABLE, also when the call causes no read."""
    with serving_through_a_proxy(private_url) as proxied:
        server = proxied.server
        good = signed_in(server)[1].access_token
        keys = server.server.state.signing_keys
        assert keys is not None
        _, key = keys.current(server.clock())
        unknown = introspecting(signed(good, key, {"kid": UNKNOWN_KID}))
        proxied.proxy.refuse()
        proxied.proxy.cut()
        eventually(lambda: outcome(server.sessions.IntrospectToken, unknown) != "OK", "the keys are to be read again")
        failures = [fails(server.sessions.IntrospectToken, unknown) for _ in range(3)]
        assert {failure.code for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
        proxied.proxy.refuse(refusing=False)
        eventually(lambda: outcome(server.sessions.IntrospectToken, unknown) == "OK", "the keys are read")
        assert not server.sessions.IntrospectToken(unknown).active


def test_a_database_that_hangs_holds_no_thread(private_url: URL) -> None:
    """While the keys are read again in vain, tokens of unknown keys are refused at once, so that those of known keys
    are verified, which needs no database in mode jwt.
    """
    with serving_through_a_proxy(private_url, grpc_threads=THREADS) as proxied, ThreadPoolExecutor(1) as pool:
        server, proxy = proxied.server, proxied.proxy
        good = signed_in(server)[1].access_token
        keys = server.server.state.signing_keys
        assert keys is not None
        unknown = checking(signed(good, keys.current(server.clock())[1], {"kid": UNKNOWN_KID}), mode="jwt")
        hold = proxy.hold = Hold("FROM signing_keys")

        def are_answered_during_one_read() -> bool:
            hold.has_come.clear()
            reading = pool.submit(keys.refresh)
            eventually(lambda: hold.has_come.is_set() or reading.done(), "a read is under way, or has failed")
            refused = at_once(5 * THREADS, lambda _: outcome(server.proxies.Check, unknown))
            assert refused == ["SIGNING_KEY_UNAVAILABLE"] * len(refused)
            assert check(server, good, mode="jwt").status == HTTPStatus.OK
            is_reading = not reading.done()
            reading.result()
            return is_reading

        try:
            keys.refresh()  # in vain; from now on no call waits for a read
            eventually(are_answered_during_one_read, "calls are answered during one read")
        finally:
            hold.release.set()
