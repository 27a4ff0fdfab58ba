import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from crossenc import CrossEncoder
from crossenc.errors import CheckpointError, ConfigError, InputError, ScoreError
from crossenc.modules import Dense, Pooling, Transformer
from crossenc.testing import tiny_checkpoint

PAIRS = [("what is water", "the river"), ("why", "stone " * 300), ("", ""), ("what is water", "the river")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def model(folder: Path) -> CrossEncoder:
    return CrossEncoder(folder, device="cpu")


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(tiny_checkpoint(tmp_path_factory.mktemp("three"), num_labels=3), device="cpu")


def test_a_model_tells_what_it_is(model: CrossEncoder, three_labels: CrossEncoder) -> None:
    assert (model.num_labels, three_labels.num_labels) == (1, 3)
    assert model.max_length == 128
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.config.model_type == "bert"
    assert model.model.config is model.config
    assert model.tokenizer.cls_token == "[CLS]"
    assert isinstance(model.activation_fn, torch.nn.Sigmoid)
    assert isinstance(three_labels.activation_fn, torch.nn.Identity)
    assert not model.model.training


# predict


def test_several_pairs_give_a_float32_array_in_their_order(model: CrossEncoder) -> None:
    scores = model.predict(PAIRS)
    assert isinstance(scores, np.ndarray)
    assert (scores.shape, scores.dtype) == ((4,), np.float32)
    assert scores[0] == pytest.approx(scores[3], abs=1e-6)
    assert len(set(scores.round(4).tolist())) == 3


def test_a_single_pair_gives_a_scalar(model: CrossEncoder, three_labels: CrossEncoder) -> None:
    for pair in (PAIRS[0], list(PAIRS[0]), np.array(PAIRS[0])):
        score = model.predict(pair)
        assert type(score) is np.float32
        assert score == pytest.approx(model.predict(PAIRS)[0], abs=1e-6)
    assert three_labels.predict(PAIRS[0]).shape == (3,)


@pytest.mark.parametrize("wrap", [tuple, np.array, iter, lambda pairs: (list(pair) for pair in pairs)])
def test_any_iterable_of_pairs_is_accepted(model: CrossEncoder, wrap: Any) -> None:
    np.testing.assert_array_equal(model.predict(wrap(PAIRS)), model.predict(PAIRS))


def test_one_pair_in_a_list_gives_an_array_of_one(model: CrossEncoder) -> None:
    assert model.predict([PAIRS[0]]).shape == (1,)


def test_nothing_gives_empty_float32_results(model: CrossEncoder, three_labels: CrossEncoder) -> None:
    for encoder, shape in ((model, (0,)), (three_labels, (0, 3))):
        array = encoder.predict([])
        assert (array.shape, array.dtype) == (shape, np.float32)
        tensor = encoder.predict([], convert_to_tensor=True)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.float32)
        assert encoder.predict([], convert_to_numpy=False) == []


def test_results_come_as_tensors_on_request(model: CrossEncoder, three_labels: CrossEncoder) -> None:
    expected = model.predict(PAIRS)
    tensor = model.predict(PAIRS, convert_to_tensor=True)
    assert (tensor.dtype, tensor.device) == (torch.float32, model.device)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    single = model.predict(PAIRS[0], convert_to_tensor=True)
    assert single.shape == ()
    tensors = model.predict(PAIRS, convert_to_numpy=False)
    assert [type(t) for t in tensors] == [torch.Tensor] * 4
    assert [t.item() for t in tensors] == expected.tolist()
    assert three_labels.predict(PAIRS, convert_to_tensor=True).shape == (4, 3)
    assert three_labels.predict(PAIRS, convert_to_numpy=False)[0].shape == (3,)


def test_softmax_normalises_over_labels_and_leaves_single_scores(
    model: CrossEncoder, three_labels: CrossEncoder
) -> None:
    logits = three_labels.predict(PAIRS).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(three_labels.predict(PAIRS, apply_softmax=True), expected, atol=1e-6)
    np.testing.assert_array_equal(model.predict(PAIRS, apply_softmax=True), model.predict(PAIRS))


