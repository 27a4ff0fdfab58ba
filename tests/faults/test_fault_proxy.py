"""Every fault of the proxy, as real S3 clients meet it, and the traps that those clients leave to us."""

import http.client
import os
import socket
import threading
import time
import uuid
from urllib.parse import urlsplit

import boto3
import pyarrow.fs
import pytest
import s3fs
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    FlexibleChecksumError,
    ResponseStreamingError,
)

from tests.support.fault_proxy import Exchange, FaultProxy, Rule
from tests.support.s3 import set_s3_env


@pytest.fixture
def proxy(moto, monkeypatch):
    with FaultProxy(moto.endpoint_url) as proxy:
        set_s3_env(monkeypatch, {**moto.env, "AWS_ENDPOINT_URL": proxy.url})
        yield proxy


@pytest.fixture
def bucket(moto):
    return moto.make_bucket(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def fs(bucket, proxy):
    """An s3fs behind the proxy, with s3fs's own retries."""
    return s3fs.S3FileSystem(skip_instance_cache=True)


@pytest.fixture
def once(bucket, proxy):
    """A boto3 client behind the proxy that tries each request once."""
    return boto3.client("s3", config=Config(retries={"total_max_attempts": 1}))


def _statuses(proxy: FaultProxy, method: str) -> list[int | None]:
    return [seen.status for seen in proxy.requests if seen.method == method]


@pytest.mark.parametrize("server_name", ["moto", pytest.param("ceph", marks=pytest.mark.faults)])
def test_without_rules_all_clients_work_as_without_the_proxy(server_name, request, monkeypatch):
    server = request.getfixturevalue(server_name)  # Ceph also checks the signature of every request
    bucket = server.make_bucket(f"test-{uuid.uuid4().hex[:12]}")
    data = os.urandom(12 << 20)  # more than one part for s3fs and pyarrow
    with FaultProxy(server.endpoint_url) as proxy:
        set_s3_env(monkeypatch, {**server.env, "AWS_ENDPOINT_URL": proxy.url})
        boto, fs = boto3.client("s3"), s3fs.S3FileSystem(skip_instance_cache=True)
        arrow, folder = pyarrow.fs.FileSystem.from_uri(f"s3://{bucket}")
        boto.put_object(Bucket=bucket, Key="boto a b+ü", Body=data, ContentEncoding="gzip")
        assert boto.head_object(Bucket=bucket, Key="boto a b+ü")["ContentLength"] == len(data)
        fs.pipe(f"{bucket}/s3fs", data, chunksize=5 << 20)
        with arrow.open_output_stream(f"{folder}/arrow") as stream:
            stream.write(data)
        assert server.list(bucket) == [f"{bucket}/{name}" for name in ("arrow", "boto a b+ü", "s3fs")]
        assert [key for key in server.list(bucket) if server.get(key) != data] == []
        assert fs.cat(f"{bucket}/boto a b+ü") == data
        with arrow.open_input_file(f"{folder}/s3fs") as file:
            assert file.read() == data
        fs.rm(fs.find(bucket))
        assert server.list(bucket) == []
        assert proxy.count(path="uploadId=") >= 4
        assert {seen.fault for seen in proxy.requests} == {None}


def test_a_chunked_body_after_expect_continue_arrives_whole(moto, bucket, proxy):
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
    headers = {"Expect": "100-continue", "Transfer-Encoding": "chunked"}
    connection.request("PUT", f"/{bucket}/key", iter([b"one ", b"two"]), headers, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert moto.get(f"{bucket}/key") == b"one two"


def test_503_reaches_the_client_as_slow_down_and_upstream_not_at_all(once, moto, bucket, proxy):
    proxy.add(Rule("status", method="PUT"))
    with pytest.raises(ClientError, match="SlowDown"):
        once.put_object(Bucket=bucket, Key="key", Body=b"data")
    assert moto.list(bucket) == []
    assert proxy.requests == (Exchange("PUT", f"/{bucket}/key", "", 503, "status"),)


def test_s3fs_retries_after_a_503(fs, moto, bucket, proxy):
    proxy.add(Rule("status", method="PUT"))
    fs.pipe(f"{bucket}/key", b"data")
    assert moto.get(f"{bucket}/key") == b"data"
    assert _statuses(proxy, "PUT") == [503, 200]


def test_reset_before_loses_the_request(once, moto, bucket, proxy):
    proxy.add(Rule("reset_before", method="PUT"))
    with pytest.raises(ConnectionClosedError):
        once.put_object(Bucket=bucket, Key="key", Body=b"data")
    assert moto.list(bucket) == []
    assert _statuses(proxy, "PUT") == [None]


def test_reset_after_loses_only_the_answer(once, moto, bucket, proxy):
    proxy.add(Rule("reset_after", method="PUT"))
    with pytest.raises(ConnectionClosedError):
        once.put_object(Bucket=bucket, Key="key", Body=b"data")
    assert moto.get(f"{bucket}/key") == b"data"
    assert _statuses(proxy, "PUT") == [200]


@pytest.mark.parametrize(("fault", "statuses"), [("reset_after", [200, 412]), ("duplicate", [412])])
def test_a_create_that_is_delivered_twice_says_exists_of_its_own_object(fault, statuses, fs, moto, bucket, proxy):
    proxy.add(Rule(fault, method="PUT", path="/record"))
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{bucket}/record", b"mine", mode="create")
    assert moto.get(f"{bucket}/record") == b"mine"
    assert _statuses(proxy, "PUT") == statuses


def test_a_truncated_body_is_an_error_that_s3fs_retries(once, fs, moto, bucket, proxy):
    moto.put(f"{bucket}/key", b"x" * 100_000)
    proxy.add(Rule("truncate", method="GET", path="/key", times=2))
    with pytest.raises(ResponseStreamingError):
        once.get_object(Bucket=bucket, Key="key")["Body"].read()
    assert fs.cat(f"{bucket}/key") == b"x" * 100_000
    assert _statuses(proxy, "GET") == [200, 200, 200]


def test_a_short_body_goes_unnoticed_by_s3fs_where_the_object_has_no_checksum(fs, moto, bucket, proxy):
    moto.put(f"{bucket}/key", b"x" * 1000)
    proxy.add(Rule("short", method="GET", path="/key"))
    assert fs.cat(f"{bucket}/key") == b"x" * 500


def test_a_short_body_of_a_ranged_read_goes_unnoticed_even_so(fs, moto, bucket, proxy):
    fs.pipe(f"{bucket}/key", b"x" * 1000)
    proxy.add(Rule("short", method="GET", path="/key"))
    assert fs.cat_file(f"{bucket}/key", start=100, end=300) == b"x" * 100


def test_a_corrupt_body_differs_in_its_middle_byte_and_goes_unnoticed_by_s3fs(fs, moto, bucket, proxy):
    moto.put(f"{bucket}/key", b"\x00" * 5)
    proxy.add(Rule("corrupt", method="GET", path="/key"))
    assert fs.cat(f"{bucket}/key") == b"\x00\x00\xff\x00\x00"


@pytest.mark.parametrize("fault", ["short", "corrupt"])
def test_boto3_notices_spoilt_bodies_of_objects_that_carry_a_checksum(fault, once, bucket, proxy):
    once.put_object(Bucket=bucket, Key="key", Body=b"x" * 1000, ChecksumAlgorithm="CRC32")
    proxy.add(Rule(fault, method="GET", path="/key"))
    with pytest.raises(FlexibleChecksumError):
        once.get_object(Bucket=bucket, Key="key")["Body"].read()


def test_latency_delays_a_right_answer(once, moto, bucket, proxy):
    moto.put(f"{bucket}/key", b"data")
    proxy.add(Rule("latency", method="GET", path="/key", seconds=0.3))
    start = time.monotonic()
    assert once.get_object(Bucket=bucket, Key="key")["Body"].read() == b"data"
    assert time.monotonic() - start >= 0.3


def test_a_head_answer_keeps_its_length_and_has_no_body(once, moto, bucket, proxy):
    moto.put(f"{bucket}/key", b"x" * 1000)
    signed = once.generate_presigned_url("head_object", Params={"Bucket": bucket, "Key": "key"})
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
    for _ in range(2):  # a stray body would be read as the start of the second answer
        connection.request("HEAD", signed.removeprefix(proxy.url))
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Length"], answer.read()) == (200, "1000", b"")
    connection.close()


def test_a_rule_lets_skip_requests_pass_and_hits_the_next_times(once, bucket, proxy):
    proxy.add(Rule("status", method="PUT", path="/key", skip=1, times=2))
    for name in ("other", "key", "key", "key", "key"):
        try:
            once.put_object(Bucket=bucket, Key=name, Body=b"")
        except ClientError as error:
            assert error.response["Error"]["Code"] == "SlowDown"
    assert _statuses(proxy, "PUT") == [200, 200, 503, 503, 200]
    assert proxy.count("PUT", "/key") == 4


def test_a_rule_with_a_header_hits_only_what_carries_its_header(once, bucket, proxy):
    proxy.add(Rule("status", header="If-None-Match", status=501))
    once.put_object(Bucket=bucket, Key="key", Body=b"")
    with pytest.raises(ClientError, match="NotImplemented"):
        once.put_object(Bucket=bucket, Key="key", Body=b"", IfNoneMatch="*")


def test_the_same_seed_hits_the_same_requests(once, bucket, proxy):
    def hits(seed: int) -> list[bool]:
        proxy.clear()
        proxy.add(Rule("status", path="/key", times=None, probability=0.5, seed=seed, status=500))
        for _ in range(30):
            try:
                once.put_object(Bucket=bucket, Key="key", Body=b"")
            except ClientError as error:
                assert error.response["Error"]["Code"] == "InternalError"
        return [status == 500 for status in _statuses(proxy, "PUT")]

    first = hits(seed=1)
    assert 5 <= sum(first) <= 25
    assert hits(seed=1) == first != hits(seed=2)


def test_a_request_whose_upstream_breaks_off_is_sent_once_and_written_down():
    num_connections = 0

    def accept() -> None:
        nonlocal num_connections
        while True:
            connection, _ = upstream.accept()
            if connection.recv(65536) == b"":
                return connection.close()
            num_connections += 1
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as upstream:
        address = upstream.getsockname()
        thread = threading.Thread(target=accept)
        thread.start()
        with FaultProxy(f"http://127.0.0.1:{address[1]}") as proxy:
            connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
            connection.request("PUT", "/bucket/key", b"")
            with pytest.raises(ConnectionError):
                connection.getresponse()
            connection.close()
        socket.create_connection(address).close()
        thread.join()
    assert num_connections == 1
    assert proxy.requests == (Exchange("PUT", "/bucket/key", "", None, "unreachable"),)


def test_an_unknown_fault_is_refused(proxy):
    with pytest.raises(ValueError, match="unknown fault 'explode'"):
        proxy.add(Rule("explode"))
