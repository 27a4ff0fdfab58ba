"""The container file: what it installs, on what, and as whom, as far as that shows without building it."""

import re
import subprocess
import sys
import tomllib

from tests.infra.manifests import INFRA, ROOT, all_manifests, pod_specs

TEXT = (INFRA / "Containerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_requirements_that_it_installs_are_those_of_the_project_and_of_a_cluster(tmp_path):
    """Docker joins lines that end in a backslash before a shell sees them."""
    (program,) = re.findall(r'&& python -c "(.+?)" > requirements', TEXT.replace("\\\n", ""), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["cluster"], *extras["train"], *extras["onnx"]]
    assert done.stdout.splitlines() == wanted


def test_every_requirement_is_pinned():
    pinned = {
        name.replace("_", "-") for name in re.findall(r"(?m)^([\w.-]+)==", (ROOT / "constraints.txt").read_text())
    }
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["cluster"], *extras["train"], *extras["onnx"]]:
        assert re.match(r"[\w.-]+", requirement)[0].replace("_", "-") in pinned, requirement


def test_its_base_is_one_tag_of_a_python_that_the_project_runs_on():
    bases = re.findall(r"^ARG BASE=(.+)$", TEXT, re.MULTILINE)
    (version,) = [re.fullmatch(r"docker\.io/library/python:(\d+\.\d+)\.\d+-slim-bookworm", base)[1] for base in bases]
    least = re.fullmatch(r">=(\d+\.\d+)(,.*)?", PROJECT["requires-python"])[1]
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))
    assert set(re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)) == {"${BASE}${BASE_DIGEST:+@${BASE_DIGEST}}"}


def test_its_user_is_the_one_of_the_pods_and_none_but_that_one_runs_anything():
    (user,) = re.findall(r"^USER (.+)$", TEXT, re.MULTILINE)
    for _, manifest in all_manifests():
        for spec in pod_specs(manifest).values():
            context = spec["securityContext"]
            assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
    assert TEXT.index("USER") < TEXT.index("CMD") and f"--chown={user}" in TEXT
