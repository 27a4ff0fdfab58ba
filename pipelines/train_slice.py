"""One slice of labelled data: rows in; tokenised lists in storage and an account of every row out.

It reads a slice, makes lists of its rows, tokenises them and stores what comes out: a part for each side of the split
and the refused rows. It knows nothing of Ray, nor of which slices there are and which are done.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter

from crossenc.errors import CrossEncError
from crossenc.loop.lists import LabelStatistics, concatenate_pairs, offsets_of
from crossenc.records import TokenizedPairs
from pipelines.inputs import check_unchanged
from pipelines.plan import InputFile
from pipelines.schemas import QUARANTINE_SCHEMA, to_parquet
from pipelines.storage import FileInfo, Location, locate
from pipelines.stored_files import StoredFile, store
from pipelines.texts import TextTable, open_store
from pipelines.train_files import DamagedError, Lines, Slice, format_of, read_slice
from pipelines.train_layout import LabelledColumns, kind_of
from pipelines.train_rows import Refusal, Row, Texts, from_arrow, from_lines, judge

Side = Literal["train", "validation"]
SIDES: tuple[Side, ...] = ("train", "validation")
#: Pairs per call of the tokenizer: a query that comes again within a call is tokenised once.
_CALL_PAIRS = 4096
#: Distinct labels that are counted.
_MAX_DISTINCT = 10
PART_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # the first one, where rows are grouped
        pa.field("num_pairs", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("labels", pa.large_list(pa.float32()), nullable=False),
        pa.field("lengths", pa.large_list(pa.int64()), nullable=False),
        pa.field("truncated", pa.large_list(pa.bool_()), nullable=False),
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("token_type_ids", pa.large_list(pa.uint8())),
    ]
)


class PairTokenizer(Protocol):
    """Turns pairs of texts into token ids, at most `max_length` a pair."""

    @property
    def max_length(self) -> int: ...

    def encode(self, queries: list[str], documents: list[str]) -> TokenizedPairs: ...

    def count_tokens(self, texts: Sequence[str]) -> Sequence[int]: ...


class TokenizerSource(Protocol):
    """What preparing needs of a model: a pipelines.model.CheckpointModel is one. Can be sent to other processes."""

    @property
    def name(self) -> str: ...

    def digests(self) -> Mapping[str, str]: ...

    def load_tokenizer(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class SliceContext:
    """What every slice needs to know. `grouped` are the sides where neighbouring rows of one query are a list."""

    folder: Location
    inputs: tuple[InputFile, ...]
    columns: LabelledColumns
    grouped: tuple[Side, ...]
    max_documents: int | None
    validation_share: float
    queries: TextTable | None
    corpus: TextTable | None
    cache: Path
    max_text_bytes: int
    storage_options: Mapping[str, Any]
    source: TokenizerSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCounts:
    """Figures of labels that can be added up. `distinct` holds at most _MAX_DISTINCT of them, the lowest."""

    minimum: float
    maximum: float
    total: float
    num_pairs: int
    num_positive: int
    num_lists: int
    num_single_label_lists: int
    distinct: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SidePart:
    """The part of one side of the split, which is absent where the side has no list."""

    file: StoredFile
    num_rows: int
    num_lists: int
    num_pairs: int
    num_tokens: int
    labels: LabelCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceCounts:
    """An account of a slice, or of the whole input.

    The conservation laws: `num_rows == num_rows_used + sum(refused_rows.values())`, and
    `num_documents == num_pairs + num_left_out + num_in_refused_rows + sum(refused_documents.values())`.
    `num_left_out` documents are beyond max_documents; the last two count documents that were refused with their row,
    and alone. Of rows that cannot be read the documents are not known.
    """

    num_rows: int
    num_rows_used: int
    num_documents: int
    num_pairs: int
    num_left_out: int
    num_in_refused_rows: int
    refused_rows: Mapping[str, int]
    refused_documents: Mapping[str, int]

    def check(self) -> None:
        """Raises CrossEncError where something came from nowhere or went missing."""
        rows = self.num_rows_used + sum(self.refused_rows.values())
        documents = self.num_pairs + self.num_left_out + self.num_in_refused_rows
        documents += sum(self.refused_documents.values())
        if (rows, documents) != (self.num_rows, self.num_documents):
            raise CrossEncError(
                f"{self.num_rows:,} rows with {self.num_documents:,} documents went in, {rows:,} and {documents:,} are"
                " accounted for; report this as a bug"
            )


@dataclass(frozen=True, slots=True)
class SliceRecord:
    """What a slice came to: storing it makes the slice done."""

    slice_id: str
    fingerprint: str
    counts: SliceCounts
    sides: Mapping[Side, SidePart]
    quarantine: StoredFile | None

    @property
    def files(self) -> list[StoredFile]:
        return [part.file for part in self.sides.values()] + ([self.quarantine] if self.quarantine else [])


RECORD = TypeAdapter(SliceRecord)


# --- rows to lists


@dataclass(slots=True)
class _List:
    """A list in the making."""

    key: object
    side: Side
    query: str
    row: int
    documents: list[str]
    labels: list[float]
    is_positive: list[bool]
    weights: list[float]


def side_of(query: str, validation_share: float) -> Side:
    """The side of the split that a query is on: by a hash of its text, whatever else there is."""
    digest = hashlib.blake2b(query.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_share * 2.0**64 else "train"


def read_rows(entry: Slice, context: SliceContext) -> Iterator[list[Row]]:
    """The rows of a slice in batches. Raises DamagedError, and InputError where the file is not the planned one."""
    planned = context.inputs[entry.file]
    file = FileInfo(locate(planned.uri, context.storage_options), planned.num_bytes, planned.version)
    columns, limit, cache = context.columns, context.max_text_bytes, context.cache
    texts = Texts(
        open_store(context.queries, cache, limit) if context.queries else None,
        open_store(context.corpus, cache, limit) if context.corpus else None,
        limit,
    )
    names = list(dict.fromkeys(columns.names.values()))
    long = [name for role, name in columns.names.items() if kind_of(role) in ("text", "texts", "id")]
    check_unchanged(file)
    for batch in read_slice(file, entry, names, long):
        if isinstance(batch, Lines):
            yield from_lines(batch, format_of(file) == "jsonl", columns, texts)
        else:
            yield from_arrow(batch[1], batch[0], columns, texts)
    check_unchanged(file)


class _SliceWork:
    """A slice while it is read: lists go to their sides, counts add up."""

    def __init__(self, entry: Slice, context: SliceContext, tokenizer: PairTokenizer) -> None:
        self.context = context
        self.sides = {side: _SideWork(tokenizer) for side in SIDES}
        self.refusals: list[Refusal] = []
        self.refused_rows: Counter[str] = Counter()
        self.refused_documents: Counter[str] = Counter()
        self.num_rows = self.num_rows_used = self.num_documents = self.num_left_out = self.num_in_refused_rows = 0
        self._open: _List | None = None

    def add(self, row: Row) -> None:
        """Takes a row: a list of its own, or where rows are grouped a part of one."""
        kept, refused = judge(row, self.context.columns)
        self.num_rows += 1
        self.num_documents += len(row.documents)
        self.refusals += refused
        documents_refused = [refusal.reason for refusal in refused if refusal.item is not None]
        self.refused_documents.update(documents_refused)
        if not kept:
            self.refused_rows[refused[-1].reason] += 1
            self.num_in_refused_rows += len(row.documents) - len(documents_refused)
        if self._open is not None and not (self._open.side in self.context.grouped and self._open.key == row.key):
            self.close()
        if not kept:
            return
        self.num_rows_used += 1
        if self._open is None:
            query = row.query[0] or ""
            side = side_of(query, self.context.validation_share)
            self._open = _List(row.key, side, query, row.row, [], [], [], [])
        self._open.weights.append(row.weight or 0.0)
        for item in kept:
            label = row.labels[item] or 0.0
            self._open.documents.append(row.documents[item][0] or "")
            self._open.labels.append(label)
            self._open.is_positive.append(item < row.num_positives or (not row.num_positives and label > 0))

    def close(self) -> None:
        """Hands on the list that is open, if there is one."""
        if self._open is None:
            return
        done, self._open = self._open, None
        chosen = list(range(len(done.documents)))
        most = self.context.max_documents
        if most is not None and len(chosen) > most:
            first = sorted(chosen, key=lambda place: not done.is_positive[place])
            chosen = sorted(first[:most])
            self.num_left_out += len(done.documents) - most
        self.sides[done.side].add(done, chosen)

    def counts(self) -> SliceCounts:
        return SliceCounts(
            num_rows=self.num_rows,
            num_rows_used=self.num_rows_used,
            num_documents=self.num_documents,
            num_pairs=sum(side.num_pairs for side in self.sides.values()),
            num_left_out=self.num_left_out,
            num_in_refused_rows=self.num_in_refused_rows,
            refused_rows=dict(sorted(self.refused_rows.items())),
            refused_documents=dict(sorted(self.refused_documents.items())),
        )


@dataclass(slots=True)
class _SideWork:
    """The lists of one side, tokenised a few thousand pairs at a time."""

    tokenizer: PairTokenizer
    num_rows: int = 0
    num_pairs: int = 0
    rows: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    pairs: list[TokenizedPairs] = field(default_factory=list)
    _queries: list[str] = field(default_factory=list)
    _documents: list[str] = field(default_factory=list)

    def add(self, done: _List, chosen: Sequence[int]) -> None:
        self.num_rows += len(done.weights)
        self.num_pairs += len(chosen)
        self.rows.append(done.row)
        self.sizes.append(len(chosen))
        self.weights.append(math.fsum(done.weights) / len(done.weights))
        self.labels += [done.labels[place] for place in chosen]
        self._queries += [done.query] * len(chosen)
        self._documents += [done.documents[place] for place in chosen]
        if len(self._queries) >= _CALL_PAIRS:
            self._tokenise()

    def _tokenise(self) -> None:
        self.pairs.append(self.tokenizer.encode(self._queries, self._documents))
        self._queries, self._documents = [], []

    def finish(self) -> tuple[pa.Table, LabelCounts]:
        """The rows of PART_SCHEMA, one a list, and the figures of their labels."""
        self._tokenise()
        pairs = concatenate_pairs(self.pairs)
        labels, sizes = np.array(self.labels, np.float32), np.array(self.sizes, np.int64)
        by_pair = offsets_of(sizes)
        by_token = pairs.offsets[by_pair]

        def lists(values: NDArray[Any], offsets: NDArray[np.int64]) -> pa.Array:
            return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))

        types = pairs.token_type_ids
        columns = {
            "row": pa.array(self.rows, pa.int64()),
            "num_pairs": pa.array(sizes),
            "num_tokens": pa.array(np.diff(by_token)),
            "weight": pa.array(np.array(self.weights, np.float32)),
            "labels": lists(labels, by_pair),
            "lengths": lists(pairs.lengths, by_pair),
            "truncated": lists(pairs.truncated, by_pair),
            "input_ids": lists(pairs.input_ids, by_token),
            "token_type_ids": pa.nulls(len(sizes), pa.large_list(pa.uint8()))
            if types is None
            else lists(types, by_token),
        }
        return pa.table(list(columns.values()), schema=PART_SCHEMA), _label_counts(labels, by_pair)


# --- labels


def _label_counts(labels: NDArray[np.float32], offsets: NDArray[np.int64]) -> LabelCounts:
    lowest = np.minimum.reduceat(labels, offsets[:-1])
    highest = np.maximum.reduceat(labels, offsets[:-1])
    return LabelCounts(
        minimum=float(labels.min()),
        maximum=float(labels.max()),
        total=math.fsum(labels.tolist()),
        num_pairs=len(labels),
        num_positive=int((labels > 0).sum()),
        num_lists=len(lowest),
        num_single_label_lists=int((lowest == highest).sum()),
        distinct=tuple(np.unique(labels)[:_MAX_DISTINCT].tolist()),
    )


def label_statistics(counts: Sequence[LabelCounts]) -> LabelStatistics:
    """The labels of all parts; there is at least one."""
    num_pairs = sum(one.num_pairs for one in counts)
    return LabelStatistics(
        minimum=min(one.minimum for one in counts),
        maximum=max(one.maximum for one in counts),
        mean=math.fsum(one.total for one in counts) / num_pairs,
        num_distinct=min(_MAX_DISTINCT, len({label for one in counts for label in one.distinct})),
        num_positive=sum(one.num_positive for one in counts),
        num_lists=sum(one.num_lists for one in counts),
        num_single_label_lists=sum(one.num_single_label_lists for one in counts),
    )


def add_counts(counts: Iterable[SliceCounts]) -> SliceCounts:
    """The sum over slices."""
    names = ("num_rows", "num_rows_used", "num_documents", "num_pairs", "num_left_out", "num_in_refused_rows")
    numbers: Counter[str] = Counter(dict.fromkeys(names, 0))
    reasons: dict[str, Counter[str]] = {"refused_rows": Counter(), "refused_documents": Counter()}
    for one in counts:
        numbers.update({name: getattr(one, name) for name in names})
        for name, total in reasons.items():
            total.update(getattr(one, name))
    sums: dict[str, Any] = {**numbers, **{name: dict(sorted(total.items())) for name, total in reasons.items()}}
    return SliceCounts(**sums)


# --- a slice


def prepare_slice(entry: Slice, context: SliceContext, tokenizer: PairTokenizer, fingerprint: str) -> SliceRecord:
    """Prepares a slice and stores its files, whose bytes depend on the slice alone.

    Raises InputError when the input file is no longer the planned one, StorageError when the store does not answer,
    RunConflictError where something else is stored. Damage inside the file is no error: every row of the slice is
    then refused as unreadable, after a second look, because bytes can also be damaged on their way.
    """
    for is_last in (False, True):
        work = _SliceWork(entry, context, tokenizer)
        try:
            for rows in read_rows(entry, context):
                for row in rows:
                    work.add(row)
            work.close()
            break
        except DamagedError as damage:
            if is_last:
                work = _unreadable(entry, context, tokenizer, str(damage))
    counts = work.counts()
    counts.check()
    if counts.num_rows != entry.num_rows:
        raise CrossEncError(
            f"{context.inputs[entry.file].uri}, rows {entry.row_start} to {entry.row_end - 1}: {entry.num_rows:,} rows"
            f" were planned and {counts.num_rows:,} read; report this as a bug"
        )
    sides: dict[Side, SidePart] = {}
    for side, lists in work.sides.items():
        if lists.sizes:
            table, labels = lists.finish()
            file = store(f"{side}/part-{entry.slice_id}.parquet", to_parquet(table), context.folder)
            num_tokens = int(table.column("num_tokens").to_numpy().sum())
            sides[side] = SidePart(file, lists.num_rows, len(lists.sizes), lists.num_pairs, num_tokens, labels)
    quarantine = None
    if work.refusals:
        body = to_parquet(_quarantine(work.refusals, context.inputs[entry.file].uri))
        quarantine = store(f"quarantine/part-{entry.slice_id}.parquet", body, context.folder)
    return SliceRecord(entry.slice_id, fingerprint, counts, sides, quarantine)


def _unreadable(entry: Slice, context: SliceContext, tokenizer: PairTokenizer, detail: str) -> _SliceWork:
    work = _SliceWork(entry, context, tokenizer)
    rows = range(entry.row_start, entry.row_end)
    work.refusals = [Refusal(row, None, "unreadable", detail, None, None) for row in rows]
    work.num_rows = work.refused_rows["unreadable"] = len(rows)
    return work


def _quarantine(refusals: Sequence[Refusal], file: str) -> pa.Table:
    rows = [
        {
            "query_id": one.query_id,
            "doc_id": one.doc_id,
            "reason": one.reason,
            "detail": one.detail,
            "file": file,
            "row": one.row,
            "item": one.item,
        }
        for one in refusals
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