def test_an_activation_can_be_given_for_a_model_and_for_a_call(model: CrossEncoder, folder: Path) -> None:
    logits = model.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(model.predict(PAIRS), 1 / (1 + np.exp(-logits.astype(np.float64))), atol=1e-6)
    raw = CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Identity())
    np.testing.assert_array_equal(raw.predict(PAIRS), logits)
    assert raw.predict(PAIRS, activation_fn=torch.tanh).tolist() == pytest.approx(np.tanh(logits).tolist())


def test_an_activation_may_change_what_a_pair_gets_but_not_the_number_of_pairs(
    model: CrossEncoder, three_labels: CrossEncoder
) -> None:
    shares = three_labels.predict(PAIRS, apply_softmax=True)
    np.testing.assert_allclose(three_labels.predict(PAIRS, activation_fn=lambda x: x.softmax(-1)[:, 1]), shares[:, 1])
    np.testing.assert_allclose(three_labels.predict(PAIRS, activation_fn=lambda x: x.softmax(-1)[:, :2]), shares[:, :2])
    scores = model.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_array_equal(model.predict(PAIRS, activation_fn=lambda x: x.squeeze(-1)), scores)
    with pytest.raises(ConfigError, match=f"the activation makes 1 scores of {len(PAIRS)} pairs"):
        model.predict(PAIRS, activation_fn=lambda x: x.mean(0, keepdim=True))


def test_a_batch_size_caps_the_pairs_of_a_batch(model: CrossEncoder) -> None:
    sizes = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    scores = model.predict([PAIRS[0]] * 5, batch_size=2)
    hook.remove()
    assert sizes == [2, 2, 1]
    np.testing.assert_allclose(scores, model.predict([PAIRS[0]] * 5), atol=1e-6)
    with pytest.raises(ConfigError, match="0"):
        model.predict(PAIRS, batch_size=0)


def test_a_progress_bar_shows_only_when_asked_for(model: CrossEncoder, capfd: pytest.CaptureFixture[str]) -> None:
    model.predict(PAIRS)
    model.predict(PAIRS, show_progress_bar=False)
    assert capfd.readouterr() == ("", "")
    model.predict(PAIRS, show_progress_bar=True)
    assert "4/4" in capfd.readouterr().out


