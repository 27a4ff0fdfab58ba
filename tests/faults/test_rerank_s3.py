"""The rerank job on S3, as drivers of their own run it: what it gives, and what it does when the store misbehaves.

Every run is compared with a run of the same job on a local disk. Candidates are clustered pairs where a test says
nothing else.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from crossenc import CrossEncoder
from crossenc.testing import tiny_checkpoint
from tests.support.collections import Collection, read_quarantine, read_results
from tests.support.fault_proxy import FaultProxy, Rule
from tests.support.rerank_driver import drivers
from tests.support.s3_jobs import (
    SLOW,
    S3Job,
    collection_with_a_gap,
    messages,
    pairs_in,
    readable_text,
    run_on_disk,
    said,
    succeeded,
    tables,
)


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


def test_queries_that_are_spread_over_files_are_ranked_as_on_a_local_disk(job, collection, on_disk):
    assert succeeded(job.run(job.write(collection, "shuffled")))
    assert tables(job.download()) == on_disk("shuffled")


def test_a_run_whose_driver_is_killed_twice_ends_as_if_nothing_had_happened(job, collection, on_disk):
    path = job.write(collection, "pairs")
    done: dict[str, str] = {}
    for _ in range(2):
        num_done = len(done)
        with job.start(path, *SLOW) as driver:
            driver.wait_until(lambda num=num_done: len(job.objects("results/")) > num + 2, 90)
            driver.kill9()
        before, done = done, job.objects("results/")
        assert before.items() <= done.items()
        assert len(done) < 20
    assert succeeded(job.run(path, *SLOW))
    assert done.items() < job.objects("results/").items()
    output = job.download()
    assert tables(output) == on_disk("pairs")
    assert pairs_in(output) == Counter(zip(collection.pairs.query_id, collection.pairs.doc_id, strict=True))
    stored = job.objects()
    again = job.run(path, *SLOW)
    assert succeeded(again) and "nothing to do: this run is finished" in said(again)
    assert job.objects() == stored
    status = job.run(job.output, module="jobs.status")
    assert "finished" in said(status) and "20 of 20" in said(status)


def test_a_storm_of_storage_faults_changes_nothing(job, collection, proxy, on_disk):
    path = job.write(collection, "pairs")
    proxy.add(Rule("status", times=None, probability=0.05, seed=1))
    proxy.add(Rule("reset_before", times=None, probability=0.05, seed=2))
    proxy.add(Rule("reset_after", method="PUT", times=None, probability=0.15, seed=3))
    proxy.add(Rule("duplicate", method="PUT", times=None, probability=0.15, seed=4))
    proxy.add(Rule("truncate", method="GET", times=None, probability=0.1, seed=5))
    proxy.add(Rule("short", method="GET", times=None, probability=0.1, seed=6))
    assert succeeded(job.run(path))
    assert tables(job.download()) == on_disk("pairs")
    met = Counter(seen.fault for seen in proxy.requests)
    assert min(met[fault] for fault in ("status", "reset_before", "reset_after", "duplicate", "truncate", "short")) > 0
    for part in job.objects("results/"):
        puts = [seen for seen in proxy.requests if seen.method == "PUT" and seen.path.endswith(part)]
        num_created = sum(seen.status == 200 for seen in puts)
        # Of a request that was delivered twice, the ledger has the second answer only.
        assert num_created == 1 or (num_created == 0 and any(seen.fault == "duplicate" for seen in puts))


def test_a_lost_answer_to_the_creation_of_plan_part_or_manifest_is_no_failure(job, collection, proxy, on_disk):
    path = job.write(collection, "pairs")
    created = (r"/epoch-000001\.json", r"/plan\.json", r"/results/part-000000-[0-9a-f]+\.parquet", r"/_manifest\.json")
    for place in created:
        proxy.add(Rule("reset_after", method="PUT", path=place))
    assert succeeded(job.run(path))
    assert tables(job.download()) == on_disk("pairs")
    assert [seen.status for seen in proxy.requests if seen.fault == "reset_after"] == [200] * len(created)


def test_an_outage_beyond_the_retry_limit_ends_with_advice_and_the_rerun_completes(job, collection, proxy, on_disk):
    path = job.write(collection, "pairs")
    job.env["AWS_SECRET_ACCESS_KEY"] = "canary/Secret+Value0"
    with job.start(path, *SLOW, "--retry-seconds", "2") as driver:
        driver.wait_until(lambda: len(job.objects("results/")) >= 2, 90)
        proxy.add(Rule("reset_before", times=None))
        code = driver.wait(120)
    assert code == 1, driver.tail()
    error = said(driver).splitlines()[-1]
    assert error.startswith("error: could not") and "run the same command again" in error
    assert "canary" not in said(driver)
    done = job.objects("results/")
    assert 2 <= len(done) < 20
    proxy.clear()
    assert succeeded(job.run(path, *SLOW))
    assert done.items() < job.objects("results/").items()
    output = job.download()
    assert tables(output) == on_disk("pairs")
    assert "canary" not in readable_text(output)


def test_refused_credentials_are_reported_before_any_work(job, collection, proxy):
    path = job.write(collection, "pairs")
    proxy.add(Rule("status", status=403, times=None))
    driver = job.run(path)
    assert driver.process.returncode == 1
    assert "check the credentials and the rights on this place" in said(driver)
    assert job.objects() == {}


def test_a_bucket_that_is_missing_is_named_before_any_work(job, collection):
    path = job.write(collection, "pairs")
    driver = job.run(path, "--set", "candidates=s3://no-such-bucket/in")
    assert driver.process.returncode == 2
    assert "there is no .parquet file at s3://no-such-bucket/in" in said(driver)
    driver = job.run(path, "--set", "output=s3://no-such-bucket/out")
    assert driver.process.returncode == 1
    assert "could not write s3://no-such-bucket/out/" in said(driver) and "check that the bucket" in said(driver)
    assert "shards" not in said(driver)


def test_a_store_without_create_only_puts_is_warned_of_and_serves(job, collection, proxy, on_disk):
    path = job.write(collection, "pairs")
    proxy.add(Rule("status", method="PUT", header="If-None-Match", status=501, times=None))
    driver = job.run(path)
    assert succeeded(driver)
    assert messages(driver)[0] == "this store's create-only PUT is unsupported: do not start two runs on one output"
    assert tables(job.download()) == on_disk("pairs")


def test_a_model_on_s3_is_copied_once_to_the_node_and_scores_as_from_disk(job, collection, proxy):
    checkpoint = tiny_checkpoint(job.folder / "model")
    path = job.write(collection, "pairs", model=job.upload(checkpoint))
    driver = job.run(path, module="jobs.rerank")
    assert succeeded(driver)
    assert proxy.count("GET", r"/model/model\.safetensors") == 1
    assert list((job.folder / "cache").rglob("model.safetensors"))
    results = read_results(job.download()).merge(collection.pairs, on=["query_id", "doc_id"])
    scores = CrossEncoder(checkpoint).predict(list(zip(results["query"], results.text, strict=True)))
    # Batches differ, and with them the order of float32 sums.
    np.testing.assert_allclose(results.score_x, scores, atol=1e-5)
    assert len(results) == collection.pairs.text.notna().sum()


def test_the_job_file_may_lie_on_s3_and_keys_may_hold_spaces_plus_percent_and_unicode(job, collection, on_disk):
    job.prefix = "se arch+ü/100%41 é"
    path = job.upload(Path(job.write(collection, "nested")))
    assert succeeded(job.run(path))
    output = job.download()
    assert tables(output) == on_disk("nested")
    assert set(read_quarantine(output).file) == {f"s3://{job.bucket}/{job.prefix}/in/nested/nested.parquet"}


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
