"""The registry: versions that never change, one history among all writers, and a pointer that follows it."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crossenc.errors import InputError, RunConflictError, StorageError
from pipelines import registry
from pipelines.registry import current, history, names, promote, read_version, resolve, rollback, store_version, verify
from pipelines.registry import versions as list_versions
from pipelines.storage import Location, delete, list_files, locate, put, read_bytes
from tests.support import registry_driver
from tests.support.fault_proxy import FaultProxy, Rule
from tests.support.registry_driver import make_model
from tests.support.s3 import set_s3_env


@pytest.fixture
def place(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "registry"))


@pytest.fixture
def store(tmp_path: Path):
    """Stores versions of `ranker`, each with weights of its own."""

    def store(place: Location, *versions: str, **settings) -> None:
        for version in versions:
            model = make_model(tmp_path / "models" / version, version)
            settings = {"parent": None, "facts": {}} | settings
            store_version(place, "ranker", version, {"model": model}, **settings)

    return store


def move(place: Location, *steps: str) -> list[str | None]:
    """Promotes `version`, or rolls back with `-` or `-version`; the version that is current after each step."""
    seen = []
    for number, step in enumerate(steps):
        key = f"step {len(history(place, 'ranker'))}, {number}"
        if step.startswith("-"):
            rollback(place, "ranker", to=step[1:] or None, reason="worse", key=key)
        else:
            promote(place, "ranker", step, reason="better", key=key)
        seen.append(pointer(place)["version"])
        assert current(place, "ranker").version == seen[-1]
    return seen


def pointer(place: Location) -> dict:
    return json.loads(read_bytes(place / "ranker/current.json"))


# --- versions


def test_a_version_has_all_files_with_their_digests_and_what_was_said_of_it(place, tmp_path):
    model, judged = make_model(tmp_path / "model", "w"), tmp_path / "evaluation"
    (judged / "deep").mkdir(parents=True)
    (judged / "deep" / "report.html").write_text("<p>")
    (tmp_path / "model" / ".hidden").write_text("stays")
    folders = {"model": model, "evaluation": locate(str(judged))}
    made = store_version(place, "ranker", "v1", folders, parent="v0", facts={"value": 0.5})
    assert read_version(place, "ranker", "v1") == made == list_versions(place, "ranker")[0]
    assert (made.parent, made.facts, made.source) == ("v0", {"value": 0.5}, "registry://ranker@v1")
    paths = ["evaluation/deep/report.html", "model/README.md", "model/config.json", "model/model.safetensors"]
    assert [file.path for file in made.files] == paths
    # printf w | sha256sum
    assert made.model_digests["model.safetensors"] == "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"
    verify(place, made)


def test_a_version_is_stored_once_and_keeps_its_facts(place, store):
    store(place, "v1", facts={"seconds": 1})
    before = [(file.location, file.version) for file in list_files(place)]
    store(place, "v1", facts={"seconds": 2})
    assert read_version(place, "ranker", "v1").facts == {"seconds": 1}
    assert [(file.location, file.version) for file in list_files(place)] == before


def test_another_content_under_the_same_version_is_refused(place, store, tmp_path):
    store(place, "v1")
    other = make_model(tmp_path / "other", "other")
    with pytest.raises(RunConflictError, match="versions never change: take another version name"):
        store_version(place, "ranker", "v1", {"model": other}, parent=None, facts={})
    more = make_model(tmp_path / "more", "v1")
    put(more / "vocab.txt", b"more")
    with pytest.raises(RunConflictError, match="holds another content already"):
        store_version(place, "ranker", "v1", {"model": more}, parent=None, facts={})


def test_what_a_killed_writer_of_another_model_left_is_not_taken_into_a_version(place, store):
    put(place / "ranker/versions/v1/model/tokenizer.json", b"{}")
    with pytest.raises(RunConflictError, match=r"model/tokenizer\.json is not of this version"):
        store(place, "v1")
    assert list_versions(place, "ranker") == ()


def test_a_folder_without_a_checkpoint_is_no_version(place, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no checkpoint"):
        store_version(place, "ranker", "v1", {"model": locate(str(tmp_path / "empty"))}, parent=None, facts={})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "-a", "_a", "a b", "a\n", "ä", "a@b", "a" * 101, "/a"])
def test_names_that_are_no_safe_folder_are_refused(place, tmp_path, name):
    folders = {"model": make_model(tmp_path / "model", "w")}
    with pytest.raises(InputError, match="cannot be a model name"):
        store_version(place, name, "v1", folders, parent=None, facts={})
    with pytest.raises(InputError, match="cannot be a version"):
        store_version(place, "ranker", name, folders, parent=None, facts={})
    with pytest.raises(InputError, match="cannot be a version"):
        promote(place, "ranker", name, reason="", key="k")
    with pytest.raises(InputError):
        resolve(f"registry://{name}", place)
    with pytest.raises(InputError):
        resolve(f"registry://ranker@{name}", place)
    assert not Path(place.path).exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_text("W1"), r"model\.safetensors was altered"),
        (lambda folder: (folder / "README.md").unlink(), r"README\.md was removed"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json is not of this version"),
    ],
)
def test_a_version_whose_files_have_changed_is_neither_promoted_nor_gone_back_to(place, store, damage, message):
    store(place, "v1", "v2", "v3")
    move(place, "v1", "v2")
    damage(Path(place.path) / "ranker/versions/v1/model")
    with pytest.raises(RunConflictError, match=message):
        promote(place, "ranker", "v1", reason="", key="k")
    with pytest.raises(RunConflictError, match=message):
        rollback(place, "ranker", reason="", key="k")
    assert [entry.version for entry in history(place, "ranker")] == ["v1", "v2"]


def test_a_version_that_lost_or_gained_a_file_is_not_served(place, store):
    store(place, "v1", "v2")
    move(place, "v1")
    folder = Path(place.path) / "ranker/versions/v1/model"
    (folder / "extra.json").write_text("{}")
    with pytest.raises(RunConflictError, match="is not of this version"):
        resolve("registry://ranker", place)
    (folder / "extra.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(RunConflictError, match=r"config\.json was removed"):
        resolve("registry://ranker", place)
    assert resolve("registry://ranker@v2", place)[0].version == "v2"


# --- promotions and rollbacks


def test_a_promotion_is_an_entry_and_a_pointer_for_other_programs(place, store):
    store(place, "v1", "v2")
    first = promote(place, "ranker", "v1", reason="first", key="a")
    second = promote(place, "ranker", "v2", reason="better", key="b")
    assert (first.number, first.action, first.version, first.previous) == (1, "promote", "v1", None)
    assert (second.number, second.version, second.previous, second.reason) == (2, "v2", "v1", "better")
    assert history(place, "ranker") == (first, second)
    assert read_bytes(place / "ranker/current.json") == read_bytes(place / "ranker/history/000002.json")
    version, folder = resolve("registry://ranker", place)
    assert (version.version, folder.uri) == ("v2", f"{place}/ranker/versions/v2/model")
    assert resolve("registry://ranker@v1", place)[0].version == "v1"
    assert names(place) == ("ranker",)


def test_the_same_key_gives_the_same_entry_whatever_came_after(place, store):
    store(place, "v1", "v2", "v3")
    first = promote(place, "ranker", "v1", reason="", key="week 1")
    promote(place, "ranker", "v2", reason="", key="week 2", expected=1)
    back = rollback(place, "ranker", reason="", key="incident")
    promote(place, "ranker", "v3", reason="", key="week 3")
    assert promote(place, "ranker", "v1", reason="again", key="week 1", expected=0) == first
    assert rollback(place, "ranker", reason="again", key="incident") == back
    assert len(history(place, "ranker")) == 4


def test_promoting_the_current_version_changes_nothing(place, store):
    store(place, "v1")
    first = promote(place, "ranker", "v1", reason="", key="a")
    assert promote(place, "ranker", "v1", reason="", key="b", expected=0) == first
    assert history(place, "ranker") == (first,)


def test_a_decision_that_rests_on_an_older_state_is_refused_in_words(place, store):
    store(place, "v1", "v2", "v3")
    promote(place, "ranker", "v1", reason="", key="a", expected=0)
    promote(place, "ranker", "v2", reason="Ann's", key="b", expected=1)
    with pytest.raises(RunConflictError, match=r"entry 2 of its history, promote of v2 \(Ann's\), came after entry 1"):
        promote(place, "ranker", "v3", reason="", key="c", expected=1)
    assert pointer(place)["version"] == "v2"


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (["a", "b", "c", "-", "-"], ["a", "b", "c", "b", "a"]),
        (["a", "b", "-", "c", "-"], ["a", "b", "a", "c", "a"]),
        (["a", "b", "c", "-a", "-c", "-", "b"], ["a", "b", "c", "a", "c", "a", "b"]),
        (["a", "b", "a", "-", "-"], ["a", "b", "a", "b", "a"]),
        (["a", "b", "-b", "-a", "-a"], ["a", "b", "b", "a", "a"]),
    ],
)
def test_rollbacks_go_back_step_by_step_and_not_to_and_fro(place, store, steps, wanted):
    store(place, "a", "b", "c")
    assert move(place, *steps) == wanted


def test_there_is_nothing_before_the_first_version(place, store):
    store(place, "v1", "v2")
    with pytest.raises(InputError, match="no version of ranker was ever promoted"):
        rollback(place, "ranker", reason="", key="a")
    move(place, "v1", "v2", "-")
    with pytest.raises(InputError, match="v1 is the first version of ranker"):
        rollback(place, "ranker", reason="", key="a")
    store(place, "v3")
    with pytest.raises(InputError, match="v3 was never the current version"):
        rollback(place, "ranker", to="v3", reason="", key="a")


def test_what_does_not_exist_is_named_with_what_does(place, store):
    with pytest.raises(InputError, match=r"no current version of ranker: .*there are: none"):
        resolve("registry://ranker", place)
    store(place, "v1")
    with pytest.raises(InputError, match="no version v9 of ranker; there are: v1"):
        promote(place, "ranker", "v9", reason="", key="a")
    with pytest.raises(InputError, match=r"no current version of other: .*there are: ranker"):
        resolve("registry://other", place)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"format": 2}', b'{"format": 1, "number": 1}'])
def test_an_entry_that_cannot_be_read_is_an_error_that_names_it(place, store, body):
    store(place, "v1")
    put(place / "ranker/history/000001.json", body)
    with pytest.raises(RunConflictError, match=r"history/000001\.json is no history entry of this version"):
        current(place, "ranker")
    put(place / "ranker/versions/v1/version.json", body)
    with pytest.raises(RunConflictError, match=r"v1/version\.json is no version of a model"):
        read_version(place, "ranker", "v1")


# --- the pointer follows the history


@pytest.mark.parametrize("stale", [b"", b"not json", None])
def test_a_reader_goes_by_the_history_and_puts_the_pointer_right(place, store, stale):
    store(place, "v1", "v2")
    move(place, "v1")
    old = read_bytes(place / "ranker/current.json")
    move(place, "v2")
    put(place / "ranker/current.json", old if stale is None else stale)
    assert resolve("registry://ranker", place)[0].version == "v2"
    assert pointer(place)["number"] == 2
    delete([place / "ranker/current.json"])
    assert current(place, "ranker").version == "v2"
    assert pointer(place)["number"] == 2


def test_who_may_not_write_reads_the_current_version_all_the_same(place, store, monkeypatch):
    store(place, "v1")
    move(place, "v1")
    delete([place / "ranker/current.json"])

    def refuse(location, data, expected):
        raise StorageError("no rights")

    monkeypatch.setattr(registry, "put_if", refuse)
    assert resolve("registry://ranker", place)[0].version == "v1"


def test_a_late_writer_does_not_move_the_pointer_back(place, store, monkeypatch):
    store(place, "v1", "v2", "v3")
    move(place, "v1")
    real, seen = registry.put_if, []

    def late(location, data, expected):
        monkeypatch.setattr(registry, "put_if", real)
        promote(place, "ranker", "v3", reason="", key="quick")
        real(location, data, expected)
        seen.append(pointer(place)["version"])

    monkeypatch.setattr(registry, "put_if", late)
    promote(place, "ranker", "v2", reason="", key="slow")
    assert seen == ["v3"]
    assert [entry.version for entry in history(place, "ranker")] == ["v1", "v2", "v3"]


def test_in_a_store_that_ignores_conditions_the_pointer_still_ends_at_the_newest_entry(place, store, monkeypatch):
    store(place, "v1", "v2")

    def late(location, data, expected):
        """A PUT that arrives after another writer's, and overwrites that."""
        monkeypatch.setattr(registry, "put_if", lambda location, data, expected: put(location, data))
        promote(place, "ranker", "v2", reason="", key="quick")
        put(location, data)

    monkeypatch.setattr(registry, "put_if", late)
    promote(place, "ranker", "v1", reason="", key="slow")
    assert [entry.version for entry in history(place, "ranker")] == ["v1", "v2"]
    assert pointer(place)["version"] == "v2"


