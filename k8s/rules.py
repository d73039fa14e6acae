"""Our own rules for what is deployed: what no schema knows. Each yields what is wrong, and names where."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from services.collector.config import CollectorSettings
from services.policy.config import PolicySettings
from services.reward.config import RewardSettings
from thumbwheel.access import CONTROL_METHODS
from thumbwheel.channels import API_KEY_VARIABLE
from thumbwheel.config import Settings
from thumbwheel.stream import broker
from thumbwheel.tls import CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE
from trainer.config import TrainerSettings

Resource = dict[str, Any]
Labels = dict[str, str]

PREFIX = "THUMBWHEEL_"
SETTINGS: dict[str, type[Settings]] = {
    "policy": PolicySettings,
    "reward": RewardSettings,
    "collector": CollectorSettings,
    "trainer": TrainerSettings,
}
CLIENT_VARIABLES = {API_KEY_VARIABLE, CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE}
SINGLE_WRITERS = {"collector", "trainer"}
SECRET_VARIABLES = {API_KEY_VARIABLE, "THUMBWHEEL_DATABASE"}


@dataclass(frozen=True)
class Workload:
    """A pod template, and what makes pods of it."""

    kind: str
    name: str
    replicas: int | None
    labels: Labels
    spec: Resource

    @property
    def containers(self) -> list[Resource]:
        """Its containers."""
        return list(self.spec["containers"])

    @property
    def serves(self) -> bool:
        """Whether it runs for ever."""
        return self.kind != "Job"

    def role(self, container: Resource) -> str:
        """The role of a container's image: "policy" of registry/policy-gpu:0.1.0."""
        return str(container["image"]).rpartition("/")[2].partition(":")[0].removesuffix("-gpu")

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Cluster:
    """Everything that one overlay makes."""

    def __init__(self, resources: Iterable[Resource]) -> None:
        self.resources = list(resources)

    def of(self, kind: str) -> list[Resource]:
        """All of a kind."""
        return [one for one in self.resources if one["kind"] == kind]

    def named(self, kind: str, name: str) -> Resource | None:
        """The one of a kind that has this name."""
        return next((one for one in self.of(kind) if one["metadata"]["name"] == name), None)

    @cached_property
    def workloads(self) -> list[Workload]:
        """All pod templates of ours."""
        found = []
        for kind in ("Deployment", "StatefulSet", "Job"):
            for one in self.of(kind):
                template = one["spec"]["template"]
                labels = template["metadata"].get("labels", {})
                replicas = one["spec"].get("replicas")
                found.append(Workload(kind, one["metadata"]["name"], replicas, labels, template["spec"]))
        for one in self.of("TrainingRuntime"):
            for job in one["spec"]["template"]["spec"]["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                labels = template["metadata"]["labels"]
                found.append(Workload("TrainingRuntime", labels["app.kubernetes.io/name"], 1, labels, template["spec"]))
        return found

    def environment(self, container: Resource) -> dict[str, str | None]:
        """What a container finds in its environment; None is a value that a secret holds."""
        found: dict[str, str | None] = {}
        for source in container.get("envFrom", ()):
            name = source["configMapRef"]["name"]
            held = self.named("ConfigMap", name)
            found |= held["data"] if held is not None else {f"no config map {name}": ""}
        return found | {one["name"]: one.get("value") for one in container.get("env", ())}


def selects(selector: Resource, labels: Labels) -> bool:
    """Whether a label selector takes these labels."""
    for expression in selector.get("matchExpressions", ()):
        held, values = labels.get(expression["key"]), expression.get("values", ())
        if {"In": held not in values, "NotIn": held in values, "Exists": held is None}.get(
            expression["operator"], True
        ):
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _probed(container: Resource) -> set[int]:
    """Ports that probes ask."""
    numbers = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    asked = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness") if f"{kind}Probe" in container]
    ports = [(probe.get("grpc") or probe.get("tcpSocket") or {}).get("port") for probe in asked]
    return {numbers.get(port, port) for port in ports if port is not None}


def _opens(rule: Resource, port: Resource) -> bool:
    wanted = [one["port"] for one in rule.get("ports", ())]
    return not wanted or port["name"] in wanted or port["containerPort"] in wanted


def every_port_has_a_policy(cluster: Cluster) -> Iterator[str]:
    """Nothing is open to nobody in particular, and nothing that listens is closed to all but probes without a need."""
    policies = cluster.of("NetworkPolicy")
    if not any(
        p["spec"]["podSelector"] == {} and {"Ingress", "Egress"} <= set(p["spec"]["policyTypes"]) for p in policies
    ):
        yield "there is no policy that denies by default"
    for work in cluster.workloads:
        rules = [
            rule
            for policy in policies
            if selects(policy["spec"]["podSelector"], work.labels)
            for rule in policy["spec"].get("ingress", ())
        ]
        for container in work.containers:
            for port in container.get("ports", ()):
                opened = [rule for rule in rules if _opens(rule, port)]
                if any("from" not in rule for rule in opened):
                    yield f"{work}: port {port['name']} is open to everybody"
                if not opened and (port["containerPort"] not in _probed(container) or port["name"] == "grpc"):
                    yield f"{work}: no policy opens port {port['name']}"


def every_link_has_two_ends(cluster: Cluster) -> Iterator[str]:
    """What one pod may receive from another, that one may send; and the other way round."""

    def links(direction: str, peers: str) -> set[tuple[str, str, int]]:
        found = set()
        for policy in cluster.of("NetworkPolicy"):
            mine = [work for work in cluster.workloads if selects(policy["spec"]["podSelector"], work.labels)]
            for rule in policy["spec"].get(direction, ()):
                for peer in rule.get(peers, ()):
                    if "namespaceSelector" in peer or "podSelector" not in peer:
                        continue
                    theirs = [work for work in cluster.workloads if selects(peer["podSelector"], work.labels)]
                    for a, b in ((a, b) for a in mine for b in theirs):
                        source, target = (b, a) if direction == "ingress" else (a, b)
                        ports = [port for container in target.containers for port in container.get("ports", ())]
                        found |= {(source.name, target.name, p["containerPort"]) for p in ports if _opens(rule, p)}
        return found

    received, sent = links("ingress", "from"), links("egress", "to")
    for source, target, port in sorted(received ^ sent):
        missing = "sent" if (source, target, port) in received else "received"
        yield f"{source} to {target} at {port}: may not be {missing}"


def every_metrics_port_has_a_monitor(cluster: Cluster) -> Iterator[str]:
    """Prometheus finds every process."""
    for work in cluster.workloads:
        ports = {port["name"] for container in work.containers for port in container.get("ports", ())}
        if work.serves and "metrics" not in ports:
            yield f"{work}: no port is called metrics"
        if "metrics" not in ports:
            continue
        services = [
            one
            for one in cluster.of("Service")
            if selects({"matchLabels": one["spec"]["selector"]}, work.labels)
            and any(port["name"] == "metrics" for port in one["spec"]["ports"])
        ]
        monitors = [
            one
            for one in cluster.of("ServiceMonitor")
            if any(selects(one["spec"]["selector"], service["metadata"].get("labels", {})) for service in services)
            and any(endpoint.get("port") == "metrics" for endpoint in one["spec"]["endpoints"])
        ]
        if not monitors:
            yield f"{work}: no ServiceMonitor takes its metrics"


def every_setting_exists(cluster: Cluster) -> Iterator[str]:
    """What is set is a field of the process's settings, its value is allowed, and the whole is consistent."""
    shared = {PREFIX + name.upper() for settings in SETTINGS.values() for name in settings.model_fields}
    for work in cluster.workloads:
        for container in work.containers:
            role = work.role(container)
            ours = {n: v for n, v in cluster.environment(container).items() if n.startswith((PREFIX, "no config map"))}
            if role == "broker":
                yield from _unknown_flags(work, container, broker.parser())
                continue
            if (settings := SETTINGS.get(role)) is None:
                yield f"{work}: {container['image']} is no image of ours"
                continue
            own = {one["name"] for one in container.get("env", ())}
            fields = {PREFIX + name.upper(): name for name in settings.model_fields}
            for name in ours.keys() - fields.keys() - CLIENT_VARIABLES:
                # The shared config map may name what only some processes know; what a container sets itself may not.
                if name in own or name not in shared:
                    yield f"{work}: {name} is no setting of {role}"
            given = {fields[name]: value for name, value in ours.items() if name in fields and value is not None}
            try:
                settings(**given)  # type: ignore[arg-type]  # as text, as the environment gives it
            except ValidationError as error:
                yield f"{work}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            for name, port in (("listen", "grpc"), ("control_listen", "control"), ("metrics_port", "metrics")):
                yield from _port(work, container, port, given.get(name))
            yield from _port(work, container, "probe", given.get("probe_port"))


def _port(work: Workload, container: Resource, name: str, value: str | None) -> Iterator[str]:
    declared = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    if name == "grpc" and "health" in declared:
        name = "health"
    said = int(value.rpartition(":")[2]) if value else None
    if said != declared.get(name) and work.serves:
        yield f"{work}: it listens at {said}, but its port {name} is {declared.get(name)}"


def _unknown_flags(work: Workload, container: Resource, parser: argparse.ArgumentParser) -> Iterator[str]:
    known = set(parser._option_string_actions)
    for flag in container.get("args", ()):
        if flag.partition("=")[0] not in known:
            yield f"{work}: {flag} is no flag of the broker"


def pods_are_restricted(cluster: Cluster) -> Iterator[str]:
    """Kubernetes' restricted profile, read-only roots, no token of the API, bounded resources."""
    for work in cluster.workloads:
        pod = work.spec.get("securityContext", {})
        if not pod.get("runAsNonRoot") or not pod.get("runAsUser"):
            yield f"{work}: may run as root"
        if pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{work}: has no seccomp profile"
        if work.spec.get("automountServiceAccountToken") is not False:
            yield f"{work}: is given a token of the Kubernetes API"
        if cluster.named("ServiceAccount", str(work.spec.get("serviceAccountName"))) is None:
            yield f"{work}: has no service account of its own"
        if any(volume.keys() & {"hostPath", "nfs", "flexVolume"} for volume in work.spec.get("volumes", ())):
            yield f"{work}: mounts a folder of its node"
        for container in work.containers:
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                yield f"{work}: may gain privileges"
            if context.get("readOnlyRootFilesystem") is not True:
                yield f"{work}: may write to its root"
            if context.get("capabilities", {}).get("drop") != ["ALL"] or "add" in context.get("capabilities", {}):
                yield f"{work}: keeps capabilities"
            if not {"cpu", "memory"} <= set(container.get("resources", {}).get("limits", {})):
                yield f"{work}: takes whatever it can"


def servers_are_probed(cluster: Cluster) -> Iterator[str]:
    """A container that serves says when it is ready; over gRPC where it speaks it, at a port without TLS."""
    for work in cluster.workloads:
        for container in work.containers if work.serves else ():
            if not {"readinessProbe", "livenessProbe"} <= container.keys():
                yield f"{work}: is not probed"
                continue
            asked = container["readinessProbe"].get("grpc", {}).get("port")
            if work.role(container) != "broker" and asked is None:
                yield f"{work}: is not asked over gRPC whether it is ready"
            given = cluster.environment(container)
            if given.get("THUMBWHEEL_TLS_CERTIFICATE") and str(asked) != given.get("THUMBWHEEL_PROBE_PORT"):
                yield f"{work}: is probed at {asked}, where it speaks TLS"


def secrets_are_referred_to(cluster: Cluster) -> Iterator[str]:
    """No manifest holds a secret."""
    for one in cluster.of("Secret"):
        yield f"Secret {one['metadata']['name']}: belongs into the cluster, not into a file"
    for work in cluster.workloads:
        for container in work.containers:
            for name, value in cluster.environment(container).items():
                if name in SECRET_VARIABLES and value:
                    yield f"{work}: {name} is written out"


def single_writers_are_single(cluster: Cluster) -> Iterator[str]:
    """Nothing scales them; and what is scaled has no fixed count, disruption budgets and a spread."""
    scalers = [*cluster.of("HorizontalPodAutoscaler"), *cluster.of("ScaledObject")]
    targets = {one["spec"]["scaleTargetRef"]["name"] for one in scalers}
    names = {work.name for work in cluster.workloads}
    yield from (f"an autoscaler scales {name}, of which there must be one" for name in targets & SINGLE_WRITERS)
    yield from (f"an autoscaler scales {name}, which is not there" for name in targets - names)
    for work in cluster.workloads:
        if work.name in SINGLE_WRITERS and work.replicas != 1:
            yield f"{work}: {work.replicas} of it"
        if work.name in targets and work.replicas is not None:
            yield f"{work}: its count is set, and an autoscaler sets it too"
        many = work.name in targets or (work.replicas or 0) > 1
        if many and not work.spec.get("topologySpreadConstraints"):
            yield f"{work}: may all be on one node"
        budgets = [p for p in cluster.of("PodDisruptionBudget") if selects(p["spec"]["selector"], work.labels)]
        if many and not budgets:
            yield f"{work}: has no disruption budget"


def references_hold(cluster: Cluster) -> Iterator[str]:
    """Claims, certificates and the services behind routes are there; images have versions."""
    made = {one["spec"]["secretName"] for one in cluster.of("Certificate")}
    for work in cluster.workloads:
        for volume in work.spec.get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and cluster.named("PersistentVolumeClaim", claim) is None:
                yield f"{work}: there is no claim {claim}"
            secret = volume.get("secret", {}).get("secretName", "")
            if secret.endswith("-tls") and secret not in made:
                yield f"{work}: nobody issues {secret}"
        for container in work.containers:
            tag = str(container["image"]).rpartition("/")[2].partition(":")[2]
            if tag in ("", "latest"):
                yield f"{work}: {container['image']} has no version"
            volumes = {volume["name"] for volume in work.spec.get("volumes", ())}
            stateful = cluster.named("StatefulSet", work.name) or {"spec": {}}
            volumes |= {claim["metadata"]["name"] for claim in stateful["spec"].get("volumeClaimTemplates", ())}
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in volumes:
                    yield f"{work}: mounts {mount['name']}, which is no volume"
    for route in cluster.of("GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for match in rule["matches"]:
                service, method = match["method"]["service"], match["method"].get("method", "")
                controls = {name for name in CONTROL_METHODS if name.startswith(f"/{service}/")}
                if controls and (not method or f"/{service}/{method}" in controls):
                    yield f"GRPCRoute: leads to {sorted(controls)[0]} from outside"
            for backend in rule["backendRefs"]:
                service = cluster.named("Service", backend["name"])
                ports = [port["port"] for port in service["spec"]["ports"]] if service else []
                if backend["port"] not in ports:
                    yield f"GRPCRoute: {backend['name']} has no port {backend['port']}"
                if service and any(
                    p["port"] == backend["port"] and p["name"] == "control" for p in service["spec"]["ports"]
                ):
                    yield "GRPCRoute: the control plane is reachable from outside"


RULES: tuple[Callable[[Cluster], Iterator[str]], ...] = (
    every_port_has_a_policy,
    every_link_has_two_ends,
    every_metrics_port_has_a_monitor,
    every_setting_exists,
    pods_are_restricted,
    servers_are_probed,
    secrets_are_referred_to,
    single_writers_are_single,
    references_hold,
)
