"""The interpolation weight: as given, or fitted on judged queries alone and stored once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crossenc.errors import InputError, RunConflictError
from crossenc.interpolation import fit_weight
from pipelines import weights
from pipelines.commit import commit_shard
from pipelines.config import RerankConfig
from pipelines.plan import Plan, Shard
from pipelines.records import StageSeconds
from pipelines.storage import Location, locate
from tests.pipelines.thin import commit_settings, refused, scored, thin_rows, with_tokens

QRELS = "q1 0 d0 1\nq2 0 d1 2\nabsent 0 d1 1\n"


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"))


@pytest.fixture
def qrels(tmp_path: Path) -> Path:
    (tmp_path / "qrels.txt").write_text(QRELS)
    return tmp_path / "qrels.txt"


def config(interpolate) -> RerankConfig:
    return RerankConfig(candidates="c", model="m", output="o", interpolate=interpolate)


def plan(fingerprint: str = "f" * 64) -> Plan:
    shards = (Shard("000000-aaaaaaaa", 0, 0, 1, 1),)
    return Plan(fingerprint, {}, None, (), (), 2, "string", "string", shards)


def rows(seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        scored(f"q{q}", f"d{d}", float(rng.random(dtype=np.float32)), rank=d, stage_score=float(rng.random()))
        for d in range(6)
        for q in range(4)
    ]


def commit(output: Location, shard_rows: list[dict], part: str = "000000-aaaaaaaa", **changes) -> None:
    settings = replace(commit_settings(output, num_buckets=2), **changes)
    commit_shard(part, with_tokens(thin_rows(*shard_rows)), 0, StageSeconds(), settings)


def decide(output: Location, qrels: Path) -> tuple[float | None, str]:
    return weights.decide(config({"fit": str(qrels)}), plan(), output)


def test_a_given_weight_is_used_and_described(output):
    settings = config({"weight": 0.25})
    expected = (0.25, "weight 0.25 of the model's score, as configured")
    assert weights.decide(settings, plan(), output) == expected
    assert weights.describe(settings) == expected[1]


def test_without_interpolation_there_is_no_weight(output):
    assert weights.decide(config(None), plan(), output) == (None, "")


def test_a_weight_is_fitted_on_the_judged_queries_only(output, qrels):
    candidates = rows()
    commit(output, candidates[:10])
    commit(output, [*candidates[10:], refused("q1", "d9", "document_empty")], "000001-aaaaaaaa")
    judged = [row for row in candidates if row["query_id"] in ("q1", "q2")]
    expected = fit_weight(
        np.array([row["model_score"] for row in judged]),
        np.array([row["stage_score"] for row in judged]),
        np.array([row["stage_rank"] for row in judged]),
        [row["doc_id"] for row in judged],
        [row["query_id"] for row in judged],
        {"q1": {"d0": 1}, "q2": {"d1": 2}},
    )
    weight, words = decide(output, qrels)
    assert weight == expected.weight
    assert words == (
        f"weight {expected.weight:g} of the model's score, the best nDCG@10 ({expected.value:.4f}) on 2 judged queries"
        f" of {qrels}"
    )


def test_a_repeated_document_is_fitted_once(output, qrels, tmp_path):
    once = rows()
    repeats = [dict(row, stage_rank=99, model_score=1.0, stage_score=9.0) for row in once]
    commit(output, once)
    commit(locate(str(tmp_path / "twice")), [*once, *repeats])
    assert decide(output, qrels) == decide(locate(str(tmp_path / "twice")), qrels)


def test_a_fitted_weight_is_stored_and_a_second_attempt_uses_it(output, qrels, tmp_path):
    commit(output, rows())
    first = decide(output, qrels)
    stored = tmp_path / "out/_run/interpolation.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"weight": 0.123}))
    assert decide(output, qrels)[0] == 0.123
    stored.unlink()
    assert decide(output, qrels) == first


def test_of_two_attempts_that_fit_at_once_the_stored_weight_counts_for_both(output, qrels, tmp_path, monkeypatch):
    commit(output, rows())
    real = weights._fit

    def slow(*args):
        body = real(*args)
        (tmp_path / "out/_run/interpolation.json").write_bytes(
            json.dumps(json.loads(body) | {"weight": 0.5, "value": 1.0}).encode()
        )
        return body

    monkeypatch.setattr(weights, "_fit", slow)
    assert decide(output, qrels)[0] == 0.5


def test_half_written_parts_of_a_killed_writer_are_passed_over(output, qrels, tmp_path):
    commit(output, rows())
    (tmp_path / "out/_run/scored/.part-000001-aaaaaaaa.parquet.0a1b.tmp").write_bytes(b"half")
    assert decide(output, qrels)[0] is not None


def test_parts_of_another_run_are_refused(output, qrels):
    commit(output, rows(), fingerprint="e" * 64)
    with pytest.raises(RunConflictError, match="belongs to another run"):
        decide(output, qrels)


def test_judgements_of_other_queries_only_are_refused(output, tmp_path):
    commit(output, rows())
    (tmp_path / "other.txt").write_text("q99 0 d0 1\n")
    with pytest.raises(InputError, match="none of the 0 candidates belongs to one of the 1 judged queries"):
        decide(output, tmp_path / "other.txt")
