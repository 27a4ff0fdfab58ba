"""What a rerank job finds wrong before any work is done."""

from pathlib import Path

import pytest

from crossenc.errors import InputError
from pipelines.config import RerankConfig
from pipelines.rerank import Job, resolve
from pipelines.testing import FakeModel
from tests.support.collections import make_collection


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
