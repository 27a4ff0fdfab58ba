"""Job files: overrides, and errors that name the key and the remedy."""

from pathlib import Path

import pytest

from crossenc.errors import ConfigError
from jobs.config import load
from pipelines.config import RerankConfig
from pipelines.mine_config import MineConfig

GOOD = "candidates: c.parquet\nmodel: m\noutput: out\n"


def config(tmp_path: Path, text: str = GOOD, *overrides: str) -> RerankConfig:
    path = tmp_path / "rerank.yaml"
    path.write_text(text)
    return load(RerankConfig, str(path), overrides)


def test_three_settings_are_enough(tmp_path):
    loaded = config(tmp_path)
    assert loaded.candidate_uris == ("c.parquet",)
    assert loaded.scoring.actors == 1 and loaded.top_k is None


def test_overrides_set_values_inside_groups_with_yaml_types(tmp_path):
    loaded = config(tmp_path, GOOD, "scoring.actors=4", "top_k=10", "pass_through=[a, b]", "interpolate.weight=0.4")
    assert (loaded.scoring.actors, loaded.top_k, loaded.pass_through) == (4, 10, ("a", "b"))
    assert loaded.interpolate is not None and loaded.interpolate.weight == 0.4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "topk: 3\n", "unknown key topk; did you mean top_k?"),
        (GOOD + "scoring: {actor: 3}\n", "unknown key scoring.actor; did you mean actors?"),
        (GOOD + "interpolate: {wieght: 0.3}\n", "did you mean weight?"),
        (GOOD + "top_k: 0\n", "top_k: Input should be greater than or equal to 1"),
        (
            GOOD + "scoring: {dtype: int3}\n",
            "scoring.dtype: Input should be 'float32', 'bfloat16', 'float16' or 'auto'",
        ),
        (GOOD + "interpolate: {}\n", "give either weight"),
        (GOOD + "queries: q.parquet\n", "queries and corpus go together"),
        (GOOD + "layout: pairs\nqueries: q\ncorpus: c\n", "layout pairs holds its own texts"),
        ("model: m\noutput: out\n", "candidates is missing; write it into the job file, or give --set candidates=…"),
        ("candidates: []\nmodel: m\noutput: out\n", "candidates is empty"),
        ("- a\n- b\n", "holds no settings"),
        ("candidates: [a\n", "is not YAML"),
        ("candidates: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        ("a: &x [1]\nb: *x\n", "aliases are not used"),
    ],
)
def test_a_wrong_job_file_is_explained(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, text)
    assert message in str(error.value)
    assert "rerank.yaml" in str(error.value)


def test_a_missing_job_file_suggests_the_nearest_one(tmp_path):
    config(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean .*rerank\.yaml\?"):
        load(RerankConfig, str(tmp_path / "rerenk.yaml"))


@pytest.mark.parametrize("override", ["top_k", "=3", "a..b=3", "candidates.x=3", "top_k=[1"])
def test_a_malformed_override_is_an_error(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        config(tmp_path, GOOD, override)


def test_the_environment_says_where_the_registry_is_unless_the_job_does(tmp_path, monkeypatch):
    assert config(tmp_path).registry is None
    monkeypatch.setenv("CROSSENC_REGISTRY", "s3://search/models")
    assert config(tmp_path).registry == "s3://search/models"
    assert config(tmp_path, GOOD + "registry: own\n").registry == "own"
    assert config(tmp_path, GOOD, "registry=own").registry == "own"
    assert load(MineConfig, str(mining_job(tmp_path))).model_dump().get("registry") is None


def mining_job(folder: Path) -> Path:
    """A job that names no model, and so has no registry."""
    (folder / "mine.yaml").write_text("candidates: c.parquet\nqrels: q.parquet\noutput: out\n")
    return folder / "mine.yaml"
