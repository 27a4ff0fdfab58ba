"""Labelled data to tokenised lists: every layout and file, bad rows, kills, splits, reading by number."""

import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossenc.errors import InputError, RunConflictError, StorageError
from crossenc.loop.lists import LabelStatistics, TokenizedLists
from crossenc.testing import FakeTokenizer, tiny_checkpoint
from pipelines import train_lists
from pipelines.mine_formats import Document, Format, MinedQuery, encode
from pipelines.model import CheckpointModel
from pipelines.plan import InputFile
from pipelines.schemas import REASONS
from pipelines.storage import list_files, locate
from pipelines.testing import FakeModel
from pipelines.texts import default_cache
from pipelines.train_data import (
    PREPARED,
    PreparedData,
    PrepareSettings,
    StoppedError,
    prepare,
    prepare_split,
)
from pipelines.train_data_config import LabelledData
from pipelines.train_files import cut_slices, find_columns
from pipelines.train_files import list_files as list_input
from pipelines.train_lists import read_lists
from pipelines.train_slice import SliceContext, add_counts, prepare_slice, read_rows
from tests.pipelines.support import write
from tests.support.s3 import S3Server

pytestmark = pytest.mark.usefixtures("ray_cluster")

#: A query with its documents and labels.
List = tuple[str, list[str], list[float]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))


def run(tmp_path: Path, data: Any, name: str = "out", source: Any = None, **options: Any) -> PreparedData:
    """Prepares `data`, as it may stand in a job file, in the folder `name`."""
    own = {name: options.pop(name) for name in ("should_stop", "on_progress") if name in options}
    data = LabelledData.model_validate(data)
    return prepare(
        data, locate(str(tmp_path / name)), source or FakeModel(), settings=PrepareSettings(**options), **own
    )


def everything(prepared: PreparedData) -> TokenizedLists:
    return read_lists(prepared, np.arange(prepared.num_lists))


def check_lists(found: TokenizedLists, wanted: Sequence[List]) -> None:
    """Compares with lists of texts, tokenised by hand."""
    pairs = [(query, document) for query, documents, _ in wanted for document in documents]
    tokens = FakeTokenizer().encode([query for query, _ in pairs], [document for _, document in pairs])
    assert found.pairs.input_ids.tolist() == tokens.input_ids.tolist()
    assert found.pairs.offsets.tolist() == tokens.offsets.tolist()
    assert found.sizes.tolist() == [len(documents) for _, documents, _ in wanted]
    assert found.labels.tolist() == pytest.approx([label for _, _, labels in wanted for label in labels])


def quarantined(folder: Path) -> list[tuple[Any, ...]]:
    rows = pq.read_table(folder / "quarantine").to_pylist() if (folder / "quarantine").exists() else []
    assert {row["reason"] for row in rows} <= set(REASONS)
    return [(row["row"], row["item"], row["reason"]) for row in rows]


def jsonl(path: Path, rows: Sequence[Any]) -> str:
    body = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return str(path)


def text_tables(tmp_path: Path) -> dict[str, str]:
    queries = pa.table({"query_id": ["q1", "q2"], "text": ["red fox", "blue sky"]})
    corpus = pa.table({"doc_id": [1, 2, 3], "text": ["a fox", "the sky", ""], "title": ["Fox", "", None]})
    return {
        "queries": write(tmp_path / "queries.parquet", queries),
        "corpus": write(tmp_path / "corpus.parquet", corpus),
    }


PAIRS = {
    "query": ["red fox", "red fox", "blue sky"],
    "document": ["a fox", "a dog", "the sky"],
    "label": [1, 0, 1],
}
AS_PAIRS: list[List] = [("red fox", ["a fox"], [1]), ("red fox", ["a dog"], [0]), ("blue sky", ["the sky"], [1])]
AS_LISTS: list[List] = [("red fox", ["a fox", "a dog"], [1, 0]), ("blue sky", ["the sky"], [1])]


# --- layouts


def make_pairs(tmp_path: Path) -> tuple[Any, list[List]]:
    return write(tmp_path / "pairs.parquet", pa.table(PAIRS)), AS_PAIRS


def make_titled_json_pairs(tmp_path: Path) -> tuple[Any, list[List]]:
    rows = [
        {"question": "red fox", "passage": "a fox", "title": "Fox", "relevance": 2.5},
        {"question": "blue sky", "passage": "the sky", "title": None, "relevance": True},
    ]
    return jsonl(tmp_path / "pairs.jsonl", rows), [("red fox", ["Fox a fox"], [2.5]), ("blue sky", ["the sky"], [1])]


