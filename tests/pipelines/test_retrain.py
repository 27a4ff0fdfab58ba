"""Retraining jobs: what is promoted, refused, void or left alone, whatever happens between. A whole one on Ray."""

import gzip
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc import CrossEncoder, saving
from crossenc.errors import ConfigError, CrossEncError, InputError, RunConflictError, StorageError
from crossenc.evaluation.results import FIRST_STAGE
from crossenc.testing import tiny_checkpoint
from jobs import status as status_job
from pipelines import evaluation, lease, registry
from pipelines import retrain as retraining
from pipelines import retrain_records as records
from pipelines.retrain import Outcome, describe, needs, resolve, retrain
from pipelines.retrain_config import RetrainConfig
from pipelines.retrain_records import Ending, Retraining, read_all
from pipelines.status import look_at_retraining
from pipelines.storage import list_files, locate, read_bytes
from pipelines.train_data import NothingToLearnError
from tests.support.retraining import World, make_world, quick_world


@pytest.fixture(scope="session")
def origin(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("origin"))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return quick_world(tmp_path, monkeypatch)


def go(world: World, *, should_stop=lambda: False, new_run=False, **more) -> Outcome:
    return retrain(world.config(**more), connect=no_ray, stream=io.StringIO(), should_stop=should_stop, new_run=new_run)


def no_ray() -> int:
    raise AssertionError("nothing here needs Ray")


def history(world: World) -> tuple[registry.Entry, ...]:
    return registry.history(locate(str(world.folder / "registry")), "reranker")


def folder_of(outcome: Outcome) -> Path:
    assert outcome.folder is not None
    return Path(outcome.folder.path)


def test_three_weeks_promote_do_nothing_refuse_and_promote_again(world):
    world.week(1, share_right=0.5)
    first = go(world)
    assert first.state == "promoted" and first.decision is not None and first.decision.baseline == FIRST_STAGE
    [entry] = history(world)
    assert (entry.version, entry.previous, entry.key) == (folder_of(first).name, None, folder_of(first).name)
    stored = registry.read_version(locate(str(world.folder / "registry")), "reranker", entry.version)
    assert stored.parent is None and stored.facts["measure"] == "nDCG@10" and stored.facts["gain"] > 0.2
    assert {"model/config.json", "model/README.md", "evaluation/evaluation.json", "evaluation/decision.json"} <= {
        file.path for file in stored.files
    }
    assert not [file.path for file in stored.files if "runs/" in file.path]

    nothing = go(world)
    assert nothing.state == "nothing new" and entry.version in nothing.message and len(history(world)) == 1

    world.week(2, share_right=0.2)
    refused = go(world)
    assert refused.state == "refused" and refused.decision is not None and refused.decision.baseline == entry.version
    assert "a gain is asked for" in refused.message and "not below 0.05" in refused.message
    assert len(history(world)) == 1 and (folder_of(refused) / "trained/model/config.json").exists()
    assert "Refused" in (folder_of(refused) / "report.html").read_text()
    still = go(world)
    assert still.state == "nothing new", "labels of a refused retraining are not tried again by themselves"
    assert f"{folder_of(refused).name}, which was refused: with other settings or labels" in still.message

    world.week(3, num_lists=80)
    second = go(world)
    assert second.state == "promoted" and [one.version for one in history(world)] == [
        entry.version,
        folder_of(second).name,
    ]
    started_as = json.loads((folder_of(second) / "trained/model/quality.json").read_text())["of"]
    assert started_as == f"registry://reranker@{entry.version}"
    one, ending = read_all(locate(str(world.folder / "out")))[2]
    assert ending is not None and ending.entry == 2 and len(one.files) == 3 and len(one.new_files) == 1


