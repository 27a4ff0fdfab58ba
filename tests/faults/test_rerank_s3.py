"""The rerank job on S3, as drivers of their own run it: what it gives, and what it does when the store misbehaves.

Every run is compared with a run of the same job on a local disk. Candidates are clustered pairs where a test says
nothing else.
"""

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from s3fs import S3FileSystem

from crossenc import CrossEncoder
from crossenc.errors import StorageError
from crossenc.testing import tiny_checkpoint
from pipelines.storage import info, list_files, locate, put, put_new, read_bytes
from tests.support.collections import Collection, read_quarantine, read_results
from tests.support.fault_proxy import FaultProxy, Rule
from tests.support.rerank_driver import drivers
from tests.support.s3_jobs import (
    SLOW,
    S3Job,
    collection_with_a_gap,
    kill_after,
    messages,
    pairs_in,
    readable_text,
    run_on_disk,
    said,
    succeeded,
    tables,
)

#: Each test starts a Ray or several, which takes 15 s or, on a busy machine, a minute.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Collection:
    return collection_with_a_gap(tmp_path_factory.mktemp("s3") / "in put")


@pytest.fixture(scope="module")
def on_disk(collection, ray_cluster, tmp_path_factory) -> Callable[[str], dict[str, pa.Table]]:
    """The tables of a run on a local disk, by layout."""
    return cache(lambda layout: run_on_disk(collection, layout, tmp_path_factory.mktemp("disk") / "out"))


@pytest.fixture
def job(moto, tmp_path) -> Iterator[S3Job]:
    with drivers(tmp_path) as starter:
        yield S3Job(moto, moto.make_bucket(f"test-{uuid.uuid4().hex[:12]}"), tmp_path, starter)


@pytest.fixture
def proxy(moto, job) -> Iterator[FaultProxy]:
    """Between the drivers of `job` and moto."""
    with FaultProxy(moto.endpoint_url) as proxy:
        job.env["AWS_ENDPOINT_URL"] = proxy.url
        yield proxy


@pytest.mark.faults
def test_a_run_that_an_outage_ends_and_then_a_kill_still_does_everything_once(job, collection, proxy, on_disk):
    path = job.write(collection, "pairs")
    job.env["AWS_SECRET_ACCESS_KEY"] = "canary/Secret+Value0"
    with job.start(path, *SLOW, "--retry-seconds", "2") as driver:
        driver.wait_until(lambda: len(job.objects("results/")) >= 2, 120)
        proxy.add(Rule("reset_before", times=None))
        assert driver.wait(120) == 1, driver.tail()
    error = said(driver).splitlines()[-1]
    assert error.startswith("error: could not") and "run the same command again" in error
    assert "canary" not in said(driver)
    after_outage = job.objects("results/")
    proxy.clear()
    after_kill = kill_after(job, path, num_parts=len(after_outage) + 2)
    assert after_outage.items() < after_kill.items()
    assert succeeded(job.run(path, *SLOW))
    assert after_kill.items() < job.objects("results/").items()
    output = job.download()
    assert tables(output) == on_disk("pairs")
    assert pairs_in(output) == Counter(zip(collection.pairs.query_id, collection.pairs.doc_id, strict=True))
    assert "canary" not in readable_text(output)
    stored = job.objects()
    again = job.run(path, *SLOW)
    assert succeeded(again) and "nothing to do: this run is finished" in said(again)
    assert job.objects() == stored
    status = job.run(job.output, module="jobs.status")
    assert "finished" in said(status) and "20 of 20" in said(status)


@pytest.mark.faults
def test_a_run_whose_driver_is_killed_again_and_again_does_everything_once(job, collection, on_disk):
    path = job.write(collection, "shuffled")
    done: dict[str, str] = {}
    for _ in range(3):
        before, done = done, kill_after(job, path, num_parts=len(done) + 2, folder="_run/scored/")
        assert before.items() < done.items()
    assert succeeded(job.run(path, *SLOW))
    assert done.items() < job.objects("_run/scored/").items()
    output = job.download()
    assert tables(output) == on_disk("shuffled")
    assert pairs_in(output) == Counter(zip(collection.pairs.query_id, collection.pairs.doc_id, strict=True))


