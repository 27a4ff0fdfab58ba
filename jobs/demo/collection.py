"""The demo's collection: docstrings of the Python standard library as queries, documents and judgements.

A query is a docstring's summary (its first paragraph); the document it should find is the rest of that
docstring. Train, dev and test are disjoint sets of top-level modules, so the test queries are about code that
training never saw. Nothing here knows a model or Ray: the output is Parquet, the same for the same Python.

What keeps test unseen: a docstring is left out of training when its summary is a dev or test query, or when
one of its texts shares a run of LEAK_WORDS words with a text of dev or test. Dev is cleaned against test in the
same way. The documents of all modules are searched, as in a real corpus.
"""

import ast
import hashlib
import importlib
import inspect
import logging
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import Stemmer

from crossenc.errors import InputError

logger = logging.getLogger(__name__)

#: Candidates of each query. With the backbone as a bi-encoder, reranking 30 gained .001 nDCG@10 over 20 on dev.
NUM_CANDIDATES = 20
#: Negatives stored with a training pair, hardest first; the training loop draws a few of them.
NUM_NEGATIVES = 20
#: Texts that share a run of so many words count as copies.
LEAK_WORDS = 8
#: Dev queries kept: enough to choose one weight by, and scoring them costs time.
MAX_DEV_QUERIES = 150

_SKIPPED_FOLDERS = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?$", re.DOTALL)
_SHARE_TEST, _SHARE_DEV = 20, 12  # per cent of the modules, not of the queries


