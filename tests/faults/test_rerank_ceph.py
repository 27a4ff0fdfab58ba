"""The rerank job on Ceph's radosgw: a strict S3 that keeps its data on disk and can be killed whole in mid-run."""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pyarrow as pa
import pytest

from tests.support.collections import Collection
from tests.support.rerank_driver import drivers
from tests.support.s3_jobs import (
    SLOW,
    S3Job,
    collection_with_a_gap,
    kill_after,
    messages,
    pairs_in,
    run_on_disk,
    said,
    succeeded,
    tables,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Collection:
    return collection_with_a_gap(tmp_path_factory.mktemp("ceph"))


@pytest.fixture(scope="module")
def on_disk(collection, ray_cluster, tmp_path_factory) -> Callable[[str], dict[str, pa.Table]]:
    """The tables of a run on a local disk, by layout."""
    return cache(lambda layout: run_on_disk(collection, layout, tmp_path_factory.mktemp("disk") / "out"))


@pytest.fixture
def job(ceph, tmp_path) -> Iterator[S3Job]:
    with drivers(tmp_path) as starter:
        yield S3Job(ceph, ceph.make_bucket(f"test-{uuid.uuid4().hex[:12]}"), tmp_path, starter)


def test_a_run_on_ceph_gives_what_a_local_disk_gives_and_is_left_alone_afterwards(job, collection, on_disk):
    path = job.write(collection, "shuffled")
    driver = job.run(path)
    assert succeeded(driver)
    assert messages(driver) == []  # creating is atomic there: nothing to warn of
    assert tables(job.download()) == on_disk("shuffled")
    stored = job.objects()
    again = job.run(path)
    assert succeeded(again) and "nothing to do: this run is finished" in said(again)
    assert job.objects() == stored


def test_a_wrong_secret_is_reported_before_any_work_and_not_shown(job, collection):
    path = job.write(collection, "pairs")
    job.env["AWS_SECRET_ACCESS_KEY"] = "canary/Secret+Value0"
    driver = job.run(path)
    assert driver.process.returncode == 1
    assert "check the credentials and the rights on this place" in said(driver)
    assert "canary" not in said(driver)
    assert job.objects() == {}


def test_a_run_on_ceph_whose_driver_is_killed_goes_on_where_it_was(job, collection, on_disk):
    path = job.write(collection, "pairs")
    done = kill_after(job, path, num_parts=3)
    assert succeeded(job.run(path, *SLOW))
    assert done.items() < job.objects("results/").items()
    output = job.download()
    assert tables(output) == on_disk("pairs")
    assert pairs_in(output) == Counter(zip(collection.pairs.query_id, collection.pairs.doc_id, strict=True))


def test_a_run_outlives_the_death_of_the_whole_store(job, ceph, collection, on_disk):
    """Or it ends resumable, where the store takes longer to come back than storage is retried."""
    path = job.write(collection, "pairs")
    with job.start(path, *SLOW) as driver:
        driver.wait_until(lambda: len(job.objects("results/")) > 2, 120)
        done = job.objects("results/")
        killed_at = time.monotonic()
        ceph.kill()
        time.sleep(5)
        ceph.restart()
        print(f"the store was away for {time.monotonic() - killed_at:.1f} s")
        code = driver.wait(400)
    print(f"the driver ended with {code}, {time.monotonic() - killed_at:.1f} s after the store was killed")
    assert code in (0, 1), driver.tail()
    if code == 1:
        assert "run the same command again" in said(driver)
        assert succeeded(job.run(path, *SLOW))
    assert done.items() <= job.objects("results/").items()
    output = job.download()
    assert tables(output) == on_disk("pairs")
    assert pairs_in(output) == Counter(zip(collection.pairs.query_id, collection.pairs.doc_id, strict=True))
