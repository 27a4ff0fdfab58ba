"""Schemas of the Kubernetes objects in infra/ that are not KubeRay's: the fields we use, and no others.

Kubernetes 1.32 and prometheus-operator 0.80 have more fields. One that a manifest begins to use is added here.
"""

import copy
from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$"}
_COUNT = {"type": "integer", "minimum": 0}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
_DURATION = {"type": "string", "pattern": "^[0-9]+(s|m|h)$"}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_METADATA = _object({"name": _NAME}, {"labels": _LABELS, "annotations": _LABELS, "namespace": _NAME})
_SELECTOR = _object({"matchLabels": _LABELS})


def _kind(api_version: str, kind: str, required: dict[str, Any]) -> dict[str, Any]:
    return _object({"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": _METADATA, **required})


_PEER = _object(
    {},
    {
        "podSelector": _SELECTOR,
        "namespaceSelector": _SELECTOR,
        "ipBlock": _object({"cidr": _TEXT}, {"except": _list(_TEXT)}),
    },
)
_PORT = _object({"port": {"type": ["integer", "string"]}, "protocol": {"enum": ["TCP", "UDP"]}})
_RULE = _object({"apiGroups": _list({"type": "string"}), "resources": _list(_TEXT), "verbs": _list(_TEXT)})
_RULE["properties"]["resourceNames"] = _list(_TEXT)
_RELABEL = _object({"sourceLabels": _list(_TEXT), "targetLabel": _TEXT})
_ALERT = _object(
    {
        "alert": {"type": "string", "pattern": "^[A-Z][A-Za-z]+$"},
        "expr": _TEXT,
        "for": _DURATION,
        "labels": _object({"severity": {"enum": ["warning", "critical"]}}),
        "annotations": _object({"summary": _TEXT, "description": _TEXT, "runbook_url": _TEXT}),
    }
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "metadata": _METADATA,
    "Namespace": _kind("v1", "Namespace", {}),
    "ServiceAccount": _kind("v1", "ServiceAccount", {"automountServiceAccountToken": {"type": "boolean"}}),
    "Role": _kind("rbac.authorization.k8s.io/v1", "Role", {"rules": _list(_RULE)}),
    "RoleBinding": _kind(
        "rbac.authorization.k8s.io/v1",
        "RoleBinding",
        {
            "roleRef": _object({"apiGroup": _TEXT, "kind": {"const": "Role"}, "name": _NAME}),
            "subjects": _list(_object({"kind": {"const": "ServiceAccount"}, "name": _NAME, "namespace": _NAME})),
        },
    ),
    "PodDisruptionBudget": _kind(
        "policy/v1", "PodDisruptionBudget", {"spec": _object({"minAvailable": _COUNT, "selector": _SELECTOR})}
    ),
    "NetworkPolicy": _kind(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        {
            "spec": _object(
                {
                    "podSelector": _SELECTOR,
                    "policyTypes": {"const": ["Ingress", "Egress"]},
                },
                {
                    "ingress": _list(_object({"from": _list(_PEER)}, {"ports": _list(_PORT)})),
                    "egress": _list(_object({"to": _list(_PEER)}, {"ports": _list(_PORT)})),
                },
            )
        },
    ),
    "CronJob": _kind(
        "batch/v1",
        "CronJob",
        {
            "spec": _object(
                {
                    "schedule": _TEXT,
                    "timeZone": _TEXT,
                    "concurrencyPolicy": {"enum": ["Allow", "Forbid", "Replace"]},
                    "startingDeadlineSeconds": _COUNT,
                    "successfulJobsHistoryLimit": _COUNT,
                    "failedJobsHistoryLimit": _COUNT,
                    "jobTemplate": _object(
                        {
                            "spec": _object(
                                {
                                    "backoffLimit": _COUNT,
                                    "activeDeadlineSeconds": _COUNT,
                                    "ttlSecondsAfterFinished": _COUNT,
                                    "template": {"const": "a pod template"},
                                }
                            )
                        }
                    ),
                }
            )
        },
    ),
    "PodMonitor": _kind(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        {
            "spec": _object(
                {
                    "namespaceSelector": _object({"matchNames": _list(_NAME)}),
                    "selector": _SELECTOR,
                    "podTargetLabels": _list(_TEXT),
                    "podMetricsEndpoints": _list(
                        _object({"port": _NAME, "interval": _DURATION}, {"relabelings": _list(_RELABEL)})
                    ),
                }
            )
        },
    ),
    "PrometheusRule": _kind(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        {"spec": _object({"groups": _list(_object({"name": _NAME, "rules": _list(_ALERT)}))})},
    ),
}


def podspec_free(manifest: dict[str, Any]) -> dict[str, Any]:
    """The object with its pod templates taken out: their schema is Kubernetes' own, inside KubeRay's."""
    if manifest.get("kind") != "CronJob":
        return manifest
    bare = copy.deepcopy(manifest)
    job = bare.get("spec", {}).get("jobTemplate", {}).get("spec", {})
    if "template" in job:
        job["template"] = "a pod template"
    return bare
