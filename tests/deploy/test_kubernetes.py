"""The Kubernetes manifests: valid by the published schemas, and true of the program."""

from __future__ import annotations

import copy
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import DEPLOY, Manifest, kubernetes, parsed, pod_specs
from toyengine import toy_engine

from tidegate.api.engine_backend import EngineBackend

VERSIONS = ("1.33", "1.37")
CUSTOM = ("kustomization.yaml", "scaledobject.yaml")
"""Kinds that Kubernetes itself does not have."""
BUILT_IN = [name for name in kubernetes() if name not in CUSTOM]
SERVING = ["deployment.yaml", "gateway.yaml"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_manifest_is_valid_by_the_published_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(kubernetes()[name], version, strict=True)


def test_the_schemas_refuse_what_does_not_exist() -> None:
    wrong = copy.deepcopy(kubernetes()["deployment.yaml"])
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)
    wrong = copy.deepcopy(kubernetes()["poddisruptionbudget.yaml"])
    wrong["spec"]["maxUnavailable"] = [1]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_kustomize_takes_every_file_but_the_one_that_needs_keda() -> None:
    listed = kubernetes()["kustomization.yaml"]["resources"]
    assert sorted(listed) == sorted(BUILT_IN)


def container(spec: Manifest, name: str = "cloud") -> Any:
    return next(one for one in spec["containers"] if one["name"] == name)


@pytest.mark.parametrize("name", SERVING)
def test_the_arguments_are_ours(name: str) -> None:
    arguments = parsed(container(dict(pod_specs())[name])["args"])
    assert arguments.restart_when_stuck
    assert arguments.api_key_file is not None
    assert (arguments.link is not None) == (name == "gateway.yaml")


@pytest.mark.parametrize("name", SERVING)
def test_a_pod_has_the_time_that_its_drain_takes(name: str) -> None:
    spec = dict(pod_specs())[name]
    one = container(spec)
    drain_s = parsed(one["args"]).drain
    leaves_s = one["lifecycle"]["preStop"]["sleep"]["seconds"]
    # Answers in the engine, then those on the wire; then processes end.
    assert spec["terminationGracePeriodSeconds"] >= leaves_s + 2 * drain_s + 5
    probe = one["readinessProbe"]
    # A pod is out of every endpoint before it stops to take calls.
    assert leaves_s >= probe["periodSeconds"] * probe["failureThreshold"]


