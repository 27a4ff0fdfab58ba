"""The mine command: what it prints, what it refuses, and its exit codes."""

import io
from pathlib import Path

import pytest
import yaml

from crossenc.errors import ConfigError, InputError
from jobs import config as job_config
from jobs import mine
from pipelines import status
from pipelines.mine_config import MineConfig
from pipelines.mine_shard import MineCounts
from pipelines.unit_progress import UnitProgress
from tests.support.collections import make_collection

GOOD = "candidates: c.parquet\nqrels: q.parquet\noutput: out\n"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    collection = make_collection(tmp_path / "in")
    (tmp_path / "qrels.txt").write_text("".join(f"q{q:04d} 0 {doc} 1\n" for q, doc in enumerate(positives(collection))))
    settings = {"qrels": str(tmp_path / "qrels.txt"), "output": str(tmp_path / "out"), **collection.write("ids")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "mine.yaml")


def positives(collection) -> list[str]:
    """The best-ranked document of the first twelve queries."""
    return collection.pairs[collection.pairs["rank"] == 1].doc_id.tolist()[:12]


def test_a_run_ends_with_a_table_of_what_each_rule_left_out(job, capsys):
    assert mine.run(job, ("max_rank=6", "absolute_margin=2.5", "num_negatives=2")) == 0
    out = capsys.readouterr().out
    assert "12 of 20 queries gave 12 positives and 24 negatives, 2.0 a query: 12 rows" in out
    lines = {line.split()[1]: int(line.split()[0]) for line in out.splitlines() if line.startswith("   ")}
    assert lines["chosen"] == 24 and lines["positive"] == 12 and lines["no_positive"] == 8
    assert lines["max_rank"] == 48 and lines["query_left_out"] == 80
    assert sum(number for name, number in lines.items() if name != "no_positive") == 200
    assert mine.run(job, ("max_rank=6", "absolute_margin=2.5", "num_negatives=2")) == 0
    again = capsys.readouterr().out
    assert "nothing to do" in again and again.splitlines()[1:] == out.splitlines()[1:]


def test_a_dry_run_shows_settings_and_plan_and_writes_nothing(job, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert mine.run(job, dry_run=True) == 0
    out = capsys.readouterr().out
    assert "num_negatives: 5" in out and "200 candidates in 1 shards" in out
    assert "12 queries with 12 positives" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_exit_with_2_and_name_the_remedy(job, capsys):
    assert mine.run(job, ("num_negative=3",)) == 2
    assert "did you mean num_negatives?" in capsys.readouterr().err
    assert mine.run(job, ("qrels=absent.parquet",)) == 2
    assert "absent.parquet: check the path" in capsys.readouterr().err
    assert mine.run(job) == 0
    assert mine.run(job, ("seed=1",)) == 2
    assert "option seed: was 0, is 1" in capsys.readouterr().err
    assert mine.run(job, ("seed=1",), new_run=True) == 0


def test_status_says_that_a_mining_run_is_none_of_its_own(job, tmp_path):
    assert mine.run(job) == 0
    with pytest.raises(InputError, match=r"crossenc mine.*see its log, or .*_SUCCESS"):
        status.look(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qrels: q\noutput: o\n", "name the candidates, or as reranked"),
        (GOOD + "reranked: r\n", "one of the two"),
        ("reranked: r\nqrels: q\noutput: o\nlayout: ids\n", "those of the rerank run"),
        (GOOD + "queries: q\n", "queries and corpus go together"),
        (GOOD + "layout: pairs\nqueries: q\ncorpus: c\n", "layout pairs holds its own queries"),
        (GOOD + "relative_margin: 0.1\npositive_percentile: 0.9\n", "are one rule"),
        (GOOD + "positive_percentile: 95\n", "give a share above 0 and up to 1"),
        (GOOD + "format: tuples\nmin_negatives: 2\n", "tuples need all"),
        (GOOD + "random_from: others\n", "needs a random_share"),
        (GOOD + "random_from: others\nrandom_share: 0.5\nscores: true\n", "have no scores"),
        (GOOD + "min_rank: 0\n", "ranks count from 1"),
        (GOOD + "num_negatives: 0\n", "must be at least 1"),
        (GOOD + "format: csv\n", "format: Input should be 'pairs'"),
        (GOOD + "absolute_margin: -1\n", "absolute_margin is negative"),
    ],
)
def test_a_wrong_job_file_is_explained(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        job_config.load(MineConfig, str(path))
    assert message in str(error.value)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_rates_and_messages(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    nothing: dict[str, int] = {}
    one = MineCounts(
        num_queries=7,
        num_candidates=70,
        num_negatives=35,
        left_out=nothing,
        refused=nothing,
        excluded=nothing,
        dropped_positives=nothing,
    )
    with UnitProgress(terminal) as progress:
        progress.expect(3, 210, [one])
        progress.update(one)
        progress.say("a message with [brackets] and \x1b[31m")
        assert progress.snapshot()["shards"] == 2 and progress.snapshot()["candidates_per_second"] > 0
    shown = terminal.getvalue()
    assert "2/3" in shown and "14 queries" in shown and "candidates/s" in shown
    assert "[brackets] and \\x1b[31m" in shown
