"""Places are checked, writes are whole or absent, and a store's faults end in our bytes or in a clear error."""

import contextlib
import errno
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.errors import ConfigError, InputError, StorageError
from pipelines import storage
from pipelines.storage import (
    FileInfo,
    Location,
    check_apart,
    delete,
    exists,
    expand,
    info,
    list_files,
    locate,
    open_input,
    probe,
    put,
    put_if,
    put_new,
    read_bytes,
    redact,
    redact_options,
)
from tests.support.fault_proxy import FaultProxy, Rule
from tests.support.filesystems import small_disk
from tests.support.s3 import set_s3_env

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture
def proxy(moto, monkeypatch):
    with FaultProxy(moto.endpoint_url) as proxy:
        set_s3_env(monkeypatch, {**moto.env, "AWS_ENDPOINT_URL": proxy.url})
        yield proxy


@pytest.fixture
def bucket(moto, proxy):
    """A bucket that the environment reaches through the proxy; `moto` reaches it directly."""
    return moto.make_bucket(f"test-{uuid.uuid4().hex[:12]}")


def _names(files: list[FileInfo]) -> list[str]:
    return [file.location.name for file in files]


# --- which places may be named


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("/data/x.parquet", "file:///data/x.parquet"),
        ("/data/../x", "file:///x"),
        ("file:///data/x", "file:///data/x"),
        ("local:///data/x", "file:///data/x"),
        ("s3://b/a b+c%2F/ü#?/k", "s3://b/a b+c%2F/ü#?/k"),
        ("s3a://b/folder/", "s3://b/folder"),
        ("gcs://b/k", "gs://b/k"),
        ("az://container/k", "abfs://container/k"),
        ("s3://b/releases/model@v1.2", "s3://b/releases/model@v1.2"),
        ("s3://b/a..b/k", "s3://b/a..b/k"),
    ],
)
def test_a_place_is_normalised_without_changing_what_it_names(uri, wanted):
    assert locate(uri).uri == wanted


def test_relative_and_home_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    assert locate("x/y").path == f"{tmp_path}/x/y"
    assert locate("~/y").path == "/somebody/y"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "empty"),
        ("   ", "empty"),
        (" s3://b/k", "spaces"),
        ("s3://b/k\n", "control"),
        ("s3://b/a\x00b", "control"),
        ("simplecache::file:///etc/passwd", "chained"),
        ("zip://a::http://x/y", "chained"),
        ("http://169.254.169.254/latest", "not allowed"),
        ("https://example.com/x.parquet", "not allowed"),
        ("hf://datasets/x", "not allowed"),
        ("S3://b/k", "not allowed"),
        ("s3:/b/k", "slash missing"),
        ("s3://", "no bucket"),
        ("s3:///k", "no bucket"),
        ("s3://b/../c", "'..'"),
        ("s3://b/%2e%2E/c", "'..'"),
        ("s3://b/..", "'..'"),
        ("file://host/x", "host"),
    ],
)
def test_a_place_that_could_mean_another_one_is_refused(uri, says):
    with pytest.raises(InputError, match=says):
        locate(uri)


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/k",
        f"s3://user:{SECRET}@bucket/k",
        f"s3://user:{SECRET}",
        f"simplecache::s3://user:{SECRET}@bucket/k",
        f"ftp://user:{SECRET}@host/k",
    ],
)
def test_credentials_in_an_address_are_refused_and_never_repeated(uri):
    with pytest.raises(InputError) as refused:
        locate(uri)
    for part in (SECRET, *SECRET.split("/"), "AKIAIOSFODNN7EXAMPLE"):
        assert part not in str(refused.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254",
        "http://169.254.170.2:80/x",
        "http://2852039166",
        "http://0xa9fea9fe/",
        "http://[fe80::1]",
        "http://[::ffff:169.254.169.254]/",
        "http://[fd00:ec2::254]",
    ],
)
def test_an_endpoint_that_hands_out_the_machines_credentials_is_refused(endpoint, monkeypatch):
    for options in ({"endpoint_url": endpoint}, {"client_kwargs": {"endpoint_url": endpoint}}):
        with pytest.raises(InputError, match="link-local"):
            locate("s3://b/k", options)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(InputError, match="link-local"):
        locate("s3://b/k")


