"""Adapters: added, trained, switched, saved alone and loaded with their base, here and by sentence-transformers."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModel

from crossenc import CrossEncoder, InputExample
from crossenc.checkpoint import check_folder, fetch
from crossenc.errors import CheckpointError, ConfigError, InputError
from crossenc.quiet import quiet_transformers
from crossenc.testing import tiny_checkpoint
from tests.parity import test_checkpoint_layouts as layouts

TOLERANCE = 5e-6  # of logits: theirs pads, ours packs, and float32 sums in another order
PAIRS = layouts.PAIRS
BERT_LAYERS = ["query", "value"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "target_modules": BERT_LAYERS, **settings})


def shake(model: Any) -> None:
    """Give the adapter weights as training might: a new one changes nothing."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)


def assert_same(scores: Any, expected: Any) -> None:
    np.testing.assert_allclose(scores, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = CrossEncoder(base, device="cpu")
    model.add_adapter(lora())
    shake(model)
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter's folder that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "copied"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LAYOUTS = {
    layouts.version_3: BERT_LAYERS,
    layouts.version_4: BERT_LAYERS,
    layouts.plain: ["Wqkv"],
    layouts.three_labels: BERT_LAYERS,
    layouts.head: BERT_LAYERS,
    layouts.causal_modular: ["q_proj", "v_proj"],
}


@pytest.mark.parametrize("saver", ["ours", "theirs"])
@pytest.mark.parametrize(("make", "layers"), LAYOUTS.items(), ids=[make.__name__ for make in LAYOUTS])
def test_either_library_loads_the_adapters_that_the_other_saved(
    make: Any, layers: list[str], saver: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "made")
    model = CrossEncoder(folder, device="cpu") if saver == "ours" else layouts.reference(folder)
    plain = model.predict(PAIRS)
    model.add_adapter(lora(target_modules=layers))
    shake(model)
    expected = model.predict(PAIRS)
    assert abs(expected - plain).max() > 1e-3
    with quiet_transformers():
        model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "config.json").exists()
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors")] == ["adapter_model.safetensors"]
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    assert_same(again.predict(PAIRS), expected)
    assert_same(layouts.reference(tmp_path / "saved").predict(PAIRS), expected)
    assert again.activation_fn.__class__ is model.activation_fn.__class__
    again.merge_adapters()
    np.testing.assert_allclose(again.predict(PAIRS), expected, rtol=0, atol=1e-5)  # sums in another order
    again.save_pretrained(tmp_path / "whole")
    assert_same(layouts.reference(tmp_path / "whole").predict(PAIRS), again.predict(PAIRS))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # peft's, of a second adapter
