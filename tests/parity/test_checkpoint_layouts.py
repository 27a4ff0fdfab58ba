"""Checkpoints of every layout score the same here and in sentence-transformers, whichever of the two saved them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sentence_transformers
import torch
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from crossenc import CrossEncoder, engine
from crossenc.errors import CheckpointError
from crossenc.quiet import quiet_transformers
from crossenc.testing import tiny_checkpoint

TOLERANCE = 1e-6
PAIRS = [
    ("what is water", "the river of the city"),
    ("how is bread", "in the stone bridge of winter"),
    ("what", "a"),
    ("the " * 90, "music " * 90),
    ("", "paper"),
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}<answer> the bread is"
)


@pytest.fixture(autouse=True)
def padded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries pad here: checkpoints are compared. That packed batches score the same is tested elsewhere."""
    if "real_pairs" not in request.node.name:
        monkeypatch.setattr(engine, "why_padded", lambda network, device: "for the comparison")


def assert_close(scores: Any, expected: Any) -> None:
    """Equal to 1e-6 of the largest."""
    largest = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE * largest)


def reference(folder: Path, **options: Any) -> Any:
    with quiet_transformers():
        return sentence_transformers.CrossEncoder(
            str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, **options
        )


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def version_3(folder: Path) -> Path:
    tiny_checkpoint(folder)
    edit_json(folder / "config.json", sbert_ce_default_activation_function="torch.nn.modules.linear.Identity")
    return folder


def version_4(folder: Path) -> Path:
    tiny_checkpoint(folder, "xlm-roberta")
    settings = {"activation_fn": "torch.nn.modules.activation.Tanh", "version": "4.1.0"}
    edit_json(folder / "config.json", sentence_transformers=settings)
    return folder


def plain(folder: Path) -> Path:
    return tiny_checkpoint(folder, "modernbert")


def three_labels(folder: Path) -> Path:
    return tiny_checkpoint(folder, "electra", num_labels=3)


