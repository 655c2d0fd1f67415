"""The servicers of the gRPC port, each with the settings that it uses."""

from datetime import timedelta

import grpc

from service.base.clock import Clock
from service.base.randomness import random_bytes, random_id
from service.base.settings import Settings
from service.core.factors.rows import FactorMaker
from service.core.factors.webauthn import RelyingParty
from service.core.lockout import LockoutKeys
from service.core.page_tokens import PageTokens
from service.core.passwords.policy import PasswordPolicy
from service.core.sessions.refresh_tokens import RefreshTokens
from service.core.signing_keys.rows import KeyMaker
from service.core.transfer.hash_secrets import HashSecrets
from service.db.engine import Database
from service.rpc.admission.hashing import HashLimiter
from service.rpc.proxies.checks import Checks, RouteMistakes
from service.rpc.proxies.envoy import AuthorizationServicer
from service.rpc.servicers.audit import AuditServicer
from service.rpc.servicers.authentication import AuthenticationServicer
from service.rpc.servicers.credential import CredentialServicer
from service.rpc.servicers.factors.factor import FactorServicer
from service.rpc.servicers.factors.second_step import SecondStep
from service.rpc.servicers.rules import Rules
from service.rpc.servicers.session import SessionServicer
from service.rpc.servicers.sign_in import SignIn
from service.rpc.servicers.signing_key import SigningKeyServicer
from service.rpc.servicers.tokens import TokenRules, Tokens
from service.rpc.servicers.users.user import UserServicer
from service.rpc.services import add_to_server
from service.rpc.signing_keys import SigningKeys


def relying_party(settings: Settings) -> RelyingParty | None:
    """The site whose passkeys are taken; None where there are no passkeys."""
    domain = settings.webauthn_rp_id
    if domain is None:
        return None
    return RelyingParty(domain, settings.totp_issuer, settings.webauthn_origins or (f"https://{domain}",))


def add_servicers(
    server: grpc.Server,
    database: Database,
    settings: Settings,
    policy: PasswordPolicy,
    *,
    clock: Clock,
    hashing: HashLimiter,
    maker: KeyMaker,
    factor_maker: FactorMaker,
    signing_keys: SigningKeys,
) -> Checks:
    """Serve everything on this server. Returns what decides for proxies, which also ask by HTTP."""
    keys = settings.keys()
    lockout_keys = LockoutKeys(keys.derive("lockout"))
    page_tokens = PageTokens(keys.derive("page-token"))
    rules = Rules(
        policy=policy,
        bcrypt_cost=settings.bcrypt_cost,
        allow_special_domains=settings.email_allow_special_domains,
        purge_after=timedelta(days=settings.purge_after_days),
        reset_valid_for=timedelta(seconds=settings.password_reset_valid),
        verification_valid_for=timedelta(seconds=settings.email_verification_valid),
    )
    sign_in = SignIn(
        database,
        clock=clock,
        bcrypt_cost=settings.bcrypt_cost,
        lockout_keys=lockout_keys,
        hash_secrets=HashSecrets(keys, random_bytes),
    )
    tokens = Tokens(
        TokenRules(
            issuer=settings.token_issuer,
            access_token_valid_for=timedelta(seconds=settings.access_token_seconds),
            session_idle=timedelta(seconds=settings.session_idle_seconds),
            session_lifetime=timedelta(seconds=settings.session_lifetime_seconds),
            refresh_grace=timedelta(seconds=settings.refresh_grace_seconds),
        ),
        RefreshTokens(keys.derive("refresh-token")),
        signing_keys,
        random=random_bytes,
        new_id=random_id,
    )
    second_step = SecondStep(database, clock, factor_maker, lockout_keys, relying_party(settings))
    checks = Checks(database, clock, tokens, RouteMistakes())
    add_to_server(
        server,
        users=UserServicer(database, clock, rules, hashing, page_tokens, keys.derive("request-fingerprint")),
        authentication=AuthenticationServicer(
            database, clock, rules, hashing, sign_in, lockout_keys, tokens, second_step
        ),
        credentials=CredentialServicer(database, clock, rules, hashing, sign_in, lockout_keys),
        audit=AuditServicer(database, page_tokens),
        sessions=SessionServicer(database, clock, tokens, page_tokens),
        signing_keys=SigningKeyServicer(
            database, clock, maker, signing_keys, issues_tokens=settings.token_issuer is not None
        ),
        factors=FactorServicer(database, clock, tokens, factor_maker, second_step),
        authorization=AuthorizationServicer(checks),
    )
    return checks