def test_while_there_is_no_version_a_base_that_ranks_is_what_is_to_be_beaten_or_else_the_first_stage(world):
    base, backbone, classes = (world.folder / name for name in ("base", "backbone", "classes"))
    tiny_checkpoint(classes, num_labels=3, max_length=64)
    world.week(1)
    for model, more, baseline in (
        (base, {}, "base"),
        (backbone, {}, FIRST_STAGE),
        (classes, {"train": {"loss": {"name": "cross_entropy"}}}, FIRST_STAGE),
    ):
        made = retraining._make(resolve(world.config(base=str(model), **more)), [])
        assert made is not None and made.baseline == baseline
    (base / "quality.json").write_text('{"quality": 1.0}')
    refused = go(world, base=str(base))
    assert refused.state == "refused" and refused.decision is not None and refused.decision.baseline == "base"
    assert "compared with the base model as it was before" in (folder_of(refused) / "report.html").read_text()


def test_only_new_labels_are_trained_on_where_that_is_asked_for(world):
    world.week(1, share_right=0.5)
    go(world, use="new")
    world.week(2)
    outcome = go(world, use="new")
    [(one, _)] = read_all(locate(str(world.folder / "out")))[1:]
    assert outcome.state == "promoted" and [Path(file.uri).name for file in one.files] == ["week-2.parquet"]


def ended(world: World, state: str, **more) -> Retraining:
    """A retraining of the labels as they are, not done but for its beginning and its ending."""
    job = resolve(world.config(**more))
    made = retraining._make(job, read_all(job.output))
    assert made is not None
    records.end(job.output, records.begin(job.output, made), Ending(state, "as the test says", None, 2.0))
    return made


def next_one(world: World, **more) -> list[tuple[str, bool]] | None:
    """The files of the retraining that would begin now, and whether they are new; None where there is none."""
    job = resolve(world.config(**more))
    made = retraining._make(job, read_all(job.output))
    return None if made is None else [(Path(file.uri).name, file.is_new) for file in made.files]


@pytest.mark.parametrize(
    "change",
    [{"train": {"epochs": 3}}, {"gate": {"max_p": 0.2}}, {"base": "other"}, {"name": "other"}, {"registry": "other"}],
)
def test_a_refused_retraining_is_tried_again_with_other_settings(world, change):
    for name in ("base", "registry"):
        change = {key: str(world.folder / value) if key == name else value for key, value in change.items()}
    tiny_checkpoint(world.folder / "other", max_length=64, seed=1)
    world.week(1)
    ended(world, "refused")
    assert next_one(world) is None
    assert next_one(world, **change) == [("week-1.parquet", True)]


def test_a_refused_retraining_is_tried_again_without_a_file_that_is_removed_or_repaired(world):
    for use in ("all", "new"):
        output, first = str(world.folder / use), world.week(1)
        ended(world, "promoted", output=output, use=use)
        good, bad = world.week(2), world.week(3, share_right=0.1)
        ended(world, "refused", output=output, use=use)
        assert next_one(world, output=output, use=use) is None
        world.week(3, num_lists=13)
        learned = [(first.name, False)] if use == "all" else []
        assert next_one(world, output=output, use=use) == [*learned, (good.name, True), (bad.name, True)]
        bad.unlink()
        assert next_one(world, output=output, use=use) == [*learned, (good.name, True)]
        ended(world, "refused", output=output, use=use)
        assert next_one(world, output=output, use=use, train={"epochs": 3}) == [*learned, (good.name, True)]
        good.unlink()
        assert next_one(world, output=output, use=use) is None, "the version in use learned what is left"


def test_labels_that_a_promoted_or_void_retraining_had_are_not_tried_again_or_are(world):
    world.week(1)
    ended(world, "promoted")
    assert next_one(world, train={"epochs": 3}) is None
    world.week(2)
    ended(world, "void")
    assert next_one(world) == [("week-1.parquet", False), ("week-2.parquet", True)]
    assert next_one(world, registry=str(world.folder / "second")) == [
        ("week-1.parquet", True),
        ("week-2.parquet", True),
    ]