def test_training_mode_is_restored(model: CrossEncoder) -> None:
    expected = model.predict(PAIRS)
    model.train()
    scores = model.predict(PAIRS)
    was_training = model.model.training
    model.eval()
    assert was_training
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ([("a", "b"), ("a", None)], "document 1 is a NoneType"),
        ([("a", "b"), (3, "b")], "query 1 is a int"),
        ([("a", "b"), None], "input 1 is not a"),
        ([("a", "b"), ("a", "b", "c")], "input 1 is not a"),
        (["a", "b", "c"], "input 0 is not a"),
        (("a",), "input 0 is not a"),
        ({"query": "a"}, "not a dict"),
        ([("a", "\udc80")], "document 0 has a lone surrogate"),
    ],
)
def test_what_is_not_a_pair_of_texts_is_refused_with_its_index(model: CrossEncoder, inputs: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        model.predict(inputs)


def test_an_unknown_keyword_is_an_error(model: CrossEncoder) -> None:
    with pytest.raises(TypeError, match=r"predict\(\) has no argument 'batchsize': did you mean 'batch_size'"):
        model.predict(PAIRS, batchsize=2)


def test_arguments_of_older_versions_still_work_and_warn(model: CrossEncoder, folder: Path) -> None:
    expected = model.predict(PAIRS)
    with pytest.warns(DeprecationWarning, match="write batch_size="):
        np.testing.assert_allclose(model.predict(PAIRS, 64), expected, atol=1e-6)
    with pytest.warns(DeprecationWarning, match="`sentences` .* write `inputs`"):
        np.testing.assert_allclose(model.predict(sentences=PAIRS), expected, atol=1e-6)
    with pytest.warns(DeprecationWarning, match="`num_workers` .* has no effect"):
        np.testing.assert_allclose(model.predict(PAIRS, num_workers=2), expected, atol=1e-6)
    with pytest.warns(DeprecationWarning, match="write `activation_fn`"):
        raw = model.predict(PAIRS, activation_fct=torch.nn.Identity())
    with pytest.warns(DeprecationWarning, match="by name only"):
        old = CrossEncoder(folder, 1, 64)
    assert (old.num_labels, old.max_length) == (1, 64)
    with pytest.warns(DeprecationWarning, match="`default_activation_function` .* write `activation_fn`"):
        old = CrossEncoder(folder, default_activation_function=torch.nn.Identity())
    np.testing.assert_allclose(old.predict(PAIRS), raw, atol=1e-6)
    for old_name in ("automodel_args", "tokenizer_args", "config_args"):
        with pytest.warns(DeprecationWarning, match=old_name):
            np.testing.assert_allclose(CrossEncoder(folder, **{old_name: {}}).predict(PAIRS), expected, atol=1e-6)


@pytest.mark.parametrize("activation", [torch.nn.Sigmoid, "sigmoid"])
def test_an_activation_that_is_no_instance_is_refused(model: CrossEncoder, folder: Path, activation: Any) -> None:
    with pytest.raises(ConfigError, match="activation_fn"):
        model.predict(PAIRS, activation_fn=activation)
    with pytest.raises(ConfigError, match="activation_fn"):
        CrossEncoder(folder, activation_fn=activation)


# rank

DOCUMENTS = ["stone", "the river", "stone", "water " * 200, ""]


def test_a_ranking_is_best_first_with_ties_in_corpus_order(model: CrossEncoder) -> None:
    scores = model.predict([("what is water", document) for document in DOCUMENTS]).tolist()
    ranking = model.rank("what is water", DOCUMENTS)
    assert [set(result) for result in ranking] == [{"corpus_id", "score"}] * 5
    expected = sorted(range(5), key=lambda i: -scores[i])
    assert [result["corpus_id"] for result in ranking] == expected
    assert [result["score"] for result in ranking] == pytest.approx([scores[i] for i in expected], abs=1e-6)
    places = {result["corpus_id"]: place for place, result in enumerate(ranking)}
    assert places[2] == places[0] + 1
    assert {type(value) for result in ranking for value in result.values()} == {int, float}


def test_documents_may_be_a_generator_and_come_back_on_request(model: CrossEncoder) -> None:
    ranking = model.rank("water", (document for document in DOCUMENTS), return_documents=True)
    assert [result["text"] for result in ranking] == [DOCUMENTS[result["corpus_id"]] for result in ranking]


@pytest.mark.parametrize(("top_k", "num_results"), [(None, 5), (0, 0), (2, 2), (9, 5)])
def test_top_k_keeps_the_first_results(model: CrossEncoder, top_k: int | None, num_results: int) -> None:
    assert model.rank("water", DOCUMENTS, top_k) == model.rank("water", DOCUMENTS)[:num_results]


def test_ranking_nothing_gives_nothing(model: CrossEncoder) -> None:
    assert model.rank("water", []) == []


def test_ranking_refuses_a_negative_top_k_and_several_labels(model: CrossEncoder, three_labels: CrossEncoder) -> None:
    with pytest.raises(ValueError, match="top_k is -1"):
        model.rank("water", DOCUMENTS, top_k=-1)
    with pytest.raises(ValueError, match=r"only works for models with num_labels=1.*This model has 3"):
        three_labels.rank("water", DOCUMENTS)


def test_ranking_refuses_scores_that_are_not_finite(model: CrossEncoder) -> None:
    with pytest.raises(ScoreError):
        model.rank("water", DOCUMENTS, activation_fn=lambda logits: logits * torch.nan)


def test_ranking_names_a_document_that_is_not_text(model: CrossEncoder) -> None:
    with pytest.raises(InputError, match="document 1 is a NoneType"):
        model.rank("water", ["a", None])  # type: ignore[list-item]


# loading


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_given_by_name_or_value(folder: Path, model: CrossEncoder, dtype: Any) -> None:
    narrow = CrossEncoder(folder, device="cpu", dtype=dtype)
    assert narrow.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of mantissa, a relative error of 4e-3 at each step of the model.
    np.testing.assert_allclose(narrow.predict(PAIRS), model.predict(PAIRS), atol=0.05)


@pytest.mark.parametrize("dtype", ["int8", "fp32", torch.float64])
def test_an_unknown_dtype_is_refused_with_the_choices(folder: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        CrossEncoder(folder, dtype=dtype)


def test_settings_that_do_not_fit_the_checkpoint_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens is 0"):
        CrossEncoder(folder, max_batch_tokens=0)
    with pytest.raises(CheckpointError, match="num_labels"):
        CrossEncoder(folder, num_labels=2)


def test_a_shorter_max_length_cuts_longer_pairs_only(folder: Path, model: CrossEncoder) -> None:
    short = CrossEncoder(folder, device="cpu", max_length=20)
    assert short.max_length == 20
    unchanged = [True, False, True, True]
    np.testing.assert_allclose(short.predict(PAIRS)[unchanged], model.predict(PAIRS)[unchanged], atol=1e-6)
    assert abs(short.predict(PAIRS)[1] - model.predict(PAIRS)[1]) > 1e-4


def test_a_model_loads_from_a_uri(folder: Path, model: CrossEncoder, tmp_path: Path) -> None:
    remote = CrossEncoder(f"file://{folder}", device="cpu", cache_folder=tmp_path)
    np.testing.assert_array_equal(remote.predict(PAIRS), model.predict(PAIRS))


# many queries, prompts, devices


def test_ranking_many_queries_gives_what_ranking_each_gives(model: CrossEncoder) -> None:
    queries = ["what is water", "how", "why"]
    lists = [["the river", "stone", "music " * 9], [], (text for text in ["bread", "the city"])]
    lists_again = [["the river", "stone", "music " * 9], [], ["bread", "the city"]]
    many = model.rank_many(iter(queries), lists, top_k=2, return_documents=True)
    for found, query, documents in zip(many, queries, lists_again, strict=True):
        expected = model.rank(query, documents, top_k=2, return_documents=True)
        assert [(r["corpus_id"], r["text"]) for r in found] == [(r["corpus_id"], r["text"]) for r in expected]
        assert [r["score"] for r in found] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert [len(found) for found in many] == [2, 0, 2]
    assert model.rank_many([], []) == []
    with pytest.raises(InputError, match="2 queries and 1 lists of documents"):
        model.rank_many(["a", "b"], [["c"]])


def test_prompts_are_put_before_queries(folder: Path) -> None:
    prompts = {"web": "the city ", "none": ""}
    model = CrossEncoder(folder, device="cpu", prompts=prompts, default_prompt_name="web")
    plain = CrossEncoder(folder, device="cpu")
    prompted = [("the city " + query, document) for query, document in PAIRS]
    np.testing.assert_allclose(model.predict(PAIRS), plain.predict(prompted), atol=1e-5)
    np.testing.assert_allclose(model.predict(PAIRS, prompt_name="none"), plain.predict(PAIRS), atol=1e-5)
    np.testing.assert_allclose(plain.predict(PAIRS, prompt="the city "), plain.predict(prompted), atol=1e-5)
    with pytest.raises(ConfigError, match="no prompt 'chat': the model has none, web"):
        model.predict(PAIRS, prompt_name="chat")
    with pytest.raises(ConfigError, match="no prompt 'chat'"):
        CrossEncoder(folder, default_prompt_name="chat")


def test_a_model_moves_and_changes_dtype_like_any_module(folder: Path) -> None:
    model = CrossEncoder(folder, device="cpu")
    expected = model.predict(PAIRS)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.predict(PAIRS).dtype == np.float32
    np.testing.assert_allclose(model.predict(PAIRS), expected, atol=0.05)
    assert not any(module is model.activation_fn for module in model.modules())


def test_logits_carry_gradients_and_are_before_the_activation(model: CrossEncoder) -> None:
    logits = model.logits(PAIRS)
    assert logits.shape == (4, 1) and logits.requires_grad
    np.testing.assert_allclose(torch.sigmoid(logits)[:, 0].detach(), model.predict(PAIRS), atol=1e-5)
    features = model.preprocess(PAIRS)
    assert torch.equal(model(features)["scores"], model.logits(PAIRS))


def test_the_limit_of_a_loaded_model_can_be_changed(folder: Path) -> None:
    model = CrossEncoder(folder, device="cpu")
    model.max_length = 20
    assert (model.max_length, model.max_seq_length) == (20, 20)
    assert model.preprocess([PAIRS[1]])["input_ids"].shape == (1, 20)


def test_more_tokens_than_the_model_has_positions_for_become_what_it_has_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "crossenc"):
        model = CrossEncoder(folder, device="cpu", max_length=8192)
    assert "max_length is 8192, but the model has positions for 128 tokens" in caplog.text
    assert (model.max_length, model.tokenizer.model_max_length) == (128, 128)
    assert CrossEncoder(folder, device="cpu", processor_kwargs={"model_max_length": 8192}).max_length == 128
    model.max_length = 129
    assert model.preprocess([("water " * 200, "stone")])["input_ids"].shape == (1, 128)


def test_a_compiled_model_scores_the_same(folder: Path) -> None:
    model = CrossEncoder(folder, device="cpu")
    expected = model.predict(PAIRS)
    model.compile(backend="eager")
    np.testing.assert_allclose(model.predict(PAIRS), expected, atol=1e-5)


def test_what_would_run_foreign_code_or_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code is not supported"):
        CrossEncoder(folder, trust_remote_code=True)
    with pytest.raises(ConfigError, match="backend is 'openvino'"):
        CrossEncoder(folder, backend="openvino")
    with pytest.raises(TypeError, match="did you mean 'max_length'"):
        CrossEncoder(folder, max_lenght=12)


def test_an_evaluator_is_called_with_the_model_and_a_folder(model: CrossEncoder, tmp_path: Path) -> None:
    called = []
    model.evaluate(lambda *args: called.append(args), str(tmp_path / "new"))
    assert called == [(model, str(tmp_path / "new"))]
    assert (tmp_path / "new").is_dir()


def backbone_of(folder: Path, place: Path) -> Path:
    AutoModel.from_pretrained(folder).save_pretrained(place)
    AutoTokenizer.from_pretrained(folder).save_pretrained(place)
    return place


def test_a_new_head_scores_once_any_training_loop_has_changed_it(folder: Path, tmp_path: Path) -> None:
    model = CrossEncoder(backbone_of(folder, tmp_path / "backbone"), device="cpu")
    assert model.head_is_new
    with pytest.raises(CheckpointError, match="new and random"):
        model.save_pretrained(tmp_path / "saved")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.logits(PAIRS).sum().backward()
    assert copy.deepcopy(model).head_is_new
    optimizer.step()
    assert not model.head_is_new
    model.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "saved", device="cpu").predict(PAIRS), model.predict(PAIRS), atol=1e-6
    )


