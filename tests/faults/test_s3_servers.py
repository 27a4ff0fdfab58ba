"""The S3 servers of the suite keep what they promise to the tests that rely on them."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
import s3fs
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.support.s3 import CephServer, S3Server


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.faults)])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def bucket(server):
    return server.make_bucket(f"test-{uuid.uuid4().hex[:12]}")


def _create(server: S3Server, bucket: str, data: bytes) -> int:
    """The HTTP status of a create-only PUT of one fixed key."""
    try:
        answer = server.client.put_object(Bucket=bucket, Key="record", Body=data, IfNoneMatch="*")
    except ClientError as error:
        answer = error.response
    return answer["ResponseMetadata"]["HTTPStatusCode"]


def test_what_was_put_can_be_got_listed_and_deleted(server, bucket):
    server.put(f"{bucket}/folder/a b+ü.bin", b"1" * 1000)
    server.put(f"{bucket}/folder/empty", b"")
    server.put(f"{bucket}/other", b"2")
    assert server.get(f"{bucket}/folder/a b+ü.bin") == b"1" * 1000
    assert server.list(f"{bucket}/folder/") == [f"{bucket}/folder/a b+ü.bin", f"{bucket}/folder/empty"]
    server.delete(f"{bucket}/folder/empty")
    assert server.list(bucket) == [f"{bucket}/folder/a b+ü.bin", f"{bucket}/other"]


def test_a_create_only_put_of_an_existing_key_is_412_and_changes_nothing(server, bucket):
    assert _create(server, bucket, b"first") == 200
    assert _create(server, bucket, b"second") == 412
    assert server.get(f"{bucket}/record") == b"first"


def test_of_eight_writers_that_create_one_key_at_once_one_wins(server, bucket):
    with ThreadPoolExecutor(8) as writers:
        statuses = list(writers.map(lambda i: _create(server, bucket, b"%d" % i), range(8)))
    assert sorted(statuses) == [200] + [412] * 7
    assert server.get(f"{bucket}/record") == b"%d" % statuses.index(200)


def test_s3fs_needs_only_the_environment(s3_bucket, moto):
    fs = s3fs.S3FileSystem()
    fs.pipe(f"{s3_bucket}/key", b"data")
    assert moto.get(f"{s3_bucket}/key") == b"data"


@pytest.mark.faults
def test_ceph_refuses_a_wrong_secret(ceph: CephServer):
    stranger = boto3.client(
        "s3",
        endpoint_url=ceph.endpoint_url,
        aws_access_key_id=ceph.access_key,
        aws_secret_access_key="wrong",
        region_name="us-east-1",
    )
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.list_buckets()


@pytest.mark.faults
def test_ceph_keeps_every_acknowledged_object_through_kill_9_of_all_daemons(ceph: CephServer):
    bucket = ceph.make_bucket(f"test-{uuid.uuid4().hex[:12]}")
    keys = [f"{bucket}/{i:02}" for i in range(20)]
    for key in keys:
        ceph.put(key, key.encode() * 1000)
    ceph.kill()
    with pytest.raises(EndpointConnectionError):
        ceph.get(keys[0])
    ceph.restart()
    assert ceph.list(bucket) == keys
    assert [ceph.get(key) for key in keys] == [key.encode() * 1000 for key in keys]