def test_a_decision_is_told_to_people_and_to_programs(world):
    world.week(1)
    outcome = go(world, price_per_hour=36, gate={"segment_floors": {"market": -0.5}})
    told = json.loads((folder_of(outcome) / "decision.json").read_text())
    assert told["promote"] is True and told["reasons"] == [check["words"] for check in told["checks"]]
    assert told["new_label_files"] == [(world.folder / "labels/week-1.parquet").as_uri()]
    assert told["gate"]["max_p"] == 0.05 and told["lineage"]["Training data"] == "b"
    page = (folder_of(outcome) / "report.html").read_text()
    for part in ("Promoted", "holds", "week-1.parquet", "evaluation/report.html", "clicks", "Training data"):
        assert part in page
    assert not re.search(r"<script|\bsrc=|http", page)
    entry = history(world)[0]
    card = (world.folder / f"registry/reranker/versions/{entry.version}/model/README.md").read_text()
    for part in (
        "promoted over the first stage",
        "market: de",
        "| **nDCG@10** |",
        "0.90 at 36.00 an hour",
        "### Where",
    ):
        assert part in card, part
    assert card.index("### On clicks") < card.index("## Training Details") and "model-index" in card.split("---")[1]


def judgements(world: World) -> dict[str, Any]:
    """Settings to mine for labels that are judgements, with their tables and candidates."""
    pairs = pd.read_parquet(world.folder / "fixed.parquet")
    pairs["query_id"] = "t" + pairs["query_id"]
    pairs["query"] = "training " + pairs["query"]
    pairs.to_parquet(world.folder / "candidates.parquet", index=False)
    queries = pairs[["query_id", "query"]].drop_duplicates().rename(columns={"query": "text"})
    queries.to_parquet(world.folder / "queries.parquet", index=False)
    pairs[["doc_id", "text"]].drop_duplicates().to_parquet(world.folder / "corpus.parquet", index=False)
    tables = {"queries": str(world.folder / "queries.parquet"), "corpus": str(world.folder / "corpus.parquet")}
    mine = {"candidates": str(world.folder / "candidates.parquet"), "num_negatives": 2}
    return {"labels": {"files": str(world.folder / "labels"), **tables}, "mine": mine}


def judge(world: World, week: int, first: int, label: int = 1, prefix: str = "t") -> Path:
    """Judgements of a week: every other query's document that is relevant."""
    rows = [(f"{prefix}q{n}", f"d{n}-5", label) for n in range(first, 40, 2)]
    path = world.folder / f"labels/week-{week}.parquet"
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame(rows, columns=["query_id", "doc_id", "label"]).to_parquet(path, index=False)
    return path


def test_judgements_become_lists_with_mined_negatives(world):
    settings = judgements(world)
    judge(world, 1, first=1)
    judge(world, 2, first=2)
    outcome = go(world, **settings)
    assert outcome.state == "promoted", outcome.message
    lists = pq.read_table(folder_of(outcome) / "mined/data").to_pylist()
    assert len(lists) == 39 and all(row["labels"] == [1.0, 0.0, 0.0] for row in lists)


def test_a_positive_of_earlier_labels_is_no_negative_where_only_new_ones_are_mined_for(world):
    settings = judgements(world)
    settings["mine"]["num_negatives"] = 4
    judge(world, 1, first=2)
    ended(world, "refused", use="new", **settings)
    new = pd.DataFrame([("tq2", "d2-1", 1), ("tq3", "d3-5", 1)], columns=["query_id", "doc_id", "label"])
    new.to_parquet(world.folder / "labels/week-2.parquet", index=False)
    stopped = go(world, use="new", should_stop=lambda: True, **settings)
    judge(world, 3, first=3)  # what comes meanwhile is for the next one
    outcome = go(world, use="new", **settings)
    assert stopped.state == "stopped" and outcome.folder == stopped.folder, outcome.message
    texts = pd.read_parquet(world.folder / "corpus.parquet").set_index("doc_id").text
    lists = {row["docs"][0]: row["docs"][1:] for row in pq.read_table(folder_of(outcome) / "mined/data").to_pylist()}
    assert lists == {
        texts["d2-1"]: texts[["d2-2", "d2-3", "d2-4"]].tolist(),
        texts["d3-5"]: texts[["d3-1", "d3-2", "d3-3", "d3-4"]].tolist(),
    }