def test_a_backbone_gets_one_label_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    place = backbone_of(folder, tmp_path / "backbone")
    config = json.loads((place / "config.json").read_text())
    for name in ("id2label", "label2id"):  # as pretrained backbones are: transformers counts two labels then
        config.pop(name, None)
    (place / "config.json").write_text(json.dumps(config))
    assert CrossEncoder(place, device="cpu").num_labels == 1
    assert CrossEncoder(place, device="cpu", num_labels=3).num_labels == 3


def test_an_activation_that_is_not_known_becomes_the_default_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = CrossEncoder(folder, device="cpu")
    model.save_pretrained(tmp_path)
    for name in ("config.json", "config_sentence_transformers.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("torch.nn.modules.activation.Sigmoid", "evil.Activation"))
    with caplog.at_level("WARNING", "crossenc"):
        loaded = CrossEncoder(tmp_path, device="cpu")
    assert "'evil.Activation' is not trusted, using default activation function" in caplog.text
    assert isinstance(loaded.activation_fn, torch.nn.Sigmoid)


def test_a_softmax_over_the_labels_is_loaded_again(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "three", num_labels=3)
    model = CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Softmax(dim=-1))
    model.save_pretrained(tmp_path / "saved")
    scores = CrossEncoder(tmp_path / "saved", device="cpu").predict(PAIRS)
    np.testing.assert_allclose(scores, model.predict(PAIRS), atol=1e-6)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-6)


