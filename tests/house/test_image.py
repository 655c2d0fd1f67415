"""The image and the compose file run existing commands, and listen with TLS only."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.base.settings import Settings
from service.cli.main import main
from service.dev.certificates import SERVER_CA, SERVER_CERTIFICATE, SERVER_KEY
from tests.house.test_docs import ROOT, compose_text

PORTS = ("grpc_port", "grpc_mtls_port")


def test_the_image_runs_verbs_that_exist() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    entry = re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert entry is not None
    assert ast.literal_eval(entry[1]) == ["python", "-m", "service"]
    (command,) = re.findall(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    (check,) = re.findall(r"^HEALTHCHECK .*(?:\n.*)?CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert ast.literal_eval(command) == ["serve"]
    assert ast.literal_eval(check) == ["python", "-m", "service", "health"]


def test_the_image_copies_files_that_exist_and_are_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"*", ".git", ".venv", ".dev", "tests"} & set(ignored)
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = [words for line in copies() for words in line.split()[:-1]]
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path.split("/")[0] in {one.split("/")[0] for one in allowed}, path
    assert ignored[0] == "*", "everything is excluded except what is named"
    assert not allowed & {".git", ".venv", ".dev", "tests", ".env"}


def test_the_image_does_not_allow_plaintext() -> None:
    assert not re.search(r"^(?!#).*(INSECURE_PLAINTEXT|GRPC_HOST)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_compose_runs_verbs_and_sets_settings_that_exist() -> None:
    compose = compose_text()
    assert re.findall(r"^  ([a-z]+):$", compose.split("\nservices:")[1].split("\nvolumes:")[0], re.MULTILINE) == [
        *("postgres", "keys", "certs", "roles", "migrate", "caller", "personae")
    ]
    for command in re.findall(r"^    command: (\[.*\])$", compose, re.MULTILINE):
        assert ast.literal_eval(command)[0] in main.commands
    set_here = re.findall(r"^      ([A-Z_]+): ", compose, re.MULTILINE)
    known = {name.upper() for name in Settings.model_fields} | {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"}
    known |= {"PGHOST", "PGUSER", "PGDATABASE", "PGPASSWORD", "SERVE_PASSWORD"}  # of psql, in `roles`
    assert set(set_here) <= known


def test_compose_publishes_on_this_machine_only() -> None:
    ports = re.findall(r'^      - "(.*:(\d+))"', compose_text(), re.MULTILINE)
    assert [inside for _, inside in ports] == [str(Settings.model_fields[name].default) for name in PORTS]
    assert all(published.startswith("127.0.0.1:") for published, _ in ports)
    assert f"EXPOSE {ports[0][1]} {ports[1][1]}\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("service", ["migrate", "caller", "personae"])
def test_compose_allows_plaintext_to_its_database(service: str) -> None:
    """The database is on a network of its own. Without the setting no service would start."""
    said = {name.lower(): value for name, value in compose_environment(service).items()}
    assert Settings(_env_file=None, **said).url
    assert said.pop("insecure_plaintext_database") == "true"
    with pytest.raises(ValueError, match="verify-full"):
        Settings(_env_file=None, **said)


def test_compose_serves_with_tls_and_authenticates_callers() -> None:
    """The server reads its certificates where `certs` creates them."""
    served = compose_environment("personae")
    settings = Settings(_env_file=None, **{name.lower(): value for name, value in served.items()})
    assert settings.has_tls
    assert settings.client_certificates == "optional"
    assert settings.caller_auth == "required"
    assert not settings.is_loopback
    made = re.search(r'"dev-certs", "--directory", "(.*)"', compose_text())
    assert made is not None
    for path, name in (
        (settings.tls_certificate_file, SERVER_CERTIFICATE),
        (settings.tls_private_key_file, SERVER_KEY),
        (settings.tls_client_ca_file, SERVER_CA),
    ):
        assert path == Path(made[1], name)


def test_compose_gives_each_service_what_it_needs() -> None:
    """The server mounts its certificate and the secret keys read-only; only `certs` has the key of the CA."""
    services = yaml.safe_load(compose_text())["services"]
    mounts = {name: service.get("volumes", []) for name, service in services.items()}
    assert mounts["personae"] == ["keys:/var/lib/personae/keys:ro", "server:/var/lib/personae/server:ro"]
    assert [name for name, volumes in mounts.items() if any(one.startswith("ca:") for one in volumes)] == ["certs"]
    assert [name for name, volumes in mounts.items() if any(one.startswith("client:") for one in volumes)] == ["certs"]
    for name, service in services.items():
        assert "no-new-privileges:true" in service["security_opt"]
        if name != "postgres":
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    made = re.search(r"install --directory .*? (/var/.*?)\n\w", (ROOT / "Dockerfile").read_text(), re.DOTALL)
    assert made is not None
    inside = {volume.split(":")[1] for name, volumes in mounts.items() if name != "postgres" for volume in volumes}
    assert inside < set(made[1].replace("\\", "").split()), "or the user of the image may not write there"


def test_images_are_named_in_one_place_each() -> None:
    """So that a digest is changed in one place. The image never runs as root."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == ["${PYTHON_IMAGE}"] * 2
    named = re.findall(r"^ARG PYTHON_IMAGE=(.*)$", dockerfile, re.MULTILINE)
    named += set(re.findall(r"image: \$\{POSTGRES_IMAGE:-(.*?)\}", compose_text()))
    assert len(named) == 2
    for image in named:
        assert re.fullmatch(r"[a-z]+:[\w.-]+(@sha256:[0-9a-f]{64})?", image)
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["10001:10001"]


def compose_environment(service: str) -> dict[str, Any]:
    """The environment of a service with an empty .env."""
    block = compose_text().split(f"\n  {service}:\n")[1].split("\n\n")[0]
    found = re.findall(r'^      ([A-Z_]+): "?(.*?)"?$', block, re.MULTILINE)
    return {name: re.sub(r"\$\{[A-Z_]+:-(.*?)\}", r"\1", value) for name, value in found}


def copies() -> list[str]:
    return re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
