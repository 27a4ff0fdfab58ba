"""Labelled data to tokenised lists in storage: plan, prepare each slice, finish.

Exactly once in the sense of the mining job: a slice's files are named by the slice, their bytes depend on the slice
alone, and each is made by one create-only PUT; the slice's record is stored after them and makes it done. Preparing
needs a Ray cluster. Reading the lists again is train_lists' business.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from crossenc.card import DatasetFacts, describe_dataset
from crossenc.card.dataset import STATISTICS_ROWS
from crossenc.errors import CrossEncError, InputError, RunConflictError
from crossenc.loop.lists import LabelStatistics
from pipelines import plan as plans
from pipelines.plan import InputFile
from pipelines.storage import (
    FileInfo,
    Location,
    check_apart,
    list_files,
    locate,
    open_input,
    put_new,
    read_bytes,
)
from pipelines.texts import TextTable, default_cache, find_tables
from pipelines.train_data_config import LabelledData
from pipelines.train_files import DamagedError, Slice, cut_slices, find_columns
from pipelines.train_files import list_files as list_input
from pipelines.train_layout import LabelledColumns
from pipelines.train_rows import Row, judge
from pipelines.train_slice import (
    RECORD,
    SIDES,
    PairTokenizer,
    Side,
    SliceContext,
    SliceCounts,
    SliceRecord,
    TokenizerSource,
    add_counts,
    label_statistics,
    read_rows,
    side_of,
)

FORMAT = 1
PREPARED_FILE = "prepared.json"
PLAN_FILE = "_run/plan.json"
RECORD_FOLDER = "_run/records"
#: Rows that are looked at for the facts on the model card.
_FACTS_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class PreparedPart:
    """A stored file of lists. `path` is relative to the folder; `file` is the input file that its rows come from."""

    part_id: str
    path: str
    file: str
    num_lists: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenised lists in storage. List i is the i-th in the order of the parts, and of the rows in each.

    `num_rows` rows of the input are in them. `num_refused` counts the rows and documents that are not, by reason: those
    of the whole input, whichever side of a split they might have been on. `facts` is what a model card shows, of the
    first rows; `statistics` is of all labels. `digest` identifies the lists: equal ones are equal in every byte.
    """

    folder: Location
    num_rows: int
    num_lists: int
    num_pairs: int
    num_tokens: int
    num_refused: Mapping[str, int]
    parts: tuple[PreparedPart, ...]
    statistics: LabelStatistics
    facts: DatasetFacts
    digest: str

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs and tokens of each list, int64 [N] both; of the parts only these columns are read."""

        def read(part: PreparedPart) -> pa.Table:
            with open_input(FileInfo(self.folder / part.path, part.num_bytes, "")) as source:
                return pq.read_table(source, columns=["num_pairs", "num_tokens"])

        with ThreadPoolExecutor(16) as pool:
            tables = list(pool.map(read, self.parts))
        columns = pa.concat_tables(tables)
        return columns.column("num_pairs").to_numpy(), columns.column("num_tokens").to_numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """How to prepare.

    `group_default` is what `LabelledData.group` is where that is None; the side that a split holds out is grouped then
    in any case, because rankings are measured on it. A task prepares about `slice_pairs` pairs, and a part holds them;
    by size if absent. At most `workers` tasks run at once; by default as many as the CPUs allow.
    """

    group_default: bool = False
    max_text_bytes: int = 4 * 2**20
    slice_pairs: int | None = None
    workers: int | None = None
    cpus_per_task: float = 1
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far preparing is. Rows include refused ones."""

    num_parts: int
    num_parts_done: int
    num_rows: int
    num_pairs: int


class NothingToLearnError(InputError):
    """Labelled data gives not one list to train on, or to validate on."""


