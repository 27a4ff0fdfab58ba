"""The end of a run: everything is counted, the manifest is written, then the report, then the mark of success."""

import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossenc.errors import CrossEncError, RunConflictError
from pipelines import evaluate, report
from pipelines.commit import COUNTS, RESULTS_FOLDER, SIDE_FOLDERS
from pipelines.config import RerankConfig
from pipelines.plan import FORMAT, Plan
from pipelines.records import (
    MANIFEST_FILE,
    REPORT_FILE,
    SUCCESS_FILE,
    Agreement,
    RefusedExample,
    RunSummary,
    ShardCounts,
    ShardRecord,
    StageSeconds,
    add_counts,
)
from pipelines.storage import Location, delete, info, list_files, open_input, put, put_new, read_bytes

if TYPE_CHECKING:
    from pipelines.rerank import Outcome

_EXAMPLES_PER_REASON = 3
_PACKAGES = ("crossenc", "torch", "transformers", "ray", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run whose parts are all committed. In two-phase runs `shard_records` are those of the scored shards."""

    config: RerankConfig
    plan: Plan
    output: Location
    model_name: str
    score_range: tuple[float, float]
    records: Mapping[str, ShardRecord]
    shard_records: Mapping[str, ShardRecord]
    interpolation: str
    elapsed_seconds: float
    agreement: Agreement | None = None


def finish(
    run: FinishedRun, say: Callable[[str], None], is_lost: Callable[[], bool] = lambda: False
) -> ShardCounts | None:
    """Reconciles, writes manifest, report and mark, and returns the counts of the whole run.

    Returns None, with nothing deleted and without the mark, where `is_lost()` says that the output is another run's.
    Raises CrossEncError where the counts do not add up, RunConflictError where what is stored is not what was made.
    """
    counts = _reconcile(run)
    wanted: list[tuple[str, int | None]] = [(record.path, record.num_bytes) for record in run.records.values()]
    wanted += [(path, None) for record in run.records.values() for path in record.side_paths]
    changed = first_changed(run.output, wanted)
    if changed:
        raise RunConflictError(f"{run.output / changed} was removed or changed meanwhile; run the same command again")
    summary = _summarise(run, counts, say)
    manifest, page = _manifest(run, summary), report.render(summary).encode()
    if is_lost():
        return None
    stored = _read_manifest(put_new(run.output / MANIFEST_FILE, json.dumps(manifest, indent=1).encode()), run.output)
    if (stored["fingerprint"], stored["parts"]) != (manifest["fingerprint"], manifest["parts"]):
        raise RunConflictError(
            f"{run.output / MANIFEST_FILE} lists other parts than are stored now; delete it and run the same command"
            " again, or start over with --new-run"
        )
    if is_lost():
        return None
    _remove_orphans(run)
    put(run.output / REPORT_FILE, page)
    if is_lost():
        return None
    put(run.output / SUCCESS_FILE, b"")
    return counts


def confirm(output: Location) -> "Outcome":
    """The outcome of a run that is finished already, after a look at whether its parts are all there."""
    from pipelines.rerank import Outcome

    try:
        manifest = _read_manifest(read_bytes(output / MANIFEST_FILE), output)
    except FileNotFoundError:
        changed: str | None = MANIFEST_FILE
    else:
        wanted = [(part["path"], part["bytes"]) for part in manifest["parts"]]
        changed = first_changed(output, wanted + [(side, None) for part in manifest["parts"] for side in part["sides"]])
    if changed:
        raise RunConflictError(
            f"the run on {output} was finished, but {changed} is missing or changed since; restore it, or delete"
            f" {SUCCESS_FILE} and {MANIFEST_FILE} and run the same command again, or start over with --new-run"
        )
    counts = COUNTS.validate_python(manifest["counts"])
    return Outcome("already done", output, f"nothing to do: this run is finished; see {output / REPORT_FILE}", counts)


def first_changed(output: Location, files: Sequence[tuple[str, int | None]]) -> str | None:
    """The first of these files that is not stored, or not with this number of bytes; None where all are."""
    folders = {path.partition("/")[0] for path, _ in files}
    stored = {file.location.uri: file.num_bytes for folder in folders for file in list_files(output / folder)}
    for path, num_bytes in files:
        found = stored.get((output / path).uri)
        if found is None or num_bytes not in (None, found):
            return path
    return None


def _read_manifest(body: bytes, output: Location) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(body)
        if manifest["format"] != FORMAT:
            raise ValueError("another format")
    except (ValueError, KeyError, TypeError) as error:
        raise RunConflictError(
            f"{output / MANIFEST_FILE} is not a manifest of this version ({error}); start over with --new-run"
        ) from None
    return manifest


def _reconcile(run: FinishedRun) -> ShardCounts:
    """The run's counts, checked: nothing came from nowhere and nothing went missing."""
    counts = add_counts(record.counts for record in run.records.values())
    if run.plan.is_two_phase:
        scored = add_counts(record.counts for record in run.shard_records.values())
        if scored.num_candidates != counts.num_candidates:
            raise CrossEncError(
                f"{scored.num_candidates:,} candidates were scored but {counts.num_candidates:,} were ranked; start"
                " over with --new-run and report this as a bug"
            )
        merged = asdict(scored) | {
            name: getattr(counts, name)
            for name in ("num_queries", "num_candidates", "num_scored", "num_results", "refused")
        }
        counts = ShardCounts(**merged)
    num_rows = sum(file.num_rows for file in run.plan.inputs)
    if run.plan.columns.layout != "nested" and counts.num_candidates != num_rows:
        raise CrossEncError(
            f"the input has {num_rows:,} rows but {counts.num_candidates:,} came out; start over with --new-run and"
            " report this as a bug"
        )
    if counts.num_candidates != counts.num_scored + sum(counts.refused.values()):
        raise CrossEncError("scored and refused do not add up to the candidates; report this as a bug")
    return counts


def _summarise(run: FinishedRun, counts: ShardCounts, say: Callable[[str], None]) -> RunSummary:
    timed = [record for record in run.shard_records.values() if record.finished_at > 0]
    seconds = StageSeconds(
        **{
            stage: sum(getattr(record.seconds, stage) for record in timed)
            for stage in ("read", "tokenise", "score", "write")
        }
    )
    evaluation = evaluate.Evaluation((), "")
    if run.config.qrels:
        say("comparing with the first stage on the judged queries …")
        qrels = evaluate.read_qrels(run.config.qrels, run.config.storage_options)
        evaluation = evaluate.compare(run.plan, run.output, qrels, run.config.top_k, run.config.storage_options)
    hours = run.elapsed_seconds / 3600
    return RunSummary(
        output=str(run.output),
        candidates=run.config.candidate_uris,
        model=run.model_name,
        top_k=run.config.top_k,
        counts=counts,
        num_shards=len(run.shard_records),
        num_shards_timed=len(timed),
        elapsed_seconds=run.elapsed_seconds,
        seconds=seconds,
        throughput=tuple(sorted((record.finished_at, record.counts.num_scored) for record in timed)),
        score_range=run.score_range,
        refused_examples=_examples(run),
        evaluation=evaluation.comparisons,
        evaluation_note=evaluation.note,
        interpolation=run.interpolation,
        agreement=run.agreement,
        cost=None if run.config.price_per_hour is None else hours * run.config.price_per_hour,
        versions={package: version(package) for package in _PACKAGES} | {"python": platform.python_version()},
    )


def _examples(run: FinishedRun) -> tuple[RefusedExample, ...]:
    """A few refused candidates of each reason, from the first part that has any."""
    chosen: dict[str, list[RefusedExample]] = {}
    for _, record in sorted(run.records.items()):
        for reason, rows in _refused_rows(run.output, record, [r for r in record.counts.refused if r not in chosen]):
            chosen[reason] = [_example(row) for row in rows]
    return tuple(example for reason in sorted(chosen) for example in chosen[reason])


def _refused_rows(
    output: Location, record: ShardRecord, reasons: Sequence[str]
) -> Iterable[tuple[str, list[dict[str, object]]]]:
    """For each reason the first rows of one part's quarantine file."""
    file = next((output / path for path in record.side_paths if path.startswith("quarantine/")), None)
    stored = info(file) if file is not None and reasons else None
    if stored is None:
        return
    with open_input(stored) as source:
        table = pq.read_table(source, page_checksum_verification=True)
    for reason in reasons:
        rows = table.filter(pc.equal(table.column("reason"), reason))
        yield reason, rows.slice(0, _EXAMPLES_PER_REASON).to_pylist()


def _example(row: Mapping[str, object]) -> RefusedExample:
    return RefusedExample(
        reason=str(row["reason"]),
        query_id=str(row["query_id"] if row["query_id"] is not None else "")[:80],
        doc_id=str(row["doc_id"] if row["doc_id"] is not None else "")[:80],
        file=str(row["file"]),
        row=int(str(row["row"])),
        detail=str(row["detail"] or "")[:200],
    )


def _manifest(run: FinishedRun, summary: RunSummary) -> dict[str, object]:
    parts = [
        {
            "path": record.path,
            "rows": record.counts.num_results,
            "bytes": record.num_bytes,
            "sha256": record.sha256,
            "sides": list(record.side_paths),
        }
        for _, record in sorted(run.records.items())
    ]
    rates = report.rates(summary)
    seconds = max(sum(asdict(summary.seconds).values()), 1e-9)
    return {
        "format": FORMAT,
        "fingerprint": run.plan.fingerprint,
        "depends_on": dict(run.plan.parts),
        "skipped_files": [list(entry) for entry in run.plan.skipped],
        "counts": asdict(summary.counts),
        "model": summary.model,
        "interpolation": summary.interpolation,
        "agreement_with_float32": None if summary.agreement is None else asdict(summary.agreement),
        "elapsed_seconds": round(summary.elapsed_seconds, 3),
        "pairs_per_second": round(rates[0], 3) if rates else None,
        "time_share": {name: round(value / seconds, 4) for name, value in asdict(summary.seconds).items()},
        "padding_share": round(1 - summary.counts.num_tokens / max(summary.counts.num_padded_tokens, 1), 4),
        "cost_of_last_process": summary.cost,
        "evaluation": [_without_nan(asdict(comparison)) for comparison in summary.evaluation],
        "evaluation_note": summary.evaluation_note,
        "versions": dict(summary.versions),
        "parts": parts,
    }


def _without_nan(values: Mapping[str, object]) -> dict[str, object]:
    """NaN is no JSON: what could not be computed is null."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _remove_orphans(run: FinishedRun) -> None:
    """Deletes what killed and losing attempts left: side files that no part names, and hidden half-written files."""
    named = {(run.output / path).uri for record in run.records.values() for path in record.side_paths}
    sides = [file.location for folder in SIDE_FOLDERS for file in list_files(run.output / folder)]
    results = [file.location for file in list_files(run.output / RESULTS_FOLDER)]
    orphans = [location for location in sides if location.uri not in named]
    delete([*orphans, *(location for location in results if re.fullmatch(r"\.part-.*\.tmp", location.name))])