@pytest.mark.parametrize("name", ["w.parquet", "frame.parquet", "w.jsonl", "w.jsonl.gz", "w.arrow"])
def test_a_label_file_without_rows_is_passed_over_and_named(world, name):
    path = world.week(1).with_name(name)
    if name == "frame.parquet":
        pd.DataFrame({"query": [], "docs": [], "labels": []}).to_parquet(path)
    elif name == "w.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("query", pa.float64())])):
            pass
    else:
        path.write_bytes(gzip.compress(b"\n") if name.endswith(".gz") else b"")
    assert next_one(world) == [("week-1.parquet", True)]
    assert f"1 label files without rows are passed over, as file://{path}" in "\n".join(
        describe(resolve(world.config()))
    )
    with pytest.raises(InputError, match="none of 1 label files has a row"):
        resolve(world.config(labels=str(path)))


def test_labels_that_give_no_list_hold_up_no_later_ones(world):
    settings = judgements(world)
    bad = judge(world, 1, first=1, label=0)
    with pytest.raises(InputError, match="judge 20 queries, and none with a relevant document"):
        go(world, **settings)
    assert not (world.folder / "out/retrainings").exists()
    bad.unlink()
    judge(world, 1, first=1, prefix="unknown-")
    with pytest.raises(
        InputError, match=r"(?s)no judged query gave a list .* is void; the same command begins another"
    ):
        go(world, **settings)
    judge(world, 2, first=2)
    outcome = go(world, **settings)
    assert outcome.state == "promoted", outcome.message
    [(_, ending), (one, _)] = read_all(locate(str(world.folder / "out")))
    assert ending is not None and ending.state == "void" and len(one.new_files) == 2


def test_a_training_without_lists_is_void_and_another_failure_names_the_remedy(world, monkeypatch):
    world.week(1)
    real, says = retraining.training.train, io.StringIO()
    failures = iter([CrossEncError("the loss is no number"), NothingToLearnError("labels have no list for train")])

    def failing(*_, **__):
        raise next(failures)

    monkeypatch.setattr(retraining.training, "train", failing)
    with pytest.raises(CrossEncError, match="no number"):
        retrain(world.config(), connect=no_ray, stream=says)
    assert "the same command goes on with it, --new-run begins another one" in says.getvalue()
    [(one, ending)] = read_all(locate(str(world.folder / "out")))
    assert ending is None
    with pytest.raises(InputError, match=rf"no list for train\n{one.key} is void"):
        go(world)
    monkeypatch.setattr(retraining.training, "train", real)
    world.week(2)
    assert next_one(world) == [("week-1.parquet", True), ("week-2.parquet", True)]


def test_a_current_version_that_could_not_score_everything_is_not_beaten_until_it_is_evaluated_again(
    world, monkeypatch
):
    world.week(1, share_right=0.5)
    current = go(world)
    world.week(2)
    real = evaluation._read
    failed = {folder_of(current).name: 2}
    monkeypatch.setattr(evaluation, "_read", lambda s, *rest: replace(real(s, *rest), num_failed=failed.get(s.name, 0)))
    refused = go(world)
    assert refused.state == "refused" and "2 candidates of clicks with " + folder_of(current).name in refused.message
    assert "evaluate again" in (folder_of(refused) / "report.html").read_text()
    failed.clear()
    assert go(world).state == "nothing new"
    shutil.rmtree(folder_of(refused) / "evaluation")
    for name in ("decision.json", "ending.json"):
        (folder_of(refused) / name).unlink()
    outcome = go(world)
    assert outcome.state == "promoted" and outcome.folder == refused.folder