def modular_classifier(folder: Path) -> Path:
    model = reference(tiny_checkpoint(folder / "plain"), prompts={"web": "the city "}, default_prompt_name="web")
    with quiet_transformers():
        model.save_pretrained(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def head(folder: Path, pooling: str | tuple[str, ...] = "mean", labels: int = 1) -> Path:
    """A backbone without a head of its own, and small layers after it."""
    tiny_checkpoint(folder / "plain")
    with quiet_transformers():
        AutoModel.from_pretrained(folder / "plain").save_pretrained(folder / "backbone")
        AutoTokenizer.from_pretrained(folder / "plain").save_pretrained(folder / "backbone")
        width = 32 * (1 if isinstance(pooling, str) else len(pooling))
        torch.manual_seed(0)
        model = sentence_transformers.CrossEncoder(
            modules=[
                Transformer(str(folder / "backbone")),
                Pooling(32, pooling_mode=pooling),
                Dense(width, 16, activation_function=torch.nn.GELU()),
                LayerNorm(16),
                Dense(16, labels, activation_function=torch.nn.Identity(), module_output_name="scores"),
            ],
            device="cpu",
        )
        model.save_pretrained(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def several_poolings(folder: Path) -> Path:
    return head(folder, ("cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"), labels=2)


def causal(folder: Path) -> Path:
    """A language model with a chat template, asked for the words bread and stone."""
    tiny_checkpoint(folder, "modernbert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shutil.rmtree(folder)
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def causal_modular(folder: Path) -> Path:
    causal(folder / "plain")
    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("Ġbread", "Ġstone")]
    with quiet_transformers():
        model = sentence_transformers.CrossEncoder(
            modules=[Transformer(str(folder / "plain"), transformer_task="text-generation"), LogitScore(*ids)],
            device="cpu",
        )
        model.save_pretrained(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


LAYOUTS = [
    version_3,
    version_4,
    plain,
    three_labels,
    modular_classifier,
    head,
    several_poolings,
    causal_modular,
]


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_either_library_loads_what_the_other_saved(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    ours, theirs = CrossEncoder(folder, device="cpu"), reference(folder)
    expected = theirs.predict(PAIRS)
    assert ours.num_labels == theirs.num_labels
    assert type(ours.activation_fn) is type(theirs.activation_fn)
    assert ours.max_length <= theirs.max_seq_length
    assert_close(ours.predict(PAIRS), expected)
    ours.save_pretrained(tmp_path / "ours")
    with quiet_transformers():
        theirs.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    assert_close(reference(tmp_path / "ours").predict(PAIRS), expected)
    for saved in ("ours", "theirs"):
        again = CrossEncoder(tmp_path / saved, device="cpu").predict(PAIRS)
        assert_close(again, expected)


@pytest.mark.parametrize("make", [version_3, version_4, plain], ids=lambda make: make.__name__)
def test_a_changed_activation_is_saved_in_both_places_and_nowhere_stale(make: Callable[[Path], Path], tmp_path: Path):
    model = CrossEncoder(make(tmp_path / "made"), device="cpu")
    model.activation_fn = torch.nn.ReLU()
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    own = json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text())
    assert config["sentence_transformers"]["activation_fn"] == own["activation_fn"]
    assert own["activation_fn"] == "torch.nn.modules.activation.ReLU"
    assert "sbert_ce_default_activation_function" not in config
    (tmp_path / "saved" / "config_sentence_transformers.json").unlink()
    (tmp_path / "saved" / "modules.json").unlink()
    assert isinstance(CrossEncoder(tmp_path / "saved").activation_fn, torch.nn.ReLU)  # what version 5 reads


def test_a_language_model_without_yes_and_no_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'yes' or 'no': give it a LogitScore part"):
        CrossEncoder(causal(tmp_path / "causal"))


def test_a_pair_that_is_cut_keeps_what_the_chat_template_ends_in(tmp_path: Path) -> None:
    folder = causal_modular(tmp_path)
    for max_length in (16, 40):
        ours, theirs = (make(folder, max_length=max_length) for make in (CrossEncoder, reference))
        assert_close(ours.predict(PAIRS), theirs.predict(PAIRS))
    ids = ours.preprocess([PAIRS[3]])["input_ids"][0].tolist()
    assert len(ids) == 40
    assert ours.tokenizer.decode(ids).endswith("<answer> the bread is")


def test_a_prompt_is_put_where_the_model_expects_it(tmp_path: Path) -> None:
    for folder in (modular_classifier(tmp_path / "one"), causal_modular(tmp_path / "two")):
        ours, theirs = CrossEncoder(folder, device="cpu"), reference(folder)
        for options in ({}, {"prompt": "of the winter "}):
            assert_close(ours.predict(PAIRS, **options), theirs.predict(PAIRS, **options))
    assert abs(ours.predict(PAIRS, prompt="of the winter ") - ours.predict(PAIRS)).max() > 1e-3


def test_a_bi_encoder_is_the_backbone_of_a_new_cross_encoder_without_its_prompts(tmp_path: Path) -> None:
    head(tmp_path)
    with quiet_transformers():
        embedder = sentence_transformers.SentenceTransformer(
            str(tmp_path / "backbone"), device="cpu", prompts={"query": "find: "}, default_prompt_name="query"
        )
        embedder.save_pretrained(str(tmp_path / "embedder"), create_model_card=False)
    model = CrossEncoder(tmp_path / "embedder")
    assert (model.num_labels, model.prompts, model.default_prompt_name) == (1, {}, None)
    assert torch.equal(
        model.model.bert.embeddings.word_embeddings.weight, embedder[0].model.embeddings.word_embeddings.weight
    )
    with pytest.raises(CheckpointError, match="the head of embedder is new and random"):
        model.predict(PAIRS)


@pytest.mark.parametrize("text", ["what is water", "the river " * 100, ""])
def test_a_text_alone_scores_the_same(text: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    ours, theirs = CrossEncoder(folder, device="cpu"), reference(folder)
    score = ours.predict(text)
    assert isinstance(score, np.float32)
    assert abs(score - theirs.predict(text)) <= TOLERANCE


def test_a_chat_template_is_used_for_classification_models_too(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    settings = {"processor_kwargs": {"chat_template": TEMPLATE}}
    ours = CrossEncoder(folder, device="cpu", **settings)
    theirs = reference(folder, **settings)
    for inputs in (PAIRS, "what is water"):
        assert_close(ours.predict(inputs), theirs.predict(inputs))
    assert abs(ours.predict(PAIRS) - CrossEncoder(folder, device="cpu").predict(PAIRS)).max() > 1e-3
    ours.save_pretrained(tmp_path / "saved")
    assert_close(reference(tmp_path / "saved").predict(PAIRS), ours.predict(PAIRS))


def test_a_checkpoint_that_takes_plain_text_alone_has_no_use_for_its_chat_template(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    chats = CrossEncoder(folder, device="cpu", processor_kwargs={"chat_template": TEMPLATE})
    chats.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "sentence_bert_config.json").read_text())
    del settings["modality_config"]["message"]
    (tmp_path / "saved" / "sentence_bert_config.json").write_text(json.dumps(settings))
    ours = CrossEncoder(tmp_path / "saved", device="cpu")
    assert ours.tokenizer.chat_template == TEMPLATE
    assert_close(ours.predict(PAIRS), reference(tmp_path / "saved").predict(PAIRS))
    assert abs(ours.predict(PAIRS) - chats.predict(PAIRS)).max() > 1e-3
    ours.save_pretrained(tmp_path / "again")
    assert_close(reference(tmp_path / "again").predict(PAIRS), ours.predict(PAIRS))


def test_a_template_without_the_roles_is_refused_until_it_is_replaced(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    only_user = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    model = CrossEncoder(folder, device="cpu", processor_kwargs={"chat_template": only_user})
    with pytest.raises(CheckpointError, match="cannot carry a 'query'/'document' pair, it leaves the query out"):
        model.predict(PAIRS)
    model.processor.chat_template = TEMPLATE
    theirs = reference(folder, processor_kwargs={"chat_template": TEMPLATE})
    assert_close(model.predict(PAIRS), theirs.predict(PAIRS))


@pytest.mark.parametrize(
    "text_settings",
    [
        {"max_length": 20, "truncation": True},
        {"max_length": 30, "truncation": "only_second"},
        {"max_length": 40, "truncation": "only_first"},
    ],
)
def test_how_texts_are_cut_can_be_set_for_a_call_and_in_a_checkpoint(
    text_settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    pairs = [("what is water " * 8, "the river and the city " * 5), ("how", "bread")]
    ours, theirs = CrossEncoder(folder, device="cpu"), reference(folder)
    expected = theirs.predict(pairs, processing_kwargs={"text": text_settings})
    found = ours.predict(pairs, processing_kwargs={"text": text_settings})
    assert_close(found, expected)
    assert abs(found - ours.predict(pairs)).max() > 1e-3
    theirs.save_pretrained(str(tmp_path / "saved"))
    edit_json(tmp_path / "saved" / "sentence_bert_config.json", processing_kwargs={"text": text_settings})
    loaded = CrossEncoder(tmp_path / "saved", device="cpu")
    assert_close(loaded.predict(pairs), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert_close(reference(tmp_path / "again").predict(pairs), expected)


def test_five_hundred_real_pairs_score_the_same_classic_and_modular(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "models" / "minilm-ce"
    if not folder.is_dir():
        pytest.skip(f"needs the model folder {folder}")
    texts = {
        kind: dict(pd.read_parquet(shared_data / "data" / "medquad" / f"{kind}.parquet")[[f"{name}_id", "text"]].values)
        for kind, name in (("queries", "query"), ("corpus", "doc"))
    }
    candidates = pd.read_parquet(shared_data / "data" / "medquad" / "candidates.parquet").head(500)
    pairs = [(texts["queries"][q], texts["corpus"][d]) for q, d in candidates[["query_id", "doc_id"]].values]
    theirs = reference(folder, max_length=64)  # the length keeps this test short, not the scores alike
    expected = theirs.predict(pairs)
    with quiet_transformers():
        theirs.save_pretrained(str(tmp_path / "modular"), create_model_card=False)
    for place in (folder, tmp_path / "modular"):
        scores = CrossEncoder(place, device="cpu", max_length=64).predict(pairs)
        assert_close(scores, expected)