def test_a_model_can_be_put_together_from_parts_that_load_folders(folder: Path, tmp_path: Path) -> None:
    transformer = Transformer(backbone_of(folder, tmp_path / "backbone"), max_seq_length=30)
    width = transformer.get_embedding_dimension()
    weight = torch.arange(width, dtype=torch.float32).unsqueeze(0) / width
    head = Dense(width, 1, bias=False, activation_function=None, init_weight=weight, module_output_name="scores")
    model = CrossEncoder(modules=[transformer, Pooling(width, pooling_mode="lasttoken"), head], device="cpu")
    assert (model.max_length, model.num_labels) == (30, 1)
    features = transformer(model.preprocess(PAIRS[:1]))
    expected = float((weight[0] * features["token_embeddings"][0, -1].detach()).sum())
    assert model.predict(PAIRS[:1], activation_fn=torch.nn.Identity())[0] == pytest.approx(expected, 1e-4)
    classifier = CrossEncoder(modules=[Transformer(folder, transformer_task="sequence-classification")], device="cpu")
    np.testing.assert_allclose(classifier.predict(PAIRS), CrossEncoder(folder, device="cpu").predict(PAIRS), atol=1e-6)
    fresh = CrossEncoder(
        modules=[Transformer(tmp_path / "backbone", transformer_task="sequence-classification")], device="cpu"
    )
    with pytest.raises(CheckpointError, match="new and random"):
        fresh.predict(PAIRS)