class StoppedError(CrossEncError):
    """Preparing was told to stop; calling it again goes on where it was."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What fixes the parts: written once, and read again by every later attempt."""

    fingerprint: str
    depends_on: Mapping[str, str]
    columns: LabelledColumns
    inputs: tuple[InputFile, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """A call with everything resolved that its fingerprint rests on."""

    data: LabelledData
    folder: Location
    files: tuple[FileInfo, ...]
    queries: TextTable | None
    corpus: TextTable | None
    grouped: tuple[Side, ...]
    validation_share: float
    source: TokenizerSource
    tokenizer: PairTokenizer
    settings: PrepareSettings
    depends_on: Mapping[str, str]


_PLAN = TypeAdapter(_Plan)
PREPARED = TypeAdapter(PreparedData)
_Prepared = tuple[PreparedData, PreparedData | None]


def prepare(
    data: LabelledData,
    folder: Location,
    source: TokenizerSource,
    *,
    settings: PrepareSettings,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
) -> PreparedData:
    """The lists of `data`, tokenised and stored in `folder`; at once where they are there already.

    Needs a connection to Ray. `should_stop()` is asked every moment; StoppedError is raised then, and what is done is
    kept for the next call. Raises InputError for data that cannot be used, RunConflictError where the folder holds
    other data, or the same of other files, tokenizer or settings.
    """
    return _prepare(_resolve(data, folder, source, 0.0, settings), should_stop, on_progress)[0]


def prepare_split(
    data: LabelledData,
    folder: Location,
    source: TokenizerSource,
    validation_share: float,
    *,
    settings: PrepareSettings,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
) -> tuple[PreparedData, PreparedData]:
    """As `prepare`, with a share of the queries held out: what to train on, and what to validate on.

    A query is held out by a hash of its text: the same in all data, whatever its order. Unless `data.group` says
    otherwise, its rows that stand together are one list of the held-out side.
    """
    if not 0 < validation_share < 1:
        raise InputError(f"the share to hold out is {validation_share}: give a number between 0 and 1")
    train, validation = _prepare(_resolve(data, folder, source, validation_share, settings), should_stop, on_progress)
    assert validation is not None, "it was asked for"
    return train, validation


def check_prepared(
    data: LabelledData,
    folder: Location,
    source: TokenizerSource,
    validation_share: float = 0.0,
    *,
    settings: PrepareSettings,
) -> None:
    """Raises RunConflictError where `folder` holds the lists of other files, tokenizer or settings; reads no data."""
    _load(_resolve(data, folder, source, validation_share, settings))


def _resolve(
    data: LabelledData,
    folder: Location,
    source: TokenizerSource,
    validation_share: float,
    settings: PrepareSettings,
) -> _Job:
    """Looks everything up that the result depends on. Raises InputError before any work is done."""
    options = dict(settings.storage_options)
    check_apart(folder, [*data.uris, data.queries, data.corpus])
    roles = ("query", "title", "query_id", "doc_id")
    names = {role: name for role, name in data.columns.items() if role in roles}
    if "document" in data.columns:
        names["text"] = data.columns["document"]
    queries, corpus = find_tables(data.queries, data.corpus, names, options)
    files = list_input(data, options)
    tables = [*(queries.files if queries else ()), *(corpus.files if corpus else ())]
    tokenizer: PairTokenizer = source.load_tokenizer()
    judged: tuple[Side, ...] = SIDES[1:] if validation_share else ()
    grouped = (SIDES[:1] if settings.group_default else ()) + judged if data.group is None else SIDES * data.group
    # Weights do not change tokens: the lists of a model serve all that have its tokenizer.
    digests = {name: digest for name, digest in source.digests().items() if not name.endswith(".safetensors")}
    depends_on = plans.describe_parts(
        [*files, *tables],
        digests,
        {
            **data.result_options(),
            "group": "validation" if grouped == SIDES[1:] else bool(grouped),
            "max_length": tokenizer.max_length,
            "max_text_bytes": settings.max_text_bytes,
            "slice_pairs": settings.slice_pairs,
            "validation_share": validation_share,
        },
    )
    depends_on |= {"job": "training data", "training data format": str(FORMAT)}
    return _Job(
        data=data,
        folder=folder,
        files=tuple(files),
        queries=queries,
        corpus=corpus,
        grouped=grouped,
        validation_share=validation_share,
        source=source,
        tokenizer=tokenizer,
        settings=settings,
        depends_on=depends_on,
    )


def _prepare(job: _Job, should_stop: Callable[[], bool], on_progress: Callable[[PrepareProgress], None]) -> _Prepared:
    finished = _load(job)
    if finished is not None:
        return finished
    plan = _stored_plan(job) or _new_plan(job)
    context = _context(job, plan)
    records = _records(job.folder, plan)

    def report() -> None:
        counts = [record.counts for record in records.values()]
        num_rows, num_pairs = sum(one.num_rows for one in counts), sum(one.num_pairs for one in counts)
        on_progress(PrepareProgress(len(plan.slices), len(records), num_rows, num_pairs))

    report()
    todo = [entry for entry in plan.slices if entry.slice_id not in records]
    if todo:
        # Imported here because Ray takes seconds to import, which readers of lists need not wait for.
        from pipelines import train_execute

        settings = job.settings
        done = train_execute.run(todo, context, plan.fingerprint, settings.workers, settings.cpus_per_task)
        with contextlib.closing(done):
            for record in done:
                if record is not None:
                    records[record.slice_id] = _store_record(record, job.folder, plan)
                    report()
                if should_stop():
                    break
    if len(records) < len(plan.slices):
        raise StoppedError(f"stopped; run the same command again to go on preparing {job.folder}")
    return _finish(job, plan, context, records)


def _context(job: _Job, plan: _Plan) -> SliceContext:
    return SliceContext(
        folder=job.folder,
        inputs=plan.inputs,
        columns=plan.columns,
        grouped=job.grouped if plan.columns.is_single else (),
        max_documents=job.data.max_documents,
        validation_share=job.validation_share,
        queries=job.queries,
        corpus=job.corpus,
        cache=default_cache(),
        max_text_bytes=job.settings.max_text_bytes,
        storage_options=dict(job.settings.storage_options),
        source=job.source,
    )


# --- what is stored


def _new_plan(job: _Job) -> _Plan:
    """Cuts the input into slices and stores that; returns the stored plan: another writer's, if that came first."""
    columns = find_columns(job.data, job.files)
    grouped = bool(job.grouped) and columns.is_single
    slices = cut_slices(job.files, columns, grouped, job.settings.slice_pairs)
    num_rows = [sum(entry.num_rows for entry in slices if entry.file == index) for index in range(len(job.files))]
    inputs = tuple(
        InputFile(file.location.uri, file.num_bytes, file.version, rows)
        for file, rows in zip(job.files, num_rows, strict=True)
    )
    plan = _Plan(plans.fingerprint(job.depends_on), job.depends_on, columns, inputs, tuple(slices))
    put_new(job.folder / PLAN_FILE, _PLAN.dump_json(plan))
    stored = _stored_plan(job)
    assert stored is not None, "the plan was just stored"
    return stored


def _stored_plan(job: _Job) -> _Plan | None:
    try:
        body = read_bytes(job.folder / PLAN_FILE)
    except FileNotFoundError:
        return None
    try:
        plan = _PLAN.validate_json(body)
    except ValidationError:
        raise _not_ours(job.folder / PLAN_FILE) from None
    plans.check_unchanged(plan.depends_on, job.depends_on, job.folder)
    return plan


def _not_ours(place: Location) -> RunConflictError:
    return RunConflictError(f"{place} is not of this version; choose another folder, or delete this one")


def _store_record(record: SliceRecord, folder: Location, plan: _Plan) -> SliceRecord:
    place = folder / f"{RECORD_FOLDER}/{record.slice_id}.json"
    return _parse_record(put_new(place, RECORD.dump_json(record)), place, plan)


def _parse_record(body: bytes, place: Location, plan: _Plan) -> SliceRecord:
    try:
        record = RECORD.validate_json(body)
    except ValidationError:
        raise _not_ours(place) from None
    if record.fingerprint != plan.fingerprint:
        raise RunConflictError(f"{place} belongs to other data; choose another folder, or delete this one")
    return record


def _records(folder: Location, plan: _Plan) -> dict[str, SliceRecord]:
    """The records of the slices that are done. A slice whose files are not all there is made again."""
    files = [file.location for file in list_files(folder / RECORD_FOLDER) if not file.location.name.startswith(".")]
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda place: _parse_record(read_bytes(place), place, plan), files))
    listed = (file for name in (*SIDES, "quarantine") for file in list_files(folder / name)) if records else ()
    stored = {(file.location.uri, file.num_bytes) for file in listed}
    return {
        record.slice_id: record
        for record in records
        if all(((folder / file.path).uri, file.num_bytes) in stored for file in record.files)
    }


