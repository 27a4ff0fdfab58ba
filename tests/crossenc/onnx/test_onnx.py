"""The ONNX backend scores as torch does, whatever the family and the shape, and refuses what it must not load."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from transformers import (
    AutoModel,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from crossenc import CheckpointError, ConfigError, CrossEncoder, InputError
from crossenc.engine import Engine
from crossenc.modules import Dense, LayerNorm, LogitScore, Pooling, Transformer
from crossenc.onnx import quantize
from crossenc.onnx.export import export_onnx
from crossenc.onnx.session import OnnxNetwork
from crossenc.quiet import quiet_transformers
from crossenc.records import TokenizedPairs
from crossenc.testing import WORDS, tiny_checkpoint

MAX_LENGTH = 48


def random_pairs(num_pairs: int, seed: int = 0, longest: int = 40) -> list[tuple[str, str]]:
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(2 * num_pairs)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def distilbert(folder: Path) -> CrossEncoder:
    tiny_checkpoint(folder, max_length=MAX_LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,
        num_labels=1,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        DistilBertForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return CrossEncoder(folder, device="cpu")


def modular(folder: Path) -> CrossEncoder:
    tiny_checkpoint(folder, max_length=MAX_LENGTH)
    with quiet_transformers():
        backbone = AutoModel.from_pretrained(folder)
    torch.manual_seed(0)
    parts = [
        Transformer(backbone, tokenizer=AutoTokenizer.from_pretrained(folder)),
        Pooling(32, ["mean", "max", "cls"]),
        Dense(96, 16, activation_function=torch.nn.GELU()),
        LayerNorm(16),
        Dense(16, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    return CrossEncoder(modules=parts, device="cpu", max_length=MAX_LENGTH)


def tiny(family):
    return lambda folder: CrossEncoder(tiny_checkpoint(folder, family, max_length=MAX_LENGTH), device="cpu")


MAKERS = {
    "xlm-roberta": tiny("xlm-roberta"),
    "modernbert": tiny("modernbert"),
    "distilbert": distilbert,
    "modular": modular,
}


@pytest.fixture(scope="module", params=["bert", *MAKERS])
def saved(request, tmp_path_factory) -> tuple[CrossEncoder, Path]:
    """A model and its checkpoint, with the ONNX file in it."""
    if request.param == "bert":
        return request.getfixturevalue("bert")
    folder = tmp_path_factory.mktemp(request.param)
    model = MAKERS[request.param](folder / "made")
    model.save_pretrained(folder / "saved", create_model_card=False)
    export_onnx(model, folder / "saved")
    return model, folder / "saved"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> tuple[CrossEncoder, Path]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("plain") / "bert", hidden_size=64, max_length=MAX_LENGTH)
    model = CrossEncoder(folder, device="cpu")
    export_onnx(model, folder)
    return model, folder


def test_every_family_scores_as_torch_does_over_shapes(saved):
    model, folder = saved
    with_onnx = CrossEncoder(folder, backend="onnx")
    assert with_onnx.get_backend() == "onnx" and model.get_backend() == "torch"
    pairs = random_pairs(24)
    for batch_size in (1, 7, 24):
        expected = model.predict(pairs, batch_size=batch_size, activation_fn=torch.nn.Identity())
        found = with_onnx.predict(pairs, batch_size=batch_size, activation_fn=torch.nn.Identity())
        # 1e-5 of the largest logit: two orders of summation in float32.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, abs(expected).max()))
    ranking = with_onnx.rank(pairs[0][0], [document for _, document in pairs])
    assert [r["corpus_id"] for r in ranking] == [
        r["corpus_id"] for r in model.rank(pairs[0][0], [document for _, document in pairs])
    ]


def test_one_token_and_the_longest_pair_go_through_the_same_file(bert):
    model, folder = bert
    network = OnnxNetwork(folder / "onnx" / "model.onnx", 1)
    for num_pairs, width in ((1, 1), (1, MAX_LENGTH), (9, 5)):
        features = {name: torch.ones(num_pairs, width, dtype=torch.long) for name in model.preprocess([("a", "b")])}
        with torch.inference_mode():
            torch.testing.assert_close(network(features)["scores"], model(features)["scores"], rtol=0, atol=1e-5)


def test_a_saved_model_takes_its_file_along_and_a_retrained_one_does_not_keep_it(bert, tmp_path):
    model, folder = bert
    with_onnx = CrossEncoder(folder, backend="onnx")
    with_onnx.save_pretrained(tmp_path / "copy")
    again = CrossEncoder(tmp_path / "copy", backend="onnx", model_kwargs={"export": False})
    np.testing.assert_array_equal(again.predict(random_pairs(3)), with_onnx.predict(random_pairs(3)))
    model.save_pretrained(tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("onnx/*.onnx")), "a file of earlier weights would score in their place"


def test_a_missing_file_is_exported_for_the_process_or_refused(bert, tmp_path, caplog):
    folder = tmp_path / "bare"
    shutil.copytree(bert[1], folder, ignore=shutil.ignore_patterns("onnx"))
    for settings in ({"export": False}, {"file_name": "model_qint8_avx2.onnx"}):
        with pytest.raises(CheckpointError, match="crossenc export"):
            CrossEncoder(folder, backend="onnx", model_kwargs=settings)
    with caplog.at_level("WARNING"):
        made = CrossEncoder(folder, backend="onnx")
    assert "for this process alone" in caplog.text and not (folder / "onnx").exists()
    made.save_pretrained(folder)
    assert (folder / "onnx" / "model.onnx").exists()
    np.testing.assert_allclose(made.predict(random_pairs(5)), bert[0].predict(random_pairs(5)), atol=1e-5)


def test_what_cannot_be_meant_is_refused(bert):
    _, folder = bert
    with pytest.raises(ConfigError, match="there is no provider 'TpuExecutionProvider' here: choose from"):
        CrossEncoder(folder, backend="onnx", model_kwargs={"provider": "TpuExecutionProvider"})
    with pytest.raises(ConfigError, match="leave dtype"):
        CrossEncoder(folder, backend="onnx", dtype="bfloat16")
    with pytest.raises(ConfigError, match="choose torch or onnx"):
        CrossEncoder(folder, backend="openvino")
    for name in ("../model.onnx", "/model.onnx", "model.bin"):
        with pytest.raises(ConfigError, match="file"):
            CrossEncoder(folder, backend="onnx", model_kwargs={"file_name": name})
    with pytest.raises(ConfigError, match="load it with backend='torch' to train"):
        CrossEncoder(folder, backend="onnx").train()


def test_a_language_model_that_is_asked_yes_or_no_is_not_exported(tmp_path):
    tiny_checkpoint(tmp_path / "plain", "modernbert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    with quiet_transformers():
        transformer = Transformer(Qwen3ForCausalLM(config), transformer_task="text-generation", tokenizer=tokenizer)
    parts = [transformer, LogitScore(5, 6)]
    with pytest.raises(ConfigError, match="yes or no"):
        export_onnx(CrossEncoder(modules=parts, device="cpu"), tmp_path)


def test_a_file_of_something_else_is_refused_by_what_it_takes_and_gives(bert, tmp_path):
    (tmp_path / "page.onnx").write_text("<html>")
    with pytest.raises(CheckpointError, match="is no ONNX file"):
        OnnxNetwork(tmp_path / "page.onnx", 1)
    with pytest.raises(CheckpointError, match="not 3 logits a pair"):
        OnnxNetwork(bert[1] / "onnx" / "model.onnx", 3)
    with pytest.raises(CheckpointError, match="there is no"):
        OnnxNetwork(tmp_path / "absent.onnx", 1)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "link"])
def test_weights_outside_of_the_folder_are_never_read(tmp_path, place):
    folder = tmp_path / "onnx"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 4)
    (folder / "link").symlink_to(tmp_path / "secret")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=place)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["pairs", "tokens"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["pairs", 1])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "w"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", [ids], [logits], initializer=[weight])
    (folder / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(CheckpointError, match="outside of its folder"):
        OnnxNetwork(folder / "model.onnx", 1)


def test_a_pool_scores_with_the_file_too(bert):
    with_onnx = CrossEncoder(bert[1], backend="onnx")
    pairs = random_pairs(4)
    with with_onnx.start_multi_process_pool(["cpu"]) as pool:
        np.testing.assert_array_equal(with_onnx.predict(pairs, pool=pool), with_onnx.predict(pairs))


def save_greedy_network(path: Path) -> None:
    """A network that takes one float of memory for one pair, and for B pairs 2 ** 48 * (B - 1) more."""
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["shape"], start=0, end=1),
        helper.make_node("Sub", ["shape", "one"], ["num_more"]),
        helper.make_node("Mul", ["num_more", "huge"], ["product"]),
        helper.make_node("Add", ["product", "one"], ["size"]),
        helper.make_node("Cast", ["input_ids"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["values"], ["largest"], keepdims=0),
        helper.make_node("Expand", ["largest", "size"], ["expanded"]),
        helper.make_node("ReduceMax", ["expanded"], ["again"], keepdims=0),
        helper.make_node("ReduceSum", ["values", "one"], ["sums"], keepdims=1),
        helper.make_node("Mul", ["sums", "again"], ["logits"]),
    ]
    constants = [
        helper.make_tensor(*each)
        for each in (("one", TensorProto.INT64, [1], [1]), ("huge", TensorProto.INT64, [1], [1 << 48]))
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["pairs", "tokens"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["pairs", 1])]
    graph = helper.make_graph(nodes, "greedy", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_a_batch_that_a_session_has_no_memory_for_is_halved(tmp_path):
    save_greedy_network(tmp_path / "model.onnx")
    calls = []
    engine = Engine(
        network=OnnxNetwork(tmp_path / "model.onnx", 1),
        num_labels=1,
        pad_token_id=0,
        padding_side="right",
        activation=torch.nn.Identity(),
        device=torch.device("cpu"),
        max_batch_tokens=100,
        on_out_of_memory=lambda: calls.append(None),
    )
    ids, offsets = np.array([1, 2, 3, 4, 5], np.int32), np.array([0, 2, 5])
    pairs = TokenizedPairs(ids, offsets, None, np.zeros(2, bool))
    assert (engine.score(pairs).tolist(), len(calls)) == ([(1 + 2) * 2, (3 + 4 + 5) * 5], 1)


def test_other_errors_of_a_session_are_raised_as_they_are(tmp_path):
    save_greedy_network(tmp_path / "model.onnx")
    network = OnnxNetwork(tmp_path / "model.onnx", 1)
    with pytest.raises(Exception, match="Invalid rank for input") as caught:
        network({"input_ids": torch.ones(3, dtype=torch.int64)})
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_int8_keeps_its_error_by_leaving_the_worst_layers_in_float32(bert):
    model, folder = bert
    file = folder / "onnx" / "model.onnx"
    features = model.preprocess(random_pairs(32, seed=1))
    batches = [{name: tensor.numpy() for name, tensor in features.items()}]
    reference = quantize._logits(onnx.load(str(file)), batches)

    def error(quantized: quantize.Quantized) -> float:
        return float(np.abs(quantize._logits(quantized.model, batches) - reference).mean() / reference.std())

    loose = quantize.quantize(file, batches, "avx2", max_error=1e9)
    assert loose.left_out == () and loose.num_layers == 12
    assert TensorProto.INT8 in {tensor.data_type for tensor in loose.model.graph.initializer}
    allowed = error(loose) / 2
    tight = quantize.quantize(file, batches, "avx2", max_error=allowed)
    assert error(tight) <= allowed and 0 < len(tight.left_out) < 12
    with pytest.raises(InputError, match="pairs to calibrate on"):
        export_onnx(model, folder, precision="int8")


def test_int8_layers_compute_what_their_codes_say(bert):
    """Every tensor of an int8 layer by hand: codes of tokens and weights, and their products."""
    model, folder = bert
    graph = onnx.load(str(folder / "onnx" / "model.onnx"))
    features = {name: tensor.numpy() for name, tensor in model.preprocess(random_pairs(4)).items()}
    groups = quantize._quantized_groups(graph, [features], "avx2")
    assert sorted(group.is_signed for group in groups) == [False] * 2 + [True] * 6, "what GELU gives is hardly negative"
    weights = quantize._weights(graph)
    nodes = {node.name: node for node in quantize._layers(graph)}
    for group in groups:
        changed = quantize._in_int8(graph, [group])
        for name, (codes_KN, scale_N, _) in group.codes.items():
            int8, float32 = (probe(each, [group.source, nodes[name].output[0]], features) for each in (changed, graph))
            smooth = (float32[0] - group.lowest) / group.factor_K
            scale = abs(smooth).max(axis=-1, keepdims=True) / (127 if group.is_signed else 255)
            weight_KN = codes_KN * scale_N / group.factor_K[:, None]
            expected = (np.round(smooth / scale) * scale * group.factor_K + group.lowest) @ weight_KN
            np.testing.assert_allclose(int8[1], expected, rtol=0, atol=2e-2 * abs(expected).std())
            np.testing.assert_allclose(int8[1], float32[1], rtol=0, atol=0.2 * float32[1].std())
            exact = numpy_helper.to_array(weights[nodes[name].input[1]])
            assert np.abs(weight_KN - exact).mean() < 0.04 * np.abs(exact).mean()


def probe(graph: onnx.ModelProto, names: list[str], features) -> list[np.ndarray]:
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return next(iter(quantize._run(probed, [features])))[1:]


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_no_two_products_that_are_summed_overflow_16_bits(seed, num_inputs, size):
    weight_KN = np.random.default_rng(seed).standard_t(2, (num_inputs, 5)).astype(np.float32) * np.float32(size)
    scale_N = quantize._scales(weight_KN, sums_have_16_bits=True)
    codes_KN = quantize._rounded(weight_KN / scale_N, np.eye(num_inputs, dtype=np.float32)).astype(int)
    for start in range(0, num_inputs, 2):
        pair = codes_KN[start : start + 2]
        assert np.maximum(pair, 0).sum(axis=0).max() * 255 < 2**15
        assert np.maximum(-pair, 0).sum(axis=0).max() * 255 <= 2**15
    assert (quantize._scales(weight_KN, sums_have_16_bits=False) <= scale_N).all()


def test_rounding_makes_up_for_errors_where_inputs_go_together():
    generator = np.random.default_rng(0)
    states_TK = (generator.normal(size=(512, 8)) @ generator.normal(size=(8, 96))).astype(np.float32)
    states_TK += generator.normal(size=states_TK.shape).astype(np.float32) / 4
    weight_KN = generator.normal(size=(96, 24)).astype(np.float32) * 8
    exact = states_TK @ weight_KN
    careful, plain = (
        np.abs(states_TK @ codes_KN - exact).mean()
        for codes_KN in (quantize._rounded(weight_KN, states_TK.T @ states_TK), np.round(weight_KN))
    )
    assert careful < plain / 2
    np.testing.assert_array_equal(quantize._rounded(weight_KN, np.eye(96, dtype=np.float32)), np.round(weight_KN))


def test_the_settings_of_sentence_transformers_are_taken_from_model_kwargs(bert):
    _, folder = bert
    kwargs = {"file_name": "onnx/model.onnx", "provider": "CPUExecutionProvider", "export": False}
    model = CrossEncoder(folder, backend="onnx", model_kwargs=kwargs)
    assert model.onnx_network is not None and model.onnx_network.path == folder / "onnx" / "model.onnx"
    assert json.dumps(kwargs) and len(kwargs) == 3, "the caller's settings stay as they were"