def test_an_ordinary_endpoint_is_accepted():
    for endpoint in ("http://127.0.0.1:9000", "https://minio.internal", "http://10.0.0.7"):
        assert locate("s3://b/k", {"endpoint_url": endpoint}).options == {"endpoint_url": endpoint}


# --- secrets


def test_redact_leaves_the_versions_of_a_registry_readable():
    assert redact("the model is registry://ranker@v1") == "the model is registry://ranker@v1"
    assert redact("registry://user:secret@host s3://key@bucket") == "registry://***@host s3://***@bucket"


def test_redact_takes_out_everything_that_looks_like_a_credential(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hub-token-from-the-environment")
    text = (
        f"s3://k:{SECRET}@b/x AKIAIOSFODNN7EXAMPLE hf_abcdefghijklmnopqrst ?X-Amz-Signature=0ff1ce&a=1 ?token=t0k3n"
        " Authorization: Bearer abc hub-token-from-the-environment"
    )
    shown = redact(text, {"client_kwargs": {"aws_secret_access_key": "nested-secret"}})
    for secret in (SECRET, "AKIAIOSFODNN7EXAMPLE", "hf_abcdefghij", "0ff1ce", "t0k3n", "abc", "hub-token"):
        assert secret not in shown
    assert "a=1" in shown


def test_values_of_secret_options_are_taken_out_however_deep():
    options = {"key": "my-key-id", "client_kwargs": {"aws_secret_access_key": SECRET, "region_name": "eu-1"}}
    assert redact(f"bad {SECRET} in eu-1", options) == "bad *** in eu-1"
    assert redact_options(options) == {
        "key": "***",
        "client_kwargs": {"aws_secret_access_key": "***", "region_name": "eu-1"},
    }
    assert SECRET not in repr(Location("s3://b/k", options))


def test_connection_strings_and_credentials_inside_other_options_are_not_shown(monkeypatch):
    connection = f"DefaultEndpointsProtocol=https;AccountName=me;accountkey={SECRET}==;EndpointSuffix=core"
    options = {
        "connection_string": connection,
        "client_kwargs": {"endpoint_url": f"https://user:{SECRET}@store:9000", "proxy_auth": SECRET},
        "endpoints": [f"https://user:{SECRET}@store", 9000],
        "anon": False,
    }
    assert redact_options(options) == {
        "connection_string": "***",
        "client_kwargs": {"endpoint_url": "https://***@store:9000", "proxy_auth": "***"},
        "endpoints": ["https://***@store", 9000],
        "anon": False,
    }
    assert redact(f"no account in {connection}", options) == "no account in ***"
    assert redact(connection) == "DefaultEndpointsProtocol=https;AccountName=me;accountkey=***;EndpointSuffix=core"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    assert redact(f"no account in {connection}") == "no account in ***"


def test_an_error_of_a_store_shows_the_place_and_no_secret(monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.0)
    options = {
        "key": "AKIAIOSFODNN7EXAMPLE",
        "secret": SECRET,
        "endpoint_url": f"http://127.0.0.1:1/{SECRET}",
    }
    with pytest.raises(StorageError, match=r"could not write s3://b/k .*run the same command again") as failed:
        put(locate("s3://b/k", options), b"x")
    assert SECRET not in str(failed.value)
    assert "AKIA" not in str(failed.value)
    assert failed.value.__cause__ is None  # the original error would show what was taken out
    assert "[Errno None]" not in str(failed.value)


# --- local disks


def test_put_replaces_and_put_new_keeps_what_is_there(tmp_path):
    place = locate(f"{tmp_path}/new/folder/x")
    assert not exists(place)
    assert put_new(place, b"first") == b"first"
    assert put_new(place, b"second") == b"first"
    put(place, b"third")
    assert read_bytes(place) == b"third"
    assert os.listdir(tmp_path / "new" / "folder") == ["x"]
    delete([place, place / "never was"])
    assert not exists(place)


def test_of_eight_writers_one_wins_and_all_see_its_bytes(tmp_path):
    place = locate(f"{tmp_path}/x")
    start = threading.Barrier(8)

    def write(writer: int) -> bytes:
        start.wait()
        return put_new(place, b"%d" % writer * 100_000)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            seen = set(pool.map(write, range(8)))
            assert seen == {read_bytes(place)}
            assert os.listdir(tmp_path) == ["x"]
            delete([place])


def test_put_if_replaces_only_what_it_was_told_is_there(tmp_path):
    place = locate(f"{tmp_path}/new/x")
    assert put_if(place, b"1", None) == b"1"
    assert put_if(place, b"2", None) == b"1"
    assert put_if(place, b"2", b"1") == b"2"
    assert put_if(place, b"3", b"1") == b"2" == read_bytes(place)
    delete([place])
    with pytest.raises(FileNotFoundError):
        put_if(place, b"3", b"2")


def count_up(place: Location, times: int) -> int:
    """Adds 1 to the number in a file so often; returns how often another writer was quicker."""
    lost = 0
    for _ in range(times):
        while True:
            before = read_bytes(place)
            body = b"%d %s" % (int(before.split()[0]) + 1, uuid.uuid4().hex.encode())
            if put_if(place, body, before) == body:
                break
            lost += 1
    return lost


def test_no_conditional_replacement_is_lost_among_writers(tmp_path, monkeypatch):
    place = locate(f"{tmp_path}/x")
    put(place, b"0 ")
    replace, random = os.replace, Random(0)

    def late(source, target):
        time.sleep(random.random() / 100)
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", late)
    with ThreadPoolExecutor(4) as pool:
        lost = sum(pool.map(lambda _: count_up(place, 10), range(4)))
    assert read_bytes(place).split()[0] == b"40"
    assert lost > 0  # or it was no race


@pytest.mark.parametrize("write", [put, put_new])
def test_a_full_disk_is_named_and_keeps_no_part_of_the_file(write):
    with small_disk(megabytes=1) as folder:
        write(locate(f"{folder}/fits"), b"x")
        with pytest.raises(StorageError, match=r"too-much: .*no space is left there: free some") as full:
            write(locate(f"{folder}/too-much"), b"x" * 2_000_000)
        assert full.value.errno == errno.ENOSPC
        assert os.listdir(folder) == ["fits"]


@pytest.mark.parametrize("write", [put, put_new])
def test_a_place_that_cannot_be_written_is_a_storage_error_and_leaves_nothing(write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"could not write file://.*file/below"):
        write(locate(f"{tmp_path}/file/below"), b"x")
    (tmp_path / "folder").mkdir()
    if write is put:  # create-only sees that the name is taken, and then that it is no file
        with pytest.raises(StorageError, match="could not write"):
            write(locate(f"{tmp_path}/folder"), b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_version_of_a_file_changes_with_its_content(tmp_path):
    place = locate(f"{tmp_path}/x")
    put(place, b"one")
    before = info(place)
    assert before is not None
    assert before.num_bytes == 3
    os.utime(tmp_path / "x", ns=(1, 1))
    assert info(place) != before
    assert info(locate(str(tmp_path))) is None


def test_a_missing_file_is_no_error_to_look_up_and_one_to_read(tmp_path):
    assert info(locate(f"{tmp_path}/none")) is None
    assert list_files(locate(f"{tmp_path}/none")) == []
    with pytest.raises(FileNotFoundError):
        read_bytes(locate(f"{tmp_path}/none"))


# --- what a path, a folder or a glob names


def _touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_glob_leaves_out_what_lies_in_folders_of_metadata(tmp_path):
    _touch(tmp_path, "_in/a.parquet", "_in/b/c.parquet", "_in/_delta_log/d.parquet", "_in/b/.x/y/e.parquet")
    assert _names(expand(locate(f"{tmp_path}/_in/**/*.parquet"), ".parquet")) == ["a.parquet", "c.parquet"]


@pytest.mark.parametrize(
    ("uri", "output", "are_apart"),
    [
        ("s3://b/data/**/*.parquet", "s3://b/data/out", False),
        ("s3://b/data/**/*.parquet", "s3://b/data/_out", True),
        ("s3://b/data/**/*.parquet", "s3://b/out", True),
        ("s3://b/data/*", "s3://b/data/out", False),
        ("s3://b/data/*", "s3://b/data/out/x", False),
        ("s3://b/data/*/results", "s3://b/data/out", False),
        ("s3://b/data/*.parquet", "s3://b/data/out", True),
        ("s3://b/data/day-*", "s3://b/data/out", True),
        ("s3://b/data/in/*.parquet", "s3://b/data", False),
        ("s3://b/data[1]/x", "s3://b/data[1]/x/out", False),
        ("s3://b/data", "s3://b/data/out", False),
        ("s3://b/data", "s3://b/data-out", True),
    ],
)
def test_an_output_that_an_input_could_name_is_refused(uri, output, are_apart):
    with contextlib.nullcontext() if are_apart else pytest.raises(ConfigError, match="lie inside each other"):
        check_apart(locate(output), [None, uri])


def test_a_folder_names_its_data_files_and_not_the_metadata_of_tools(tmp_path):
    _touch(tmp_path, "b.parquet", "a/c.parquet", "_SUCCESS", ".a.parquet.crc", "_tmp/d.parquet", ".x/e.parquet")
    _touch(tmp_path, "readme.txt", "_metadata.parquet", "a/.hidden.parquet")
    assert _names(expand(locate(str(tmp_path)), ".parquet")) == ["c.parquet", "b.parquet"]


def test_a_hidden_folder_that_is_named_itself_is_read(tmp_path):
    _touch(tmp_path, "_staging/a.parquet")
    assert _names(expand(locate(f"{tmp_path}/_staging"), ".parquet")) == ["a.parquet"]


def test_a_glob_takes_files_of_any_suffix_and_folders_whole_and_each_file_once(tmp_path):
    _touch(tmp_path, "d1/a.pq", "d1/b.parquet", "d2/c.parquet", "d2/note.txt", "_x.parquet")
    assert _names(expand(locate(f"{tmp_path}/d*"), ".parquet")) == ["b.parquet", "c.parquet"]
    assert _names(expand(locate(f"{tmp_path}/d1/*.pq"), ".parquet")) == ["a.pq"]
    assert _names(expand(locate(f"{tmp_path}/**"), ".parquet")).count("b.parquet") == 1
    assert _names(expand(locate(f"{tmp_path}/d2/*"), ".parquet")) == ["c.parquet", "note.txt"]


def test_a_file_that_is_named_whole_needs_no_suffix_and_may_hold_glob_characters(tmp_path):
    _touch(tmp_path, "part[1]?", "part1x")
    assert _names(expand(locate(f"{tmp_path}/part[1]?"), ".parquet")) == ["part[1]?"]


def test_links_to_files_count_as_the_files(tmp_path):
    _touch(tmp_path, "blobs/abc")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").symlink_to(tmp_path / "blobs" / "abc")
    for uri in (f"{tmp_path}/data", f"{tmp_path}/data/*", f"{tmp_path}/data/a.parquet"):
        [file] = expand(locate(uri), ".parquet")
        assert file == info(locate(f"{tmp_path}/data/a.parquet"))
        assert file.num_bytes == 1


def test_a_link_to_nothing_is_refused_instead_of_left_out(tmp_path):
    _touch(tmp_path, "a.parquet")
    (tmp_path / "b.parquet").symlink_to(tmp_path / "gone")
    for uri in (str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(InputError, match=r"b\.parquet is a link to a file that does not exist"):
            expand(locate(uri), ".parquet")


@pytest.mark.parametrize("name", ["", "/none", "/none/*.parquet", "/*.pq"])
def test_nothing_to_read_is_an_error_that_names_the_place(tmp_path, name):
    _touch(tmp_path, "readme.txt")
    with pytest.raises(InputError, match=rf"no \.parquet file at file://{tmp_path}"):
        expand(locate(f"{tmp_path}{name}"), ".parquet")


# --- object stores

ODD_KEYS = ("a b+c.parquet", "%2F.parquet", "ü#?.parquet", "x[1].parquet", "/two-slashes.parquet", "=&'.parquet")


def test_odd_keys_are_listed_and_read_exactly_once(moto, s3_bucket):
    for key in ODD_KEYS:
        moto.put(f"{s3_bucket}/in/{key}", key.encode())
    moto.put(f"{s3_bucket}/in-other/sibling.parquet", b"")
    found = expand(locate(f"s3://{s3_bucket}/in"), ".parquet")
    assert sorted(read_bytes(file.location).decode() for file in found) == sorted(ODD_KEYS)
    for file in found:
        assert file.location.uri == f"s3://{s3_bucket}/in/{read_bytes(file.location).decode()}"
        [named] = expand(locate(file.location.uri), ".parquet")
        assert named == file
        with open_input(file) as source:
            assert source.read() == read_bytes(file.location)


def test_odd_keys_can_be_written_and_deleted(moto, s3_bucket):
    folder = locate(f"s3://{s3_bucket}/out")
    for key in ODD_KEYS[:4]:
        put(folder / key, b"1")
        assert put_new(folder / key, b"2") == b"1"
    assert moto.list(f"{s3_bucket}/out") == sorted(f"{s3_bucket}/out/{key}" for key in ODD_KEYS[:4])
    delete(file.location for file in list_files(folder))
    assert moto.list(s3_bucket) == []


def test_marks_of_folders_in_a_bucket_are_not_files(moto, s3_bucket):
    for key in ("in/", "in/sub/", "in/table.parquet/"):
        moto.put(f"{s3_bucket}/{key}", b"")
    moto.put(f"{s3_bucket}/in/table.parquet/part-0.parquet", b"x")
    moto.put(f"{s3_bucket}/in/_SUCCESS", b"")
    for uri in (f"s3://{s3_bucket}/in", f"s3://{s3_bucket}/in/", f"s3://{s3_bucket}/in/*", f"s3://{s3_bucket}/**"):
        assert _names(expand(locate(uri), ".parquet")) == ["part-0.parquet"]


@pytest.mark.parametrize("write", [put, put_new, probe])
def test_a_missing_bucket_is_a_storage_error_that_says_so(s3_env, write):
    arguments = () if write is probe else (b"x",)
    with pytest.raises(StorageError, match="check that the bucket or the folder exists"):
        write(locate("s3://no-such-bucket-here/k"), *arguments)


def test_of_eight_writers_to_a_bucket_one_wins_and_all_see_its_bytes(moto, s3_bucket):
    place = locate(f"s3://{s3_bucket}/x")
    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(lambda writer: put_new(place, b"%d" % writer), range(8)))
    assert seen == {moto.get(f"{s3_bucket}/x")}


@pytest.mark.faults  # moto looks at the condition and stores afterwards
def test_no_conditional_replacement_is_lost_among_writers_to_a_bucket(ceph, monkeypatch):
    set_s3_env(monkeypatch, ceph.env)
    place = locate(f"s3://{ceph.make_bucket('conditional')}/x")
    assert put_if(place, b"0 ", None) == b"0 "
    assert put_if(place, b"other", b"1 ") == b"0 "
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: count_up(place, 4), range(3)))
    assert read_bytes(place).split()[0] == b"12"


