"""The manifests of infra/kuberay and infra/monitoring: strict schemas, and what a cluster's owner would insist on."""

import contextlib
import importlib.util
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.scripts.scripts import start as ray_start

from pipelines import logs
from pipelines.config import RerankConfig
from pipelines.retrain_config import RetrainConfig
from pipelines.train_config import TrainConfig
from tests.infra.manifests import (
    CRDS,
    INFRA,
    KUBERAY,
    ROOT,
    all_manifests,
    documents,
    fields,
    manifest_files,
    pod_specs,
    ray_job_spec,
    validate,
    with_typo,
)

MANIFESTS = all_manifests()
RAY_JOBS = [(name, manifest) for name, manifest in MANIFESTS if manifest["kind"] in ("RayJob", "RayCronJob")]
PODS = [
    pytest.param(spec, id=f"{name}-{pod}") for name, manifest in MANIFESTS for pod, spec in pod_specs(manifest).items()
]
#: Maps whose keys are data, not fields. What may stand in them is checked below, by name.
FREE_MAPS = {"labels", "annotations", "matchLabels", "rayStartParams", "requests", "limits"}
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def every(manifests):
    return pytest.mark.parametrize("manifest", [pytest.param(m, id=name) for name, m in manifests])


@every(MANIFESTS)
def test_a_manifest_fits_its_schema(manifest):
    validate(manifest)


@every(MANIFESTS)
def test_a_misspelt_field_anywhere_in_a_manifest_is_refused(manifest):
    accepted = []
    tried = 0
    for path in fields(manifest):
        if FREE_MAPS & set(path[:-1]):
            continue
        tried += 1
        with contextlib.suppress(jsonschema.ValidationError):
            validate(with_typo(manifest, path))
            accepted.append(".".join(map(str, path)))
    assert tried >= 3 and not accepted


def test_every_file_is_in_a_kustomization():
    for path in manifest_files():
        if KUBERAY in path.parents:
            kustomization = yaml.safe_load((path.parent / "kustomization.yaml").read_text())
            assert path.name in kustomization["resources"], path


def test_what_kustomizations_name_exists():
    for path in KUBERAY.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        named = [*kustomization.get("resources", []), *kustomization.get("components", [])]
        named += [file for generator in kustomization.get("configMapGenerator", []) for file in generator["files"]]
        for name in named:
            place = path.parent / name
            assert place.is_file() or (place / "kustomization.yaml").is_file(), f"{path}: {name}"


# Versions


def images(spec):
    return [c["image"] for c in [*spec.get("initContainers", []), *spec["containers"]]]


@pytest.mark.parametrize("spec", PODS)
def test_an_image_is_named_by_the_pinned_versions(spec):
    for image in images(spec):
        assert re.fullmatch(rf"crossenc-(gpu|cpu):{re.escape(VERSION)}-ray{re.escape(RAY_VERSION)}", image)


@every(RAY_JOBS)
def test_the_ray_version_is_the_pinned_one(manifest):
    assert ray_job_spec(manifest)["rayClusterSpec"]["rayVersion"] == RAY_VERSION


# Security


@pytest.mark.parametrize("spec", PODS)
def test_a_pod_runs_without_root_and_privileges(spec):
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] is True and pod["runAsUser"] == pod["runAsGroup"] == container_uid()
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in context


@every(RAY_JOBS)
def test_the_autoscaler_is_held_as_tightly_as_the_other_containers(manifest):
    options = ray_job_spec(manifest)["rayClusterSpec"]["autoscalerOptions"]
    head = pod_specs(manifest)["head"]["containers"][0]
    assert options["securityContext"] == head["securityContext"]
    assert options["resources"]["requests"] == options["resources"]["limits"]


def container_uid():
    return int(re.search(r"--uid (\d+)", (INFRA / "Containerfile").read_text())[1])


