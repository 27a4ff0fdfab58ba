"""`crossenc export` keeps a file that ranks as well, leaves nothing of one that does not, and rerank scores with it."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from crossenc import CrossEncoder
from crossenc.engine import Engine
from crossenc.errors import CheckpointError
from crossenc.testing import tiny_checkpoint
from jobs.cli import app
from pipelines import metrics
from pipelines.config import RerankConfig
from pipelines.model import CheckpointModel
from pipelines.rerank import rerank, resolve
from tests.crossenc.test_engine import RunsOutOfMemory
from tests.support.collections import make_collection, read_results

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A model, candidates, judgements and the model's checkpoint with a float32 file in it."""
    folder = tmp_path_factory.mktemp("export")
    with_loud_neurons(tiny_checkpoint(folder / "model", max_length=48))
    pairs = make_collection(folder, num_queries=8, depth=12).pairs
    pairs.to_parquet(folder / "pairs.parquet", index=False)
    judged = pairs.groupby("query_id").first().reset_index().assign(relevance=1)
    judged[["query_id", "doc_id", "relevance"]].to_parquet(folder / "qrels.parquet", index=False)
    done = export(folder, folder / "exported")
    assert done.exit_code == 0, done.output
    return folder


def with_loud_neurons(folder: Path) -> None:
    """Makes some neurons of each layer as loud, beside the others, as those of trained models are."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "intermediate.dense" in name:
            tensor[:4] *= 100
        elif name.endswith("output.dense.weight") and "attention" not in name:
            tensor[:, :4] /= 100
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def export(folder: Path, output: Path, *flags: str, precision: str = "float32"):
    data = ["--data", str(folder / "pairs.parquet"), "--qrels", str(folder / "qrels.parquet")]
    return RUNNER.invoke(app, ["export", str(folder / "model"), str(output), "--precision", precision, *data, *flags])


def naive(path: Path) -> None:
    """What a first attempt at int8 does: everything, a scale a tensor, activations with the extremes of a batch."""
    model = onnx.load(str(path))
    onnx.save(model, str(path))
    quantize_dynamic(str(path), str(path), weight_type=QuantType.QInt8)


def test_the_figures_lie_beside_the_file_and_the_checkpoint_is_whole(workplace):
    facts = json.loads((workplace / "exported" / "onnx" / "model.quality.json").read_text())
    quality = facts["quality"]
    assert quality["num_queries"] == quality["num_judged_queries"] == 6, "two of eight are for calibration"
    assert quality["num_pairs"] == 72 and quality["max_difference"] < 1e-4
    assert quality["ndcg"] == pytest.approx(quality["reference_ndcg"])
    assert facts["limits"] == {"ndcg_drop": 0.002, "max_difference": 1e-4, "kendall_tau": 0.9}
    names = {path.name for path in (workplace / "exported").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "onnx"} <= names


def test_a_naive_int8_file_is_refused_and_nothing_of_it_is_left(workplace, tmp_path, monkeypatch):
    from crossenc.onnx import export as exporting
    from crossenc.onnx.quantize import Quantized

    def naively(path, *_):
        naive(path)
        return Quantized(onnx.load(str(path)), 12, ())

    monkeypatch.setattr(exporting, "quantize", naively)
    done = export(workplace, tmp_path / "out", precision="int8")
    assert done.exit_code == 1
    assert "refused: Kendall" in done.output and "nothing was written" in done.output
    assert not (tmp_path / "out").exists()


def test_a_careful_int8_file_of_the_same_model_is_kept(workplace):
    before = (workplace / "exported" / "onnx" / "model.onnx").read_bytes()
    done = export(workplace, workplace / "exported", precision="int8")
    assert done.exit_code == 0, done.output
    (path,) = (workplace / "exported" / "onnx").glob("model_qint8_*.onnx")
    quality = json.loads(path.with_suffix(".quality.json").read_text())["quality"]
    assert quality["kendall_tau"] >= 0.9
    assert (workplace / "exported" / "onnx" / "model.onnx").read_bytes() == before


def test_int8_needs_data_and_an_output_of_its_own(workplace, tmp_path):
    words = ["export", str(workplace / "model")]
    without_data = RUNNER.invoke(app, [*words, str(tmp_path / "out"), "--precision", "int8"])
    assert without_data.exit_code == 2 and "--data" in without_data.output
    tiny_checkpoint(tmp_path / "other", seed=1)
    occupied = RUNNER.invoke(app, [*words, str(tmp_path / "other")])
    assert occupied.exit_code == 2 and "another checkpoint" in occupied.output


@pytest.mark.usefixtures("ray_cluster")
def test_a_rerank_job_of_two_shards_scores_with_the_file_as_torch_does(workplace, tmp_path):
    config = RerankConfig(
        candidates=str(workplace / "pairs.parquet"),
        model=str(workplace / "exported"),
        output=str(tmp_path / "out"),
        shard_candidates=48,
        scoring={"cpus_per_actor": 1, "backend": "onnx"},
    )
    rerank(config, connect=lambda: 2, stream=io.StringIO())
    results = read_results(tmp_path / "out")
    pairs = pd.read_parquet(workplace / "pairs.parquet").set_index(["query_id", "doc_id"])
    texts = pairs.loc[list(zip(results.query_id, results.doc_id, strict=True)), ["query", "text"]]
    scores = CrossEncoder(workplace / "exported", device="cpu").predict(texts.to_numpy().tolist())
    assert len(results) == 96
    np.testing.assert_allclose(results.score, scores, rtol=0, atol=1e-5)
    with_torch = config.model_copy(update={"scoring": config.scoring.model_copy(update={"backend": "torch"})})
    assert resolve(with_torch).parts != resolve(config).parts


def test_a_batch_that_a_files_session_has_no_memory_for_is_counted(workplace, monkeypatch):
    counted = []
    monkeypatch.setattr(metrics, "count", lambda name: counted.append(name))
    model = CheckpointModel(source=str(workplace / "exported"), backend="onnx")
    pairs = model.load_tokenizer().encode(["water"] * 4, ["the water of the river"] * 4)
    scorer = model.load_scorer(1)
    assert isinstance(scorer, Engine) and counted == []
    network = RunsOutOfMemory(scorer.network, num_tokens=2 * int(pairs.lengths[0]))
    replace(scorer, network=network).score(pairs)
    assert counted == ["crossenc_out_of_memory_total"]


def test_a_rerank_job_without_its_onnx_file_does_not_start(workplace, tmp_path):
    config = RerankConfig(
        candidates=str(workplace / "pairs.parquet"),
        model=str(workplace / "model"),
        output=str(tmp_path / "out"),
        scoring={"backend": "onnx"},
    )
    with pytest.raises(CheckpointError, match="crossenc export"):
        rerank(config, connect=lambda: 2, stream=io.StringIO())