def make_triplets(tmp_path: Path) -> tuple[Any, list[List]]:
    table = pa.table({"anchor": ["red fox"], "positive": ["a fox"], "negative": ["a dog"]})
    return [write(tmp_path / "triplets.parquet", table)], [("red fox", ["a fox", "a dog"], [1, 0])]


def make_tuples(tmp_path: Path) -> tuple[Any, list[List]]:
    names = ["query", "positive", "negative_10", "negative_2"]
    table = pa.table({name: [f"{name} text"] for name in names} | {"scores": [[3.0, 2.0, 1.0]]})
    wanted = ["positive text", "negative_2 text", "negative_10 text"]
    return write(tmp_path / "tuples.parquet", table), [("query text", wanted, [1, 0, 0])]


def make_scored_tuples(tmp_path: Path) -> tuple[Any, list[List]]:
    path, [(query, documents, _)] = make_tuples(tmp_path)
    return {"files": path, "columns": {"labels": "scores"}}, [(query, documents, [3, 2, 1])]


def make_lists(tmp_path: Path) -> tuple[Any, list[List]]:
    labels = pa.array([[1, 0], [1]], pa.large_list(pa.int8()))
    table = pa.table({"query": ["red fox", "blue sky"], "docs": [["a fox", "a dog"], ["the sky"]], "labels": labels})
    return write(tmp_path / "lists.parquet", table), AS_LISTS


def make_gzipped_lists_with_teacher_scores(tmp_path: Path) -> tuple[Any, list[List]]:
    rows = [
        {"query": "red fox", "docs": ["a fox", "a dog"], "labels": [1, 0], "scores": [4.5, -2]},
        {"query": "blue sky", "docs": ["the sky"], "labels": [1], "scores": [0.25]},
    ]
    wanted = [("red fox", ["a fox", "a dog"], [4.5, -2]), ("blue sky", ["the sky"], [0.25])]
    return {"files": jsonl(tmp_path / "lists.jsonl.gz", rows), "columns": {"label": "scores"}}, wanted


def make_ids(tmp_path: Path) -> tuple[Any, list[List]]:
    table = pa.table({"qid": ["q1", "q2"], "pid": [1, 2], "label": [1.0, 0.5]})
    data = {"files": write(tmp_path / "ids.parquet", table), **text_tables(tmp_path)}
    return data, [("red fox", ["Fox a fox"], [1]), ("blue sky", ["the sky"], [0.5])]


def make_json_ids(tmp_path: Path) -> tuple[Any, list[List]]:
    rows = [{"query_id": "q1", "doc_id": 1, "label": 1}, {"query_id": "q2", "doc_id": "2", "label": 0}]
    data = {"files": jsonl(tmp_path / "ids.jsonl", rows), **text_tables(tmp_path)}
    return data, [("red fox", ["Fox a fox"], [1]), ("blue sky", ["the sky"], [0])]


def make_flagembedding(tmp_path: Path) -> tuple[Any, list[List]]:
    rows = [
        {"query": "red fox", "pos": ["a fox"], "neg": ["a dog", "a cat"], "pos_scores": [9], "neg_scores": [2, 1]},
        {"query": "blue sky", "pos": ["the sky", "sky"], "neg": [], "pos_scores": [8, 7], "neg_scores": []},
    ]
    wanted = [("red fox", ["a fox", "a dog", "a cat"], [1, 0, 0]), ("blue sky", ["the sky", "sky"], [1, 1])]
    return jsonl(tmp_path / "flag.jsonl", rows), wanted


def make_scored_flagembedding(tmp_path: Path) -> tuple[Any, list[List]]:
    path, [(fox, foxes, _), (sky, skies, _)] = make_flagembedding(tmp_path)
    return {"files": path, "columns": {"labels": "scores"}}, [(fox, foxes, [9, 2, 1]), (sky, skies, [8, 7])]


def make_triples(tmp_path: Path) -> tuple[Any, list[List]]:
    path = tmp_path / "triples.tsv"
    path.write_text('red fox\ta fox\ta "dog\n\nblue sky\tthe sky\ta dog\r\n')
    return str(path), [("red fox", ["a fox", 'a "dog'], [1, 0]), ("blue sky", ["the sky", "a dog"], [1, 0])]


def make_triples_of_ids(tmp_path: Path) -> tuple[Any, list[List]]:
    path = tmp_path / "ids.tsv.gz"
    path.write_bytes(gzip.compress(b"q1\t1\t2\nq2\t2\t1"))
    wanted = [("red fox", ["Fox a fox", "the sky"], [1, 0]), ("blue sky", ["the sky", "Fox a fox"], [1, 0])]
    return {"files": str(path), **text_tables(tmp_path)}, wanted


