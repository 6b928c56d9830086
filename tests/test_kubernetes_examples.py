"""The Kubernetes example: Kubernetes' own schemas, and the names that must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from medsa_deploy.remote.transport import SEQUENCE_HEADER

EXAMPLE = Path(__file__).parents[1] / "docs" / "kubernetes" / "triton.yaml"
VERSION = "1.33"
OBJECTS: dict[str, dict[str, Any]] = {
    document["kind"]: document for document in yaml.safe_load_all(EXAMPLE.read_text())
}
FOREIGN = "DestinationRule"
"""A kind of Istio's, which Kubernetes has no schema for."""


@pytest.mark.parametrize("kind", [kind for kind in OBJECTS if kind != FOREIGN])
def test_objects_are_valid(kind: str) -> None:
    kubernetes_validate.validate(OBJECTS[kind], VERSION, strict=True)


def test_the_validator_refuses_a_wrong_field() -> None:
    wrong = OBJECTS["Deployment"] | {"spec": OBJECTS["Deployment"]["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_a_sequence_stays_on_its_server() -> None:
    policy = OBJECTS[FOREIGN]["spec"]["trafficPolicy"]
    header = policy["loadBalancer"]["consistentHash"]["httpHeaderName"]
    assert header == SEQUENCE_HEADER
    assert OBJECTS[FOREIGN]["spec"]["host"] == OBJECTS["Service"]["metadata"]["name"]


def test_names_agree() -> None:
    deployment = OBJECTS["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert OBJECTS[kind]["spec"]["selector"]["matchLabels"] == labels
    scaler = OBJECTS["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert OBJECTS["PodDisruptionBudget"]["spec"]["minAvailable"] < scaler["minReplicas"]
    rules = yaml.safe_load(OBJECTS["ConfigMap"]["data"]["config.yaml"])["rules"]
    metrics = [metric["pods"]["metric"]["name"] for metric in scaler["metrics"]]
    assert metrics == [rule["name"]["as"] for rule in rules]
    assert "nv_inference_queue_duration_us" in rules[0]["metricsQuery"]


def test_a_server_has_time_to_end() -> None:
    """The container's own limit is shorter than Kubernetes'; mounts are volumes of the pod."""
    pod = OBJECTS["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (limit,) = (a.split("=")[1] for a in container["args"] if a.startswith("--exit-timeout-secs"))
    assert int(limit) < pod["terminationGracePeriodSeconds"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in OBJECTS["Service"]["spec"]["ports"]} <= ports
