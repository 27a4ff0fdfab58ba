"""Fixtures shared by all tests: a clean environment, real S3, one local Ray, shared data."""

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pytest

from tests.support.s3 import CephServer, S3Server, ceph_is_installed, ceph_server, moto_server, set_s3_env

_REMOVED_PREFIXES = ("AWS_", "RAY_", "HF_", "HUGGING_FACE_", "CROSSENC_")
_SET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Two threads of a worker wait for each other: where one is not served, as nice ones are beside tests, both stand.
    "RAY_worker_niceness": "0",
}


#: Tells, once the shared Ray has been started, whether it still runs.
_running_ray: list[Callable[[], bool]] = []
_LONG_FILES = ("test_readme.py", "test_train.py", "test_driver_kills.py", "test_evaluate.py", "test_rerank_s3.py")

# Ray 2.60 warns about the defaults that its own DataContext sets on first use.
_RAY_DEPRECATIONS = ("use_push_based_shuffle", "use_polars", "use_arrow_tensor_v2")


def pytest_configure(config: pytest.Config) -> None:
    """Clean the environment before test modules import libraries that read it only once."""
    # The same examples each time: a commit passes or fails, whenever it is tested.
    hypothesis.settings.register_profile("repeatable", derandomize=True)
    hypothesis.settings.load_profile("repeatable")
    for setting in _RAY_DEPRECATIONS:
        line = f"ignore:`{setting}` is deprecated:DeprecationWarning:ray.data.context"
        config.addinivalue_line("filterwarnings", line)
    for name in _unwanted():
        del os.environ[name]
    os.environ.update(_SET)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two workers that take file by file then end at about the same time."""
    items.sort(key=lambda item: item.path.name not in _LONG_FILES)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the developer's credentials and clusters, nor what another test left behind."""
    for name in _unwanted():
        monkeypatch.delenv(name)
    for name, value in _SET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """One moto server for the session; tests keep apart by bucket."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephServer]:
    """One Ceph radosgw for the session, about 18 s to start; for tests marked `faults`."""
    if not ceph_is_installed():
        pytest.skip("needs Ceph: `python -m tests.support.s3 ceph install` as root, or `make test-faults`")
    with TemporaryDirectory(prefix="ceph-") as folder, ceph_server(Path(folder)) as server:
        yield server


@pytest.fixture
def s3_env(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Point S3 clients at moto; returns the variables that were set, for subprocesses and Ray workers."""
    set_s3_env(monkeypatch, moto.env)
    return moto.env


@pytest.fixture
def s3_bucket(moto: S3Server, s3_env: dict[str, str]) -> str:
    """The name of a new, empty bucket that the environment's credentials can use."""
    return moto.make_bucket(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray on this machine, started by the first test that asks and shared by the session.

    Its workers inherit the environment of that start: S3 settings reach them by `runtime_env` or arguments.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        object_store_memory=300 << 20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    _running_ray.append(ray.is_initialized)
    yield
    _running_ray.clear()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # Ray kills processes, and waits for none
        ray.shutdown()


@pytest.fixture(autouse=True)
def shared_ray_outlives_tests() -> Iterator[None]:
    """Complains of a test that ends the shared Ray: later ones would get another, smaller one without a word."""
    yield
    assert all(is_running() for is_running in _running_ray), "this test ended the Ray that all tests share"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared` beside the repository, with public data and models; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}")
    return folder


def _unwanted() -> list[str]:
    return [name for name in os.environ if name.startswith(_REMOVED_PREFIXES) and name not in _SET]
