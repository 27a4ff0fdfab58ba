import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub.errors import LocalEntryNotFoundError

from crossenc.checkpoint import (
    check_folder,
    fetch,
    file_digests,
)
from crossenc.errors import CheckpointError, InputError, StorageError
from crossenc.testing import tiny_checkpoint

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("original") / "bert")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def memory_uri(original: Path) -> str:
    """The checkpoint in fsspec's in-memory store, with files beside it that are none of a checkpoint's."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs.clear()
    filesystem.put(str(original), "/models/bert", recursive=True)
    filesystem.pipe("/models/bert/pytorch_model.bin", b"pickle")
    filesystem.pipe("/models/bert/optimizer.pt", b"pickle")
    filesystem.pipe("/models/bert/checkpoint-10/model.safetensors", b"older")
    return "memory://models/bert"


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# fetch


def test_a_local_folder_is_used_where_it_is(original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(original, cache_dir=cache) == original
    monkeypatch.chdir(original.parent)
    assert fetch("bert", cache_dir=cache) == original.absolute()
    monkeypatch.setenv("HOME", str(original.parent))
    assert fetch("~/bert", cache_dir=cache) == original
    assert not cache.exists()


def test_a_uri_is_copied_once_without_pickles_and_subfolders(
    memory_uri: str, original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(memory_uri, cache_dir=cache)
    assert folder.parent == cache
    assert names(folder) == FILES
    assert file_digests(folder) == file_digests(original)
    monkeypatch.setattr(MemoryFileSystem, "get_file", None)  # a second copy would fail
    assert fetch(memory_uri + "/", cache_dir=cache) == folder


def test_the_cache_folder_comes_from_the_environment(
    memory_uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSENC_CACHE", str(cache))
    assert fetch(memory_uri).parent == cache


def test_a_changed_file_is_copied_again(memory_uri: str, cache: Path) -> None:
    before = fetch(memory_uri, cache_dir=cache)
    filesystem = fsspec.filesystem("memory")
    config = json.loads(filesystem.cat("/models/bert/config.json"))
    filesystem.pipe("/models/bert/config.json", json.dumps({**config, "note": 1}).encode())
    after = fetch(memory_uri, cache_dir=cache)
    assert after != before
    assert json.loads((after / "config.json").read_text())["note"] == 1
    assert names(before) == FILES


def test_a_file_uri_is_copied_to_the_cache(original: Path, cache: Path) -> None:
    assert file_digests(fetch(f"file://{original}", cache_dir=cache)) == file_digests(original)


def test_a_checkpoint_comes_from_s3(original: Path, cache: Path, s3_bucket: str) -> None:
    fsspec.filesystem("s3").put(str(original), f"{s3_bucket}/models/bert", recursive=True)
    folder = fetch(f"s3://{s3_bucket}/models/bert", cache_dir=cache)
    assert file_digests(folder) == file_digests(original)
    with pytest.raises(InputError, match="no folder s3://"):
        fetch(f"s3://{s3_bucket}/models/none", cache_dir=cache)
    with pytest.raises(InputError, match="no folder s3://"):
        fetch("s3://no-such-bucket-here/models", cache_dir=cache)


def test_concurrent_callers_copy_once_and_get_the_same_folder(
    memory_uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counting(self: MemoryFileSystem, remote: str, local: str, **options: Any) -> None:
        copied.append(remote)
        get_file(self, remote, local, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counting)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: fetch(memory_uri, cache_dir=cache), range(8)))
    assert len(set(folders)) == 1
    assert len(copied) == len(FILES)


def test_a_copy_that_was_killed_is_started_again(memory_uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        get_file = MemoryFileSystem.get_file

        def dying(self: MemoryFileSystem, remote: str, local: str, **options: Any) -> None:
            if remote.endswith("model.safetensors"):
                Path(local).write_bytes(b"half a fi")
                raise KeyboardInterrupt
            get_file(self, remote, local, **options)

        patched.setattr(MemoryFileSystem, "get_file", dying)
        with pytest.raises(KeyboardInterrupt):
            fetch(memory_uri, cache_dir=cache)
    assert [path.name for path in cache.iterdir() if path.is_dir() and path.suffix != ".partial"] == []
    assert names(fetch(memory_uri, cache_dir=cache)) == FILES


def test_a_short_read_is_an_error_and_leaves_no_folder(
    memory_uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: MemoryFileSystem, remote: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(self.cat(remote)[:-1])

    monkeypatch.setattr(MemoryFileSystem, "get_file", short)
    with pytest.raises(StorageError, match=r"config.json gave \d+ of \d+ bytes"):
        fetch(memory_uri, cache_dir=cache)
    assert [path for path in cache.iterdir() if path.is_dir() and path.suffix != ".partial"] == []


def test_a_source_that_changes_under_the_copy_is_an_error(
    memory_uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file = MemoryFileSystem.get_file

    def overtaken(self: MemoryFileSystem, remote: str, local: str, **options: Any) -> None:
        get_file(self, remote, local, **options)
        self.pipe("/models/bert/config.json", b"{}")

    monkeypatch.setattr(MemoryFileSystem, "get_file", overtaken)
    with pytest.raises(StorageError, match="changed while it was copied"):
        fetch(memory_uri, cache_dir=cache)


@pytest.mark.parametrize(
    "source",
    [
        "./none",
        "/no/such/folder",
        "a/b/c",
        "",
        "two words",
        "owner/name@",
        "-x/name",
        "ftp://host/model",
        "s3a://b/m",
    ],
)
def test_a_source_of_no_known_form_is_refused_with_the_three_forms(source: str, cache: Path) -> None:
    with pytest.raises(InputError, match=r"folder that exists, a URI .* or a hub id"):
        fetch(source, cache_dir=cache)


@pytest.mark.parametrize(
    "source",
    [
        "s3://AKIA:hunter2@bucket/model",
        "s3://AKIA:hun/ter2@bucket/model",
        "s3://hunter2@bucket/model",
        "s3://bucket/model?token=hunter2",
        "simplecache::s3://bucket/hunter2",
        "AKIA:hunter2@bucket",
        "zip://hunter2:x@bucket",
    ],
)
def test_a_source_with_a_secret_is_refused_without_repeating_it(source: str, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        fetch(source, cache_dir=cache)
    assert "ter2" not in str(caught.value)


def test_a_missing_folder_behind_a_uri_is_an_input_error(memory_uri: str, cache: Path) -> None:
    with pytest.raises(InputError, match="no folder memory://models/none"):
        fetch("memory://models/none", cache_dir=cache)
    with pytest.raises(InputError, match="no checkpoint files directly in memory://models"):
        fetch("memory://models", cache_dir=cache)


def test_a_hub_id_asks_the_hub_for_safetensors_and_settings_only(
    original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def answer(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(original)

    monkeypatch.setattr("crossenc.checkpoint.snapshot_download", answer)
    assert fetch("owner/name@v1.0/rc", cache_dir=cache) == original
    assert (asked["repo"], asked["revision"], asked["cache_dir"]) == ("owner/name", "v1.0/rc", cache)
    assert set(asked["allow_patterns"]) == {"*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"}
    fetch("name", revision="abc")
    assert (asked["repo"], asked["revision"]) == ("name", "abc")
    with pytest.raises(InputError, match="give one"):
        fetch("owner/name@one", revision="two")


def test_a_hub_id_without_an_owner_may_be_one_of_cross_encoders(
    original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def answer(repo: str, cache_dir: object, **_: Any) -> str:
        asked.append((repo, cache_dir))
        if "/" not in repo:
            raise LocalEntryNotFoundError("unknown")
        return str(original)

    monkeypatch.setattr("crossenc.checkpoint.snapshot_download", answer)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    assert fetch("ms-marco") == original
    assert asked == [("ms-marco", str(tmp_path)), ("cross-encoder/ms-marco", str(tmp_path))]


def test_an_unreachable_hub_is_a_storage_error_that_doubts_the_spelling(cache: Path) -> None:
    with pytest.raises(StorageError, match="no folder here, and the hub could not be reached: check the spelling"):
        fetch("models/mispelt", cache_dir=cache)


def test_a_model_in_the_hub_cache_loads_offline(original: Path, cache: Path) -> None:
    repo = cache / "models--owner--name"
    shutil.copytree(original, repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    assert fetch("owner/name", cache_dir=cache) == repo / "snapshots" / "0123abc"


# folders


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        check_folder(checkpoint)


def test_pickled_weights_alone_are_refused_with_the_remedy(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin.*convert to model.safetensors"):
        fetch(checkpoint)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"", "empty file"),
        (b"\x80\x04\x95pickle, not safetensors", "not a whole safetensors file"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_something_else_is_named(checkpoint: Path, name: str, content: bytes, what: str) -> None:
    (checkpoint / name).write_bytes(content)
    expected = what if name.endswith(".safetensors") or "whole" not in what else "not JSON"
    with pytest.raises(CheckpointError, match=f"{name} is not .*{expected}|{name} is {expected}"):
        check_folder(checkpoint)


@pytest.mark.parametrize("num_bytes_lost", [1, 5000])
def test_truncated_weights_are_refused(checkpoint: Path, num_bytes_lost: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-num_bytes_lost])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        check_folder(checkpoint)


def test_a_missing_part_of_sharded_weights_is_named(checkpoint: Path) -> None:
    edit_json(checkpoint / "model.safetensors.index.json", weight_map={"w": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        check_folder(checkpoint)


def test_digests_are_those_of_the_checkpoints_files(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("words")
    (checkpoint / "pytorch_model.bin").write_text("pickle")
    digests = file_digests(checkpoint)
    assert list(digests) == sorted(FILES)
    assert digests["config.json"] == sha256((checkpoint / "config.json").read_bytes()).hexdigest()


# tiny checkpoints


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "electra", "modernbert"])
def test_a_tiny_checkpoint_is_a_function_of_its_seed(family: Any, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (
        tiny_checkpoint(tmp_path / name, family, seed=seed) for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert file_digests(first) == file_digests(again)
    assert file_digests(first)["model.safetensors"] != file_digests(other)["model.safetensors"]
    check_folder(first)


def test_a_tiny_checkpoint_is_the_same_in_another_process(original: Path, tmp_path: Path) -> None:
    code = f"from crossenc.testing import tiny_checkpoint; tiny_checkpoint({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert file_digests(tmp_path) == file_digests(original)
