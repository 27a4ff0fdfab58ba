"""The distill command: what it prints, what it refuses, and its exit codes. Whole runs: tests/pipelines."""

from pathlib import Path

import pytest
import yaml

from crossenc.testing import tiny_checkpoint
from jobs import distill
from pipelines.distill import Outcome
from pipelines.distill_lists import ListCounts
from pipelines.storage import locate
from pipelines.train_finish import Finished
from tests.support.collections import make_collection


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    tiny_checkpoint(tmp_path / "teacher", max_length=64)
    settings = {
        "teachers": str(tmp_path / "teacher"),
        "output": str(tmp_path / "out"),
        "student_layers": 1,
        "storage_options": {"secret": "my-secret-key"},
        **make_collection(tmp_path / "in").write("pairs"),
    }
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "distill.yaml")


def test_a_dry_run_shows_settings_and_an_estimate_and_writes_nothing(job, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert distill.run(job, ("student.epochs=3",), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "activation: identity" in out and "epochs: 3" in out and "name: kl_distillation" in out
    assert "200 pairs" in out and "the first teacher with 1 layers" in out and "my-secret-key" not in out
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_exit_with_2_and_name_the_remedy(job, capsys):
    for override, says in (
        ("student_layer=2", "did you mean student_layers?"),
        ("student.epoch=2", "did you mean epochs?"),
        ("student_layers=5", "has 2 layers: it cannot keep 5"),
        ("candidates=absent.parquet", "absent.parquet: check the path"),
        ("student.output=x", "output is given by the distillation job"),
        ("student.loss={name: cross_entropy}", "take kl_distillation"),
    ):
        assert distill.run(job, (override,)) == 2, override
        assert says in capsys.readouterr().err


def test_the_end_says_what_was_made_and_where(capsys):
    counts = ListCounts(
        num_queries=10,
        num_lists=8,
        num_short=1,
        num_candidates=100,
        num_documents=60,
        num_positives=7,
        num_lost_positives=2,
        left_out={"too_few_documents": 2},
        refused={"document_missing": 5},
        excluded={"not_drawn": 33, "query_left_out": 2},
    )
    counts.check()
    student = Finished(best_step=4, num_steps=8, measure="nDCG@10", value=0.75, before=0.5)
    distill._show_outcome(Outcome("done", locate("/out"), "done; it is in /out", counts, (0, 3, 5), student))
    out = capsys.readouterr().out
    for line in (
        "done; it is in /out",
        "8 of 10 queries gave lists of 60 documents, 7.5 a list",
        "1 lists have fewer",
        "7 judged positives are in them, 2 are not",
        "layers 0, 3, 5",
        "step 4 of 8",
        "nDCG@10 0.7500, 0.5000 before",
    ):
        assert line in out
    lines = {line.split()[1]: int(line.split()[0]) for line in out.splitlines() if line.startswith("     ")}
    assert lines == {
        "chosen": 60,
        "not_drawn": 33,
        "query_left_out": 2,
        "document_missing": 5,
        "too_few_documents": 2,
    }
