"""What kustomize makes of the overlays: by the kustomize inside kubectl where there is one, and patch by patch."""

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import jsonpatch
import pytest
import yaml

from tests.infra.manifests import KUBERAY, all_manifests, pod_specs, ray_job_spec, validate

KUSTOMIZATIONS = sorted(
    path.parent.relative_to(KUBERAY)
    for path in KUBERAY.rglob("kustomization.yaml")
    if yaml.safe_load(path.read_text())["kind"] == "Kustomization"
)


@lru_cache
def render(folder):
    """The objects of a kustomization, as `kubectl apply -k` would send them."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    done = subprocess.run([kubectl, "kustomize", str(KUBERAY / folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def ray_jobs(folder):
    return [manifest for manifest in render(folder) if manifest["kind"] in ("RayJob", "RayCronJob")]


def test_every_patch_changes_what_it_names_to_something_valid():
    changed = 0
    for path in KUBERAY.rglob("kustomization.yaml"):
        for patch in yaml.safe_load(path.read_text()).get("patches", []):
            target = patch["target"]
            found = [m for _, m in all_manifests() if m["kind"] == target["kind"]]
            found = [m for m in found if target.get("name") in (None, m["metadata"]["name"])]
            assert found, f"{path}: {target}"
            for manifest in found:
                patched = jsonpatch.apply_patch(manifest, yaml.safe_load(patch["patch"]))
                assert patched != manifest
                validate(patched)
                changed += 1
    assert changed >= 6


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=str)
def test_a_rendered_overlay_fits_the_schemas(folder):
    for manifest in render(folder):
        if manifest["kind"] != "ConfigMap":
            validate(manifest)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=str)
def test_everything_a_pod_refers_to_is_made_in_its_namespace(folder):
    platform = folder.parent / "platform"
    made = [*render(folder), *render(platform)]
    (namespace,) = {manifest["metadata"]["name"] for manifest in made if manifest["kind"] == "Namespace"}
    places = {m["metadata"].get("namespace") for m in made if m["kind"] != "Namespace"}
    assert places == {namespace}
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in made}
    for manifest in made:
        for spec in pod_specs(manifest).values():
            assert ("ServiceAccount", spec["serviceAccountName"]) in names
            for volume in spec["volumes"]:
                assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in names


@pytest.mark.parametrize("job", ["rerank", "train", "retrain"])
def test_production_takes_every_image_from_its_registry(job):
    for manifest in render(Path() / "overlays" / "gpu-prod" / job):
        for spec in pod_specs(manifest).values():
            assert spec["containers"][0]["image"].startswith("registry.example.com/search/crossenc-")


def test_production_binds_the_accounts_to_a_role_and_holds_no_keys():
    accounts = [m for m in render(Path() / "overlays/gpu-prod/platform") if m["kind"] == "ServiceAccount"]
    assert len(accounts) == 2
    for account in accounts:
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")


def test_the_nightly_rerank_may_have_a_node_for_every_actor():
    (job,) = ray_jobs(Path() / "overlays/gpu-prod/rerank")
    assert ray_job_spec(job)["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 32


@pytest.mark.parametrize("job", ["rerank", "train"])
def test_development_needs_no_gpu_and_no_spot_node_and_takes_keys_by_reference(job):
    (manifest,) = ray_jobs(Path() / "overlays" / "cpu-dev" / job)
    pods = pod_specs(manifest)
    for pod, spec in pods.items():
        (container,) = spec["containers"]
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
        assert not {"affinity", "tolerations"} & set(spec)
        assert container["image"].startswith("crossenc-cpu:")
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("envFrom" in container) is (pod != "submitter")
    assert pods["head"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "crossenc-s3"}}]


def test_development_reaches_a_store_beside_the_cluster_and_production_none():
    opened = {}
    for overlay in ("cpu-dev", "gpu-prod"):
        policies = [m for m in render(Path() / "overlays" / overlay / "platform") if m["kind"] == "NetworkPolicy"]
        (policy,) = [policy for policy in policies if policy["metadata"]["name"] == "crossenc-ray"]
        outside = [
            rule for rule in policy["spec"]["egress"] if rule["to"][0].get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
        ]
        opened[overlay] = [port["port"] for rule in outside for port in rule["ports"]]
    assert opened == {"cpu-dev": [443, 9000], "gpu-prod": [443]}


@pytest.mark.parametrize("job", ["rerank", "train", "retrain"])
def test_production_has_a_job_file_of_its_own(job):
    (own,) = [
        manifest["data"][f"{job}.yaml"]
        for manifest in render(Path() / "overlays" / "gpu-prod" / job)
        if manifest["kind"] == "ConfigMap" and manifest["metadata"]["name"] == f"crossenc-{job}-job"
    ]
    assert own == (KUBERAY / "overlays" / "gpu-prod" / job / f"{job}.yaml").read_text()


def test_the_ray_cron_job_sleeps_beside_the_cron_job_and_is_awake_alone():
    asleep = {}
    for folder in ("retrain", "retrain-cron"):
        (cron,) = ray_jobs(Path() / "base" / folder)
        asleep[folder] = cron["spec"].get("suspend", False)
    assert asleep == {"retrain": False, "retrain-cron": True}