def make_saved_dataset(tmp_path: Path) -> tuple[Any, list[List]]:
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pa.table(PAIRS)
    for name, chunk in (("data-00000-of-00001.arrow", 2), ("cache-1234.arrow", 3)):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=chunk)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return str(folder), AS_PAIRS


MAKERS = {name.removeprefix("make_"): make for name, make in globals().items() if name.startswith("make_")}


@pytest.mark.parametrize("layout", MAKERS)
def test_every_layout_gives_the_lists_that_were_written_by_hand(layout, tmp_path):
    data, wanted = MAKERS[layout](tmp_path)
    prepared = run(tmp_path, data)
    check_lists(everything(prepared), wanted)
    assert prepared.num_lists == prepared.num_rows == len(wanted) and not prepared.num_refused
    sizes, tokens = prepared.sizes()
    assert sizes.tolist() == [len(documents) for _, documents, _ in wanted]
    assert tokens.sum() == prepared.num_tokens and sizes.sum() == prepared.num_pairs


def test_a_dataset_that_the_package_datasets_saved_is_read(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_dict(PAIRS)
    dataset.save_to_disk(str(tmp_path / "one"))
    check_lists(everything(run(tmp_path, str(tmp_path / "one"), group_default=True)), AS_LISTS)
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(InputError, match="DatasetDict"):
        run(tmp_path, str(tmp_path / "several"), "other")


@pytest.mark.parametrize("name", ["pairs", "triplets", "tuples", "lists", "ids", "flagembedding"])
def test_what_mining_writes_with_scores_is_read_again(name, tmp_path):
    document = {
        text: Document(f"d{n}", text, grade, n / 2)
        for n, (text, grade) in enumerate([("a fox", 2), ("a vixen", 1), ("a dog", 0), ("a cat", 0)])
    }
    positives, negatives = tuple(list(document.values())[:2]), tuple(list(document.values())[2:])
    shape = Format(name, 1 if name == "triplets" else 2, scores=True, labels="grades")
    body, _ = encode([MinedQuery("q1", "red fox", positives, negatives)], shape)
    path = tmp_path / f"part{shape.suffix}"
    path.write_bytes(body)
    data: dict[str, Any] = {"files": str(path)}
    if name == "ids":
        corpus = pa.table({"doc_id": [one.doc_id for one in document.values()], "text": list(document)})
        queries = pa.table({"query_id": ["q1"], "text": ["red fox"]})
        data |= {"corpus": write(tmp_path / "c.parquet", corpus), "queries": write(tmp_path / "q.parquet", queries)}
    graded: list[List] = [("red fox", list(document), [2, 1, 0, 0])]
    each = [("red fox", [positive.text, *(n.text for n in negatives)], [1, 0, 0]) for positive in positives]
    pairs = [("red fox", [p.text, n.text], [1, 0]) for p in positives for n in negatives]
    flat = [("red fox", list(document), [1, 1, 0, 0])]
    wanted = {"tuples": each, "triplets": pairs, "flagembedding": flat}.get(name, graded)
    check_lists(everything(run(tmp_path, data, group_default=True)), wanted)
    label = "label" if name in ("pairs", "ids") else "labels"
    teacher = {**data, "columns": {label: "score" if label == "label" else "scores"}}
    scores = {one.text: one.score for one in document.values()}
    scored = [(query, texts, [scores[text] for text in texts]) for query, texts, _ in wanted]
    check_lists(everything(run(tmp_path, teacher, "scored", group_default=True)), scored)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_token_ids_are_those_of_the_checkpoints_own_tokenizer(family, tmp_path):
    from transformers import AutoTokenizer

    folder = tiny_checkpoint(tmp_path / "model", family)
    long = " ".join(["water river bread stone"] * 20)
    table = pa.table(
        {"query": ["what is music", long, "fever"], "document": ["the heart", long, long], "label": [1, 0, 1]}
    )
    prepared = run(tmp_path, write(tmp_path / "p.parquet", table), source=CheckpointModel(str(folder), max_length=48))
    lists = everything(prepared)
    encoded = AutoTokenizer.from_pretrained(folder)(
        table["query"].to_pylist(), table["document"].to_pylist(), truncation=True, max_length=48
    )
    assert lists.pairs.input_ids.tolist() == [token for ids in encoded["input_ids"] for token in ids]
    assert lists.pairs.truncated.tolist() == [False, True, True]
    if family == "bert":
        assert lists.pairs.token_type_ids is not None
        assert lists.pairs.token_type_ids.tolist() == [kind for types in encoded["token_type_ids"] for kind in types]
    else:
        assert lists.pairs.token_type_ids is None


# --- grouping, caps, weights, splits


def many_pairs(tmp_path: Path, suffix: str = ".parquet", num_queries: int = 30) -> str:
    """Queries with 1 to 4 documents each, in row groups of seven rows."""
    rows = [
        {"query": f"query {q}", "document": f"text {q} {d}", "label": int(d == 0)}
        for q in range(num_queries)
        for d in range(q % 4 + 1)
    ]
    path = tmp_path / f"many{suffix}"
    if suffix == ".parquet":
        return write(path, pa.Table.from_pylist(rows), row_group_size=7)
    if suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        return str(path)
    return jsonl(path, rows)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".jsonl.gz"])
