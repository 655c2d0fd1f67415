"""A web site with passkeys: the few calls between a browser and Personae. For reading, and for trying on this machine.

    make run                                    # in .env: WEBAUTHN_RP_ID=localhost
                                                #          WEBAUTHN_ORIGINS=http://localhost:8000
    .venv/bin/python examples/passkeys/server.py

A site of yours has a framework, cookies by https alone, and protection against forged requests; this has none of it.
"""

import json
import os
import secrets
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from google.rpc import status_pb2

from personae.v1 import (
    authentication_pb2,
    authentication_pb2_grpc,
    factor_pb2,
    factor_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
)

PAGE = Path(__file__).with_name("index.html")
CHANNEL = grpc.insecure_channel(os.environ.get("PERSONAE", "127.0.0.1:50051"))
USERS = user_pb2_grpc.UserServiceStub(CHANNEL)
AUTHENTICATION = authentication_pb2_grpc.AuthenticationServiceStub(CHANNEL)
FACTORS = factor_pb2_grpc.FactorServiceStub(CHANNEL)
Visitor = dict[str, str]
Form = dict[str, Any]
Answer = dict[str, Any]
VISITORS: dict[str, Visitor] = {}
"""By the browser's cookie: the ticket of what has begun, and the session. Neither is ever in the page."""


def sign_up(visitor: Visitor, form: Form) -> Answer:
    user = user_pb2.User(email=form["email"], username=form["username"])
    USERS.CreateUser(user_pb2.CreateUserRequest(user=user, password=form["password"]))
    return sign_in(visitor, form)


def sign_in(visitor: Visitor, form: Form) -> Answer:
    """By the password. A user with a passkey is asked for it next."""
    try:
        answer = AUTHENTICATION.Authenticate(
            authentication_pb2.AuthenticateRequest(
                identifier=form["username"], password=form["password"], session=authentication_pb2.SessionRequest()
            )
        )
    except grpc.RpcError as error:
        challenge = challenge_of(error)
        if challenge is None:
            raise
        visitor["ticket"] = challenge.ticket
        return {"passkey": json.loads(challenge.passkey_options_json)}
    return signed_in(visitor, answer)


def enrol(visitor: Visitor, form: Form) -> Answer:
    request = factor_pb2.StartPasskeyEnrollmentRequest(session_id=visitor["session"])
    begun = FACTORS.StartPasskeyEnrollment(request)
    visitor["ticket"] = begun.ticket
    return {"options": json.loads(begun.options_json)}


def enrolled(visitor: Visitor, form: Form) -> Answer:
    request = factor_pb2.CompletePasskeyEnrollmentRequest(
        ticket=visitor.pop("ticket"), credential_json=json.dumps(form["credential"]), label=form.get("label", "")
    )
    return {"recovery_codes": list(FACTORS.CompletePasskeyEnrollment(request).recovery_codes)}


def passkey(visitor: Visitor, form: Form) -> Answer:
    """Without a name and a password."""
    begun = FACTORS.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest())
    visitor["ticket"] = begun.ticket
    return {"passkey": json.loads(begun.options_json)}


def complete(visitor: Visitor, form: Form) -> Answer:
    """What the browser has signed, after `sign_in` or `passkey`."""
    request = factor_pb2.CompleteSecondFactorRequest(
        ticket=visitor.pop("ticket"),
        passkey_json=json.dumps(form["credential"]),
        session=authentication_pb2.SessionRequest(),
    )
    return signed_in(visitor, FACTORS.CompleteSecondFactor(request))


def signed_in(visitor: Visitor, answer: authentication_pb2.AuthenticateResponse) -> Answer:
    visitor["session"] = answer.tokens.session.id
    return {"username": answer.user.username, "acr": answer.tokens.session.acr}


def challenge_of(error: Any) -> authentication_pb2.SecondFactorChallenge | None:
    """The SecondFactorChallenge in the details of a status; None when a second factor is not what is missing."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    challenge = authentication_pb2.SecondFactorChallenge()
    found = (detail.Unpack(challenge) for detail in status_pb2.Status.FromString(details).details)
    return challenge if any(found) else None


CALLS = {f"/{call.__name__}": call for call in (sign_up, sign_in, enrol, enrolled, passkey, complete)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8", f"visitor={secrets.token_urlsafe(32)}")

    def do_POST(self) -> None:
        cookie = SimpleCookie(self.headers.get("cookie", "")).get("visitor")
        call = CALLS.get(self.path)
        if call is None or cookie is None:
            self.answer(404, b"{}", "application/json")
            return
        form = json.loads(self.rfile.read(min(int(self.headers["content-length"]), 65_536)))
        try:
            body, status = call(VISITORS.setdefault(cookie.value, {}), form), 200
        except grpc.RpcError as error:
            body, status = {"error": error.details()}, 400
        self.answer(status, json.dumps(body).encode(), "application/json")

    def answer(self, status: int, body: bytes, kind: str, cookie: str = "") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        if cookie:
            self.send_header("set-cookie", f"{cookie}; HttpOnly; SameSite=Strict")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8000"))), Handler) as server:
        print(f"http://localhost:{server.server_port}", flush=True)
        server.serve_forever()