def test_one_pair_or_text_is_told_from_several(model: CrossEncoder) -> None:
    single = [("a", "b"), ["a", "b"], np.array(["a", "b"]), "a text"]
    several = [[("a", "b")], [["a", "b"], ["c", "d"]], np.array([["a", "b"]]), np.array([], dtype=str), []]
    assert [model.is_singular_input(inputs) for inputs in single] == [True] * 4
    assert [model.is_singular_input(inputs) for inputs in several] == [False] * 5


# what users of other libraries and older versions pass


def test_positional_arguments_of_older_versions_mean_what_they_meant(model: CrossEncoder, folder: Path) -> None:
    expected, raw = model.predict(PAIRS), model.predict(PAIRS, activation_fn=torch.nn.Identity())
    identity = torch.nn.Identity()
    for arguments, wanted in (
        ((64,), expected),
        ((np.int64(8), False), expected),
        ((32, False, 0, identity, False, True, False), raw),  # version 3
        ((32, False, identity, False, True, False), raw),  # versions 4 to 5.3
    ):
        with pytest.warns(DeprecationWarning, match="write batch_size="):
            np.testing.assert_allclose(model.predict(PAIRS, *arguments), wanted, atol=1e-6)
    with pytest.warns(DeprecationWarning, match="write batch_size="):
        assert [r["corpus_id"] for r in model.rank("what", DOCUMENTS, None, False, 32)] == [
            r["corpus_id"] for r in model.rank("what", DOCUMENTS)
        ]
    with pytest.raises(TypeError, match="takes no more than 4 more by place"):
        CrossEncoder(folder, 1, 64, None, "cpu", "surplus")


