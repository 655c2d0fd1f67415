"""Access tokens with verifiers of others: PyJWT, and Envoy's `jwt_authn`.

They read the keys from the HTTP port, and use the clock of the machine, at which the clock of the servers here starts.
"""

import contextlib
import http.client
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from sqlalchemy.engine import URL

from personae.v1 import session_pb2
from personae.v1 import signing_key_pb2 as pb
from service.http.app import CONFIGURATION_PATH, JWKS_PATH
from tests.support.clocks import MovableClock
from tests.support.databases import ROOT, Postgres
from tests.support.envoy import Envoy, ask, envoy
from tests.support.forgeries import WRONG_CLAIMS, forgeries, with_wrong_claim
from tests.support.scrapes import free_port, get
from tests.support.servers import RunningServer, running
from tests.support.sessions import claims_of, introspect, refresh, signed_in
from tests.support.signing_keys import keys_of, kid_of
from tests.support.waiting import eventually

API = "https://api.example.com"
EXAMPLE = ROOT / "examples/verify/verify.py"
LOAD_THREADS = 4
REFUSED = {http.client.UNAUTHORIZED, http.client.FORBIDDEN}
"""How Envoy refuses: with 403 where only the audience is wrong."""
PYJWT_REFUSALS = {
    "another issuer": jwt.InvalidIssuerError,
    "another audience": jwt.InvalidAudienceError,
    "expired": jwt.ExpiredSignatureError,
    "issued in the future": jwt.ImmatureSignatureError,
    "another type": jwt.InvalidTokenError,
    "no algorithm": jwt.InvalidAlgorithmError,
    "no algorithm, and the signature": jwt.InvalidAlgorithmError,
    "HS256 with the public key as PEM": jwt.InvalidAlgorithmError,
    "HS256 with the public key as DER": jwt.InvalidAlgorithmError,
    "an unknown kid": jwt.PyJWKClientError,
    "the kid of another key": jwt.InvalidSignatureError,
    "an edited payload": jwt.InvalidSignatureError,
    "no signature": jwt.InvalidSignatureError,
    "a trailing character": jwt.InvalidSignatureError,
}
"""By what is wrong with the token."""
ENVOY_TAKES = {"issued in the future", "another type", "a trailing character"}
"""Envoy 1.40 compares `exp` and `nbf`, not `iat`, and does not look at `typ`: this service signs nothing but access
tokens with these keys. And it ignores what base64 has too much at the end of a signature, so that one token has several
texts. That is harmless as long as nobody looks tokens up by their text: a list of revoked ones would miss the others.
Nothing here does: IntrospectToken refuses such a text, and looks sessions up by the `sid` that is signed.
"""


@contextlib.contextmanager
def issuing(url: URL, clock: MovableClock | None = None) -> Iterator[RunningServer]:
    """A server that issues tokens, and publishes its keys at the address of its issuer."""
    port = free_port()
    with running(url, clock, http_port=port, token_issuer=f"http://127.0.0.1:{port}", access_token_seconds=3600) as one:
        yield one


@pytest.fixture(scope="module")
def server(postgres: Postgres, template: str) -> Iterator[RunningServer]:
    """A server whose keys no test changes."""
    with postgres.scratch(template=template) as url, issuing(url) as found:
        yield found


@pytest.fixture(scope="module")
def proxy(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    with envoy_of(server, tmp_path_factory.mktemp("envoy")) as found:
        yield found


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyJWT would reach even this machine through the one of the environment."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def envoy_of(server: RunningServer, directory: Path) -> "contextlib.AbstractContextManager[Envoy]":
    return envoy(directory, server.server.http_port, issuer=issuer_of(server), audience=API)


def issuer_of(server: RunningServer) -> str:
    return f"http://127.0.0.1:{server.server.http_port}"


def new_token(server: RunningServer) -> str:
    """The access token of a new user's session."""
    token: str = signed_in(server, audience=(API,))[1].access_token
    return token


def forged_by(server: RunningServer, good: str) -> dict[str, str]:
    """Invalid tokens that are signed with the server's own key."""
    [next_kid] = [one.kid for one in keys_of(server) if one.state == pb.SigningKey.STATE_NEXT]
    return forgeries(good, key_of(server), next_kid)


def key_of(server: RunningServer) -> EllipticCurvePrivateKey:
    """The key with which the server signs."""
    keys = server.server.state.signing_keys
    assert keys is not None
    return keys.current(server.clock())[1]


def rotate(server: RunningServer, *, immediately: bool = False) -> pb.SigningKey:
    return server.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest(immediately=immediately))


def revoke(server: RunningServer, token: str) -> None:
    """Revoke the key of a token."""
    server.signing_keys.RevokeSigningKey(pb.RevokeSigningKeyRequest(kid=kid_of(token)))