def test_a_store_is_probed_without_leaving_anything_behind(moto, s3_bucket, tmp_path):
    assert probe(locate(f"s3://{s3_bucket}/out")) == "atomic"
    assert moto.list(s3_bucket) == []
    assert probe(locate(str(tmp_path))) == "atomic"
    assert os.listdir(tmp_path) == []


# --- faults of a store


@pytest.mark.parametrize(
    "rule",
    [
        Rule("status", method="PUT", status=503, times=2),
        Rule("status", method="PUT", status=500, times=2),
        Rule("reset_before", method="PUT", times=3),
        Rule("reset_after", method="PUT"),
        Rule("duplicate", method="PUT"),
        Rule("status", method="PUT", status=409),
    ],
    ids=lambda rule: f"{rule.fault}-{rule.status}",
)
def test_create_only_survives_a_fault_and_knows_its_own_bytes(moto, proxy, bucket, rule):
    proxy.add(rule)
    assert put_new(locate(f"s3://{bucket}/k"), b"mine") == b"mine"
    assert moto.get(f"{bucket}/k") == b"mine"
    assert [seen.fault for seen in proxy.requests if seen.method == "PUT"].count(rule.fault) == rule.times


def test_a_lost_answer_to_create_only_is_not_a_failure_and_not_a_second_object(moto, proxy, bucket):
    proxy.add(Rule("reset_after", method="PUT"))
    assert put_new(locate(f"s3://{bucket}/k"), b"mine") == b"mine"
    puts = [seen.status for seen in proxy.requests if seen.method == "PUT"]
    assert puts[0] == 200  # stored at once, the answer was lost
    assert set(puts[1:]) <= {412}  # what the client repeats meets its own object