def test_rows_of_one_query_become_a_list_that_no_slice_cuts(suffix, tmp_path):
    path = many_pairs(tmp_path, suffix)
    prepared = run(tmp_path, path, slice_pairs=8, group_default=True)
    assert len(prepared.parts) >= 5
    wanted: list[List] = [
        (f"query {q}", [f"text {q} {d}" for d in range(q % 4 + 1)], [float(d == 0) for d in range(q % 4 + 1)])
        for q in range(30)
    ]
    check_lists(everything(prepared), wanted)
    single = run(tmp_path, {"files": path, "group": False}, "single", slice_pairs=8, group_default=True)
    assert single.num_lists == single.num_rows == prepared.num_pairs == prepared.num_rows
    assert everything(single).pairs.input_ids.tolist() == everything(prepared).pairs.input_ids.tolist()


def test_a_list_is_capped_with_its_positives_kept(tmp_path):
    table = pa.table({"query": ["a"], "docs": [["n1", "p1", "n2", "p2"]], "labels": [[0, 1, 0, 2]]})
    path = write(tmp_path / "l.parquet", table)
    prepared = run(tmp_path, {"files": path, "max_documents": 3})
    check_lists(everything(prepared), [("a", ["n1", "p1", "p2"], [0, 1, 2])])
    body = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert (body["counts"]["num_documents"], body["counts"]["num_pairs"], body["counts"]["num_left_out"]) == (4, 3, 1)


def test_weights_are_kept_and_those_of_a_group_averaged(tmp_path):
    path = write(tmp_path / "p.parquet", pa.table(PAIRS | {"weight": [1.0, 2.0, 0.0]}))
    assert everything(run(tmp_path, path)).weights.tolist() == [1, 2, 0]
    assert everything(run(tmp_path, path, "grouped", group_default=True)).weights.tolist() == [1.5, 0]


def test_a_split_holds_queries_out_whatever_the_layout(tmp_path):
    path = many_pairs(tmp_path, num_queries=60)
    out, fake = locate(str(tmp_path / "split")), FakeModel()
    options = PrepareSettings(slice_pairs=20, group_default=True)
    train, validation = prepare_split(LabelledData(files=path), out, fake, 0.25, settings=options)
    assert 5 <= validation.num_lists <= 25 and train.num_lists + validation.num_lists == 60
    whole = run(tmp_path, path, group_default=True)
    queries = [f"query {q}" for q in range(60)]

    def queries_of(side: PreparedData) -> set[str]:
        rows = pq.read_table(path).column("query").to_pylist()
        return {rows[int(origin.rpartition(" ")[2])] for origin in everything(side).origins}

    assert queries_of(train) | queries_of(validation) == set(queries) == queries_of(whole)
    assert not queries_of(train) & queries_of(validation)
    lines = LabelledData(files=many_pairs(tmp_path, ".jsonl", num_queries=60))
    pairs, again = prepare_split(lines, locate(str(tmp_path / "lines")), fake, 0.25, settings=PrepareSettings())
    rows = [json.loads(line)["query"] for line in Path(lines.uris[0]).read_text().splitlines()]
    assert {rows[int(origin.rpartition(" ")[2])] for origin in everything(again).origins} == queries_of(validation)
    assert (train, validation) == prepare_split(LabelledData(files=path), out, fake, 0.25, settings=options)
    assert pairs.num_lists == pairs.num_rows == train.num_pairs, "trained on as pairs"
    assert everything(again).sizes.tolist() == everything(validation).sizes.tolist(), "judged as whole lists"
    alone = lines.model_copy(update={"group": False})
    found = prepare_split(alone, locate(str(tmp_path / "alone")), fake, 0.25, settings=options)[1]
    assert found.num_lists == found.num_rows == validation.num_pairs, "unless the job wants pairs"
    with pytest.raises(InputError, match="no list for validation in 3 rows"):
        data = LabelledData(files=write(tmp_path / "few.parquet", pa.table(PAIRS)))
        prepare_split(data, locate(str(tmp_path / "few")), fake, 0.001, settings=PrepareSettings())