def verifier_of(server: RunningServer) -> Any:
    """A verifier that has not read the keys yet."""
    return runpy.run_path(str(EXAMPLE))["Verifier"](issuer_of(server), API)


def python_example(_: Path) -> list[str]:
    """The command of the program. The others skip the test if their language or its packages are missing: a test
    downloads nothing.
    """
    return [sys.executable, str(EXAMPLE)]


def node_example(directory: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no Node here")
    root = subprocess.run([npm, "root", "--global"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(root, "jose").exists():
        pytest.skip("npm install --global jose@6 has not been run here")
    (directory / "node_modules").symlink_to(root)
    return ["node", str(shutil.copy(EXAMPLE.with_name("verify.mjs"), directory))]


def go_example(directory: Path) -> list[str]:
    go = shutil.which("go")
    if go is None:
        pytest.skip("there is no Go here")
    for name in ("verify.go", "go.mod", "go.sum"):
        shutil.copy(EXAMPLE.with_name(name), directory)
    offline = os.environ | {"GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}
    built = subprocess.run(
        [go, "build", "verify.go"], cwd=directory, env=offline, capture_output=True, text=True, check=False
    )
    if "disabled by GOPROXY=off" in built.stderr:
        pytest.skip("go mod download has not been run in examples/verify")
    if "requires go >=" in built.stderr:
        pytest.skip("the Go here is older than go.mod asks for")
    assert built.returncode == 0, built.stderr
    return [str(directory / "verify")]


def judge(verifier: Any, token: str) -> type[Exception] | None:
    """The exception with which PyJWT refuses a token; None: it accepts it."""
    try:
        verifier.verify(token)
    except jwt.PyJWTError as error:
        return type(error)
    return None


def test_the_configuration_leads_to_the_keys(server: RunningServer) -> None:
    """For verifiers that read it; the others append the path to the issuer."""
    configuration = orjson.loads(get(server.server.http_port, CONFIGURATION_PATH)[2])
    assert configuration["issuer"] == issuer_of(server)
    assert configuration["jwks_uri"] == issuer_of(server) + JWKS_PATH
    read = jwt.PyJWKClient(configuration["jwks_uri"]).get_signing_keys()
    assert {key.key_id for key in read} == {key.kid for key in keys_of(server)}


def test_the_service_refuses_every_forgery(server: RunningServer) -> None:
    good = new_token(server)
    forged = forged_by(server, good)
    assert introspect(server, good, audience=API).active
    assert [what for what, token in forged.items() if introspect(server, token, audience=API).active] == []


@pytest.mark.parametrize("claim", WRONG_CLAIMS)
def test_the_service_refuses_other_claims_under_its_own_key(server: RunningServer, claim: str) -> None:
    """With the answer for every token that is not active: OK, and nothing else (RFC 7662, 2.2)."""
    good = new_token(server)
    assert introspect(server, good).active
    answers = [(what, introspect(server, token)) for what, token in with_wrong_claim(good, key_of(server), claim)]
    assert [what for what, answer in answers if answer != session_pb2.IntrospectTokenResponse()] == []


class TestPyJWT:
    """As examples/verify/verify.py uses it, which people copy."""

    def test_it_accepts_a_good_token(self, server: RunningServer) -> None:
        user, tokens = signed_in(server, audience=("https://other.example.com", API))
        claims = verifier_of(server).verify(tokens.access_token)
        assert (claims["sub"], claims["sid"]) == (str(user.id), tokens.session.id)

    def test_it_refuses_every_forgery(self, server: RunningServer) -> None:
        verifier, good = verifier_of(server), new_token(server)
        assert judge(verifier, good) is None
        assert {what: judge(verifier, token) for what, token in forged_by(server, good).items()} == PYJWT_REFUSALS

    def test_a_rotation(self, private_url: URL) -> None:
        """A verifier knows the next key before it signs; earlier tokens stay valid."""
        with issuing(private_url) as server:
            verifier, before = verifier_of(server), new_token(server)
            assert judge(verifier, before) is None
            rotate(server, immediately=True)
            after = new_token(server)
            assert kid_of(after) != kid_of(before)
            assert judge(verifier, after) is None
            assert judge(verifier, before) is None
            assert judge(verifier_of(server), before) is None  # with the keys of now

    def test_a_revoked_key(self, private_url: URL) -> None:
        """Its tokens are refused once the keys are read again, and those of the next key are valid at once."""
        with issuing(private_url) as server:
            verifier, before = verifier_of(server), new_token(server)
            assert judge(verifier, before) is None
            revoke(server, before)
            assert judge(verifier_of(server), before) is jwt.PyJWKClientError
            assert judge(verifier, new_token(server)) is None


class TestExamples:
    """The programs of examples/verify as they are: tokens in, a line for each out."""

    @pytest.mark.parametrize("make_command", [python_example, node_example, go_example])
    def test_they_tell_good_tokens_from_bad_ones(
        self, server: RunningServer, tmp_path: Path, make_command: Callable[[Path], list[str]]
    ) -> None:
        command = [*make_command(tmp_path), issuer_of(server), API]
        user, tokens = signed_in(server, audience=(API,))
        forged = forged_by(server, tokens.access_token)
        sent = "\n".join([tokens.access_token, *forged.values(), tokens.access_token, ""])
        done = subprocess.run(command, input=sent, capture_output=True, text=True, check=True)
        first, *answers, last = done.stdout.splitlines()
        assert first == last == f"good: user {user.id}"
        assert len(answers) == len(forged)
        assert [what for what, answer in zip(forged, answers, strict=True) if not answer.startswith("refused:")] == []


class TestEnvoy:
    def test_it_accepts_a_good_token(self, server: RunningServer, proxy: Envoy) -> None:
        """And passes the user id on."""
        user, tokens = signed_in(server, audience=("https://other.example.com", API))
        with proxy.client() as connection:
            assert ask(connection, tokens.access_token) == (http.client.OK, str(user.id))
            assert ask(connection, "")[0] in REFUSED

    def test_it_refuses_forgeries(self, server: RunningServer, proxy: Envoy) -> None:
        """Except for ENVOY_TAKES, whose user is the one that this service has signed."""
        good = new_token(server)
        with proxy.client() as connection:
            answers = {what: ask(connection, token) for what, token in forged_by(server, good).items()}
        assert {what for what, (status, _) in answers.items() if status not in REFUSED} == ENVOY_TAKES
        assert {answers[what] for what in ENVOY_TAKES} == {(http.client.OK, claims_of(good)["sub"])}

    def test_no_request_fails_while_a_key_rotates(self, private_url: URL, tmp_path: Path) -> None:
        """Tokens of before and after, on several threads; the next key was published an hour ago."""
        clock = MovableClock()
        clock.advance(-timedelta(hours=1))
        with issuing(private_url, clock) as server:
            clock.advance(timedelta(hours=1))
            with envoy_of(server, tmp_path) as proxy, under_load(server, proxy) as load:
                load.wait_for_kids(1)
                rotate(server)
                load.wait_for_kids(2)
            assert set(load.statuses) == {http.client.OK}

    def test_keys_that_it_has_not_read(self, private_url: URL, tmp_path: Path) -> None:
        """An unknown kid does not make it read them, which is why keys are published early. Nor does it know of a
        revocation before it reads them again.
        """
        with issuing(private_url) as server, envoy_of(server, tmp_path) as proxy, proxy.client() as connection:
            first = new_token(server)
            rotate(server, immediately=True)
            rotate(server, immediately=True)  # to a key that was not there when Envoy started
            third = new_token(server)
            assert ask(connection, third, "/seldom")[0] in REFUSED
            eventually(lambda: ask(connection, third)[0] == http.client.OK, "Envoy has read the new key")
            revoke(server, first)
            eventually(lambda: ask(connection, first)[0] in REFUSED, "Envoy has read that the key is gone")
            assert ask(connection, first, "/seldom")[0] == http.client.OK
            assert ask(connection, third, "/seldom")[0] in REFUSED


class Load:
    """Requests through Envoy on several threads, each with the first and with the newest token of its session."""

    def __init__(self, server: RunningServer, proxy: Envoy) -> None:
        self.statuses: Counter[int] = Counter()
        self._server = server
        self._proxy = proxy
        self._over = Event()
        self._kids: list[set[str]] = [set() for _ in range(LOAD_THREADS)]
        self._threads: list[Future[Counter[int]]] = []

    def start(self, pool: ThreadPoolExecutor) -> None:
        self._threads += [pool.submit(self._ask, kids) for kids in self._kids]

    def wait_for_kids(self, count: int) -> None:
        """Wait until each thread has used tokens of this many keys."""
        eventually(
            lambda: all(len(kids) >= count for kids in self._kids) or any(one.done() for one in self._threads),
            f"tokens of {count} keys on each thread",
        )

    def end(self) -> None:
        self._over.set()

    def count(self) -> None:
        """Once all threads have ended. Raises what one of them has raised."""
        for one in self._threads:
            self.statuses += one.result()

    def _ask(self, kids: set[str]) -> Counter[int]:
        _, tokens = signed_in(self._server, audience=(API,))
        first, statuses = tokens.access_token, Counter[int]()
        with self._proxy.client() as connection:
            while not self._over.is_set():
                tokens = refresh(self._server, tokens.refresh_token)
                statuses.update(ask(connection, token)[0] for token in (first, tokens.access_token))
                kids.add(kid_of(tokens.access_token))
        return statuses


@contextlib.contextmanager
def under_load(server: RunningServer, proxy: Envoy) -> Iterator[Load]:
    load = Load(server, proxy)
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        load.start(pool)
        try:
            yield load
        finally:
            load.end()
    load.count()