@pytest.mark.faults
def test_a_storm_of_faults_and_lost_answers_to_every_creation_change_nothing(job, collection, proxy, on_disk):
    path = job.write(collection, "pairs")
    created = (r"/epoch-000001\.json", r"/plan\.json", r"/results/part-000000-[0-9a-f]+\.parquet", r"/_manifest\.json")
    for place in created:
        proxy.add(Rule("reset_after", method="PUT", path=place))
    proxy.add(Rule("status", times=None, probability=0.05, seed=1))
    proxy.add(Rule("reset_before", times=None, probability=0.05, seed=2))
    proxy.add(Rule("reset_after", method="PUT", times=None, probability=0.15, seed=3))
    proxy.add(Rule("duplicate", method="PUT", times=None, probability=0.15, seed=4))
    proxy.add(Rule("truncate", method="GET", times=None, probability=0.1, seed=5))
    proxy.add(Rule("short", method="GET", times=None, probability=0.1, seed=6))
    assert succeeded(job.run(path))
    assert tables(job.download()) == on_disk("pairs")
    for place in created:  # each was stored by the request whose answer was lost
        puts = [seen for seen in proxy.requests if seen.method == "PUT" and re.search(place, seen.path)]
        assert (puts[0].fault, puts[0].status) == ("reset_after", 200)
    met = Counter(seen.fault for seen in proxy.requests)
    assert min(met[fault] for fault in ("status", "reset_before", "reset_after", "duplicate", "truncate", "short")) > 0
    for part in job.objects("results/"):
        puts = [seen for seen in proxy.requests if seen.method == "PUT" and seen.path.endswith(part)]
        num_created = sum(seen.status == 200 for seen in puts)
        # Of a request that was delivered twice, the ledger has the second answer only.
        assert num_created == 1 or (num_created == 0 and any(seen.fault == "duplicate" for seen in puts))


def test_refused_credentials_are_reported_before_any_work(job, collection, proxy):
    path = job.write(collection, "pairs")
    proxy.add(Rule("status", status=403, times=None))
    driver = job.run(path)
    assert driver.process.returncode == 1
    assert "check the credentials and the rights on this place" in said(driver)
    assert job.objects() == {}


def test_missing_credentials_are_a_storage_error_with_advice_whatever_is_done(s3_bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    place = locate(f"s3://{s3_bucket}/key")
    for operation in (read_bytes, info, list_files, lambda key: put(key, b""), lambda key: put_new(key, b"")):
        with pytest.raises(StorageError, match=r"Unable to locate credentials; check the credentials .* run the same"):
            operation(place)


def test_a_bucket_that_is_missing_is_named_before_any_work(job, collection):
    path = job.write(collection, "pairs")
    driver = job.run(path, "--set", "candidates=s3://no-such-bucket/in")
    assert driver.process.returncode == 2
    assert "there is no .parquet file at s3://no-such-bucket/in" in said(driver)
    driver = job.run(path, "--set", "output=s3://no-such-bucket/out")
    assert driver.process.returncode == 1
    assert "could not write s3://no-such-bucket/out/" in said(driver) and "check that the bucket" in said(driver)
    assert "shards" not in said(driver)


@pytest.mark.faults
def test_a_store_without_create_only_puts_is_warned_of_and_serves_both_phases(job, collection, proxy, on_disk):
    path = job.write(collection, "shuffled")
    proxy.add(Rule("status", method="PUT", header="If-None-Match", status=501, times=None))
    driver = job.run(path)
    assert succeeded(driver)
    assert messages(driver)[0] == "this store's create-only PUT is unsupported: do not start two runs on one output"
    assert tables(job.download()) == on_disk("shuffled")


def test_job_file_model_and_candidates_may_all_lie_on_s3_under_odd_names(job, collection, proxy):
    job.prefix = "se arch+ü/100%41 é"
    checkpoint = tiny_checkpoint(job.folder / "model")
    path = job.upload(Path(job.write(collection, "nested", model=job.upload(checkpoint))))
    assert succeeded(job.run(path, module="jobs.rerank"))
    assert proxy.count("GET", r"/model/model\.safetensors") == 1  # for the driver and all workers of this node
    assert list((job.folder / "cache").rglob("model.safetensors"))
    output = job.download()
    results = read_results(output).merge(collection.pairs, on=["query_id", "doc_id"])
    scores = CrossEncoder(checkpoint).predict(list(zip(results["query"], results.text, strict=True)))
    # Batches differ, and with them the order of float32 sums.
    np.testing.assert_allclose(results.score_x, scores, atol=1e-5)
    assert pairs_in(output) == Counter(zip(collection.pairs.query_id, collection.pairs.doc_id, strict=True))
    assert set(read_quarantine(output).file) == {f"s3://{job.bucket}/{job.prefix}/in/nested/nested.parquet"}


@pytest.mark.faults
def test_credentials_of_the_job_file_reach_every_process_and_nothing_that_is_written(job, collection, on_disk):
    secret = "canary/Secret+Value0"
    options = {"endpoint_url": job.server.endpoint_url, "key": job.server.access_key, "secret": secret}
    path = job.write(collection, "ids", storage_options=options)
    job.env |= dict.fromkeys(job.server.env, "")
    driver = job.run(path)
    assert succeeded(driver)
    output = job.download()
    assert tables(output) == on_disk("ids")
    assert "canary" not in readable_text(output) + said(driver)
    logs = [path for path in job.drivers.ray_folder.rglob("logs/**/*") if path.is_file() and not path.is_symlink()]
    assert len(logs) > 5
    assert [path.name for path in logs if b"canary" in path.read_bytes()] == []
    assert yaml.safe_load(Path(path).read_text())["storage_options"]["secret"] == secret