@pytest.mark.parametrize("rule", [None, Rule("status", method="PUT", status=412), Rule("reset_after", method="PUT")])
def test_create_only_returns_the_bytes_of_the_writer_that_came_first(moto, proxy, bucket, rule):
    moto.put(f"{bucket}/k", b"theirs")
    if rule is not None:
        proxy.add(rule)  # a bare 412, as stores other than AWS send it
    assert put_new(locate(f"s3://{bucket}/k"), b"mine") == b"theirs"
    assert moto.get(f"{bucket}/k") == b"theirs"


@pytest.mark.parametrize(
    "rule",
    [
        Rule("status", method="PUT", status=503),
        Rule("reset_after", method="PUT"),
        Rule("duplicate", method="PUT"),
        Rule("status", method="PUT", status=409),
        Rule("status", method="PUT", status=412),
        Rule("status", method="PUT", status=501),  # the store knows no such condition
    ],
    ids=lambda rule: f"{rule.fault}-{rule.status}",
)
def test_a_conditional_replacement_survives_a_fault_and_knows_its_own_bytes(moto, proxy, bucket, rule):
    moto.put(f"{bucket}/k", b"old")
    proxy.add(rule)
    assert put_if(locate(f"s3://{bucket}/k"), b"mine", b"old") == b"mine"
    assert moto.get(f"{bucket}/k") == b"mine"


