"""Files for Ray's cluster launcher against the schema in its wheel, and S3's rules against an S3 server."""

import copy
import json
import re
from pathlib import Path

import boto3
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

from tests.infra.manifests import INFRA, KUBERAY, documents, fields, with_typo

CLUSTERS = sorted((INFRA / "clusters").glob("*.yaml"))
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
STORAGE = {path.stem: json.loads(path.read_text()) for path in (INFRA / "storage").glob("*.json")}
AWS = {path.stem: json.loads(path.read_text()) for path in (INFRA / "clusters").glob("*.json")}
clusters = pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)


def load(path):
    (cluster,) = documents_with_merges(path)
    return cluster


def documents_with_merges(path):
    return list(yaml.safe_load_all(path.read_text()))


@clusters
def test_a_launcher_file_fits_rays_schema(path):
    jsonschema.validate(load(path), SCHEMA)


@clusters
def test_a_misspelt_setting_of_a_launcher_file_is_refused(path):
    cluster = load(path)
    open_maps = {"provider", "node_config", "resources", "file_mounts"}  # the schema leaves them to the provider
    accepted = []
    for place in fields(cluster):
        if open_maps & set(place[:-1]) or (len(place) == 2 and place[0] == "available_node_types"):
            continue
        try:
            jsonschema.validate(with_typo(cluster, place), SCHEMA)
        except jsonschema.ValidationError:
            continue
        accepted.append(place)
    assert accepted == []


@clusters
def test_ray_starts_with_a_token_a_dashboard_of_its_own_and_no_work_on_the_head(path):
    cluster = load(path)
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    for command in (head, worker):
        assert "export RAY_AUTH_MODE=token;" in command and "--metrics-export-port=8080" in command
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    types = cluster.get("available_node_types", {})
    assert not types or types[cluster["head_node_type"]]["resources"] == {"CPU": 0}


@clusters
def test_nodes_install_the_pinned_versions(path):
    commands = " ".join(load(path)["setup_commands"])
    assert "pip install --quiet --constraint constraints.txt '.[cluster,train]'" in commands


@pytest.mark.parametrize(("name", "market"), [("aws", "InstanceMarketOptions"), ("gcp", "scheduling")])
def test_scorers_are_spot_instances_and_the_head_is_not(name, market):
    types = load(INFRA / "clusters" / f"{name}.yaml")["available_node_types"]
    assert "spot" in str(types["scorer"]["node_config"][market]).lower()
    assert market not in types["head"]["node_config"]


def test_on_aws_ray_makes_no_security_group_of_its_own_which_would_open_ssh_to_the_world():
    cluster = load(INFRA / "clusters" / "aws.yaml")
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"]
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


