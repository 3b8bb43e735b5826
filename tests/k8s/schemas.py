"""JSON schemas of the kinds that the manifests use: from the operators' CRDs, unknown fields refused."""

import functools
import json
from pathlib import Path
from typing import Any

from tests.k8s.manifests import Json

CRDS = Path(__file__).with_name("crds")


def _strict(schema: Any) -> Any:
    """A structural OpenAPI schema as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        strict["properties"] = {name: _strict(one) for name, one in schema["properties"].items()}
    if schema.get("x-kubernetes-int-or-string"):
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@functools.cache
def _crd(name: str) -> Json:
    (version,) = json.loads((CRDS / f"{name}.json").read_text())["spec"]["versions"]
    schema: Json = version["schema"]["openAPIV3Schema"]
    return schema


def _object(**properties: Any) -> Json:
    return {"type": "object", "properties": properties, "additionalProperties": False}


_TEXT: Json = {"type": "string"}
TEXTS: Json = {"type": "object", "additionalProperties": _TEXT}
_SELECTOR = _object(matchLabels=TEXTS)
_PORTS: Json = {
    "type": "array",
    "items": _object(
        protocol={"enum": ["TCP", "UDP"]}, port={"type": "integer", "minimum": 1, "maximum": 65535}
    ),
}
_PEERS: Json = {
    "type": "array",
    "minItems": 1,
    "items": _object(
        podSelector=_SELECTOR, ipBlock=_object(cidr=_TEXT, **{"except": {"type": "array", "items": _TEXT}})
    ),
}


@functools.cache
def schemas() -> dict[str, Json]:
    """kind -> the schema of its spec (of the whole object without metadata for a ConfigMap)."""
    runtime = _strict(_crd("trainer.kubeflow.org_trainingruntimes")["properties"]["spec"])
    job = runtime["properties"]["template"]["properties"]["spec"]["properties"]["replicatedJobs"]["items"][
        "properties"
    ]["template"]["properties"]["spec"]
    volume = job["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]["items"]
    claim = volume["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    return {
        "PyTorchJob": _strict(_crd("kubeflow.org_pytorchjobs")["properties"]["spec"]),
        "MPIJob": _strict(_crd("kubeflow.org_mpijobs")["properties"]["spec"]),
        "TrainJob": _strict(_crd("trainer.kubeflow.org_trainjobs")["properties"]["spec"]),
        "TrainingRuntime": runtime,
        # The same types of Kubernetes, as the CRD of the runtime holds them.
        "Job": job,
        "PersistentVolumeClaim": claim,
        "NetworkPolicy": _object(
            podSelector=_SELECTOR,
            policyTypes={"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            ingress={"type": "array", "items": _object(**{"from": _PEERS, "ports": _PORTS})},
            egress={"type": "array", "items": _object(to=_PEERS, ports=_PORTS)},
        ),
        "PodDisruptionBudget": _object(minAvailable={"type": "integer", "minimum": 1}, selector=_SELECTOR),
        "PrometheusRule": _object(
            groups={
                "type": "array",
                "items": _object(
                    name=_TEXT,
                    rules={
                        "type": "array",
                        "items": _object(
                            **{"alert": _TEXT, "expr": _TEXT, "for": _TEXT},
                            labels=TEXTS,
                            annotations=TEXTS,
                        ),
                    },
                ),
            }
        ),
    }