def _load(job: _Job) -> _Prepared | None:
    """What an earlier call has finished, or None."""
    place = job.folder / PREPARED_FILE
    try:
        body = json.loads(read_bytes(place))
        plans.check_unchanged(body["depends_on"], job.depends_on, job.folder)
        here = {"folder": {"uri": job.folder.uri, "options": dict(job.folder.options)}}
        sides = [PREPARED.validate_python(side | here) if side else None for side in (body[name] for name in SIDES)]
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CrossEncError):
            raise
        raise _not_ours(place) from None
    assert sides[0] is not None, "there is always something to train on"
    return sides[0], sides[1]


def _finish(job: _Job, plan: _Plan, context: SliceContext, records: Mapping[str, SliceRecord]) -> _Prepared:
    """Reconciles, and stores the record of the whole."""
    in_order = [records[entry.slice_id] for entry in plan.slices]
    counts = add_counts(record.counts for record in in_order)
    counts.check()
    facts = _facts(job, plan, context)
    sides: dict[str, Any] = dict.fromkeys(SIDES)
    for side in SIDES if job.validation_share else SIDES[:1]:
        whole = _side(side, job, plan, in_order, counts, facts[side])
        sides[side] = PREPARED.dump_python(whole, mode="json", exclude={"folder"})
    body = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "depends_on": dict(plan.depends_on),
        "counts": TypeAdapter(SliceCounts).dump_python(counts, mode="json"),
        "versions": {package: version(package) for package in ("crossenc", "numpy", "pyarrow", "tokenizers")},
        **sides,
    }
    put_new(job.folder / PREPARED_FILE, json.dumps(body, indent=1).encode())
    stored = _load(job)
    assert stored is not None, "the record was just stored"
    return stored


