"""Reads a judged collection with first-stage candidates into samples for reranking. Knows no model.

A folder holds four tables, each a Parquet file (`queries.parquet`) or a folder of them (`queries/`):

- `queries`: an id and a text;
- `corpus`: an id and a text, and perhaps a title, which then stands before the text;
- `qrels`: a query id, a document id (or a list of them) and perhaps a grade, of which 1 or more is relevant;
- `candidates` (or `bm25`): a query id and a document id, with or without a rank, or a list of ids, best first.

Ids may be texts or numbers. Columns may have the names of BEIR or of this library. Every judged query counts: one
without candidates has an empty list.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossenc.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_IDS = ("_id", "id")
_QUERY_ID = ("query_id", "query-id", "qid")
_DOC_ID = ("doc_id", "corpus-id", "corpus_id", "docid")
_DOC_IDS = ("doc_ids", "corpus-ids", "corpus_ids")
_GRADE = ("relevance", "score", "grade", "label")

#: A table by its name, and where it is from, for errors.
_Load = Callable[[str], "tuple[pd.DataFrame, str] | None"]


def read_folder(folder: Path, rerank_k: int) -> list[dict[str, Any]]:
    """Samples of a local folder, with the first `rerank_k` candidates each. Raises InputError naming what is wrong."""
    import pandas as pd  # takes half a second to import, and imports pyarrow

    def load(name: str) -> "tuple[pd.DataFrame, str] | None":
        for path in (folder / f"{name}.parquet", folder / name):
            if path.exists():
                try:
                    return pd.read_parquet(path), str(path)
                except (OSError, ValueError) as error:  # pyarrow's errors derive from these
                    raise InputError(f"{path} cannot be read: {error}; write it again as Parquet") from error
        return None

    return _samples(load, str(folder), rerank_k)


def read_hub(dataset_id: str, split: str, rerank_k: int) -> list[dict[str, Any]]:
    """Samples of a hub dataset with subsets corpus, queries, qrels and bm25, by the library `datasets`.

    Raises InputError when the library is not installed or cannot load one of them.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{dataset_id} is no local folder, and datasets of the hub need `pip install datasets`; or give a folder"
        ) from error

    def load(name: str) -> "tuple[pd.DataFrame, str] | None":
        if name == "candidates":
            return None
        where = f"{dataset_id}, subset {name}, split {split}"
        try:
            return load_dataset(dataset_id, name, split=split).to_pandas(), where
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{where} cannot be loaded: {error}; without the hub, give a folder as dataset_id"
            ) from error

    return _samples(load, dataset_id, rerank_k)


def _samples(load: _Load, source: str, rerank_k: int) -> list[dict[str, Any]]:
    """Query, positives and ranked documents of every judged query, in the order of the queries."""
    queries, corpus = _texts(load, source, "queries", _QUERY_ID), _texts(load, source, "corpus", _DOC_ID)
    positives = _positives(*_table(load, source, ("qrels",)))
    candidates = _candidates(*_table(load, source, ("candidates", "bm25")))
    unknown = [query_id for query_id in positives if query_id not in queries]
    if unknown:
        raise InputError(f"{source}: the queries have no {unknown[0]!r}, which the qrels judge")
    return [
        {
            "query": text,
            "positive": [_text_of(corpus, doc_id, source) for doc_id in positives[query_id]],
            "documents": [_text_of(corpus, doc_id, source) for doc_id in candidates.get(query_id, ())[:rerank_k]],
        }
        for query_id, text in queries.items()
        if query_id in positives
    ]


def _texts(load: _Load, source: str, name: str, id_names: Sequence[str]) -> dict[str, str]:
    """Texts by id."""
    table, where = _table(load, source, (name,))
    ids = table[_column(table, (*id_names, *_IDS), where)].astype(str)
    texts = table[_column(table, ("text", "query", "document"), where)].fillna("").astype(str)
    if "title" in table and name == "corpus":
        texts = (table["title"].fillna("").astype(str) + " " + texts).where(table["title"].fillna("") != "", texts)
    return dict(zip(ids, texts, strict=True))


def _positives(table: "pd.DataFrame", where: str) -> dict[str, list[str]]:
    """Relevant document ids by query id; a query whose documents are all irrelevant has none."""
    if _found(table, _DOC_IDS) is None and (grade := _found(table, _GRADE)) is not None:
        judged = dict.fromkeys(table[_column(table, _QUERY_ID, where)].astype(str))
        return {**{query_id: [] for query_id in judged}, **_lists(table[table[grade] > 0], where)}
    return _lists(table, where)


def _candidates(table: "pd.DataFrame", where: str) -> dict[str, list[str]]:
    """Document ids by query id, best first: by rank, else by score, else as they stand."""
    if "rank" in table:
        table = table.sort_values("rank", kind="stable")
    elif "score" in table:
        table = table.sort_values("score", kind="stable", ascending=False)
    return _lists(table, where)


def _lists(table: "pd.DataFrame", where: str) -> dict[str, list[str]]:
    """Document ids by query id, in the order of the rows."""
    query_id = _column(table, _QUERY_ID, where)
    doc_id = _found(table, _DOC_IDS) or _column(table, _DOC_ID, where)
    lists: dict[str, list[str]] = {}
    for query, documents in zip(table[query_id].astype(str), table[doc_id].tolist(), strict=True):
        many = [documents] if isinstance(documents, str | int) else documents
        lists.setdefault(query, []).extend(map(str, many))
    return lists


def _table(load: _Load, source: str, names: Sequence[str]) -> "tuple[pd.DataFrame, str]":
    for name in names:
        if (found := load(name)) is not None:
            return found
    raise InputError(f"{source} has no {' or '.join(names)}: put {names[0]}.parquet there")


def _column(table: "pd.DataFrame", names: Sequence[str], where: str) -> str:
    found = _found(table, names)
    if found is None:
        raise InputError(f"{where} has no column {' or '.join(names)}; it has {', '.join(map(str, table.columns))}")
    return found


def _found(table: "pd.DataFrame", names: Sequence[str]) -> str | None:
    return next((name for name in names if name in table), None)


def _text_of(corpus: dict[str, str], doc_id: str, source: str) -> str:
    try:
        return corpus[doc_id]
    except KeyError:
        raise InputError(f"{source}: the corpus has no document {doc_id!r}, which qrels or candidates name") from None
