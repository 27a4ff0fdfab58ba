"""Small retrieval collections, made in every layout that candidates come in, and readers of what a run wrote."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from crossenc.testing import FakeScorer, FakeTokenizer


@dataclass(frozen=True)
class Collection:
    """Queries with `depth` candidates each. `pairs` has one row per candidate, texts included."""

    pairs: pd.DataFrame
    folder: Path

    def write(self, layout: str) -> dict[str, str]:
        """Writes the candidates in a layout; returns the settings that name them."""
        folder = self.folder / layout
        folder.mkdir(parents=True, exist_ok=True)
        if layout == "pairs":
            self.pairs.to_parquet(folder / "pairs.parquet", index=False)
        elif layout == "shuffled":
            mixed = self.pairs.sample(frac=1, random_state=0)
            half = len(mixed) // 2
            mixed[:half].to_parquet(folder / "a.parquet", index=False)
            mixed[half:].to_parquet(folder / "b.parquet", index=False)
        elif layout == "nested":
            pq.write_table(self._nested(), folder / "nested.parquet")
        else:
            ids, queries, corpus = folder / "candidates", folder / "queries.parquet", folder / "corpus.parquet"
            ids.mkdir(exist_ok=True)
            self.pairs[["query_id", "doc_id", "rank", "score"]].to_parquet(ids / "a.parquet", index=False)
            unique = self.pairs.drop_duplicates("query_id")
            pd.DataFrame({"query_id": unique.query_id, "text": unique["query"]}).to_parquet(queries, index=False)
            self.pairs[["doc_id", "text"]].drop_duplicates("doc_id").to_parquet(corpus, index=False)
            return {"candidates": str(ids), "queries": str(queries), "corpus": str(corpus)}
        return {"candidates": str(folder)}

    def _nested(self) -> pa.Table:
        rows = [
            {
                "query_id": query_id,
                "query": group["query"].iloc[0],
                "doc_ids": group.doc_id.tolist(),
                "documents": group.text.tolist(),
                "ranks": group["rank"].tolist(),
                "scores": group.score.tolist(),
            }
            for query_id, group in self.pairs.groupby("query_id", sort=False)
        ]
        return pa.Table.from_pylist(rows)


def make_collection(folder: Path, num_queries: int = 20, depth: int = 10, seed: int = 0) -> Collection:
    """A collection of made-up words; documents are shared between queries, ranks follow falling scores."""
    rng = np.random.default_rng(seed)
    words = np.array([f"word{i}" for i in range(500)])
    documents = [" ".join(rng.choice(words, rng.integers(3, 30))) for _ in range(num_queries * depth // 2)]
    rows = []
    for q in range(num_queries):
        query = " ".join(rng.choice(words, 4))
        for rank, d in enumerate(rng.choice(len(documents), depth, replace=False), start=1):
            row = {"query_id": f"q{q:04d}", "query": query, "doc_id": f"d{d:05d}", "text": documents[d]}
            rows.append(row | {"rank": rank, "score": 30.0 - rank + float(rng.random())})
    return Collection(pd.DataFrame(rows), folder)


def with_bad_rows(collection: Collection, marker: str) -> Collection:
    """The same collection with two documents that are refused: one without a text, one that holds `marker`."""
    pairs = collection.pairs.copy()
    pairs.loc[13, "text"] = None
    pairs.loc[27, "text"] = f"{pairs.loc[27, 'text']} {marker}"
    return Collection(pairs, collection.folder)


def write_job(path: Path, **settings: object) -> str:
    """Writes a job file; returns its path."""
    path.write_text(yaml.safe_dump({"model": "fake", **settings}))
    return str(path)


def plain_ranking(pairs: pd.DataFrame) -> pd.DataFrame:
    """The ranking by hand: every pair scored by itself, ordered by score, first-stage rank and doc id."""
    scored = pairs.copy()
    scored["score"] = FakeScorer().score(FakeTokenizer().encode(pairs["query"].tolist(), pairs.text.tolist()))
    order = ["query_id", "score", "rank", "doc_id"]
    return scored.sort_values(order, ascending=[True, False, True, True]).reset_index(drop=True)


def read_results(output: Path | str) -> pd.DataFrame:
    """All ranked documents, sorted by query and rank."""
    return pq.read_table(f"{output}/results").to_pandas().sort_values(["query_id", "rank"]).reset_index(drop=True)


def read_quarantine(output: Path | str) -> pd.DataFrame:
    """All refused candidates, in input order; empty where nothing was refused."""
    folder = Path(output) / "quarantine"
    if not folder.exists():
        return pd.DataFrame(columns=["query_id", "doc_id", "reason", "detail", "file", "row", "item"])
    return pq.read_table(folder).to_pandas().sort_values(["file", "row", "item"]).reset_index(drop=True)


def read_manifest(output: Path | str) -> dict:
    return json.loads((Path(output) / "_manifest.json").read_text())


def part_bytes(output: Path | str) -> dict[str, bytes]:
    """Every file of the three tables by its path below the output: what must be byte-identical between runs."""
    root = Path(output)
    files = [
        p for folder in ("results", "completeness", "quarantine") for p in sorted((root / folder).rglob("*.parquet"))
    ]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def parts(output: Path | str) -> dict[str, tuple[int, int]]:
    """The committed parts by name, each with inode and modification time in ns: equal as long as it is the same file.

    Hidden files are somebody's unfinished work and do not count.
    """
    found = [(path.name, path.stat()) for path in Path(output, "results").glob("part-*.parquet")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def visible_files(output: Path | str) -> set[str]:
    """Every file below the output by its path, but for hidden ones, which no reader of tables looks at."""
    root = Path(output)
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in files if not path.name.startswith(".")}