def _side(
    side: Side, job: _Job, plan: _Plan, records: Sequence[SliceRecord], counts: SliceCounts, facts: DatasetFacts
) -> PreparedData:
    found = [
        (entry, record.sides[side]) for entry, record in zip(plan.slices, records, strict=True) if side in record.sides
    ]
    refused: Counter[str] = Counter()
    for reasons in (counts.refused_rows, counts.refused_documents):
        refused.update(reasons)
    if not found:
        why = f"; refused, see quarantine/: {dict(sorted(refused.items()))}" if refused else ""
        remedy = "give more data, or another validation_share" if job.validation_share else "check the files"
        raise NothingToLearnError(
            f"{', '.join(job.data.uris)} has no list for {side} in {counts.num_rows:,} rows: {remedy}{why}"
        )
    parts = tuple(
        PreparedPart(
            part_id=entry.slice_id,
            path=part.file.path,
            file=plan.inputs[entry.file].uri,
            num_lists=part.num_lists,
            num_bytes=part.file.num_bytes,
            sha256=part.file.sha256,
        )
        for entry, part in found
    )
    return PreparedData(
        folder=job.folder,
        num_rows=sum(part.num_rows for _, part in found),
        num_lists=sum(part.num_lists for _, part in found),
        num_pairs=sum(part.num_pairs for _, part in found),
        num_tokens=sum(part.num_tokens for _, part in found),
        num_refused=dict(sorted(refused.items())),
        parts=parts,
        statistics=label_statistics([part.labels for _, part in found]),
        facts=replace(facts, num_rows=sum(part.num_rows for _, part in found)),
        digest=hashlib.sha256(json.dumps([[part.part_id, part.sha256] for part in parts]).encode()).hexdigest(),
    )


# --- facts for the model card


def _facts(job: _Job, plan: _Plan, context: SliceContext) -> dict[Side, DatasetFacts]:
    """What the model card shows of each side: of the first rows that are whole."""
    wanted = SIDES if job.validation_share else SIDES[:1]
    rows: dict[Side, list[dict[str, Any]]] = {side: [] for side in wanted}
    for row in islice(_rows(plan.slices, context), _FACTS_ROWS):
        kept, refused = judge(row, plan.columns)
        if kept and not refused:
            rows[side_of(row.query[0] or "", job.validation_share)].append(_shown(row, plan.columns))
        if all(len(found) >= STATISTICS_ROWS for found in rows.values()):
            break
    name = locate(job.data.uris[0]).name
    return {side: describe_dataset(found, None, job.tokenizer.count_tokens, name=name) for side, found in rows.items()}


def _rows(slices: Sequence[Slice], context: SliceContext) -> Iterator[Row]:
    """The rows of slices, but for those behind a damaged place."""
    for entry in slices:
        with contextlib.suppress(DamagedError):
            for batch in read_rows(entry, context):
                yield from batch


def _shown(row: Row, columns: LabelledColumns) -> dict[str, Any]:
    """A row as the card shows it: texts instead of ids, under the names that the file has."""
    texts = [text for text, _ in row.documents]
    labels = [int(label) if label is not None and label.is_integer() else label for label in row.labels]

    def name(role: str) -> str:
        return role if columns.has_ids or columns.layout == "triples" else columns.names[role]

    shown: dict[str, Any] = {name("query"): row.query[0]}
    if columns.is_single:
        return shown | {name("document"): texts[0], name("label"): labels[0]}
    if columns.layout == "lists":
        return shown | {name("docs"): texts, name("labels"): labels}
    if columns.layout == "flagembedding":
        return shown | {name("pos"): texts[: row.num_positives], name("neg"): texts[row.num_positives :]}
    roles = ["positive", *(role.removesuffix("_id") for role in columns.negatives)]
    shown |= {name(role): text for role, text in zip(roles, texts, strict=True)}
    return shown | ({name("labels"): labels} if "labels" in columns.names else {})
