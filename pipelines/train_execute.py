"""Runs slices of labelled data as Ray Data tasks and hands their records to the driver, one by one.

Knows Ray Data; knows nothing of what was done before or what happens to the records.
"""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray
import ray.data
from pydantic import TypeAdapter
from ray.data import TaskPoolStrategy

from crossenc.errors import CrossEncError
from pipelines.execute import configure_ray_data, rows_of
from pipelines.stages import failure_message, raise_failure
from pipelines.train_files import Slice
from pipelines.train_slice import RECORD, PairTokenizer, SliceContext, SliceRecord, prepare_slice

_SLICE = TypeAdapter(Slice)
#: Slices in one Ray dataset, which gets slower with their number.
_WAVE_SLICES = 4096


def run(
    slices: Sequence[Slice], context: SliceContext, fingerprint: str, workers: int | None, cpus_per_task: float
) -> Generator[SliceRecord | None]:
    """Prepares slices and yields their records as they come, None now and then between.

    At most `workers` tasks run at once, or as many as the cluster has CPUs for. Close the generator to end early:
    what is in work is dropped then. Raises what a slice raised.
    """
    configure_ray_data()
    reference = ray.put((context, fingerprint))
    for start in range(0, len(slices), _WAVE_SLICES):
        wave = slices[start : start + _WAVE_SLICES]
        rows = [{"slice": _SLICE.dump_json(entry).decode()} for entry in wave]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _PrepareSlice(reference),
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=workers),
            num_cpus=cpus_per_task,
        )
        with contextlib.closing(rows_of(dataset)) as results:
            for row in results:
                if row is not None and row["failure"]:
                    raise_failure(row["failure"])
                yield None if row is None else RECORD.validate_json(row["record"])


@dataclass(frozen=True)
class _PrepareSlice:
    """The one stage, as a function of a batch. It raises nothing that Ray would try again."""

    reference: Any

    def __call__(self, batch: pa.Table) -> pa.Table:
        record = failure = ""
        try:
            context, fingerprint, tokenizer = _loaded(self.reference.hex(), self)
            entry = _SLICE.validate_json(batch["slice"][0].as_py())
            record = RECORD.dump_json(prepare_slice(entry, context, tokenizer, fingerprint)).decode()
        except (CrossEncError, OSError) as error:
            failure = failure_message(error)
        return pa.table({"record": [record], "failure": [failure]})


@lru_cache(maxsize=2)
def _loaded(reference_hex: str, stage: _PrepareSlice) -> tuple[SliceContext, str, PairTokenizer]:
    """The context, and the tokenizer loaded: once for each process."""
    context, fingerprint = ray.get(stage.reference)
    return context, fingerprint, context.source.load_tokenizer()