def test_adapters_are_switched_listed_and_deleted(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = CrossEncoder(base, device="cpu")
    plain = model.predict(PAIRS)
    model.load_adapter(adapter)
    first = model.predict(PAIRS)
    model.add_adapter(lora(r=2), "second")
    assert model.active_adapters() == ["second"]
    assert_same(model.predict(PAIRS), plain)  # it is new
    model.set_adapter("default")
    assert model.active_adapters() == ["default"]
    assert_same(model.predict(PAIRS), first)
    model.disable_adapters()
    assert_same(model.predict(PAIRS), plain)
    model.enable_adapters()
    assert_same(model.predict(PAIRS), first)
    weights = model.get_adapter_state_dict()
    assert len(weights) == 8 and {tuple(w.shape) for w in weights.values()} == {(4, 32), (32, 4)}
    assert {tuple(w.shape) for w in model.get_adapter_state_dict("second").values()} == {(2, 32), (32, 2)}
    model.delete_adapter("second")
    model.delete_adapter("default")
    assert_same(model.predict(PAIRS), plain)
    model.save_pretrained(tmp_path / "saved")
    assert_same(layouts.reference(tmp_path / "saved").predict(PAIRS), plain)
    with pytest.raises(ConfigError, match="no adapter to merge"):
        model.merge_adapters()


def test_training_changes_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    examples = [InputExample(texts=["what is water", text], label=len(text) % 2) for text in ("city", "stone") * 8]
    settings = {"warmup_steps": 0, "optimizer_params": {"lr": 1e-2}, "show_progress_bar": False}
    model = CrossEncoder(base, device="cpu")
    model.add_adapter(lora())
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    model.fit(DataLoader(examples, batch_size=4), output_path=str(tmp_path / "trained"), **settings)
    changed = {name for name, weight in model.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all("lora_" in name for name in changed)
    again = CrossEncoder(tmp_path / "trained", device="cpu")
    assert_same(again.predict(PAIRS), model.predict(PAIRS))
    assert_same(layouts.reference(tmp_path / "trained").predict(PAIRS), model.predict(PAIRS))
    with pytest.raises(ConfigError, match=r"all weights are frozen: load the adapter with is_trainable=True"):
        again.fit(DataLoader(examples, batch_size=4), **settings)
    further = CrossEncoder(base, device="cpu")
    further.load_adapter(tmp_path / "trained", is_trainable=True)
    further.fit(DataLoader(examples, batch_size=4), **settings)
    assert abs(further.predict(PAIRS) - again.predict(PAIRS)).max() > 1e-3


def test_a_new_head_is_trained_and_saved_with_the_adapter_or_refused(base: Path, tmp_path: Path) -> None:
    with quiet_transformers():
        AutoModel.from_pretrained(base).save_pretrained(tmp_path / "backbone")
    for path in base.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "backbone")
    model = CrossEncoder(tmp_path / "backbone", device="cpu")
    with pytest.raises(ConfigError, match=r"would freeze it: set modules_to_save=\['classifier'\]"):
        model.add_adapter(lora())
    model.add_adapter(lora(modules_to_save=["classifier"]))
    with pytest.raises(CheckpointError, match="new and random"):
        model.predict(PAIRS)
    examples = [InputExample(texts=["what", "city"], label=1), InputExample(texts=["how", "stone"], label=0)]
    model.fit(DataLoader(examples * 4, batch_size=2), warmup_steps=0, show_progress_bar=False)
    expected = model.predict(PAIRS)
    model.save_pretrained(tmp_path / "saved")
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    assert_same(again.predict(PAIRS), expected)
    assert_same(layouts.reference(tmp_path / "saved").predict(PAIRS), expected)
    for one in (model, again):
        for without in (one.disable_adapters, lambda one=one: one.delete_adapter("default")):
            with pytest.raises(ConfigError, match="random head"):
                without()


def test_weights_that_no_checkpoint_holds_get_no_adapter(base: Path) -> None:
    model = CrossEncoder(base, device="cpu")
    examples = [InputExample(texts=["what", "city"], label=1)]
    model.fit(DataLoader(examples, batch_size=1), warmup_steps=0, show_progress_bar=False)
    with pytest.raises(ConfigError, match=r"in no checkpoint .*: save the model, and add the adapter to CrossEncoder"):
        model.add_adapter(lora())


def test_a_whole_model_and_an_adapter_replace_each_other_in_a_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole, adapted = CrossEncoder(base, device="cpu"), CrossEncoder(adapter, device="cpu")
    for model in (whole, adapted, whole):
        model.save_pretrained(tmp_path / "saved")
        assert_same(CrossEncoder(tmp_path / "saved", device="cpu").predict(PAIRS), model.predict(PAIRS))


def test_an_adapter_of_a_hub_model_names_its_id_and_revision(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["token"]))
        return str(base)

    monkeypatch.setattr("crossenc.checkpoint.snapshot_download", answer)
    model = CrossEncoder("owner/name@v2", device="cpu")
    model.add_adapter(lora())
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/name", "v2")
    CrossEncoder(tmp_path / "saved", device="cpu", token="secret")
    assert asked == [("owner/name", "v2", None), ("owner/name", "v2", "secret")]


def test_another_kind_of_adapter_works_too(base: Path, tmp_path: Path) -> None:
    model = CrossEncoder(base, device="cpu")
    model.add_adapter(
        IA3Config(
            task_type="SEQ_CLS", target_modules=[*BERT_LAYERS, "output.dense"], feedforward_modules=["output.dense"]
        )
    )
    for name, weight in model.named_parameters():
        if "ia3" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(tmp_path / "saved")
    assert_same(CrossEncoder(tmp_path / "saved", device="cpu").predict(PAIRS), model.predict(PAIRS))
    assert_same(layouts.reference(tmp_path / "saved").predict(PAIRS), model.predict(PAIRS))


# what is refused


