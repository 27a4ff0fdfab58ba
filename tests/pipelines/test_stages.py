"""The stages by themselves: what goes wrong in one travels on as a row that says so."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from pipelines import stages
from pipelines.commit import CommitSettings, commit_shard
from pipelines.records import StageSeconds
from pipelines.schemas import to_ipc
from tests.pipelines.thin import commit_settings, scored, thin_rows, with_tokens


def held(settings: CommitSettings) -> Any:
    """A reference to the context of a run that commits so."""
    context = SimpleNamespace(commit=settings)
    return SimpleNamespace(get=lambda: context)


def test_rows_that_arrow_cannot_put_together_are_a_failure_with_the_remedy(tmp_path):
    settings = commit_settings(tmp_path, num_buckets=1)
    few = pa.field("pass:kind", pa.dictionary(pa.int8(), pa.string()))
    for number in range(2):
        rows = [scored("q", f"d{i}", 0.5, **{"pass:kind": f"kind {number} {i}"}) for i in range(100)]
        thin = with_tokens(thin_rows(*rows, pass_through=[few]))
        commit_shard(f"{number:06d}-aaaaaaaa", thin, 0, StageSeconds(), settings)
    [failure] = stages._Read(0, held(settings))()
    assert failure["kind"].to_pylist() == ["failure"]
    message = failure["message"][0].as_py()
    assert message.startswith("other\nArrow could not read the rows of b00000 (ArrowInvalid: ")
    assert message.endswith("or leave it out of pass_through")


def test_rows_that_parquet_cannot_hold_are_a_failure_with_the_remedy(tmp_path):
    odd = pa.field("pass:age", pa.month_day_nano_interval())
    rows = with_tokens(thin_rows(scored("q", "d", 0.5), pass_through=[odd]))
    batch = stages._row("000000-aaaaaaaa", "rows", payload=to_ipc(rows))
    result = stages.Commit(held(commit_settings(tmp_path)))(batch)
    assert result["kind"].to_pylist() == ["failure"]
    assert (
        "Arrow could not write the rows of 000000-aaaaaaaa (ArrowNotImplementedError: " in result["message"][0].as_py()
    )
