"""The rerank job without a cluster: what is found wrong before any work is done, and how a run may end."""

import io
from pathlib import Path

import pytest

from crossenc.errors import InputError
from pipelines import lease
from pipelines import rerank as reranking
from pipelines.config import RerankConfig
from pipelines.rerank import Job, rerank, resolve
from pipelines.testing import FakeModel
from tests.support.collections import Collection, make_collection


def resolved(tmp_path: Path, **settings) -> Job:
    settings = {**make_collection(tmp_path / "in", num_queries=2, depth=2).write("pairs"), **settings}
    config = RerankConfig.model_validate({"model": "fake", "output": str(tmp_path / "out"), **settings})
    return resolve(config, FakeModel())


def test_malformed_judgements_are_named_before_the_run_and_not_at_its_end(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("q0 0 d1 1\n")
    bad.write_text("q0 0 d1 1\nq0 0 d2 high\n")
    for settings in ({"qrels": str(bad)}, {"interpolate": {"fit": str(bad)}, "qrels": str(good)}):
        with pytest.raises(InputError, match=r"bad\.txt, line 2: write"):
            resolved(tmp_path, **settings)
    assert resolved(tmp_path, interpolate={"fit": str(good)}, qrels=str(good)).config.qrels == str(good)


def test_a_run_that_was_overtaken_does_not_finish(tmp_path, monkeypatch):
    folder = tmp_path / "out" / lease.LEASE_FOLDER

    def overtaken(*arguments, **settings) -> dict:
        (folder / "epoch-000002.json").write_bytes((folder / "epoch-000001.json").read_bytes())
        return {}

    monkeypatch.setattr(reranking._Run, "_phase", overtaken)
    none = make_collection(tmp_path, num_queries=2, depth=2).pairs.head(0).astype({"rank": int})
    config = RerankConfig(
        model="fake", output=str(tmp_path / "out"), **Collection(none, tmp_path / "in").write("pairs")
    )
    outcome = rerank(config, connect=lambda: 1, stream=io.StringIO(), model=FakeModel())
    assert outcome.state == "stopped" and "took this output over" in outcome.message
    assert not (tmp_path / "out" / "_SUCCESS").exists()