def test_leaks_are_refused_by_name_and_dropped_where_that_is_asked_for(world):
    world.week(1)
    leaky = world.week(2, num_lists=10, queries=["judged THE 0", "\uff4audged of\u00a0 1", "another"])
    with pytest.raises(InputError) as error:
        go(world)
    told = str(error.value)
    assert "2 queries of the labels are judged on, too, in 7 rows" in told and "leaking: drop" in told
    assert f"'judged THE 0' ({leaky.as_uri()}, row 0) is q0 of clicks" in told
    assert not (world.folder / "out/retrainings").exists() and not (world.folder / "registry").exists()
    world.week(3, num_lists=4, queries=["judged and 2"])
    with pytest.raises(InputError, match="nothing is left to train on: every row of labels"):
        go(world, leaking="drop", labels=str(world.folder / "labels/week-3.parquet"))
    assert not (world.folder / "out/retrainings").exists()
    outcome = go(world, leaking="drop")
    assert outcome.state == "promoted"
    kept = pq.read_table(folder_of(outcome) / "labels/000000-week-2.parquet").column("query").to_pylist()
    assert kept == ["another"] * 3
    assert not list((folder_of(outcome) / "labels").glob("*week-3*")), "nothing of it is left"
    told = json.loads((folder_of(outcome) / "decision.json").read_text())
    assert told["leaking_rows_left_out"] == 11 and told["training_rows"] == 12 + 3


def test_queries_that_were_learned_before_they_were_judged_are_found_where_only_new_labels_are_trained_on(world):
    world.week(1, num_lists=3, queries=["a later one"])
    ended(world, "promoted", use="new")
    pairs = pd.read_parquet(world.folder / "fixed.parquet")
    pairs.loc[pairs.query_id == "q0", "query"] = "A later one"
    pairs.to_parquet(world.folder / "fixed.parquet", index=False)
    world.week(2)
    with pytest.raises(InputError, match=r"1 queries of the labels .* in 3 rows.*\n.*week-1\.parquet, row 0\) is q0"):
        next_one(world, use="new")
    lines = "\n".join(describe(resolve(world.config(use="new", leaking="drop"))))
    assert "3 rows of labels from before are judged on now" in lines and "left out" not in lines
    assert next_one(world, use="new", leaking="drop") == [("week-2.parquet", True)]


def test_validation_data_and_candidates_of_teachers_must_not_be_judged_on_either(world):
    world.week(1)
    world.week(2, queries=["judged the 0"]).rename(world.folder / "dev.parquet")
    train = {"validation": str(world.folder / "dev.parquet")}
    with pytest.raises(InputError, match=r"1 queries of train\.validation .*\n.*is q0 of clicks\n.*validation data"):
        go(world, train=train)
    pd.read_parquet(world.folder / "fixed.parquet").query("query_id == 'q3'").to_parquet(world.folder / "c.parquet")
    distill = {"teachers": str(world.folder / "base"), "candidates": str(world.folder / "c.parquet")}
    with pytest.raises(InputError, match=r"1 queries of distill\.candidates"):
        go(world, distill=distill)


@pytest.mark.parametrize("share_right", [0.0, 1.0])
def test_a_promotion_by_somebody_else_makes_a_retraining_void_and_the_next_one_begins_anew(
    world, monkeypatch, share_right
):
    world.week(1, share_right=0.5)
    go(world)
    world.week(2, num_lists=80, share_right=share_right)
    real = retraining.evaluating.evaluate

    def overtaken(*arguments, **named):
        found = real(*arguments, **named)
        place = locate(str(world.folder / "registry"))
        registry.store_version(
            place, "reranker", "theirs", {"model": locate(str(world.folder / "base"))}, parent=None, facts={}
        )
        registry.promote(place, "reranker", "theirs", reason="a hotfix", key="theirs")
        return found

    (world.folder / "base/quality.json").write_text('{"quality": 0.1}')
    monkeypatch.setattr(retraining.evaluating, "evaluate", overtaken)
    void = go(world)
    assert void.state == "void" and "entry 2 of its history, promote of theirs" in void.message
    assert void.decision is not None and void.decision.promote == (share_right == 1)
    assert [one.version for one in history(world)][1:] == ["theirs"]
    assert "Void" in (folder_of(void) / "report.html").read_text()
    monkeypatch.setattr(retraining.evaluating, "evaluate", real)
    again = go(world)
    assert again.state == ("promoted" if share_right else "refused") and folder_of(again) != folder_of(void)
    assert again.decision is not None and again.decision.baseline == "theirs"