def test_on_aws_the_head_may_give_scorers_their_role_and_start_and_end_machines_of_its_cluster_alone(moto, s3_env):
    cluster = load(INFRA / "clusters" / "aws.yaml")
    types = cluster["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in types.items()}
    assert len({*profiles.values()}) == 2
    rights = {statement["Sid"]: statement for statement in AWS["aws-head-policy"]["Statement"]}
    assert rights["GiveThemTheirRole"]["Resource"].endswith(f":role/{profiles['scorer']}")
    ended = rights["NameAndEndThoseOfThisCluster"]
    assert "ec2:TerminateInstances" in ended["Action"]
    assert ended["Condition"] == {"StringEquals": {f"ec2:ResourceTag/{TAG_RAY_CLUSTER_NAME}": cluster["cluster_name"]}}
    regions = set(re.findall(r"eu-[a-z]+-\d", json.dumps(AWS["aws-head-policy"])))
    assert regions == {cluster["provider"]["region"]} and not cluster["provider"]["cache_stopped_nodes"]
    iam = boto3.client("iam", endpoint_url=s3_env["AWS_ENDPOINT_URL"])
    iam.create_role(RoleName=profiles["head"], AssumeRolePolicyDocument=json.dumps(AWS["aws-trust"]))
    iam.put_role_policy(
        RoleName=profiles["head"], PolicyName="scorers", PolicyDocument=json.dumps(AWS["aws-head-policy"])
    )
    readme = (INFRA / "README.md").read_text()
    for name in profiles.values():
        assert f"add-role-to-instance-profile --instance-profile-name {name} --role-name {name}" in readme


# Storage


@pytest.fixture
def s3(moto, s3_env):
    return boto3.client("s3", endpoint_url=s3_env["AWS_ENDPOINT_URL"])


def test_s3_takes_the_lifecycle_rules(s3, s3_bucket):
    s3.put_bucket_lifecycle_configuration(Bucket=s3_bucket, LifecycleConfiguration=STORAGE["lifecycle"])
    stored = s3.get_bucket_lifecycle_configuration(Bucket=s3_bucket)["Rules"]
    assert [rule["ID"] for rule in stored] == [rule["ID"] for rule in STORAGE["lifecycle"]["Rules"]]
    broken = copy.deepcopy(STORAGE["lifecycle"])
    broken["Rules"][1]["Expiratoin"] = broken["Rules"][1].pop("Expiration")
    with pytest.raises(Exception, match="Expiratoin"):
        s3.put_bucket_lifecycle_configuration(Bucket=s3_bucket, LifecycleConfiguration=broken)


def test_only_outputs_expire_and_unfinished_uploads_go_everywhere():
    rules = STORAGE["lifecycle"]["Rules"]
    expiring = [rule["Filter"].get("And", rule["Filter"]) for rule in rules if "Expiration" in rule]
    assert {place["Prefix"]: place.get("ObjectSizeGreaterThan") for place in expiring} == {
        "reranked/": None,
        "trained/": None,
        "retrained/": 2**20,  # what a retraining is known by is smaller
    }
    bucket = "s3://search/"
    for path in KUBERAY.glob("overlays/gpu-prod/*/*.yaml"):
        if path.name != "kustomization.yaml":
            job = yaml.safe_load(path.read_text())
            assert any(job["output"].startswith(bucket + place["Prefix"]) for place in expiring), path
            kept = [job.get("registry"), job.get("model"), job.get("base")]
            assert all(uri.startswith(f"{bucket}models/") for uri in kept if uri)
    assert [rule["Filter"]["Prefix"] for rule in rules if "AbortIncompleteMultipartUpload" in rule] == [""]


@pytest.mark.parametrize("name", ["role-policy", "role-trust"])
def test_iam_takes_the_policies(moto, s3_env, name):
    iam = boto3.client("iam", endpoint_url=s3_env["AWS_ENDPOINT_URL"])
    document = json.dumps(STORAGE[name])
    if name == "role-trust":
        iam.create_role(RoleName="crossenc-job", AssumeRolePolicyDocument=document)
        return
    iam.create_policy(PolicyName="crossenc-job", PolicyDocument=document)
    broken = document.replace('"Effect"', '"Efect"', 1)
    with pytest.raises(Exception, match=r"(?i)policy"):
        iam.create_policy(PolicyName="broken", PolicyDocument=broken)


def test_the_role_may_do_what_a_run_does_and_no_more():
    allowed = {}
    for statement in STORAGE["role-policy"]["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        for resource in resources:
            allowed.setdefault(resource, set()).update(actions)
    assert "*" not in "".join(action for actions in allowed.values() for action in actions)
    assert {resource for resource, actions in allowed.items() if "s3:PutObject" in actions} == {
        "arn:aws:s3:::search/models/*",
        "arn:aws:s3:::search/reranked/*",
        "arn:aws:s3:::search/retrained/*",
        "arn:aws:s3:::search/trained/*",
    }
    assert all("s3:AbortMultipartUpload" in actions for actions in allowed.values() if "s3:PutObject" in actions)
    listed = STORAGE["role-policy"]["Statement"][0]["Condition"]["StringLikeIfExists"]["s3:prefix"]
    assert {f"arn:aws:s3:::search/{prefix}" for prefix in listed} == {*allowed} - {"arn:aws:s3:::search"}
    files = [KUBERAY / "overlays" / "gpu-prod" / job / f"{job}.yaml" for job in ("rerank", "train", "retrain")]
    files += [KUBERAY / "base" / job / f"{job}.yaml" for job in ("train", "retrain")]
    for path in files:
        for key, uri in yaml.safe_load(path.read_text()).items():
            if str(uri).startswith("s3://"):
                place = "arn:aws:s3:::" + uri.removeprefix("s3://")
                actions = [a for resource, a in allowed.items() if place.startswith(resource.rstrip("*"))]
                assert any(
                    {"s3:GetObject", *(["s3:PutObject"] if key in ("output", "registry") else [])} <= a for a in actions
                ), uri


def test_the_trust_names_the_accounts_of_the_pods_and_the_overlay_names_the_role():
    (statement,) = STORAGE["role-trust"]["Statement"]
    subjects = next(value for key, value in statement["Condition"]["StringEquals"].items() if key.endswith(":sub"))
    accounts = documents(KUBERAY / "base" / "platform" / "service-accounts.yaml")
    assert subjects == [f"system:serviceaccount:crossenc:{account['metadata']['name']}" for account in accounts]
    overlay = (KUBERAY / "overlays" / "gpu-prod" / "platform" / "kustomization.yaml").read_text()
    assert set(re.findall(r"arn:aws:iam::\d+:role/([\w-]+)", overlay)) == {"crossenc-job"}


def test_s3_takes_the_bucket_policy(s3, s3_bucket):
    text = json.dumps(STORAGE["bucket-policy"]).replace("arn:aws:s3:::search", f"arn:aws:s3:::{s3_bucket}")
    s3.put_bucket_policy(Bucket=s3_bucket, Policy=text)
    assert json.loads(s3.get_bucket_policy(Bucket=s3_bucket)["Policy"]) == json.loads(text)
