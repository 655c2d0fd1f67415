"""CPU cost of authenticating callers, by API key or client certificate, and of TLS."""

from contextlib import ExitStack
from statistics import median

from benchmarks.bench import Bench
from benchmarks.identities import Identity, make_certificates
from benchmarks.load import ClosedLoopResult
from benchmarks.processes import CALLER_AUTH_REQUIRED, SERVICE, Server, running
from benchmarks.requests import get_user
from benchmarks.rounds import Variant, format_cpu_utilisation, measure_interleaved, ratio_per_round
from benchmarks.table import Findings, spread

_USERS = range(1, 1001)
_MICRO = 1e6
_PAIRS = (("key", "off"), ("TLS key", "TLS off"), ("mTLS", "TLS off"), ("mTLS", "off"), ("TLS off", "off"))
"""The last pair shows the cost of TLS alone."""


def measure(bench: Bench) -> Findings:
    """Compare one server per way to authenticate, all on the same core, in interleaved rounds."""
    certificates = make_certificates(bench.directory / "certificates")
    tls, mtls = certificates.server_settings, certificates.server_settings | certificates.client_ca_settings
    reads = [get_user(user_id) for user_id in _USERS]
    with ExitStack() as stack:

        def start_server(settings: dict[str, str]) -> Server:
            return stack.enter_context(
                running(SERVICE, bench.database_url, bench.directory, settings=settings, cores=bench.cores.server)
            )

        results = measure_interleaved(
            bench,
            {
                "off": Variant(start_server({}), reads),
                "key": Variant(start_server(CALLER_AUTH_REQUIRED), reads, Identity(key=bench.api_key)),
                "TLS off": Variant(start_server(tls), reads, certificates.identity()),
                "TLS key": Variant(
                    start_server(CALLER_AUTH_REQUIRED | tls), reads, certificates.identity(key=bench.api_key)
                ),
                "mTLS": Variant(
                    start_server(CALLER_AUTH_REQUIRED | mtls),
                    reads,
                    certificates.identity(with_client_certificate=True),
                ),
            },
        )
    return _findings(bench, results)


def _findings(bench: Bench, results: dict[str, list[ClosedLoopResult]]) -> Findings:
    cost = {name: [result.cpu_per_call for result in of_variant] for name, of_variant in results.items()}
    medians = {name: median(values) for name, values in cost.items()}

    def ratio(name: str, other: str) -> float:
        return medians[name] / medians[other]

    findings = Findings()
    findings.at_most("GetUser with an API key: server CPU / CALLER_AUTH=off", ratio("key", "off"), 1.15)
    findings.at_most("GetUser by mTLS: server CPU / CALLER_AUTH=off in clear text", ratio("mTLS", "off"), 1.15)
    findings.at_most("GetUser by mTLS: server CPU / CALLER_AUTH=off by TLS", ratio("mTLS", "TLS off"), 1.15)
    each = ", ".join(f"{name} {spread(values, scale=_MICRO, unit=' µs')}" for name, values in cost.items())
    findings.note(f"CPU per GetUser, by authentication: {each}.")
    within = "; ".join(
        f"{name} / {other} {ratio(name, other):.2f}, within one round {ratio_per_round(cost[name], cost[other])}"
        for name, other in _PAIRS
    )
    findings.note(f"Authentication of callers, and TLS: {within}.")
    findings.note(
        f"{bench.sizes.rounds} rounds of {bench.sizes.seconds:g} s for each server, {bench.in_flight} calls in flight; "
        f"share of its core that the server used: {format_cpu_utilisation(results)}."
    )
    return findings