class Docstring(NamedTuple):
    """A docstring cut in two: `summary` is the query, `rest` the document. `name` is the qualified name."""

    name: str
    summary: str
    rest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Where the collection lies, and how large it is.

    `queries` holds the dev and test queries [query_id, text], `corpus` all documents [doc_id, text],
    `qrels_*` [query_id, doc_id, relevance], `candidates` BM25's best of the dev and test
    queries [query_id, doc_id, rank, score], `training` [query, positive, negatives], hardest negatives first.
    """

    queries: Path
    corpus: Path
    qrels_dev: Path
    qrels_test: Path
    candidates: Path
    training: Path
    num_documents: int
    num_dev_queries: int
    num_test_queries: int
    num_candidates: int
    num_training_pairs: int


def build_collection(
    folder: Path, *, modules: Sequence[str] | None = None, split_of: Callable[[str], str] | None = None
) -> Collection:
    """Write the collection into `folder` and say what it holds.

    `modules` are top-level modules of the standard library (None: all); `split_of` maps a module family to
    "train", "dev" or "test" (None: `split_of_family`). Raises InputError when a split ends up empty.
    """
    library = _first_of_each_name(standard_library_docstrings(modules))
    found = _by_split(library, split_of or split_of_family)
    test = found["test"]
    dev = _without_copies(found["dev"], of=test)
    train = _without_copies(found["train"], of=[*test, *dev])
    splits = {"train": train, "dev": _sample(_distinct_queries(dev), MAX_DEV_QUERIES), "test": test}
    for name, pairs in splits.items():
        if not pairs:
            raise InputError(
                f"The demo's {name} split has no docstring with a summary and a rest: Python may be "
                "installed without its sources or run with docstrings stripped (-OO). Use a full Python installation."
            )
    return _write(folder, library, splits)


def split_of_family(family: str) -> str:
    """The split of a module family: a pure function of its name."""
    bucket = int(hashlib.sha256(family.encode()).hexdigest(), 16) % 100
    if bucket < _SHARE_TEST:
        return "test"
    return "dev" if bucket < _SHARE_TEST + _SHARE_DEV else "train"


def module_family(name: str) -> str:
    """The top-level module that a qualified name belongs to, `_pydecimal` and `_decimal` being `decimal`.

    C accelerators and pure Python twins repeat each other's docstrings, so they must share a split.
    """
    family = name.partition(".")[0].lstrip("_")
    twin = family.removeprefix("py").lstrip("_")
    return twin if twin in sys.stdlib_module_names else family


def standard_library_docstrings(modules: Sequence[str] | None = None) -> Iterator[Docstring]:
    """Usable docstrings of the standard library: Python sources are read, C modules imported."""
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(modules if modules is not None else sys.stdlib_module_names):
        if module in _SKIPPED_FOLDERS or module.startswith("_test") or module.startswith("_xx"):
            continue
        if (root / module).is_dir():
            yield from _source_docstrings(root / module, module)
        elif (root / f"{module}.py").is_file():
            yield from _file_docstrings(root / f"{module}.py", module)
        else:
            yield from _binary_docstrings(module)


def _source_docstrings(folder: Path, package: str) -> Iterator[Docstring]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not _SKIPPED_FOLDERS.intersection(parts):
            yield from _file_docstrings(path, ".".join((package, *(p for p in parts if p != "__init__"))))


def _file_docstrings(path: Path, module: str) -> Iterator[Docstring]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template or a file for another Python
        logger.info("%s is not Python %d.%d and is left out", path, *sys.version_info[:2])
        return
    yield from _node_docstrings(tree, module)


def _node_docstrings(node: ast.AST, name: str) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield from _usable(name, ast.get_docstring(node))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _node_docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):  # definitions that depend on the platform
            yield from _node_docstrings(child, name)


def _binary_docstrings(module: str) -> Iterator[Docstring]:
    try:
        loaded = importlib.import_module(module)
    except ImportError:  # not built on this system, e.g. _tkinter or winreg
        logger.info("module %s cannot be imported here and is left out", module)
        return
    yield from _usable(module, loaded.__doc__)
    for name, value in sorted(vars(loaded).items()):
        if name.startswith("__"):  # __loader__ and the like belong to the import system
            continue
        if isinstance(value, type):
            yield from _usable(f"{module}.{name}", value.__doc__)
            for attribute, member in sorted(vars(value).items()):
                if inspect.isroutine(member) or inspect.isdatadescriptor(member):
                    yield from _usable(f"{module}.{name}.{attribute}", member.__doc__)
        elif isinstance(value, types.BuiltinFunctionType):
            yield from _usable(f"{module}.{name}", value.__doc__)


def _usable(name: str, docstring: object) -> Iterator[Docstring]:
    """The docstring in two parts, if both parts say enough."""
    if not isinstance(docstring, str):
        return
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if p.strip()]
    if paragraphs and _SIGNATURE.match(paragraphs[0]):  # "add(x, y) -> number" is a name, not a summary
        paragraphs = paragraphs[1:]
    if len(paragraphs) < 2:
        return
    summary, rest = " ".join(paragraphs[0].split()), "\n\n".join(paragraphs[1:])
    if 3 <= len(_words(summary)) <= 40 and len(_words(rest)) >= 10:
        yield Docstring(name, summary, rest)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _normal(text: str) -> str:
    return " ".join(_words(text))


def _digest_order(pairs: Iterable[Docstring]) -> list[Docstring]:
    """The pairs in an order that looks random and depends on nothing but their names."""
    return sorted(pairs, key=lambda d: hashlib.sha256(d.name.encode()).digest())


def _sample(pairs: Iterable[Docstring], limit: int) -> list[Docstring]:
    return _digest_order(pairs)[:limit]


def _first_of_each_name(pairs: Iterable[Docstring]) -> list[Docstring]:
    """Names are ids: of a definition's variants for several platforms one is kept."""
    return list({d.name: d for d in reversed(list(pairs))}.values())[::-1]


def _merge(pairs: Iterable[Docstring]) -> list[Docstring]:
    """The pairs without those whose two texts both repeat an earlier pair's."""
    return list({(_normal(d.summary), _normal(d.rest)): d for d in reversed(list(pairs))}.values())[::-1]


def _by_split(library: Iterable[Docstring], split_of: Callable[[str], str]) -> dict[str, list[Docstring]]:
    splits: dict[str, list[Docstring]] = {"train": [], "dev": [], "test": []}
    for pair in _merge(library):
        splits[split_of(module_family(pair.name))].append(pair)
    return splits


def _without_copies(pairs: Iterable[Docstring], *, of: Iterable[Docstring]) -> list[Docstring]:
    """The pairs that repeat no text of `of`: neither a whole summary nor LEAK_WORDS words in a row."""
    held_out = list(of)
    summaries = {_normal(d.summary) for d in held_out}
    runs = {run for d in held_out for run in _runs(d)}
    return [d for d in pairs if _normal(d.summary) not in summaries and runs.isdisjoint(_runs(d))]


def _runs(pair: Docstring) -> Iterator[tuple[str, ...]]:
    for text in (pair.summary, pair.rest):
        words = _words(text)
        for start in range(len(words) - LEAK_WORDS + 1):
            yield tuple(words[start : start + LEAK_WORDS])