def test_one_that_is_overtaken_before_it_has_decided_trains_no_further(world, monkeypatch):
    world.week(1)
    monkeypatch.setattr(retraining.training, "train", lambda *_, **__: pytest.fail("it was overtaken"))
    real = registry.history
    job = resolve(world.config())
    made = retraining._make(job, [])
    assert made is not None
    records.begin(job.output, made)
    place = job.registry
    registry.store_version(
        place, "reranker", "theirs", {"model": locate(str(world.folder / "base"))}, parent=None, facts={}
    )
    registry.promote(place, "reranker", "theirs", reason="a hotfix", key="theirs")
    assert go(world).state == "void" and len(real(place, "reranker")) == 1


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_killed_again_and_again_while_it_writes_it_ends_with_one_promotion_and_one_entry(world, monkeypatch):
    world.week(1)
    left = [0]
    modules = [module for module in vars(retraining).values() if hasattr(module, "put_new")]

    def deadly(real):
        def write(*arguments):
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            return real(*arguments)

        return write

    for module in {retraining, *modules} - {lease}:  # a lease that is not released would only be waited for
        for name in ("put", "put_new", "put_if"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, deadly(getattr(module, name)))
    num_kills, outcome = 0, None
    while outcome is None:
        left[0] = 2 * num_kills  # so that each attempt dies elsewhere, and the last one comes to the end
        try:
            outcome = go(world)
        except KilledError:
            num_kills += 1
    assert num_kills >= 10 and outcome.state == "promoted"
    [entry] = history(world)
    [(one, ending)] = read_all(locate(str(world.folder / "out")))
    assert entry.key == one.key and ending is not None and ending.entry == 1
    place = locate(str(world.folder / "registry"))
    registry.verify(place, registry.read_version(place, "reranker", entry.version))


def test_an_unfinished_one_goes_on_as_it_set_out_or_is_given_up(world, monkeypatch):
    world.week(1)
    assert go(world, should_stop=lambda: True).state == "stopped"
    assert look_at_retraining(str(world.folder / "out")).steps_to_do == ("evaluate", "decide", "promote or refuse")
    world.week(2)
    with pytest.raises(RunConflictError, match=r"(?s)option train: was .*epochs.*start over with --new-run"):
        go(world, train={"epochs": 9})
    outcome = go(world)
    [(one, _)] = read_all(locate(str(world.folder / "out")))
    assert outcome.state == "promoted" and [Path(file.uri).name for file in one.files] == ["week-1.parquet"]

    assert go(world, should_stop=lambda: True).state == "stopped"
    world.week(2, num_lists=5)
    with pytest.raises(RunConflictError, match=r"week-2\.parquet was changed or removed since"):
        go(world)
    assert go(world, new_run=True).state in ("promoted", "refused")
    assert [ending.state for _, ending in read_all(locate(str(world.folder / "out")))][1] == "void"


def test_a_promoted_model_is_pushed_once_and_a_failed_upload_holds_nothing_up(world, monkeypatch):
    world.week(1)
    calls, is_away = [], [True]

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **settings):
            if is_away[0]:
                raise ConnectionError("the hub is away")
            calls.append((repo_id, settings["private"], settings["exist_ok"]))
            return type("Place", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, **settings):
            calls.append(("promoted over" in Path(folder_path, "README.md").read_text(), settings["commit_message"]))
            return type("Done", (), {"commit_url": "https://hub/commit/1", "pr_url": None})

    monkeypatch.setattr(saving, "HfApi", Hub)
    said = "was promoted, but could not be uploaded to owner/name: the hub is away"
    for week in (2, 3):
        with pytest.raises(StorageError, match=said):
            go(world, push="owner/name")
        world.week(week, share_right=0.0)
    (first, ending), (_, refused) = read_all(locate(str(world.folder / "out")))
    assert ending is not None and ending.state == "promoted" and f"reranker is {first.key} now" in ending.reason
    assert "Promoted" in (world.folder / f"out/retrainings/{first.key}/report.html").read_text()
    assert refused is not None and refused.state == "refused", "labels of week 2 did not wait for the hub"
    (world.folder / "labels/week-3.parquet").unlink()
    is_away[0] = False
    outcome = go(world, push="owner/name")
    assert outcome.state == "nothing new" and f"{first.key} is at https://hub/commit/1" in outcome.message
    assert calls == [("owner/name", True, True), (True, f"Version {first.key}")]
    assert "hub" not in go(world, push="owner/name").message and len(calls) == 2
    place = locate(str(world.folder / "registry"))
    registry.store_version(
        place, "reranker", "theirs", {"model": locate(str(world.folder / "base"))}, parent=None, facts={}
    )
    registry.promote(place, "reranker", "theirs", reason="a hotfix", key="theirs")
    assert go(world, push="owner/another").state == "nothing new" and len(calls) == 2, "it is the current one no more"


