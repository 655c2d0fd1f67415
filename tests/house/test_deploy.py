"""The files in deploy/ fit the code: metrics, reasons, runbooks, settings, ports."""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from service import __version__
from service.base.settings import Settings
from service.cli.main import main
from service.rpc.pipeline.status import CODES
from service.rpc.services import SERVED_METHODS
from tests.house.test_docs import rows

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RULES_FILE = DEPLOY / "prometheus/alerts.yml"
DASHBOARD = DEPLOY / "grafana/personae.json"
KUBERNETES = DEPLOY / "kubernetes"
METRICS = ROOT / "docs/metrics.md"
EXPORTED = re.compile(r"\b(?:personae|grpc_server)_[a-z0-9_]+\b")
RECORDED = re.compile(r"\bpersonae(?::[a-z0-9_]+)+\b")
SEVERITIES = {"critical", "warning", "info"}

DOCUMENTS = [
    one for path in sorted(KUBERNETES.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text()) if one is not None
]
RULES = [rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a document, each with the key above it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from texts(one, name)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one, key)


EXPRESSIONS = [rule["expr"] for rule in RULES] + [
    text for key, text in texts(json.loads(DASHBOARD.read_text())) if key in {"expr", "query"}
]
"""The queries of the rules and of the dashboard with its variables."""


def manifests(kind: str) -> list[dict[str, Any]]:
    return [one for one in DOCUMENTS if one["kind"] == kind]


def manifest(kind: str) -> dict[str, Any]:
    (found,) = manifests(kind)
    return found


def template(kind: str) -> Any:
    return manifest(kind)["spec"]["template"]


def container(kind: str) -> Any:
    (found,) = template(kind)["spec"]["containers"]
    return found


CONFIGURED: dict[str, str] = manifest("ConfigMap")["data"]
"""The settings that are not secret."""


def test_every_metric_in_the_dashboard_and_the_alerts_is_exported() -> None:
    exported = {row[0].split("{")[0] for row in rows(METRICS)}
    for name in {name for expression in EXPRESSIONS for name in EXPORTED.findall(expression)}:
        assert exported & {name, re.sub(r"_(?:bucket|sum|count)$", "", name)}, name


def test_every_recorded_metric_that_is_used_is_recorded() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    used = {name for expression in EXPRESSIONS for name in RECORDED.findall(expression)}
    assert used == recorded


def test_reasons_codes_and_methods_in_expressions_exist() -> None:
    known = {
        "reason": {error.reason for error in CODES},
        "grpc_code": {"".join(word.capitalize() for word in code.name.split("_")) for code in grpc.StatusCode},
        "grpc_method": {method.rpartition("/")[2] for method in SERVED_METHODS},
    }
    for expression in EXPRESSIONS:
        for label, values in re.findall(r'\b(reason|grpc_code|grpc_method)[!=]~?"([A-Za-z_|]+)"', expression):
            assert set(values.split("|")) <= known[label], expression


def test_every_alert_has_a_severity_and_a_runbook() -> None:
    for alert in ALERTS:
        assert alert["labels"]["severity"] in SEVERITIES, alert["alert"]
        assert alert.keys() >= {"expr", "for"}, alert["alert"]
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}, alert["alert"]
        assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{alert['alert'].lower()}"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    page = (ROOT / "docs/alerts.md").read_text()
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(dict.fromkeys(one["alert"] for one in ALERTS))


def test_every_alert_has_a_unit_test() -> None:
    proofs = (DEPLOY / "prometheus/alerts_test.yml").read_text()
    assert {one["alert"] for one in ALERTS} == set(re.findall(r"\bPersonae[A-Z]\w+", proofs))


def test_the_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH")
    for words in (
        ["check", "rules", "--lint=all", "--lint-fatal", RULES_FILE.name],
        ["test", "rules", "alerts_test.yml"],
    ):
        subprocess.run([promtool, *words], cwd=RULES_FILE.parent, check=True, stdin=subprocess.DEVNULL)


