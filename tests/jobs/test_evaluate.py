"""The evaluate command: what it prints, what it refuses, and its exit codes."""

from pathlib import Path

import pytest
import yaml

from crossenc.errors import ConfigError
from jobs import config as job_config
from jobs import evaluate
from pipelines import rankings
from pipelines.evaluation_config import EvaluateConfig
from tests.support.collections import make_collection

GOOD = "collections:\n- {name: c, candidates: c.parquet, qrels: q.parquet}\noutput: out\n"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    pairs = make_collection(tmp_path / "in", num_queries=30, depth=5).pairs
    orders = {query: group.doc_id.tolist() for query, group in pairs.groupby("query_id")}
    (tmp_path / "bm25.run").write_bytes(rankings.trec_run(orders))
    (tmp_path / "better.run").write_bytes(rankings.trec_run({query: docs[::-1] for query, docs in orders.items()}))
    (tmp_path / "qrels.txt").write_text("".join(f"{query} 0 {docs[-1]} 1\n" for query, docs in orders.items()))
    settings = {
        "collections": [
            {"name": "made-up", "candidates": str(tmp_path / "bm25.run"), "qrels": str(tmp_path / "qrels.txt")}
        ],
        "systems": [{"ranking": str(tmp_path / "better.run")}],
        "measures": ["nDCG@10", "RR@10", "Judged@5"],
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "evaluate.yaml")


def test_a_run_ends_with_one_table_of_all_systems(job, capsys):
    assert evaluate.run(job) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["made-up,", "30", "queries", "nDCG@10", "MRR@10", "Judged@5"]
    assert rows[1] == ["first_stage", "0.3869", "0.2000", "0.2000"]
    assert rows[2] == ["better.run", "1.0000", "1.0000", "0.2000"]
    assert rows[3] == ["+0.6131*", "+0.8000*"]
    assert "* where Holm's p < .05 over 2 comparisons" in out and "report.html" in out
    assert evaluate.run(job) == 0
    again = capsys.readouterr().out
    assert "nothing to do" in again and again.splitlines()[:4] == out.splitlines()[:4]


def test_a_dry_run_shows_settings_and_plan_and_writes_nothing(job, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert evaluate.run(job, dry_run=True) == 0
    out = capsys.readouterr().out
    assert "baseline: first_stage" in out and "30 queries, 150 candidates" in out and "0 pairs to score" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_exit_with_2_and_name_the_remedy(job, capsys):
    assert evaluate.run(job, ("measure=[AP]",)) == 2
    assert "did you mean measures?" in capsys.readouterr().err
    assert evaluate.run(job, ("measures=[nDCG@ten]",)) == 2
    assert "unknown measure" in capsys.readouterr().err
    assert evaluate.run(job, ("systems=[{ranking: absent.run}]",)) == 2
    assert "absent.run: check the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: o\ncollections: []\n", "collections: Tuple should have at least 1 item"),
        ("output: o\ncollections:\n- {name: c, candidates: c}\n", "name the judgements as qrels, or a BEIR folder"),
        (GOOD + "systems: [{model: m, ranking: r}]\n", "give either a model or a ranking"),
        (GOOD + "systems: [{name: x}]\n", "give either a model or a ranking"),
        (GOOD + "systems: [a/m, b/m]\n", "systems names 'm' twice"),
        (GOOD + "systems: [first_stage]\n", "first_stage is always among the systems"),
        (GOOD + "systems: [{ranking: r, scoring: {}}]\n", "a ranking is only read"),
        (GOOD + "systems: [{ranking: {d: r}}]\n", "its ranking must name the collections c"),
        (GOOD + "systems: [{modle: m}]\n", "did you mean model?"),
        (GOOD + "baseline: m\n", "baseline m is none of the systems first_stage"),
        (GOOD + "measures: [Judged@10]\n", "Judged@10 does not say how good a ranking is"),
        (GOOD + "measures: [AP, AP]\n", "measures names 'AP' twice"),
        (GOOD + "depths: [0]\n", "greater than or equal to 1"),
        (GOOD.replace("name: c,", "name: ../c,"), "name: String should match pattern"),
        (GOOD.replace("name: c,", "name: c, beir: b, queries: q, corpus: c,"), "has its own queries and corpus"),
        (GOOD.replace("name: c,", "name: c, queries: q,"), "queries and corpus go together"),
        (GOOD.replace("name: c,", "name: c, segment: [a],"), "did you mean segments?"),
    ],
)
def test_a_wrong_job_file_is_explained(tmp_path, text, message):
    path = tmp_path / "evaluate.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        job_config.load(EvaluateConfig, str(path))
    assert message in str(error.value), str(error.value)


def test_a_plain_name_is_a_model_and_gets_a_short_name(tmp_path):
    path = tmp_path / "evaluate.yaml"
    path.write_text(GOOD + "systems: [org/My_Model@abc, {ranking: 's3://b/last week/run.trec'}]\n")
    config = job_config.load(EvaluateConfig, str(path))
    assert [(s.name, s.model) for s in config.systems] == [("My_Model", "org/My_Model@abc"), ("run.trec", None)]
