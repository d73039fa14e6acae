"""Both overlays keep every rule, and each rule notices when it is broken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest

from k8s import check, rules, schemas
from trainer import samples
from trainer.ingest import Ingest
from trainer.voting import Voting

Resource = dict[str, Any]
Break = Callable[[dict[str, Resource]], object]


@pytest.fixture(scope="module", params=check.OVERLAYS)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return check.load(request.param)


@pytest.fixture(scope="module")
def dev() -> list[Resource]:
    return check.load("dev")


@pytest.fixture(scope="module")
def gpu() -> list[Resource]:
    return check.load("gpu")


def test_an_overlay_has_no_fault(resources: list[Resource]) -> None:
    assert list(check.faults(resources)) == []
    assert {"policy", "reward", "collector", "trainer"} <= {work.name for work in rules.Cluster(resources).workloads}


def _pod(one: Resource) -> Resource:
    pod: Resource = one["spec"]["template"]["spec"]
    return pod


def _container(one: Resource) -> Resource:
    container: Resource = _pod(one)["containers"][0]
    return container


BROKEN: list[tuple[str, Break]] = [
    ("no policy that denies by default", lambda all: all.pop("NetworkPolicy/default-deny")),
    ("no policy opens port control", lambda all: all.pop("NetworkPolicy/operators-to-control")),
    ("open to everybody", lambda all: all["NetworkPolicy/gateway-to-policy"]["spec"]["ingress"][0].pop("from")),
    (
        "collector to reward at 50052: may not be sent",
        lambda all: all.pop("NetworkPolicy/collector-calls-reward-and-policy"),
    ),
    ("trainer to broker at 9092: may not be received", lambda all: all.pop("NetworkPolicy/parts-to-broker")),
    ("no ServiceMonitor takes its metrics", lambda all: all.pop("ServiceMonitor/trainer")),
    ("THUMBWHEEL_LISEN is no setting of policy", lambda all: _set(all, "StatefulSet/policy", "THUMBWHEEL_LISEN", "x")),
    ("is not host:port", lambda all: _set(all, "StatefulSet/policy", "THUMBWHEEL_LISTEN", "50051")),
    ("it listens at 50099", lambda all: _set(all, "StatefulSet/policy", "THUMBWHEEL_LISTEN", "0.0.0.0:50099")),
    ("no setting of collector", lambda all: _set(all, "StatefulSet/collector", "THUMBWHEEL_SPOOL_BYTES", "1048576")),
    ("--liste=1 is no flag", lambda all: _container(all["StatefulSet/broker"])["args"].append("--liste=1")),
    ("may run as root", lambda all: _pod(all["StatefulSet/trainer"])["securityContext"].pop("runAsNonRoot")),
    (
        "may write to its root",
        lambda all: _container(all["Deployment/reward"])["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    ("keeps capabilities", lambda all: _container(all["Job/publish-base"])["securityContext"].pop("capabilities")),
    ("takes whatever it can", lambda all: _container(all["StatefulSet/policy"])["resources"].pop("limits")),
    ("is not probed", lambda all: _container(all["StatefulSet/policy"]).pop("livenessProbe")),
    (
        "where it speaks TLS",
        lambda all: _container(all["StatefulSet/policy"])["readinessProbe"]["grpc"].update(port=50051),
    ),
    ("is written out", lambda all: _set(all, "StatefulSet/collector", "THUMBWHEEL_API_KEY", "tw_a_b")),
    ("belongs into the cluster", lambda all: all.update(x={"kind": "Secret", "metadata": {"name": "x"}})),
    ("2 of it", lambda all: all["StatefulSet/trainer"]["spec"].update(replicas=2)),
    ("there is no claim store", lambda all: all.pop("PersistentVolumeClaim/store")),
    ("nobody issues policy-tls", lambda all: all.pop("Certificate/policy")),
    ("has no version", lambda all: _container(all["StatefulSet/policy"]).update(image="ghcr.io/thumbwheel/policy")),
    (
        "leads to /thumbwheel.v1.PolicyService/ForgetGenerations from outside",
        lambda all: all["GRPCRoute/data-plane"]["spec"]["rules"][0]["matches"][0]["method"].pop("method"),
    ),
    (
        "the control plane is reachable from outside",
        lambda all: all["GRPCRoute/data-plane"]["spec"]["rules"][2]["backendRefs"][0].update(port=50063),
    ),
]


def _set(all: dict[str, Resource], where: str, name: str, value: str) -> None:
    environment = _container(all[where])["env"]
    environment[:] = [one for one in environment if one["name"] != name]
    environment.append({"name": name, "value": value})


@pytest.mark.parametrize(("said", "change"), BROKEN, ids=[said for said, _ in BROKEN])
def test_a_broken_rule_is_noticed(dev: list[Resource], said: str, change: Break) -> None:
    found = _faults(dev, change)
    assert any(said in fault for fault in found), found


def test_what_is_scaled_is_not_a_single_writer(gpu: list[Resource]) -> None:
    def scale(all: dict[str, Resource]) -> None:
        all["ScaledObject/reward"]["spec"]["scaleTargetRef"]["name"] = "collector"

    assert any("an autoscaler scales collector" in fault for fault in _faults(gpu, scale))
    assert any(
        "its count is set" in fault
        for fault in _faults(gpu, lambda a: a["StatefulSet/policy"]["spec"].update(replicas=2))
    )
    assert any(
        "may all be on one node" in fault
        for fault in _faults(gpu, lambda a: _pod(a["StatefulSet/policy"]).pop("topologySpreadConstraints"))
    )


def _faults(resources: list[Resource], change: Break) -> list[str]:
    all = {f"{one['kind']}/{one['metadata']['name']}": one for one in copy.deepcopy(resources)}
    change(all)
    cluster = rules.Cluster(all.values())
    return [fault for rule in rules.RULES for fault in rule(cluster)]


@pytest.mark.parametrize(
    ("where", "path", "said"),
    [
        ("StatefulSet/policy", ("spec", "replica"), "replica"),
        ("ServiceMonitor/policy", ("spec", "endpoint"), "spec.endpoint is no field"),
        ("ScaledObject/reward", ("spec", "maxReplicas"), "spec.maxReplicas is no field"),
        ("TrainJob/trainer", ("spec", "runtime"), "spec.runtime is no field"),
        ("TrainingRuntime/thumbwheel", ("spec", "mlPolicies"), "spec.mlPolicies is no field"),
        ("Kafka/kafka", ("spec", "zookeeper"), "zookeeper"),
        ("KafkaUser/trainer", ("spec", "quota"), "quota"),
        ("Cluster/database", ("spec", "instance"), "instance"),
        ("GRPCRoute/data-plane", ("spec", "host"), "host"),
        ("Certificate/policy", ("spec", "dns"), "dns"),
    ],
)
def test_a_field_that_there_is_not_is_refused(
    gpu: list[Resource], where: str, path: tuple[str, str], said: str
) -> None:
    [one] = [one for one in gpu if f"{one['kind']}/{one['metadata']['name']}" == where]
    assert list(schemas.faults(one)) == []
    changed = copy.deepcopy(one)
    changed[path[0]][path[1]] = 3
    assert any(said in fault for fault in schemas.faults(changed)), list(schemas.faults(changed))


def test_the_stream_lets_each_do_what_it_does(gpu: list[Resource]) -> None:
    def may(user: str, operation: str) -> set[str]:
        [found] = [one for one in gpu if one["kind"] == "KafkaUser" and one["metadata"]["name"] == user]
        rights = found["spec"]["authorization"]["acls"]
        return {
            one["resource"]["name"].removeprefix("thumbwheel.").removesuffix(".v1")
            for one in rights
            if one["resource"]["type"] == "topic" and operation in one["operations"]
        }

    assert {user for user in ("policy", "reward", "collector", "trainer") if "versions" in may(user, "Write")} == {
        "trainer"
    }
    assert may("policy", "Write") == {"generations", "deadletter"}
    assert may("reward", "Write") == {"deadletter"}
    assert may("collector", "Read") == {"generations", "feedback", "comparisons", "thumbs", "deadletter"}
    assert may("trainer", "Read") == {topic.removeprefix("thumbwheel.").removesuffix(".v1") for topic in _learnt_from()}


def _learnt_from() -> Sequence[str]:
    """The topics that the trainer reads, where its objectives learn from all that there is."""
    log: Any = Mock()
    everything: Any = Mock()
    kinds = frozenset(samples.KINDS.values())
    Ingest(log, everything, everything, task="policy", start={}, topic_ids={}, kinds=kinds, voting=Voting())
    (wanted,) = log.consumer.call_args.args
    return list(wanted)


def test_the_topics_are_those_that_the_code_makes(gpu: list[Resource]) -> None:
    from thumbwheel.stream import topics

    made = {topic.name: topic for topic in topics.topics(partitions=12, replication=3)}
    declared = {one["metadata"]["name"]: one["spec"] for one in gpu if one["kind"] == "KafkaTopic"}
    assert declared.keys() == made.keys()
    for name, spec in declared.items():
        topic = made[name]
        assert (spec["partitions"], spec["replicas"]) == (topic.partitions, topic.replication), name
        assert (spec["config"]["cleanup.policy"] == "compact") == topic.compacted, name
