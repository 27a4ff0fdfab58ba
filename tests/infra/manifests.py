"""The manifests of infra/ and their schemas: KubeRay's where the CRDs lie beside the repository, our own for the rest.

Both are strict: a field that a schema does not know is an error.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.core_schemas import SCHEMAS, podspec_free

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
CRDS = ROOT.parent / "shared" / "schemas" / "kuberay"
_CRD_FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayCronJob": "ray.io_raycronjobs.yaml"}

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    """The YAML documents of a file, read as Kubernetes reads them: a key given twice is an error."""
    return list(yaml.load_all(path.read_text(), Loader=_Strict))


class _Strict(yaml.CSafeLoader):
    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice at line {node.start_mark.line + 1}"
        return super().construct_mapping(node, deep)


def manifest_files() -> list[Path]:
    """Every file of infra/ with Kubernetes objects, kustomize's own files left out."""
    files = [*KUBERAY.rglob("*.yaml"), *(INFRA / "monitoring").glob("*.yaml")]
    return sorted(f for f in files if f.name != "kustomization.yaml" and "apiVersion:" in f.read_text())


def all_manifests() -> list[tuple[str, Manifest]]:
    """(name for people, object) of every object in every file."""
    return [
        (f"{path.relative_to(INFRA)}:{document['kind']}/{document['metadata']['name']}", document)
        for path in manifest_files()
        for document in documents(path)
    ]


def validate(manifest: Manifest) -> None:
    """Raises jsonschema.ValidationError where the object breaks its schema. Skips where a CRD is not at hand."""
    kind = manifest.get("kind", "")
    if kind in _CRD_FILES:
        _crd_validator(kind).validate(manifest)
        return
    jsonschema.Draft7Validator(SCHEMAS.get(kind, False)).validate(podspec_free(manifest))
    for spec in _pod_templates(manifest):
        if (CRDS / _CRD_FILES["RayJob"]).exists():
            _pod_template_validator().validate(spec)


def _pod_templates(manifest: Manifest) -> Iterator[Manifest]:
    if manifest["kind"] == "CronJob":
        yield manifest["spec"]["jobTemplate"]["spec"]["template"]


@lru_cache
def _crd_schema(kind: str) -> dict[str, Any]:
    file = CRDS / _CRD_FILES[kind]
    if not file.exists():
        pytest.skip(f"needs KubeRay's schemas in {CRDS}")
    crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes has one schema for all, see _METADATA
    return _closed(schema)


@lru_cache
def _crd_validator(kind: str) -> jsonschema.Draft7Validator:
    schema = copy.copy(_crd_schema(kind))
    schema["properties"] = {**schema["properties"], "metadata": SCHEMAS["metadata"]}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft7Validator(schema)


@lru_cache
def _pod_template_validator() -> jsonschema.Draft7Validator:
    """Any pod template: KubeRay's schemas hold Kubernetes' own."""
    return jsonschema.Draft7Validator(_crd_schema("RayJob")["properties"]["spec"]["properties"]["submitterPodTemplate"])


def _closed(schema: Any) -> Any:
    """The schema with objects that take no other fields than theirs, as the API server with strict validation."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {name: _closed(value) for name, value in schema.items() if name not in ("description", "format")}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "properties" in schema and not is_open:
        closed["additionalProperties"] = False
    return closed


def ray_job_spec(manifest: Manifest) -> Manifest:
    """The spec of a RayJob, or that which a RayCronJob makes RayJobs of."""
    return manifest["spec"] if manifest["kind"] == "RayJob" else manifest["spec"]["jobTemplate"]


def pod_specs(manifest: Manifest) -> dict[str, Manifest]:
    """Every pod that the object makes, by what it is: its spec."""
    if manifest["kind"] == "CronJob":
        return {"cron": manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]}
    if manifest["kind"] not in _CRD_FILES:
        return {}
    spec = ray_job_spec(manifest)
    cluster = spec["rayClusterSpec"]
    pods = {"submitter": spec["submitterPodTemplate"]["spec"], "head": cluster["headGroupSpec"]["template"]["spec"]}
    return pods | {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}


def fields(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field in the tree."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield (*path, name)
            yield from fields(value, (*path, name))
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from fields(value, (*path, index))


def with_typo(manifest: Manifest, path: tuple[Any, ...]) -> Manifest:
    """A copy of the object in which the field at `path` has lost a letter of its name, or gained one."""
    changed = copy.deepcopy(manifest)
    *parents, name = path
    node = changed
    for part in parents:
        node = node[part]
    node[name[:-1] if len(name) > 3 else name + "s"] = node.pop(name)
    return changed
