"""The export job: a checkpoint with an ONNX file in it, kept only where it ranks candidates as well as the checkpoint.

Reads the candidates as a rerank job does. Graphs and figures are crossenc.onnx's.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crossenc.errors import ConfigError, InputError
from crossenc.records import Qrels, TokenizedPairs
from pipelines import plan as plans
from pipelines.config import RerankConfig
from pipelines.evaluate import read_qrels
from pipelines.inputs import scan
from pipelines.isolation import select
from pipelines.model import CheckpointModel
from pipelines.prepare import prepare
from pipelines.rerank import read_settings, resolve
from pipelines.stages import good_pairs

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder
    from crossenc.onnx.export import Precision
    from crossenc.onnx.quality import Limits, Quality
    from crossenc.onnx.quantize import Target

#: Share of the sampled queries that int8 is calibrated on; the others judge it.
_CALIBRATION_SHARE = 0.2
_MAX_CALIBRATION_PAIRS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """What to export, and what to judge it by.

    `data` are candidates in any layout of a rerank job, `queries` and `corpus` the tables of texts that go with ids,
    `qrels` judgements. `num_queries` of them are used, spread over the data.
    """

    model: str
    output: str
    precision: "Precision"
    limits: "Limits"
    target: "Target | None" = None
    data: str | None = None
    queries: str | None = None
    corpus: str | None = None
    qrels: str | None = None
    max_length: int | None = None
    num_queries: int = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an export ended: the file, None where it was refused, what it broke then, and what is written beside it."""

    path: Path | None
    problems: tuple[str, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Tokenised candidates of some queries, and what they are judged by."""

    pairs: TokenizedPairs
    query_ids: list[str]
    doc_ids: list[str]
    qrels: Qrels | None

    def rows(self, is_chosen: NDArray[np.bool_]) -> "_Sample":
        places = np.flatnonzero(is_chosen)
        query_ids, doc_ids = ([ids[row] for row in places] for ids in (self.query_ids, self.doc_ids))
        return _Sample(select(self.pairs, places), query_ids, doc_ids, self.qrels)


def export(settings: ExportSettings, say: Callable[[str], object]) -> Outcome:
    """Export, judge and, where all limits hold, keep the file in `<output>/onnx` with its figures beside it as JSON.

    `say` is told what is going on. Raises InputError for data that cannot be read or int8 without any, and
    CheckpointError for a model that cannot be exported.
    """
    from crossenc.checkpoint import fetch
    from crossenc.model import CrossEncoder
    from crossenc.onnx.backend import FOLDER
    from crossenc.onnx.export import export_onnx
    from crossenc.onnx.quality import broken
    from crossenc.onnx.session import copy_files

    if settings.data is None and settings.precision != "float32":
        raise ConfigError("an int8 file must be judged before it is used: give candidates with --data")
    source = fetch(settings.model)
    output = Path(settings.output)
    _check_output(source, output)
    sample = None if settings.data is None else _read_sample(settings)
    model = CrossEncoder(source, device="cpu", max_length=settings.max_length)
    calibration, judged = (None, None) if sample is None else _parted(sample)
    with tempfile.TemporaryDirectory(prefix="crossenc-export-") as folder:
        say(f"exporting {settings.model} to ONNX, {settings.precision}")
        exported = export_onnx(
            model,
            folder,
            precision=settings.precision,
            calibration=() if calibration is None else calibration.pairs,
            target=settings.target,
        )
        facts = _facts(settings, exported.path, exported.num_int8_layers, exported.left_out)
        problems: list[str] = []
        if judged is not None:
            say(f"scoring {len(judged.pairs):,} pairs with torch and with the file")
            quality, rates = _judge(model, exported.path, judged)
            facts |= {"quality": asdict(quality), "limits": asdict(settings.limits), "pairs_per_second": rates}
            problems = broken(quality, settings.limits)
        if problems:
            return Outcome(None, tuple(problems), facts)
        _copy_checkpoint(source, output)
        path = copy_files(exported.path, output / FOLDER)
    path.with_suffix(".quality.json").write_text(json.dumps(facts, indent=1) + "\n")
    return Outcome(path, (), facts)


def _facts(settings: ExportSettings, path: Path, num_int8_layers: int, left_out: tuple[str, ...]) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "model": settings.model,
        "file": path.name,
        "sha256": digest,
        "num_bytes": path.stat().st_size,
        "precision": settings.precision,
        "max_length": settings.max_length,
        "num_int8_layers": num_int8_layers - len(left_out),
        "layers_left_in_float32": list(left_out),
        "versions": {name: version(name) for name in ("onnx", "onnxruntime", "torch", "transformers")},
    }


def _judge(model: "CrossEncoder", path: Path, sample: _Sample) -> tuple["Quality", dict[str, float]]:
    """The figures of the file's raw scores beside torch's, and the pairs a second of both."""
    from dataclasses import replace

    import torch

    from crossenc.onnx.quality import compare
    from crossenc.onnx.session import OnnxNetwork

    if model.num_labels != 1:
        raise InputError(f"{model.num_labels} labels give no ranking to judge by: leave --data out")
    engine = model.engine.with_limits(torch.nn.Identity(), None)
    scores, rates = {}, {}
    for name, chosen in (
        ("torch", engine),
        ("onnx", replace(engine, network=OnnxNetwork(path, model.num_labels))),
    ):
        started = time.perf_counter()
        scores[name] = chosen.score(sample.pairs)
        rates[name] = round(len(sample.pairs) / (time.perf_counter() - started), 1)
    return compare(scores["torch"], scores["onnx"], sample.query_ids, sample.doc_ids, sample.qrels), rates


# --- data


def _read_sample(settings: ExportSettings) -> _Sample:
    """The tokenised candidates of `num_queries` queries, of shards drawn from all over the data."""
    config = RerankConfig(
        candidates=settings.data or "",
        model=settings.model,
        output=settings.output,
        queries=settings.queries,
        corpus=settings.corpus,
        qrels=settings.qrels,
        scoring={"max_length": settings.max_length},  # type: ignore[arg-type]  # pydantic makes it one
    )
    job = resolve(config, CheckpointModel(settings.model, max_length=settings.max_length))
    plan = plans.make(scan(config, job.files), job.parts, shard_candidates=None, force_two_phase=False)
    reading, tokenizer = read_settings(job, plan), job.model.load_tokenizer()
    tables: list[pa.Table] = []
    query_ids: set[str] = set()
    for number in np.random.default_rng(0).permutation(len(plan.shards)).tolist():
        shard = plan.shards[number]
        rows = prepare(shard, plan.inputs[shard.file], reading, tokenizer).rows
        tables.append(rows.filter(pc.is_null(rows.column("reason"))))
        query_ids |= set(tables[-1].column("query_id").to_pylist())
        # Where a query's candidates are spread over shards, all are read.
        if not plan.is_two_phase and len(query_ids) >= settings.num_queries:
            break
    rows = _without_repeats(pa.concat_tables(tables))
    if rows.num_rows == 0:
        raise InputError(f"{settings.data} has no candidate that can be scored: look at it with crossenc rerank")
    names = rows.column("query_id").to_pylist()
    distinct = sorted(set(names))
    spread = np.linspace(0, len(distinct) - 1, min(settings.num_queries, len(distinct))).astype(int)
    rows = rows.filter(pc.is_in(rows.column("query_id"), pa.array([distinct[i] for i in spread], pa.large_string())))
    qrels = read_qrels(settings.qrels, {}) if settings.qrels else None
    query_names, doc_names = (rows.column(name).to_pylist() for name in ("query_id", "doc_id"))
    return _Sample(good_pairs(rows), query_names, doc_names, qrels)


def _without_repeats(rows: pa.Table) -> pa.Table:
    """The first row of each query and document."""
    keys = list(zip(rows.column("query_id").to_pylist(), rows.column("doc_id").to_pylist(), strict=True))
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    return rows.filter(pa.array([first[key] == row for row, key in enumerate(keys)], pa.bool_()))


def _parted(sample: _Sample) -> tuple[_Sample, _Sample]:
    """What to calibrate on and what to judge by: other queries, unless there is only one."""
    queries = list(dict.fromkeys(sample.query_ids))
    num_first = int(np.ceil(len(queries) * _CALIBRATION_SHARE))
    chosen = set(queries[:: max(1, len(queries) // num_first)][:num_first])
    is_first = np.array([query_id in chosen for query_id in sample.query_ids])
    calibration = sample.rows(is_first)
    spread = np.linspace(0, len(calibration.pairs) - 1, min(_MAX_CALIBRATION_PAIRS, len(calibration.pairs))).astype(int)
    calibration = calibration.rows(np.isin(np.arange(len(calibration.pairs)), spread))
    return calibration, sample if is_first.all() else sample.rows(~is_first)


# --- the folder that the file goes into


def _check_output(source: Path, output: Path) -> None:
    """Raises ConfigError where another checkpoint lies in `output`."""
    from crossenc.checkpoint import file_digests

    if "://" in str(output):
        raise ConfigError(f"output {output} is no local folder: export into one, then copy it")
    if (output / "config.json").exists() and file_digests(output) != file_digests(source):
        raise ConfigError(f"{output} holds another checkpoint than {source}: give an empty folder, or the model's own")


def _copy_checkpoint(source: Path, output: Path) -> None:
    """Copies the checkpoint to `output`, config.json last, so that it is whole once that is there."""
    from crossenc.checkpoint import file_digests

    if (output / "config.json").exists():
        return
    for name in sorted(file_digests(source), key=lambda name: name == "config.json"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, output / name)
    if (source / "README.md").exists():
        shutil.copyfile(source / "README.md", output / "README.md")