@pytest.mark.parametrize("name", SERVING)
def test_probes_ask_paths_that_need_no_key(name: str) -> None:
    one = container(dict(pod_specs())[name])
    paths = {kind: one[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")}
    assert paths == {"startup": "/ready", "readiness": "/ready"}
    assert one["livenessProbe"]["httpGet"]["path"] == "/health"
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    listens = int(parsed(one["args"]).listen.rsplit(":", 1)[1])
    assert ports[one["livenessProbe"]["httpGet"]["port"]] == listens


@pytest.mark.parametrize("name", SERVING)
def test_no_pod_may_more_than_it_must(name: str) -> None:
    spec = dict(pod_specs())[name]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] >= 10_000
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert spec["automountServiceAccountToken"] is False
    for one in [*spec["containers"], *spec.get("initContainers", [])]:
        allowed = one["securityContext"]
        assert allowed["readOnlyRootFilesystem"]
        assert allowed["allowPrivilegeEscalation"] is False
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        assert one["resources"]["requests"]["memory"]
        assert one["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", SERVING)
def test_a_pod_asks_for_its_gpu(name: str) -> None:
    one = container(dict(pod_specs())[name])
    assert one["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert parsed(one["args"]).executor == "gpu"


def test_every_pod_is_looked_at() -> None:
    assert [name for name, _ in pod_specs()] == SERVING


def test_who_selects_pods_finds_them() -> None:
    objects = kubernetes()
    labels = objects["deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    gateway = objects["gateway.yaml"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["service.yaml"]["spec"]["selector"],
        objects["poddisruptionbudget.yaml"]["spec"]["selector"]["matchLabels"],
        objects["networkpolicy.yaml"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert not selectors[0].items() <= gateway.items()
    assert selectors[2].items() <= gateway.items()
    target = objects["scaledobject.yaml"]["spec"]["scaleTargetRef"]
    assert target["name"] == objects["deployment.yaml"]["metadata"]["name"]
    assert "replicas" not in objects["deployment.yaml"]["spec"]


def test_the_broker_may_be_reached() -> None:
    one = container(dict(pod_specs())["gateway.yaml"])
    (link,) = [argument for argument in one["args"] if argument.startswith("--link=")]
    allowed = kubernetes()["networkpolicy.yaml"]["spec"]["egress"]
    ports = {port["port"] for rule in allowed for port in rule["ports"]}
    assert int(link.rsplit(":", 1)[1]) in ports


def test_secrets_are_named_and_never_written_down() -> None:
    assert all(one.get("kind") != "Secret" for one in kubernetes().values())
    named = {
        volume["secret"]["secretName"]
        for _, spec in pod_specs()
        for volume in spec["volumes"]
        if "secret" in volume
    }
    assert named == {"tidegate-api-keys", "tidegate-gw0"}


def test_keda_asks_for_metrics_that_there_are() -> None:
    told = EngineBackend(toy_engine(), route="cloud", created_s=0).metrics().decode()
    triggers = kubernetes()["scaledobject.yaml"]["spec"]["triggers"]
    asked = {
        name
        for trigger in triggers
        for name in re.findall(r"tidegate_\w+", trigger["metadata"]["query"])
    }
    assert asked == {"tidegate_num_requests_waiting", "tidegate_num_requests_running"}
    assert all(re.search(rf"^{name}{{", told, re.MULTILINE) for name in asked)
    # KEDA takes the values of metadata as text alone.
    assert all(isinstance(value, str) for one in triggers for value in one["metadata"].values())


def test_keda_counts_the_pods_that_it_scales_and_no_gateway() -> None:
    objects = kubernetes()
    scaled = objects["deployment.yaml"]["metadata"]["name"]
    gateway = objects["gateway.yaml"]["metadata"]["name"]
    for trigger in objects["scaledobject.yaml"]["spec"]["triggers"]:
        (pods,) = re.findall(r'pod=~"([^"]+)"', trigger["metadata"]["query"])
        # Prometheus matches the whole label; a Deployment's pods have two hashes in their names.
        assert re.fullmatch(pods, f"{scaled}-6b474476c4-x7k2p")
        assert not re.fullmatch(pods, f"{gateway}-0")


KEDA_FIELDS = {
    "scaleTargetRef",
    "pollingInterval",
    "cooldownPeriod",
    "initialCooldownPeriod",
    "idleReplicaCount",
    "minReplicaCount",
    "maxReplicaCount",
    "advanced",
    "fallback",
    "triggers",
}
"""Of a ScaledObject's spec, by KEDA's reference (keda.sh, "ScaledObject specification")."""


def test_keda_gets_fields_that_it_has() -> None:
    spec = kubernetes()["scaledobject.yaml"]["spec"]
    assert set(spec) <= KEDA_FIELDS
    assert set(spec["fallback"]) == {"failureThreshold", "replicas"}
    assert 1 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
    # What KEDA hands to Kubernetes is Kubernetes's, and has its schema.
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "made-by-keda"},
        "spec": {
            "scaleTargetRef": spec["scaleTargetRef"],
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": behaviour,
        },
    }
    kubernetes_validate.validate(scaler, VERSIONS[-1], strict=True)


def test_an_object_is_in_one_file_and_in_one_namespace() -> None:
    for path in (DEPLOY / "kubernetes").glob("*.yaml"):
        assert len(list(yaml.safe_load_all(path.read_text("utf-8")))) == 1, path.name
    spaces = {
        one["metadata"].get("namespace")
        for name, one in kubernetes().items()
        if name not in ("kustomization.yaml", "namespace.yaml")
    }
    assert spaces == {"tidegate"}
