"""Creates a RayJob out of a RayCronJob's template, unless the last one is unfinished. Runs in a pod of the cluster.

Usage: create_rayjob.py NAME, where NAME is a RayCronJob in the pod's own namespace. It knows Kubernetes by its HTTP API
alone, and needs nothing but the standard library. Exit codes: 0 created or left alone, 1 anything else.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: The label that KubeRay's own controller puts on the RayJobs of a RayCronJob.
LABEL = "ray.io/cronjob-name"
FINISHED = ("Complete", "Failed", "ValidationFailed")


def call(method: str, path: str, body: Any = None) -> Any:
    """Sends a request for the ray.io resources of this namespace and returns the answer's JSON."""
    server = os.environ.get("KUBERNETES_API", "https://kubernetes.default.svc")
    namespace = (ACCOUNT / "namespace").read_text().strip()
    request = urllib.request.Request(
        f"{server}/apis/ray.io/v1/namespaces/{namespace}/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/json",
        },
    )
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")) if server.startswith("https") else None
    with urllib.request.urlopen(request, timeout=30, context=context) as response:
        return json.load(response)


def rayjob(cron: dict[str, Any], minute: int) -> dict[str, Any]:
    """The RayJob to create: KubeRay's name for a scheduled one, so that one minute gives one RayJob."""
    name, uid = cron["metadata"]["name"], cron["metadata"]["uid"]
    owner = {"apiVersion": cron["apiVersion"], "kind": cron["kind"], "name": name, "uid": uid}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": f"{name}-{minute}",
            "labels": {**cron["metadata"].get("labels", {}), LABEL: name},
            "ownerReferences": [owner],
        },
        "spec": cron["spec"]["jobTemplate"],
    }


def main(name: str) -> None:
    """Creates the RayJob, or says which unfinished one is in its way."""
    cron = call("GET", f"raycronjobs/{name}")
    for job in call("GET", f"rayjobs?labelSelector={LABEL}%3D{name}")["items"]:
        if job.get("status", {}).get("jobDeploymentStatus") not in FINISHED:
            sys.stdout.write(f"{job['metadata']['name']} is unfinished: nothing is created\n")
            return
    try:
        created = call("POST", "rayjobs", rayjob(cron, int(time.time() // 60)))
    except urllib.error.HTTPError as error:
        sys.exit(f"Kubernetes refused the RayJob with {error.code}: {error.read().decode(errors='replace')[:500]}")
    sys.stdout.write(f"created {created['metadata']['name']}\n")


if __name__ == "__main__":
    main(sys.argv[1])