def test_a_conditional_replacement_returns_the_bytes_of_the_writer_that_came_between(moto, bucket, monkeypatch):
    moto.put(f"{bucket}/k", b"old")
    real = storage._put_options

    def come_between(location):
        moto.put(f"{bucket}/k", b"theirs")
        return real(location)

    monkeypatch.setattr(storage, "_put_options", come_between)
    assert put_if(locate(f"s3://{bucket}/k"), b"mine", b"old") == b"theirs"
    assert moto.get(f"{bucket}/k") == b"theirs"


def test_a_store_without_create_only_gets_a_plain_put_unless_something_is_there(moto, proxy, bucket):
    proxy.add(Rule("status", method="PUT", path="/k$", status=501))
    assert put_new(locate(f"s3://{bucket}/k"), b"mine") == b"mine"
    proxy.add(Rule("status", method="PUT", path="/k$", status=501))
    assert put_new(locate(f"s3://{bucket}/k"), b"other") == b"mine"
    proxy.clear()
    proxy.add(Rule("status", method="PUT", path="_probe", status=501, skip=1, times=None))
    assert probe(locate(f"s3://{bucket}")) == "unsupported"


@pytest.mark.parametrize(
    "rule",
    [
        Rule("truncate", method="GET", times=2),
        Rule("short", method="GET", times=2),
        Rule("reset_before", method="GET", times=2),
        Rule("status", method="GET", status=503, times=2),
    ],
    ids=lambda rule: rule.fault,
)
def test_a_body_that_is_cut_is_noticed_and_read_again(moto, proxy, bucket, rule):
    table = pa.table({"n": range(200_000)})
    data = pa.BufferOutputStream()
    pq.write_table(table, data)
    moto.put(f"{bucket}/t.parquet", data.getvalue().to_pybytes())
    file = info(locate(f"s3://{bucket}/t.parquet"))
    assert file is not None
    proxy.add(rule)
    assert read_bytes(file.location) == data.getvalue().to_pybytes()
    proxy.add(rule)
    with open_input(file) as source:
        assert pq.read_table(source).equals(table)
    assert [seen.fault for seen in proxy.requests].count(rule.fault) == 2 * 2