def test_warnings_point_at_the_line_of_the_caller(model: CrossEncoder) -> None:
    with pytest.warns(DeprecationWarning) as caught:
        model.predict(sentences=PAIRS)
        model.predict(PAIRS, 32)
        model.default_activation_function
    assert {warning.filename for warning in caught} == {__file__}


def test_tables_and_lone_texts_are_not_taken_for_pairs_or_documents(model: CrossEncoder) -> None:
    frame = pd.DataFrame(PAIRS, columns=["query", "document"])
    with pytest.raises(InputError, match="not a DataFrame: of a table pass the rows"):
        model.predict(frame)
    np.testing.assert_allclose(model.predict(frame.values), model.predict(PAIRS), atol=1e-6)
    with pytest.raises(InputError, match="the documents of a query are the text 'water'"):
        model.rank("what", "water")
    with pytest.raises(InputError, match="give a list of texts"):
        model.rank_many(["a", "b"], ["doc one", "doc two"])


def test_a_head_of_other_labels_is_made_anew_when_asked_for(folder: Path) -> None:
    model = CrossEncoder(folder, device="cpu", num_labels=3, model_kwargs={"ignore_mismatched_sizes": True})
    assert (model.num_labels, model.head_is_new) == (3, True)
    assert torch.equal(
        model.model.base_model.embeddings.word_embeddings.weight,
        CrossEncoder(folder, device="cpu").model.base_model.embeddings.word_embeddings.weight,
    )


def test_a_backbone_without_its_pooler_can_be_trained(folder: Path, tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert CrossEncoder(tmp_path, device="cpu", num_labels=1).head_is_new


def test_auto_among_the_models_settings_is_the_dtype_that_is_stored(folder: Path, tmp_path: Path) -> None:
    CrossEncoder(folder, device="cpu", dtype="float16").save_pretrained(tmp_path)
    assert CrossEncoder(tmp_path, device="cpu").dtype == torch.float32
    assert CrossEncoder(tmp_path, device="cpu", model_kwargs={"torch_dtype": "auto"}).dtype == torch.float16


def test_settings_of_transformers_that_are_fixed_here_are_taken_or_refused_by_name(folder: Path) -> None:
    fixed = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False, "device_map": None}
    assert CrossEncoder(folder, device="cpu", model_kwargs=fixed).num_labels == 1
    for name, value in (("use_safetensors", False), ("trust_remote_code", True), ("device_map", "auto")):
        with pytest.raises(ConfigError, match=f"{name}(=False)? is not supported"):
            CrossEncoder(folder, device="cpu", model_kwargs={name: value})


def test_texts_alone_may_stand_among_pairs(model: CrossEncoder) -> None:
    scores = model.predict([PAIRS[0], "the river", PAIRS[1], "stone"])
    expected = [model.predict(one) for one in (PAIRS[0], "the river", PAIRS[1], "stone")]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    for inputs in (["a", "b", "c"], ["a"], [("a", "b"), None], [("a", "b", "c")]):
        with pytest.raises(InputError, match="is not a"):
            model.predict(inputs)


def test_another_tokenizer_can_be_put_in_place(folder: Path, tmp_path: Path) -> None:
    model = CrossEncoder(folder, device="cpu", max_length=40)
    expected = model.predict(PAIRS)
    other = AutoTokenizer.from_pretrained(tiny_checkpoint(tmp_path, vocabulary=["river", "stone", "the"]))
    model.processor = other
    assert model.tokenizer is other and model.max_length == 40
    assert abs(model.predict(PAIRS) - expected).max() > 1e-4