def test_the_kustomization_has_every_manifest_that_needs_nothing_first() -> None:
    named = set(yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"])
    apart = {"kustomization.yaml", "migrate-job.yaml", "secrets.example.yaml", "podmonitor.yaml"}
    assert named == {path.name for path in KUBERNETES.glob("*.yaml")} - apart


def test_selectors_find_the_pods() -> None:
    server, migrate = template("Deployment"), template("Job")
    labels = server["metadata"]["labels"]
    deployment = manifest("Deployment")["spec"]
    selectors = [
        manifest("Service")["spec"]["selector"],
        deployment["selector"]["matchLabels"],
        manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        manifest("PodMonitor")["spec"]["selector"]["matchLabels"],
        *(one["labelSelector"]["matchLabels"] for one in server["spec"]["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= migrate["metadata"]["labels"].items(), "a migration gets no calls"
    guarded = manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert guarded.items() <= labels.items() & migrate["metadata"]["labels"].items()


def test_ports_are_those_of_the_settings() -> None:
    declared = {port["name"]: port["containerPort"] for port in container("Deployment")["ports"]}
    assert declared["metrics"] == int(CONFIGURED["METRICS_PORT"])
    for name, setting in (("grpc", "grpc_port"), ("grpc-mtls", "grpc_mtls_port")):
        assert declared[name] == int(CONFIGURED.get(setting.upper(), Settings.model_fields[setting].default))
    service = manifest("Service")["spec"]["ports"]
    offered = {port["targetPort"]: port["port"] for port in service}
    assert offered == {name: port for name, port in declared.items() if name != "metrics"}


def test_probes_use_the_metrics_port() -> None:
    probes = {kind: container("Deployment")[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"metrics"}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }


def test_every_setting_of_the_pods_exists_and_is_valid() -> None:
    secrets = {one["metadata"]["name"]: one["stringData"] for one in manifests("Secret")}
    assert secrets.keys() == {"personae", "personae-migrate", "personae-tls"}
    assert {*CONFIGURED, *secrets["personae"], *secrets["personae-migrate"]} <= {
        row[0] for row in rows(ROOT / "docs/settings.md")
    }
    assert not any(value for data in secrets.values() for value in data.values()), "a template contains no secret"
    referred = container("Deployment")["envFrom"]
    assert [next(iter(one.values()))["name"] for one in referred] == ["personae-settings", "personae"]
    for variable in container("Job")["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert variable["name"] == reference["key"]
        assert reference["key"] in secrets[reference["name"]]
    known: dict[str, Any] = {
        name.lower(): value for name, value in CONFIGURED.items() if name.lower() in Settings.model_fields
    }
    settings = Settings(
        _env_file=None, database_url="postgresql://db.example.com/personae?sslmode=verify-full", **known
    )
    assert settings.has_tls
    assert settings.client_certificates == "optional"
    assert settings.caller_auth == "required"


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_the_database_url_of_the_template_is_accepted_and_its_ca_is_mounted(kind: str) -> None:
    (proposed,) = re.findall(r"postgresql://\S+", (KUBERNETES / "secrets.example.yaml").read_text())
    url = Settings(_env_file=None, database_url=proposed).url
    assert url is not None
    (mounted,) = [one for one in container(kind)["volumeMounts"] if one["name"] == "database-ca"]
    assert url.query["sslrootcert"] == f"{mounted['mountPath']}/ca.crt"
    assert "database-ca" in {one["name"] for one in template(kind)["spec"]["volumes"]}


def test_only_the_migration_gets_the_role_that_owns_the_tables() -> None:
    assert "personae-migrate" not in (KUBERNETES / "deployment.yaml").read_text()


def test_files_that_settings_name_are_mounted() -> None:
    (mounted,) = [one for one in container("Deployment")["volumeMounts"] if one["name"] == "tls"]
    (volume,) = [one for one in template("Deployment")["spec"]["volumes"] if one["name"] == "tls"]
    (secret,) = [one for one in manifests("Secret") if one["metadata"]["name"] == volume["secret"]["secretName"]]
    for name, path in CONFIGURED.items():
        if name.endswith("_FILE"):
            assert path.startswith(mounted["mountPath"] + "/")
            assert path.rpartition("/")[2] in secret["stringData"]


def test_a_pod_has_time_to_stop() -> None:
    spec = template("Deployment")["spec"]
    needed = float(CONFIGURED["SHUTDOWN_DRAIN"]) + float(CONFIGURED["SHUTDOWN_GRACE"])
    assert spec["terminationGracePeriodSeconds"] > needed + 15, "the service kills its workers 15 s after that"
    assert manifest("Deployment")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_pods_have_no_privileges_that_they_do_not_need(kind: str) -> None:
    spec = template(kind)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert (
        spec["securityContext"].items()
        >= {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}.items()
    )
    assert container(kind)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container(kind)["args"][0] in main.commands


def test_migrations_run_with_the_image_that_serves() -> None:
    (image,) = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["images"]
    assert container("Deployment")["image"] == image["name"]
    assert container("Job")["image"] == f"{image['newName']}:{image['newTag']}"


def test_manifests_and_package_have_the_version_of_the_code() -> None:
    (image,) = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["images"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert image["newTag"] == project["version"] == __version__