# --- writers at the same moment, and writers that die


def drive(what: str, folder: Path):
    command = [sys.executable, "-m", "tests.support.registry_driver", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_chain(entries) -> None:
    """Each entry follows the one before, and changes something."""
    assert entries[0][1] is None
    for (_, _, before), (_, previous, version) in itertools.pairwise(entries):
        assert previous == before != version


def test_processes_that_promote_at_once_make_one_history_and_lose_nothing(tmp_path):
    found = drive("race", tmp_path)
    assert found["codes"] == [0] * registry_driver.NUM_RACERS
    assert found["num_told"] == registry_driver.NUM_RACERS * registry_driver.NUM_ROUNDS
    assert found["num_lost"] == 0
    assert found["numbers"] == list(range(1, len(found["numbers"]) + 1))
    check_chain(found["entries"])
    assert found["pointer"] == found["numbers"][-1]


def test_a_writer_killed_at_any_step_is_completed_by_doing_the_same_again(tmp_path):
    found = drive("kill", tmp_path)
    assert len(found) > 25 and {one["code"] for one in found} == {99}
    assert {one["current_after_kill"] for one in found} == {"v1", "v2"}
    for one in found:
        assert one["entries"] == [["promote", None, "v1"], ["promote", "v1", "v2"], ["rollback", "v2", "v1"]]
        assert (one["numbers"], one["pointer"]) == ([1, 2, 3], 3)


def test_two_that_roll_back_at_once_do_not_go_two_versions_back(place, store, monkeypatch):
    store(place, "v1", "v2", "v3")
    move(place, "v1", "v2", "v3")
    real = registry.put_new

    def slow(location, data):
        monkeypatch.setattr(registry, "put_new", real)
        rollback(place, "ranker", reason="same incident", key="quick")
        return real(location, data)

    monkeypatch.setattr(registry, "put_new", slow)
    with pytest.raises(RunConflictError, match="somebody else changed ranker at the same moment"):
        rollback(place, "ranker", reason="incident", key="slow")
    assert current(place, "ranker").version == "v2"


# --- object stores


def test_promoters_at_once_in_a_bucket_make_one_history(s3_bucket, store):
    place = locate(f"s3://{s3_bucket}/models")
    store(place, "v0", "v1", "v2")

    with ThreadPoolExecutor(3) as pool:
        told = pool.map(lambda n: promote(place, "ranker", f"v{n}", reason="", key=f"{n}"), range(3))
    entries = history(place, "ranker")
    assert [entry.number for entry in entries] == [1, 2, 3]
    assert set(told) == set(entries)
    check_chain([(entry.action, entry.previous, entry.version) for entry in entries])
    assert pointer(place)["number"] == entries[-1].number


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.faults
def test_a_writer_to_a_bucket_killed_at_any_step_is_completed_by_doing_the_same_again(s3_bucket, store, monkeypatch):
    real_new, real_if = registry.put_new, registry.put_if
    place = locate(f"s3://{s3_bucket}/models")
    store(place, "v0", "v1")
    promote(place, "ranker", "v0", reason="", key="first")
    for step in range(1, 100):
        left = step

        def stepping(function):
            def stepped(*arguments):
                nonlocal left
                for is_after in (False, True):
                    result = function(*arguments) if is_after else None
                    left -= 1
                    if left == 0:
                        raise Killed
                return result

            return stepped

        version, key = f"v{step % 2}", f"step {step}"
        monkeypatch.setattr(registry, "put_new", stepping(real_new))
        monkeypatch.setattr(registry, "put_if", stepping(real_if))
        try:
            promote(place, "ranker", version, reason="", key=key)
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(registry, "put_new", real_new)
            monkeypatch.setattr(registry, "put_if", real_if)
        assert promote(place, "ranker", version, reason="", key=key).number == step + 1
        assert [entry.key for entry in history(place, "ranker")][step:] == [key]
        assert pointer(place)["key"] == key
    assert step == 5  # before and after the entry, before and after the pointer


def test_a_promotion_whose_answers_are_lost_is_made_once(moto, monkeypatch, store):
    with FaultProxy(moto.endpoint_url) as proxy:
        set_s3_env(monkeypatch, {**moto.env, "AWS_ENDPOINT_URL": proxy.url})
        place = locate(f"s3://{moto.make_bucket('lost-answers')}/models")
        store(place, "v1", "v2")
        promote(place, "ranker", "v1", reason="", key="a")
        proxy.add(Rule("reset_after", method="PUT", path=r"history/000002|current\.json", times=2))
        promote(place, "ranker", "v2", reason="", key="b")
        assert [entry.version for entry in history(place, "ranker")] == ["v1", "v2"]
        assert pointer(place)["version"] == "v2"


@pytest.mark.faults
def test_ceph_serves_a_registry_to_promoters_at_once(ceph, monkeypatch, store):
    set_s3_env(monkeypatch, ceph.env)
    test_promoters_at_once_in_a_bucket_make_one_history(ceph.make_bucket("registry"), store)
    assert os.environ["AWS_ENDPOINT_URL"] == ceph.endpoint_url