def _write(folder: Path, library: Sequence[Docstring], splits: dict[str, list[Docstring]]) -> Collection:
    folder.mkdir(parents=True, exist_ok=True)
    documents = {_normal(d.rest): d for d in reversed(library)}  # equal rests are one document, named by the first
    doc_ids = [d.name for d in documents.values()]
    judged = _judgements(library, {text: d.name for text, d in documents.items()})
    queries = {split: _distinct_queries(splits[split]) for split in ("dev", "test")}
    asked = [*queries["dev"], *queries["test"]]
    found = _bm25([d.rest for d in documents.values()], [d.summary for d in asked], NUM_CANDIDATES)
    candidates = [
        (query.name, doc_ids[index], rank, score)
        for query, hits in zip(asked, found, strict=True)
        for rank, (index, score) in enumerate(hits, start=1)
    ]
    training = _training_rows(splits["train"])
    _write_table(folder / "queries.parquet", [(d.name, d.summary) for d in asked], ("query_id", "text"))
    corpus = [(d.name, d.rest) for d in documents.values()]
    _write_table(folder / "corpus.parquet", corpus, ("doc_id", "text"))
    for split, members in queries.items():
        rows = [(d.name, doc_id, 1) for d in members for doc_id in judged[_normal(d.summary)]]
        _write_table(folder / f"qrels_{split}.parquet", rows, ("query_id", "doc_id", "relevance"))
    _write_table(folder / "candidates.parquet", candidates, ("query_id", "doc_id", "rank", "score"))
    _write_table(folder / "training.parquet", training, ("query", "positive", "negatives"))
    return Collection(
        queries=folder / "queries.parquet",
        corpus=folder / "corpus.parquet",
        qrels_dev=folder / "qrels_dev.parquet",
        qrels_test=folder / "qrels_test.parquet",
        candidates=folder / "candidates.parquet",
        training=folder / "training.parquet",
        num_documents=len(corpus),
        num_dev_queries=len(queries["dev"]),
        num_test_queries=len(queries["test"]),
        num_candidates=len(candidates),
        num_training_pairs=len(training),
    )


def _write_table(path: Path, rows: Iterable[tuple[object, ...]], columns: tuple[str, ...]) -> None:
    values = zip(*rows, strict=True)
    pq.write_table(pa.table(dict(zip(columns, map(list, values), strict=True))), path)


def _judgements(library: Iterable[Docstring], doc_id_of: dict[str, str]) -> dict[str, list[str]]:
    """Normalised summary -> the documents it describes, in whatever module they are."""
    judged: dict[str, list[str]] = {}
    for pair in library:
        doc_ids = judged.setdefault(_normal(pair.summary), [])
        if (doc_id := doc_id_of[_normal(pair.rest)]) not in doc_ids:
            doc_ids.append(doc_id)
    return judged


def _distinct_queries(pairs: Iterable[Docstring]) -> list[Docstring]:
    return list({_normal(d.summary): d for d in reversed(list(pairs))}.values())[::-1]


def _training_rows(train: Sequence[Docstring]) -> list[tuple[str, str, list[str]]]:
    """Each training pair with the documents of other training pairs that BM25 confuses with its own."""
    ordered = _digest_order(train)
    same: dict[str, set[str]] = {}
    for pair in ordered:
        same.setdefault(_normal(pair.summary), set()).add(_normal(pair.rest))
    documents = list({_normal(d.rest): d.rest for d in ordered}.items())
    found = _bm25([text for _, text in documents], [d.summary for d in ordered], NUM_NEGATIVES)
    rows = []
    for pair, hits in zip(ordered, found, strict=True):
        positives = same[_normal(pair.summary)]
        negatives = [documents[index][1] for index, _ in hits if documents[index][0] not in positives]
        if negatives:
            rows.append((pair.summary, pair.rest, negatives))
    return rows


def _bm25(documents: Sequence[str], queries: Sequence[str], depth: int) -> list[list[tuple[int, float]]]:
    """For each query its best documents as (index, score), best first; only scores above 0."""
    stemmer = Stemmer.Stemmer("english")
    settings = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    retriever = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    retriever.index(bm25s.tokenize(list(documents), **settings), show_progress=False)
    hits, scores = retriever.retrieve(
        bm25s.tokenize(list(queries), **settings), k=min(depth, len(documents)), show_progress=False
    )
    return [
        [(int(index), float(score)) for index, score in zip(row, row_scores, strict=True) if score > 0]
        for row, row_scores in zip(np.asarray(hits), np.asarray(scores), strict=True)
    ]