def test_a_promotion_that_was_overtaken_before_it_was_told_does_not_say_that_it_is_current(world, monkeypatch):
    world.week(1)
    real = retraining.render
    monkeypatch.setattr(retraining, "render", lambda *_, **__: (_ for _ in ()).throw(KilledError()))
    with pytest.raises(KilledError):
        go(world)
    [entry] = history(world)
    place = locate(str(world.folder / "registry"))
    registry.store_version(
        place, "reranker", "theirs", {"model": locate(str(world.folder / "base"))}, parent=None, facts={}
    )
    registry.promote(place, "reranker", "theirs", reason="a hotfix", key="theirs")
    monkeypatch.setattr(retraining, "render", real)
    outcome = go(world, push="owner/name")
    assert (
        outcome.state == "promoted" and "entry 1 promoted it, but reranker is theirs now, by entry 2" in outcome.message
    )
    assert (folder_of(outcome) / "report.html").exists() and folder_of(outcome).name == entry.version


def test_a_dry_run_and_the_status_say_what_is_to_do_and_write_nothing(world, capsys):
    world.week(1)
    lines = "\n".join(describe(resolve(world.config())))
    assert "none; " in lines and "week-1.parquet" in lines and "to do        train" in lines
    assert not (world.folder / "out").exists()
    go(world, should_stop=lambda: True)
    lines = "\n".join(describe(resolve(world.config())))
    assert "goes on with" in lines and "done         train" in lines and "to do        evaluate" in lines
    assert status_job.run(str(world.folder / "out")) == 0
    assert "resumable" in capsys.readouterr().out
    go(world)
    pointer = world.folder / "registry/reranker/current.json"
    pointer.write_text("{}")  # as a kill leaves it behind
    assert "no label file is new since" in "\n".join(describe(resolve(world.config())))
    world.week(2)
    assert "week-2.parquet" in "\n".join(describe(resolve(world.config()))) and pointer.read_text() == "{}"
    status_job.run(str(world.folder / "out"))
    out = capsys.readouterr().out
    assert "finished" in out and "1 promoted, 0 refused, 0 void" in out