@pytest.mark.parametrize("fault", ["short", "truncate"])
def test_a_body_that_is_always_cut_ends_in_a_storage_error(moto, proxy, bucket, fault, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.3)
    moto.put(f"{bucket}/k", b"x" * 1000)
    proxy.add(Rule(fault, method="GET", times=None))
    with pytest.raises(StorageError, match=rf"could not read s3://{bucket}/k .*run the same command again"):
        read_bytes(locate(f"s3://{bucket}/k"))
    with pytest.raises(StorageError, match=rf"could not read s3://{bucket}/k"):
        open_input(FileInfo(locate(f"s3://{bucket}/k"), 1000, "")).read()


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule("reset_before", times=None), "run the same command again when the store answers"),
        (Rule("status", status=500, times=None), "run the same command again when the store answers"),
        (Rule("status", status=403, times=None), "check the credentials and the rights"),
        (Rule("status", status=411, times=None), "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    ],
    ids=["reset", "500", "403", "411"],
)
def test_a_store_that_keeps_refusing_ends_in_an_error_that_says_what_to_do(proxy, bucket, monkeypatch, rule, says):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.3)
    proxy.add(rule)
    place = locate(f"s3://{bucket}/k")
    patient = [lambda: put_new(place, b"x"), lambda: read_bytes(place)]
    quick = [
        lambda: put(place, b"x"),
        lambda: info(place),
        lambda: list_files(locate(f"s3://{bucket}/folder")),
        lambda: expand(locate(f"s3://{bucket}/*.parquet"), ".parquet"),
        lambda: delete([place]),
        lambda: probe(locate(f"s3://{bucket}/folder")),
    ]
    for work in [*patient, *(quick if rule.status in (403, 411) else [])]:
        with pytest.raises(StorageError, match=says) as failed:
            work()
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(failed.value)


def test_an_outage_shorter_than_the_limit_is_survived_with_one_put_of_content(moto, proxy, bucket):
    proxy.add(Rule("reset_before", times=12))
    put(locate(f"s3://{bucket}/k"), b"x")
    assert moto.get(f"{bucket}/k") == b"x"
    assert [seen.status for seen in proxy.requests if seen.method == "PUT" and seen.fault is None] == [200]
