"""Whether a resource is what Kubernetes, or the operator it is meant for, will take.

Kubernetes' own kinds are checked against its published schemas (kubernetes-validate, strict). Of custom resources, the
operators' own models are used where a package brings them (KEDA, Prometheus Operator, Kubeflow Trainer); for the others
`definitions/` holds what we use of their definitions, written by hand: a field that is not in it is refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from pydantic import BaseModel, ValidationError

KUBERNETES = "1.37"
HERE = Path(__file__).resolve().parent
Resource = dict[str, Any]


@cache
def _model(group: str, kind: str) -> type[BaseModel] | None:
    if group == "keda.sh/v1alpha1":
        from cloudcoil.models.keda import v1alpha1 as models
    elif group == "monitoring.coreos.com/v1":
        from cloudcoil.models.prometheus_operator import v1 as models
    elif group == "trainer.kubeflow.org/v1alpha1":
        import kubeflow_trainer_api.models as models

        kind = f"TrainerV1alpha1{kind}"
    else:
        return None
    return getattr(models, kind, None)


@cache
def _schema(group: str, kind: str) -> Resource | None:
    path = HERE / "definitions" / f"{group.partition('/')[0]}.json"
    if not path.exists():
        return None
    found: Resource | None = json.loads(path.read_text()).get(f"{group.partition('/')[2]}/{kind}")
    return found


def faults(resource: Resource) -> Iterator[str]:
    """What is wrong with it."""
    group, kind = resource["apiVersion"], resource["kind"]
    if kind == "TrainingRuntime":  # the model is not at ease with quantities: pods are for Kubernetes' own schema
        resource = copy.deepcopy(resource)
        for job in resource["spec"]["template"]["spec"]["replicatedJobs"]:
            template = job["template"]["spec"]["template"]
            yield from faults(
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": job["name"]}, "spec": template["spec"]}
            )
            template["spec"] = {"containers": []}
    name = f"{kind} {resource['metadata']['name']}"
    if (model := _model(group, kind)) is not None:
        try:
            taken = model.model_validate(resource).model_dump(by_alias=True, exclude_unset=True, mode="json")
        except ValidationError as error:
            yield from (f"{name}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        else:  # these models drop what they do not know
            yield from (f"{name}: {path} is no field of it" for path in _lost(resource, taken, ""))
    elif (schema := _schema(group, kind)) is not None:
        whole = {"type": "object", "properties": {"spec": schema}, "required": ["spec"]}
        for problem in jsonschema.Draft202012Validator(whole).iter_errors(resource):
            yield f"{name}: {'.'.join(map(str, problem.absolute_path))}: {problem.message}"
    else:
        try:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
        except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError):
            yield f"{name}: there is no schema of {group}"


def _lost(given: Any, taken: Any, path: str) -> Iterator[str]:
    """Paths of `given` that are not in `taken`."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for key, value in given.items():
            if key not in taken:
                yield f"{path}.{key}".lstrip(".")
            else:
                yield from _lost(value, taken[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(taken, list):
        for index, (one, other) in enumerate(zip(given, taken, strict=False)):
            yield from _lost(one, other, f"{path}[{index}]")