def test_without_peft_every_call_says_what_to_install(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CrossEncoder(base, device="cpu")
    config = lora()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("crossenc.adapters.find_spec", lambda name: None if name == "peft" else find_spec(name))
    for call in (
        lambda: model.add_adapter(config),
        lambda: model.load_adapter(adapter),
        lambda: model.set_adapter("default"),
        model.enable_adapters,
        model.disable_adapters,
        model.active_adapters,
        model.get_adapter_state_dict,
        model.merge_adapters,
        lambda: model.delete_adapter("default"),
        lambda: CrossEncoder(adapter, device="cpu"),
    ):
        with pytest.raises(ImportError, match=r"not installed: pip install 'crossenc\[peft\]'"):
            call()


def test_pipelines_are_told_to_merge(adapter: Path) -> None:
    for refused in (fetch, check_folder):
        with pytest.raises(CheckpointError, match=r"is an adapter, which only CrossEncoder loads.*merge_adapters"):
            refused(adapter)


def test_an_adapter_without_its_base_is_refused(copied: Path, adapter: Path) -> None:
    edit_json(copied / "adapter_config.json", base_model_name_or_path="./gone")
    with pytest.raises(InputError, match=r"the base model of the adapter .* no checkpoint at './gone'"):
        CrossEncoder(copied)
    edit_json(copied / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base model"):
        CrossEncoder(copied)
    edit_json(copied / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(CheckpointError, match=r"the base model of the adapter .* is an adapter"):
        CrossEncoder(copied)


def test_an_adapter_that_does_not_fit_its_base_is_refused(copied: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "wider", hidden_size=64)
    edit_json(copied / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match=r"does not fit its base model.*another shape for"):
        CrossEncoder(copied)
    other = tiny_checkpoint(tmp_path / "other", "modernbert")
    edit_json(copied / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match="does not load"):
        CrossEncoder(copied)


def test_an_adapter_with_damaged_weights_is_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copied / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * torch.nan}, path)
    with pytest.raises(CheckpointError, match=r"lora_B.* NaN or infinite"):
        CrossEncoder(copied)
    del weights[name]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"does not fit its base model.*lacks.*lora_B"):
        CrossEncoder(copied)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        CrossEncoder(copied)


def test_an_adapter_that_could_run_code_is_refused(copied: Path) -> None:
    weights = copied / "adapter_model.safetensors"
    edit_json(copied / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")
    with pytest.raises(CheckpointError, match="asks for Megatron"):
        CrossEncoder(copied)
    weights.rename(copied / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors.*adapter_model.bin.*save_pretrained"):
        CrossEncoder(copied)


def test_an_adapter_that_is_refused_leaves_the_model_as_it_was(base: Path, copied: Path, adapter: Path) -> None:
    model = CrossEncoder(base, device="cpu")
    expected, names = model.predict(PAIRS), list(model.state_dict())
    edit_json(copied / "adapter_config.json", r=8)
    for place, what in ((copied, "another shape for"), (base, "a whole model, not an adapter")):
        with pytest.raises(CheckpointError, match=what):
            model.load_adapter(place)
        assert list(model.state_dict()) == names
        np.testing.assert_array_equal(model.predict(PAIRS), expected)
    (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        model.load_adapter(copied)
    model.load_adapter(adapter)
    adapted = model.predict(PAIRS)
    with pytest.raises(ConfigError, match="an adapter 'default' already"):
        model.load_adapter(adapter)
    np.testing.assert_array_equal(model.predict(PAIRS), adapted)


def test_a_folder_with_a_model_and_an_adapter_is_refused(copied: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", copied)
    with pytest.raises(CheckpointError, match=r"holds an adapter and also model.safetensors: keep them in two"):
        CrossEncoder(copied)


def test_the_stored_dtype_is_that_of_the_base(base: Path, tmp_path: Path) -> None:
    CrossEncoder(base, device="cpu", dtype="bfloat16").save_pretrained(tmp_path / "narrow")
    model = CrossEncoder(tmp_path / "narrow", device="cpu")
    model.add_adapter(lora())
    model.save_pretrained(tmp_path / "adapter")
    assert CrossEncoder(tmp_path / "adapter", device="cpu", model_kwargs={"dtype": "auto"}).dtype == torch.bfloat16