def test_the_sections_of_the_job_make_the_settings_of_the_steps(world):
    tables = {"queries": "q.parquet", "corpus": "c.parquet"}
    config = world.config(
        labels={"files": "labels", **tables},
        mine={"candidates": "cand.parquet", **tables, "num_negatives": 3, "scoring": {"actors": 2}},
        distill={"teachers": "big", "candidates": "cand.parquet", "student": {"epochs": 2}},
        max_text_bytes=1000,
        drain_seconds=7,
    )
    scored = config.rerank_config("current", "reranked")
    assert (scored.model, scored.scoring.actors, scored.queries, scored.drain_seconds) == ("current", 2, "q.parquet", 7)
    by_score, by_rank = config.mine_config(("a", "b"), "reranked", "m"), config.mine_config(("a",), None, "m")
    assert by_score.reranked == "reranked" and not by_score.candidate_uris and by_score.qrels == ("a", "b")
    assert by_rank.candidate_uris == ("cand.parquet",) and by_rank.num_negatives == 3
    student = config.distill_config("current", "distilled").student
    assert (student.model, student.epochs, student.loss.name) == ("current", 2, "kl_distillation")
    judged = config.evaluate_config({"v1": "a", "v2": "b"}, "v1", "evaluation")
    assert [system.name for system in judged.systems] == ["v1", "v2"] and judged.max_text_bytes == 1000
    assert needs(config, 4)["CPU"] >= 2 * 2
    own_texts = {"candidates": "pairs.parquet", "corpus": "c.parquet", "columns": {"text": "abstract"}}
    with_corpus = world.config(labels={"files": "labels", **tables}, mine=own_texts)
    scored, mined = with_corpus.rerank_config("current", "r"), with_corpus.mine_config(("a",), "r", "m")
    assert (scored.corpus, scored.columns) == (None, {"text": "abstract"}) and mined.corpus == "c.parquet"
    assert with_corpus.mine_config(("a",), None, "m").columns == {"text": "abstract"}
    faster = config.model_copy(update={"mine": config.mine.model_copy(update={"workers": 4}), "price_per_hour": 2.0})
    assert faster.result_options() == config.result_options()
    assert world.config(use="new").result_options() != world.config().result_options()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate": {"max_pp": 0.1}}, r"unknown key max_pp; did you mean max_p\?"),
        ({"gate": {"metric": "AP"}}, "gate.metric is AP, but the first of evaluation.measures is nDCG@10"),
        ({"gate": {"collection": "other"}}, "evaluation has clicks"),
        ({"gate": {"segment_floors": {"colour": -0.1}}}, "no collection that the gate looks at has colour"),
        ({"train": {"model": "x"}}, "model is given by the retraining job"),
        ({"train": {"drain_seconds": 3}}, "set it beside train"),
        ({"mine": {"candidates": "c"}}, "mine needs labels that are judgements"),
        (
            {"distill": {"teachers": "t", "candidates": "c", "student_layers": 2}},
            "leave student.model and student_layers",
        ),
        ({"push": "name"}, "write owner/name"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_remedy(world, settings, says):
    with pytest.raises(ValueError, match=says):
        world.config(**settings)


def test_a_collection_without_texts_is_refused_before_any_work(world):
    world.week(1)
    pairs = pd.read_parquet(world.folder / "fixed.parquet")
    pairs[["query_id", "doc_id", "rank"]].to_parquet(world.folder / "fixed.parquet", index=False)
    with pytest.raises(ConfigError, match="clicks has no texts for a model to read"):
        go(world)


def test_a_retraining_may_have_everything_in_a_bucket(world, s3_bucket):
    world.week(1)
    root = f"s3://{s3_bucket}"
    config = RetrainConfig.model_validate(world.upload(root) | {"base": f"{root}/base"})
    place, output = locate(config.registry), locate(config.output)
    assert "baseline     base" in describe(resolve(config)) and not list_files(output)
    stopped = retrain(config, connect=no_ray, stream=io.StringIO(), should_stop=lambda: True)
    assert stopped.state == "stopped" and registry.newest(place, "reranker") is None
    outcome = retrain(config, connect=no_ray, stream=io.StringIO())
    assert outcome.state == "promoted" and outcome.folder == stopped.folder, outcome.message
    [entry] = registry.history(place, "reranker")
    version, model = registry.resolve("registry://reranker", place)
    registry.verify(place, version)
    assert version.version == entry.key and "of" in json.loads(read_bytes(model / "quality.json"))
    assert b"Promoted" in read_bytes(outcome.folder / "report.html")
    assert look_at_retraining(config.output).num_promoted == 1
    assert retrain(config, connect=no_ray, stream=io.StringIO()).state == "nothing new"


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_retraining_promotes_a_model_that_beats_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    world = make_world(tmp_path)
    world.week(1, num_lists=64)
    config = world.config()
    outcome = retrain(config, connect=lambda: 2, stream=io.StringIO())
    assert outcome.state == "promoted", outcome.message
    version, place = registry.resolve("registry://reranker", locate(str(tmp_path / "registry")))
    model = CrossEncoder(place.path, device="cpu")
    wet, dry = model.predict([("city", "the water of the city"), ("city", "the bread of the city")])
    assert wet > dry and version.version == folder_of(outcome).name
    card = Path(place.path, "README.md").read_text()
    assert "pairs a second of one scorer on the CPU" in card and "### Training Logs" in card
    again = retrain(config, connect=no_ray, stream=io.StringIO())
    assert again.state == "nothing new" and len(history(world)) == 1
