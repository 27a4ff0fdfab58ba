"""The demo's collection, built from a few standard library modules."""

import math
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from crossenc.errors import InputError
from jobs.demo.collection import (
    LEAK_WORDS,
    NUM_CANDIDATES,
    Collection,
    Docstring,
    build_collection,
    module_family,
    split_of_family,
    standard_library_docstrings,
)
from jobs.demo.collection import _usable as usable
from jobs.demo.collection import _without_copies as without_copies

#: shutil defines disk_usage twice, for two platforms: names must be unique all the same.
SPLITS = {"logging": "train", "shutil": "train", "difflib": "dev", "threading": "test"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collection")


@pytest.fixture(scope="module")
def collection(folder: Path) -> Collection:
    return build_collection(folder, modules=tuple(SPLITS), split_of=SPLITS.__getitem__)


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def texts_by_split() -> Mapping[str, list[Docstring]]:
    found: dict[str, list[Docstring]] = {"train": [], "dev": [], "test": []}
    for docstring in standard_library_docstrings(tuple(SPLITS)):
        found[SPLITS[module_family(docstring.name)]].append(docstring)
    return found


def runs_of_words(text: str) -> set[str]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return {" ".join(words[i : i + LEAK_WORDS]) for i in range(len(words) - LEAK_WORDS + 1)}


def test_a_query_is_judged_in_the_split_of_its_module_only(collection: Collection) -> None:
    judged = {
        split: {r["query_id"] for r in rows(path)}
        for split, path in (("dev", collection.qrels_dev), ("test", collection.qrels_test))
    }
    assert judged["dev"] and judged["test"]
    for split, query_ids in judged.items():
        assert {SPLITS[module_family(query_id)] for query_id in query_ids} == {split}
    assert judged["dev"] | judged["test"] == {r["query_id"] for r in rows(collection.queries)}
    assert (len(judged["dev"]), len(judged["test"])) == (collection.num_dev_queries, collection.num_test_queries)


def test_no_training_text_repeats_a_dev_or_test_text(collection: Collection) -> None:
    split_texts = texts_by_split()
    queries = {r["text"].lower() for r in rows(collection.queries)}
    held_out = [text for split in ("dev", "test") for d in split_texts[split] for text in d[1:]]
    held_out_runs = set().union(*map(runs_of_words, held_out))
    training = rows(collection.training)
    assert len(training) == collection.num_training_pairs > 50
    for row in training:
        assert row["query"].lower() not in queries
        for text in (row["query"], row["positive"], *row["negatives"]):
            assert runs_of_words(text).isdisjoint(held_out_runs)


def test_negatives_are_other_documents_than_the_positive(collection: Collection) -> None:
    for row in rows(collection.training):
        assert row["negatives"]
        assert row["positive"] not in row["negatives"]
        assert len(set(row["negatives"])) == len(row["negatives"])


def test_every_candidate_and_every_judgement_names_a_document_of_the_corpus(collection: Collection) -> None:
    doc_ids = [r["doc_id"] for r in rows(collection.corpus)]
    assert len(set(doc_ids)) == len(doc_ids) == collection.num_documents
    for path in (collection.candidates, collection.qrels_dev, collection.qrels_test):
        assert {r["doc_id"] for r in rows(path)} <= set(doc_ids)


def test_a_query_s_candidates_are_ranked_from_1_by_falling_score(collection: Collection) -> None:
    by_query: dict[str, list[dict]] = {}
    for row in rows(collection.candidates):
        by_query.setdefault(row["query_id"], []).append(row)
    assert sum(map(len, by_query.values())) == collection.num_candidates
    for candidates in by_query.values():
        assert [r["rank"] for r in candidates] == list(range(1, len(candidates) + 1))
        assert len(candidates) <= NUM_CANDIDATES
        scores = [r["score"] for r in candidates]
        assert scores == sorted(scores, reverse=True)
        assert min(scores) > 0 and all(map(math.isfinite, scores))


def test_bm25_puts_the_right_document_among_the_candidates_of_most_queries(collection: Collection) -> None:
    found = {(r["query_id"], r["doc_id"]) for r in rows(collection.candidates)}
    relevant = [(r["query_id"], r["doc_id"]) for r in rows(collection.qrels_test)]
    assert sum(pair in found for pair in relevant) > len(relevant) / 2


def test_the_same_python_builds_the_same_bytes(collection: Collection, folder: Path, tmp_path: Path) -> None:
    build_collection(tmp_path, modules=tuple(SPLITS), split_of=SPLITS.__getitem__)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_an_empty_split_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train split"):
        build_collection(tmp_path, modules=("threading",), split_of=lambda family: "test")


def test_c_modules_and_their_python_twins_share_a_family() -> None:
    assert module_family("_pydecimal.Decimal") == module_family("_decimal.Decimal") == "decimal"
    assert module_family("_pyio.open") == module_family("io.open") == "io"
    assert module_family("_py_abc.ABCMeta") == module_family("abc.ABC") == "abc"
    assert module_family("pydoc.help") == "pydoc"
    assert split_of_family("asyncio") == "test"  # a digest decides: the splits must not move between versions


def test_a_docstring_is_cut_after_its_first_paragraph() -> None:
    text = (
        "Open the file\nfor reading.\n\nThe mode is one of r, w or a; others raise\n\n  ValueError, as they should.\n"
    )
    assert list(usable("m.f", text)) == [
        Docstring(
            "m.f",
            "Open the file for reading.",
            "The mode is one of r, w or a; others raise\n\nValueError, as they should.",
        )
    ]


@pytest.mark.parametrize(
    "docstring",
    [
        None,
        "One paragraph is a summary without a document.",
        "Too short.\n\nThe rest has ten words or more, which would be enough for it.",
        "The summary has enough words.\n\nThe rest has not.",
        f"{'word ' * 41}\n\nThe rest has ten words or more, which would be enough for it.",
    ],
)
def test_a_docstring_with_too_little_in_either_part_is_left_out(docstring: str | None) -> None:
    assert list(usable("m.f", docstring)) == []


def test_a_leading_signature_is_not_taken_for_the_summary() -> None:
    text = "add(x, y=(1, 2)) -> number\n\nAdd two numbers.\n\nBoth are converted to the wider of their two types first."
    assert [d.summary for d in usable("m.add", text)] == ["Add two numbers."]


def test_a_copied_summary_or_run_of_words_removes_a_pair() -> None:
    run = "one two three four five six seven eight"
    held_out = Docstring("t", "Close the file.", f"before {run} after")
    same_summary = Docstring("a", "close the FILE", "nothing in common")
    same_run = Docstring("b", "Other words.", f"x {run.upper()}. y")
    seven_words = Docstring("c", "Other words.", "x one two three four five six seven y")
    assert without_copies([same_summary, same_run, seven_words], of=[held_out]) == [seven_words]