@every(RAY_JOBS)
def test_ray_asks_for_a_token(manifest):
    assert ray_job_spec(manifest)["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_no_file_of_infra_holds_a_secret():
    suspicious = re.compile(
        r"(?i)AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{16}|BEGIN [A-Z ]*PRIVATE KEY"
        r"|(password|secret_access_key|token): *['\"]?\w{8}"
    )
    for path in INFRA.rglob("*"):
        if path.is_file():
            assert not suspicious.search(path.read_text()), path
    assert not [manifest for _, manifest in MANIFESTS if manifest["kind"] == "Secret"]


@pytest.mark.parametrize("spec", PODS)
def test_values_in_the_environment_that_could_be_secrets_come_by_reference(spec):
    for container in spec["containers"]:
        for variable in container.get("env", []):
            assert "valueFrom" in variable or not re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"])


@every(RAY_JOBS)
def test_only_the_head_and_its_autoscaler_may_talk_to_kubernetes(manifest):
    accounts = {m["metadata"]["name"]: m for _, m in MANIFESTS if m["kind"] == "ServiceAccount"}
    for pod, spec in pod_specs(manifest).items():
        assert spec["serviceAccountName"] in accounts
        mounts = spec.get(
            "automountServiceAccountToken", accounts[spec["serviceAccountName"]]["automountServiceAccountToken"]
        )
        assert mounts is (pod == "head")


def test_policies_deny_what_they_do_not_name_and_let_only_the_operator_to_the_dashboard():
    policies = [m["spec"] for _, m in MANIFESTS if m["kind"] == "NetworkPolicy"]
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    from_elsewhere = [
        (rule, peer)
        for policy in policies
        for rule in policy.get("ingress", [])
        for peer in rule["from"]
        if "namespaceSelector" in peer
    ]
    assert all("ipBlock" not in peer for _, peer in from_elsewhere)
    opened = {port["port"] for rule, _ in from_elsewhere for port in rule["ports"]}
    assert opened == {"metrics", "as-metrics", "dash-metrics", "dashboard"}
    for rule, peer in from_elsewhere:
        if "dashboard" in {port["port"] for port in rule["ports"]}:
            assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    for policy in policies:
        for rule in policy["egress"]:
            for peer in rule["to"]:
                wide = peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
                assert not wide or peer["ipBlock"]["except"] == ["169.254.0.0/16"]


@pytest.mark.parametrize("spec", PODS)
def test_no_service_is_opened_to_the_world(spec):
    assert not [port for container in spec["containers"] for port in container.get("ports", []) if "hostPort" in port]


@every(RAY_JOBS)
def test_kuberay_opens_no_way_in(manifest):
    head = ray_job_spec(manifest)["rayClusterSpec"]["headGroupSpec"]
    assert not {"enableIngress", "ingressOptions", "serviceType", "headService"} & set(head)


# Resources and scheduling


def gibibytes(quantity):
    number, unit = re.fullmatch(r"(\d+)([MG]i)?", str(quantity)).groups()
    return int(number) / {"Gi": 1, "Mi": 2**10, None: 2**30}[unit]


@pytest.mark.parametrize("spec", PODS)
def test_requests_equal_limits_so_that_no_pod_is_evicted_for_anothers_sake(spec):
    for container in spec["containers"]:
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
        assert set(resources["limits"]) <= {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}


@pytest.mark.parametrize("spec", PODS)
def test_volumes_are_limited_to_less_than_their_container_may_use(spec):
    disk = memory = 0.0
    for volume in spec["volumes"]:
        if "emptyDir" in volume:
            size = gibibytes(volume["emptyDir"]["sizeLimit"])
            disk, memory = (disk, memory + size) if "medium" in volume["emptyDir"] else (disk + size, memory)
    limits = spec["containers"][0]["resources"]["limits"]
    assert disk < gibibytes(limits["ephemeral-storage"]) or disk == 0
    assert memory < gibibytes(limits["memory"]) / 2


@every(RAY_JOBS)
def test_the_object_store_fits_into_shared_memory(manifest):
    cluster = ray_job_spec(manifest)["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == "shared-memory"]
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts["shared-memory"] == "/dev/shm" and volume["emptyDir"]["medium"] == "Memory"
        assert gibibytes(group["rayStartParams"]["object-store-memory"]) < gibibytes(volume["emptyDir"]["sizeLimit"])


@every(RAY_JOBS)
def test_parameters_of_ray_start_exist_and_the_head_takes_no_work(manifest):
    known = {option.lstrip("-") for parameter in ray_start.params for option in parameter.opts}
    cluster = ray_job_spec(manifest)["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@every(RAY_JOBS)
def test_the_head_keeps_off_spot_nodes_and_workers_with_gpus_are_on_them(manifest):
    pods = pod_specs(manifest)

    def terms(spec):
        node_affinity = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return [
            [(e["key"], e["operator"], *e.get("values", [])) for e in term["matchExpressions"]]
            for term in node_affinity["nodeSelectorTerms"]
        ]

    keys = {"karpenter.sh/capacity-type", "eks.amazonaws.com/capacityType", "cloud.google.com/gke-spot"}
    (head_term,) = terms(pods["head"])
    assert {key for key, *_ in head_term} == keys and {op for _, op, *_ in head_term} == {"NotIn", "DoesNotExist"}
    for pod in set(pods) - {"head", "submitter"}:
        worker_terms = terms(pods[pod])
        assert {key for ((key, *_),) in worker_terms} == keys
        assert {operator for ((_, operator, *_),) in worker_terms} == {"In"}
        assert {t["key"] for t in pods[pod]["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
        assert pods[pod]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in pods["head"]["containers"][0]["resources"]["limits"]


@every(RAY_JOBS)
def test_ray_tells_how_full_the_disk_of_every_node_is(manifest):
    agent = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    (variable,) = set(re.findall(r'environ.get\("(\w+_DISK_USAGE)"\) == "1"', agent.read_text()))
    for pod, spec in pod_specs(manifest).items():
        if pod != "submitter":
            assert {"name": variable, "value": "1"} in spec["containers"][0]["env"]


@every(RAY_JOBS)
def test_a_budget_guards_the_head_and_matches_its_labels(manifest):
    labels = ray_job_spec(manifest)["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    labels = labels | {"ray.io/node-type": "head"}  # KubeRay adds it
    budgets = [m["spec"] for _, m in MANIFESTS if m["kind"] == "PodDisruptionBudget"]
    assert [b["minAvailable"] for b in budgets if b["selector"]["matchLabels"].items() <= labels.items()] == [1]


# The job


@every(RAY_JOBS)
def test_a_job_cleans_up_and_is_bounded_and_uses_no_fields_that_exclude_each_other(manifest):
    spec = ray_job_spec(manifest)
    assert spec["submissionMode"] == "K8sJobMode" and "clusterSelector" not in spec
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert "deletionStrategy" not in spec
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] >= 1
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    pods = pod_specs(manifest)
    assert {spec["restartPolicy"] for spec in pods.values()} == {"Never"}  # the autoscaler's version 2 insists
    assert not {"networkPolicy", "tlsOptions", "historyServerOptions"} & set(cluster)  # behind gates that are off
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # KubeRay's limits, from which names of clusters and services are made
    assert len(manifest["metadata"]["name"]) <= 36


@every(RAY_JOBS)
def test_stopping_takes_longer_than_draining(manifest):
    kinds = (RerankConfig, TrainConfig, RetrainConfig)
    drain_seconds = max(kind.model_fields["drain_seconds"].default for kind in kinds)
    environment = yaml.safe_load(ray_job_spec(manifest)["runtimeEnvYAML"])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > drain_seconds
    for pod, spec in pod_specs(manifest).items():
        if pod != "submitter":
            assert spec["terminationGracePeriodSeconds"] > int(environment["RAY_JOB_STOP_WAIT_TIME_S"])


@every(RAY_JOBS)
def test_a_job_and_its_workers_log_in_json(manifest):
    """A job's environment is that of its driver and of all its workers."""
    environment = yaml.safe_load(ray_job_spec(manifest)["runtimeEnvYAML"])["env_vars"]
    assert environment[logs.VARIABLE] == "json"


@every(RAY_JOBS)
def test_the_entrypoint_is_a_module_that_reads_the_mounted_job_file(manifest):
    words = ray_job_spec(manifest)["entrypoint"].split()
    assert words[:2] == ["python", "-m"]
    head = pod_specs(manifest)["head"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    (volume,) = [volume for volume in head["volumes"] if "configMap" in volume]
    folder, _, file = words[3].rpartition("/")
    assert mounts[volume["name"]] == folder
    kustomization = yaml.safe_load(
        next(
            KUBERAY.glob(f"base/{manifest['metadata']['labels']['app.kubernetes.io/component']}/kustomization.yaml")
        ).read_text()
    )
    assert kustomization["configMapGenerator"] == [{"name": volume["configMap"]["name"], "files": [file]}]
    if importlib.util.find_spec(words[2]) is None:
        pytest.skip(f"{words[2]} is not in this tree")


def most_workers(path):
    """The workers' pods that a job may have whose file lies at `path`, of the base or of an overlay."""
    (job,) = documents(KUBERAY / "base" / path.stem / "rayjob.yaml")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    most = group["maxReplicas"]
    for place in (path.parent, path.parent.parent / "common"):
        kustomization = place / "kustomization.yaml"
        for patch in yaml.safe_load(kustomization.read_text()).get("patches", []) if kustomization.exists() else []:
            for operation in yaml.safe_load(patch["patch"]):
                most = operation["value"] if operation["path"].endswith("/maxReplicas") else most
    return most


@pytest.mark.parametrize("path", sorted(KUBERAY.rglob("rerank.yaml")), ids=lambda p: str(p.relative_to(KUBERAY)))
def test_a_rerank_job_file_is_valid_and_its_actors_fit_the_largest_cluster(path):
    config = RerankConfig.model_validate(yaml.safe_load(path.read_text()))
    most = most_workers(path)
    if config.scoring.gpus_per_actor:
        assert config.scoring.actors * config.scoring.gpus_per_actor == most
    else:
        assert config.scoring.cpus_per_actor is not None and config.scoring.actors <= most


@pytest.mark.parametrize("path", sorted(KUBERAY.rglob("train.yaml")), ids=lambda p: str(p.relative_to(KUBERAY)))
def test_a_train_job_file_is_valid_and_its_workers_fit_the_largest_cluster(path):
    workers = TrainConfig.model_validate(yaml.safe_load(path.read_text())).workers
    if workers.gpus:
        assert workers.count * workers.gpus == most_workers(path)
    else:
        assert workers.cpus is not None and workers.count <= most_workers(path)


@pytest.mark.parametrize("path", sorted(KUBERAY.rglob("retrain.yaml")), ids=lambda p: str(p.relative_to(KUBERAY)))
def test_a_retrain_job_file_is_valid_and_its_workers_fit_the_cluster(path):
    config = RetrainConfig.model_validate(yaml.safe_load(path.read_text()))
    (cron,) = documents(KUBERAY / "base" / "retrain" / "raycronjob.yaml")
    (group,) = ray_job_spec(cron)["rayClusterSpec"]["workerGroupSpecs"]
    assert config.train.workers.count == config.evaluation.scoring.actors == group["maxReplicas"]
    assert ray_job_spec(cron)["entrypoint"].endswith(" --refused-ok")


def test_the_jobs_differ_in_nothing_but_their_own():
    """One hand edits three manifests: what is right in one has to be right in all."""

    def neutral(manifest):
        text = yaml.safe_dump(ray_job_spec(manifest)["rayClusterSpec"])
        text = re.sub(r"(component: |crossenc-)(rerank|train|retrain)\b", r"\1JOB", text)
        return re.sub(r"(groupName|maxReplicas): \w+", r"\1: X", text)

    assert len({neutral(manifest) for _, manifest in RAY_JOBS}) == 1
    assert len(RAY_JOBS) == 3


def test_the_cron_job_creates_from_the_ray_cron_job_and_may_do_nothing_else():
    by_kind = {manifest["kind"]: manifest for name, manifest in MANIFESTS if "retrain" in name}
    cron, ray_cron, role = by_kind["CronJob"], by_kind["RayCronJob"], by_kind["Role"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["schedule"] == ray_cron["spec"]["schedule"]
    assert cron["spec"]["timeZone"] == ray_cron["spec"]["timeZone"]
    (container,) = pod_specs(cron)["cron"]["containers"]
    assert container["command"][-1] == ray_cron["metadata"]["name"]
    verbs = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert verbs == {("raycronjobs", "get"), ("rayjobs", "list"), ("rayjobs", "create")}
    binding = by_kind["RoleBinding"]
    account = pod_specs(cron)["cron"]["serviceAccountName"]
    assert [s["name"] for s in binding["subjects"]] == [account] and binding["roleRef"]["name"] == role["metadata"][
        "name"
    ]


def test_the_schemas_of_kuberay_are_used_where_they_are_at_hand():
    if not CRDS.is_dir():
        pytest.skip(f"needs KubeRay's schemas in {CRDS}")
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolcy"):
        manifest = dict(RAY_JOBS)["kuberay/base/rerank/rayjob.yaml:RayJob/crossenc-rerank"]
        broken = yaml.safe_load(yaml.safe_dump(manifest).replace("imagePullPolicy", "imagePullPolcy"))
        validate(broken)