def test_labels_and_rows_are_described(tmp_path):
    table = {"query": ["a b c", "d"], "docs": [["x", "y"], ["z"]], "labels": [[0.5, -1.0], [3.0]]}
    prepared = run(tmp_path, write(tmp_path / "l.parquet", pa.table(table)), slice_pairs=1)
    assert len(prepared.parts) == 2
    assert prepared.statistics == LabelStatistics(-1.0, 3.0, pytest.approx(2.5 / 3), 3, 2, 2, 1)
    facts = prepared.facts
    assert facts.columns == {"query": "string", "docs": "list", "labels": "list"} and facts.num_rows == 2
    assert facts.statistics["query"] == ["min: 1 tokens", "mean: 2.00 tokens", "max: 3 tokens"]
    assert facts.samples[1] == {"query": "d", "docs": ["z"], "labels": [3]}


# --- exactly once


def stored(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("part-*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_one_worker_and_two_write_the_same_bytes(tmp_path):
    path = many_pairs(tmp_path)
    one = run(tmp_path, path, "one", slice_pairs=10, workers=1)
    two = run(tmp_path, path, "two", slice_pairs=10, workers=2)
    assert one.digest == two.digest and len(one.parts) >= 5
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


def test_after_a_kill_only_what_is_missing_is_made_again(tmp_path):
    path, progress = many_pairs(tmp_path), []
    first = run(tmp_path, path, slice_pairs=10)
    bytes_before = stored(tmp_path / "out")
    (tmp_path / "out" / "prepared.json").unlink()
    (tmp_path / "out" / first.parts[1].path).unlink()
    (tmp_path / "out" / "_run" / "records" / f"{first.parts[2].part_id}.json").unlink()
    again = run(tmp_path, path, slice_pairs=10, on_progress=progress.append)
    assert again == first and stored(tmp_path / "out") == bytes_before
    assert progress[0].num_parts_done == len(first.parts) - 2 and progress[-1].num_parts_done == len(first.parts)
    assert progress[-1].num_rows == first.num_rows


def test_stopped_it_says_so_and_goes_on_later(tmp_path):
    path, done = many_pairs(tmp_path), []
    with pytest.raises(StoppedError, match="run the same command again"):
        run(tmp_path, path, slice_pairs=4, workers=1, on_progress=done.append, should_stop=lambda: len(done) > 1)
    assert not (tmp_path / "out" / "prepared.json").exists()
    whole = run(tmp_path, path, "other", slice_pairs=4)
    assert run(tmp_path, path, slice_pairs=4).digest == whole.digest


def test_what_is_prepared_is_found_at_once_and_belongs_to_its_input_and_settings(tmp_path):
    path, progress = many_pairs(tmp_path), []
    first = run(tmp_path, path)
    assert run(tmp_path, path, on_progress=progress.append) == first and not progress
    for change in ({"group_default": True}, {"source": FakeModel(max_length=9)}):
        with pytest.raises(RunConflictError, match="option"):
            run(tmp_path, path, **change)
    many_pairs(tmp_path, num_queries=7)
    with pytest.raises(RunConflictError, match=r"input .*many\.parquet"):
        run(tmp_path, path)


def test_a_file_that_changes_while_it_is_prepared_is_refused(tmp_path):
    path, done = many_pairs(tmp_path), []

    def change(progress) -> None:
        done.append(progress)
        if len(done) == 1:
            many_pairs(tmp_path, num_queries=31)

    with pytest.raises(InputError, match="has changed since the run was planned"):
        run(tmp_path, path, on_progress=change)


def test_data_and_lists_may_lie_in_an_object_store(tmp_path, moto: S3Server, s3_bucket):
    options = {
        "endpoint_url": moto.endpoint_url,
        "key": moto.access_key,
        "secret": moto.secret_key,
    }
    for suffix in (".parquet", ".jsonl.gz"):
        local = many_pairs(tmp_path, suffix)
        moto.client.put_object(Bucket=s3_bucket, Key=f"in/many{suffix}", Body=Path(local).read_bytes())
        out = locate(f"s3://{s3_bucket}/out{suffix}", options)
        data = LabelledData(files=f"s3://{s3_bucket}/in/*{suffix}")
        prepared = prepare(data, out, FakeModel(), settings=PrepareSettings(slice_pairs=30, storage_options=options))
        here = run(tmp_path, local, f"here{suffix}", slice_pairs=30)
        assert everything(prepared).pairs.input_ids.tolist() == everything(here).pairs.input_ids.tolist()
        assert len(list_files(out / "train")) == len(prepared.parts) >= 2
        assert not [key for key in moto.list(f"{s3_bucket}/out") if moto.secret_key.encode() in moto.get(key)]


# --- bad rows


def test_each_kind_of_bad_row_is_quarantined_with_its_place(tmp_path):
    good = {"query": "a", "docs": ["x", "y"], "labels": [1, 0], "weight": 1}
    rows = [
        good,
        good | {"query": None},
        good | {"query": "  "},
        good | {"query": 7},
        good | {"query": "\ud800"},
        good | {"query": "q" * 101},
        good | {"docs": []},
        good | {"docs": ["x"]},
        good | {"docs": "x"},
        good | {"weight": None},
        good | {"weight": -1},
        b'{"query": "a", ',
        b"[1]",
        b'{"query": "\xff"}',
        b"",
        good | {"docs": ["x", None]},
        good | {"docs": ["", "y"]},
        good | {"docs": ["x", 3]},
        good | {"docs": ["x", "z" * 101]},
        good | {"labels": [1, None]},
        good | {"labels": [math.nan, 0]},
        good | {"labels": [10**400, 1e39]},
        good | {"labels": ["1", 0]},
    ]
    prepared = run(tmp_path, jsonl(tmp_path / "bad.jsonl", rows), max_text_bytes=100)
    assert quarantined(tmp_path / "out") == [
        (1, None, "query_missing"),
        (2, None, "query_empty"),
        (3, None, "query_not_text"),
        (4, None, "query_not_utf8"),
        (5, None, "query_too_large"),
        (6, None, "list_empty"),
        (7, None, "list_length_mismatch"),
        (8, None, "line_broken"),
        (9, None, "weight_not_finite"),
        (10, None, "weight_not_finite"),
        (11, None, "line_broken"),
        (12, None, "line_broken"),
        (13, None, "line_broken"),
        (15, 1, "document_missing"),
        (16, 0, "document_empty"),
        (17, 1, "document_not_text"),
        (18, 1, "document_too_large"),
        (19, 1, "label_not_finite"),
        (20, 0, "label_not_finite"),
        (21, 0, "label_not_finite"),
        (21, 1, "label_not_finite"),
        (21, None, "documents_refused"),
        (22, 0, "label_not_finite"),
    ]
    assert prepared.num_rows == 8 and sum(prepared.num_refused.values()) == 23
    assert [int(origin.rpartition(" ")[2]) for origin in everything(prepared).origins] == [
        0,
        15,
        16,
        17,
        18,
        19,
        20,
        22,
    ]
    assert everything(prepared).origins[1] == f"file://{tmp_path}/bad.jsonl, row 15"


def test_bad_rows_of_parquet_are_quarantined_too(tmp_path):
    table = pa.table(
        {
            "query": pa.array([b"a", b"\xff", b"a", b"a", None], pa.binary()),
            "positive": ["p", "p", None, "p", "p"],
            "negative_1": ["n", "n", "n", "", "n"],
            "negative_2": ["n", "n", "n", None, "n"],
        }
    )
    run(tmp_path, write(tmp_path / "t.parquet", table))
    assert quarantined(tmp_path / "out") == [
        (1, None, "query_not_utf8"),
        (2, 0, "document_missing"),
        (2, None, "documents_refused"),
        (3, 1, "document_empty"),
        (3, 2, "document_missing"),
        (3, None, "documents_refused"),
        (4, None, "query_missing"),
    ]


def test_ids_without_a_text_are_quarantined_with_the_ids(tmp_path):
    table = pa.table({"query_id": ["q1", "q9", None, "q1", "q1"], "doc_id": [1, 1, 1, 9, 3], "label": [1] * 5})
    run(tmp_path, {"files": write(tmp_path / "ids.parquet", table), **text_tables(tmp_path)})
    rows = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert [(row["query_id"], row["doc_id"], row["reason"]) for row in rows] == [
        ("q9", "1", "query_unknown"),
        (None, "1", "query_id_missing"),
        ("q1", "9", "document_unknown"),
        ("q1", "3", "document_empty"),
    ]


def test_lines_without_three_fields_are_quarantined(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"a\tb\tc\na\tb\na\tb\tc\td\na\t\xff\tc\na\tb\t \n")
    assert run(tmp_path, str(path)).num_lists == 1
    reasons = [(1, None, "line_broken"), (2, None, "line_broken"), (3, 0, "document_not_utf8")]
    reasons += [(3, None, "documents_refused"), (4, 1, "document_empty"), (4, None, "documents_refused")]
    assert quarantined(tmp_path / "out") == reasons


def test_rows_of_a_damaged_page_are_refused_as_unreadable(tmp_path):
    texts = [f"text {n} " + "x" * 500 for n in range(40)]
    table = pa.table({"query": ["a"] * 40, "document": texts, "label": [1] * 40})
    path = write(tmp_path / "p.parquet", table, row_group_size=20, compression="none", use_dictionary=False)
    body = bytearray(Path(path).read_bytes())
    body[body.index(b"text 30")] ^= 1
    Path(path).write_bytes(body)
    prepared = run(tmp_path, path, slice_pairs=20)
    assert prepared.num_refused == {"unreadable": 20} and prepared.num_rows == 20
    assert quarantined(tmp_path / "out") == [(row, None, "unreadable") for row in range(20, 40)]


ANY_TEXT = st.sampled_from(["red fox", "sky", "", " ", None, 3, "\ud800", "x" * 60])
ANY_NUMBER = st.sampled_from([0, 1, 0.5, None, "1", math.inf, True])
ANY_ROW = st.one_of(
    st.fixed_dictionaries(
        {
            "query": ANY_TEXT,
            "docs": st.one_of(st.lists(ANY_TEXT, max_size=4), ANY_TEXT),
            "labels": st.one_of(st.lists(ANY_NUMBER, max_size=4), ANY_NUMBER),
            "weight": st.sampled_from([1, 2, 0, None, -1]),
        }
    ),
    st.sampled_from([b"{", b"", b"\xff", b"3"]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANY_ROW, max_size=12), st.integers(1, 9), st.sampled_from([None, 1, 2]))
def test_every_row_and_document_is_used_or_refused(tmp_path, rows, slice_pairs, max_documents):
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    good = {"query": "sky", "docs": ["a b"], "labels": [1], "weight": 1}
    data = LabelledData(files=jsonl(folder / "rows.jsonl", [good, *rows]), max_documents=max_documents)
    files = list_input(data, {})
    columns = find_columns(data, files)
    context = SliceContext(
        folder=locate(str(folder)),
        inputs=(InputFile(files[0].location.uri, files[0].num_bytes, files[0].version, 0),),
        columns=columns,
        grouped=(),
        max_documents=max_documents,
        validation_share=0.5,
        queries=None,
        corpus=None,
        cache=default_cache(),
        max_text_bytes=50,
        storage_options={},
        source=FakeModel(),
    )
    slices = cut_slices(files, columns, False, slice_pairs)
    records = [prepare_slice(entry, context, FakeTokenizer(), "") for entry in slices]
    counts = add_counts(record.counts for record in records)
    counts.check()
    assert counts.num_rows == 1 + sum(row != b"" for row in rows)
    found = [row for entry in slices for batch in read_rows(entry, context) for row in batch]
    assert counts.num_documents == sum(len(row.documents) for row in found)
    refused = Counter(item is None for _, item, _ in quarantined(folder))
    assert refused == Counter(
        {True: counts.num_rows - counts.num_rows_used, False: sum(counts.refused_documents.values())}
    )
    tables = [pq.read_table(folder / part.file.path) for record in records for part in record.sides.values()]
    assert sum(table.num_rows for table in tables) == counts.num_rows_used
    assert sum(len(labels) for table in tables for labels in table["labels"].to_pylist()) == counts.num_pairs


# --- data that does not fit


def test_data_that_cannot_be_used_is_refused_by_name(tmp_path):
    pairs = write(tmp_path / "p.parquet", pa.table(PAIRS))
    plain = pa.table({"query": ["a"], "document": ["b"], "lable": [1]})
    cases: list[tuple[Any, str]] = [
        (write(tmp_path / "1.parquet", plain), r"no column for label .* Did you mean 'lable'.* columns: {label:"),
        (write(tmp_path / "2.parquet", pa.table({"x": [1]})), "has the columns x, which are no layout"),
        ({"files": pairs, "columns": {"label": "score"}}, r"no column 'score' \(from columns.label\)"),
        ({"files": pairs, "columns": {"labl": "score"}}, "'labl' is not a role"),
        (
            {"files": pairs, "columns": {"label": "document"}},
            r"'document' \(label\) holds string, but must hold a number",
        ),
        ({"files": pairs, "layout": "lists"}, "no column for docs"),
        ({"files": pairs, **text_tables(tmp_path)}, "no column for query_id"),
        ([pairs, make_lists(tmp_path)[0]], r"p.parquet is pairs .*lists.parquet is lists"),
        (write(tmp_path / "ids.parquet", pa.table({"query_id": ["a"], "doc_id": ["b"], "label": [1]})), "ids only"),
        (jsonl(tmp_path / "e.jsonl", [b"{", b"3"]), "no JSON object"),
        (str(tmp_path / "nowhere"), r"there is no .parquet or .arrow"),
        (jsonl(tmp_path / "data.csv", [{}]), "of no known kind"),
        ({"files": make_triples(tmp_path)[0], "layout": "pairs"}, "has no column names"),
        (write(tmp_path / "r.parquet", pa.table(PAIRS | {"document": [None, "", " "]})), "no list for train in 3 rows"),
    ]
    (tmp_path / "broken.jsonl.gz").write_bytes(
        gzip.compress(b'{"query": "a", "document": "b", "label": 1}\n' * 1000)[:-9]
    )
    cases.append((str(tmp_path / "broken.jsonl.gz"), "not a sound gzip file"))
    for place, (data, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            run(tmp_path, data, f"out{place}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "name at least one"),
        ({"files": "a", "queries": "q"}, "go together"),
        ({"files": "a", "layout": "ids"}, "needs the tables"),
        ({"files": "a", "layout": "lists", "queries": "q", "corpus": "c"}, "its own texts"),
        ({"files": "a", "lists": "b"}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        LabelledData.model_validate(data)


def test_a_path_alone_stands_for_data():
    assert LabelledData.model_validate("a.parquet") == LabelledData(files="a.parquet")
    assert LabelledData.model_validate(["a", "b"]).uris == ("a", "b")


# --- reading


def test_lists_are_read_in_any_order_and_each_part_once(tmp_path, monkeypatch):
    prepared = run(tmp_path, many_pairs(tmp_path), slice_pairs=10, group_default=True)
    reads = []
    real = train_lists.read_bytes
    monkeypatch.setattr(train_lists, "read_bytes", lambda place: reads.append(place) or real(place))
    order = np.array([29, 0, 15, 0, 7])
    found = read_lists(prepared, order)
    check_lists(
        found, [(f"query {q}", [f"text {q} {d}" for d in range(q % 4 + 1)], [1, 0, 0, 0][: q % 4 + 1]) for q in order]
    )
    assert found.labels.flags.writeable and found.pairs.input_ids.flags.writeable
    assert len(reads) == len(set(reads)) < len(prepared.parts)
    everything(prepared)
    everything(prepared)
    assert len(reads) == len(prepared.parts)
    assert len(read_lists(prepared, np.array([], np.int64))) == 0
    with pytest.raises(IndexError, match="numbered from 0 to 29"):
        read_lists(prepared, np.array([30]))


def test_only_so_many_bytes_of_parts_are_kept(tmp_path, monkeypatch):
    prepared = run(tmp_path, many_pairs(tmp_path), slice_pairs=10)
    reads = []
    real = train_lists.read_bytes
    monkeypatch.setattr(train_lists, "read_bytes", lambda place: reads.append(place) or real(place))
    monkeypatch.setattr(train_lists, "_KEPT_BYTES", 1)
    monkeypatch.setattr(train_lists, "_KEPT_PARTS", 1)
    for _ in range(2):
        for number in range(prepared.num_lists):
            read_lists(prepared, np.array([number]))
    assert len(reads) == 2 * len(prepared.parts)


def test_a_damaged_or_missing_part_is_named(tmp_path):
    prepared = run(tmp_path, many_pairs(tmp_path))
    place = tmp_path / "out" / prepared.parts[0].path
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"part-000000-.* is damaged"):
        everything(prepared)
    place.unlink()
    with pytest.raises(StorageError, match=r"part-000000-.* is gone"):
        everything(prepared)


def test_prepared_data_travels_as_json_and_is_read_without_ray(tmp_path):
    prepared = run(tmp_path, many_pairs(tmp_path))
    body = PREPARED.dump_json(prepared)
    assert PREPARED.validate_json(body) == prepared
    code = "import sys, numpy as np\nfrom pipelines.train_data import PREPARED\n"
    code += "from pipelines.train_lists import read_lists\n"
    code += "found = read_lists(PREPARED.validate_json(sys.stdin.buffer.read()), np.array([3, 1]))\n"
    code += "assert not {'ray', 'torch'} & set(sys.modules), 'heavy import'\nprint(len(found), found.origins[0])"
    done = subprocess.run([sys.executable, "-c", code], input=body, capture_output=True, check=True)
    assert done.stdout.decode().split(" ", 1) == ["2", f"file://{tmp_path}/many.parquet, row 3\n"]
