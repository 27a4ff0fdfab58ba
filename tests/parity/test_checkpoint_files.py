"""How a checkpoint's weights may lie on disk, and what may be wrong with them, for every layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crossenc import CrossEncoder
from crossenc.checkpoint import check_folder, file_digests
from crossenc.errors import CheckpointError
from tests.parity.test_checkpoint_layouts import (
    PAIRS,
    assert_close,
    causal_modular,
    edit_json,
    head,
    modular_classifier,
    padded,  # noqa: F401 - a fixture for all tests here
    reference,
    three_labels,
    version_3,
    version_4,
)

INDEX = "model.safetensors.index.json"
LAYOUTS = (version_3, version_4, three_labels, modular_classifier, head, causal_modular)


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda make: make.__name__)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = request.param
    return make(tmp_path_factory.mktemp(make.__name__) / "made")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy of each layout that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def split(folder: Path, num_shards: int = 3) -> list[Path]:
    """Cut model.safetensors into shards with an index, as large models come."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places, shards = {}, []
    for i in range(num_shards):
        shard = folder / f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        mine = names[i::num_shards]
        save_file({name: weights[name] for name in mine}, shard, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, shard.name)
        shards.append(shard)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    return shards


def scores_of(folder: Path, **settings: Any) -> Any:
    return CrossEncoder(folder, device="cpu", **settings).predict(PAIRS)


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# how weights may lie


def test_sharded_weights_give_the_scores_of_whole_ones(original: Path, checkpoint: Path) -> None:
    expected = scores_of(original)
    split(checkpoint)
    assert INDEX in file_digests(checkpoint)
    assert_close(scores_of(checkpoint), expected)
    assert_close(reference(checkpoint).predict(PAIRS), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_weights_stored_in_half_precision_are_computed_in_float32_unless_asked(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    for path in checkpoint.rglob("*.safetensors"):
        edit_weights(path, lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    edit_json(checkpoint / "config.json", dtype=str(dtype).removeprefix("torch."))
    model = CrossEncoder(checkpoint, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert_close(model.predict(PAIRS), reference(checkpoint).predict(PAIRS))
    low = CrossEncoder(checkpoint, device="cpu", dtype=dtype)
    assert {weight.dtype for weight in low.parameters()} == {dtype}
    assert low.predict(PAIRS).dtype == np.float32
    differences = abs(low.predict(PAIRS) - model.predict(PAIRS))
    assert 0 < differences.max() < (0.03 if dtype == torch.float16 else 0.3)  # 11 and 8 bits of logits around 3


# what may be wrong


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    split(checkpoint)[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors.*copy it again"):
        CrossEncoder(checkpoint)


def test_shards_without_their_index_are_refused(checkpoint: Path) -> None:
    split(checkpoint)
    (checkpoint / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"has model-00001-of-00003.safetensors but no {INDEX}"):
        CrossEncoder(checkpoint)


def test_weights_that_are_not_finite_in_the_last_shard_are_named(checkpoint: Path) -> None:
    last = split(checkpoint)[-1]
    name = max(load_file(last))
    edit_weights(last, lambda weights: {**weights, name: weights[name] * torch.inf})
    with pytest.raises(CheckpointError, match=r"has weights that are NaN or infinite in torch.float32"):
        CrossEncoder(checkpoint)


def test_a_shard_that_lacks_a_weight_is_refused(checkpoint: Path) -> None:
    shard = split(checkpoint)[0]
    name = next(name for name in sorted(load_file(shard)) if "pooler" not in name)
    edit_weights(shard, lambda weights: {key: weight for key, weight in weights.items() if key != name})
    with pytest.raises(CheckpointError, match=r"lacks .*not a trained cross-encoder"):
        CrossEncoder(checkpoint)


def test_another_number_of_labels_than_the_heads_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another shape for|gives \d scores a pair, not 4"):
        CrossEncoder(checkpoint, num_labels=4)


def test_pickled_weights_are_refused_with_the_remedy(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin.*convert to model.safetensors"):
        CrossEncoder(checkpoint)
    (checkpoint / "pytorch_model.bin").rename(checkpoint / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only pytorch_model-00001-of-00001.bin, .*convert to"):
        CrossEncoder(checkpoint)
    (checkpoint / "pytorch_model.bin.index.json").rename(checkpoint / INDEX)
    with pytest.raises(CheckpointError, match=r"names 'pytorch_model-00001-of-00001.bin', which is no safetensors"):
        CrossEncoder(checkpoint)


def test_code_that_a_checkpoint_of_a_known_kind_names_is_not_run(
    original: Path, checkpoint: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    classes = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": [None, "evil.Model"]}
    edit_json(checkpoint / "config.json", auto_map={**auto_map, **dict.fromkeys(classes, "evil.Model")})
    edit_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Model"]})
    np.testing.assert_array_equal(scores_of(checkpoint), scores_of(original))
    assert not marker.exists()


# one layout is enough for what only the index says


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON but an empty file"),
        ("[]", "has no weight_map"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"w": 3}}', "has no weight_map"),
        ('{"weight_map": {"w": "../other.safetensors"}}', r"names '\.\./other.safetensors', which is no"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "names '/etc/passwd', which is no"),
        ('{"weight_map": {"w": "sub/model.safetensors"}}', "names 'sub/model.safetensors', which is no"),
    ],
)
def test_an_index_that_is_damaged_or_leads_out_of_the_folder_is_refused(
    content: str, what: str, tmp_path: Path
) -> None:
    split(version_3(tmp_path / "model"))
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "model" / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=what):
        check_folder(tmp_path / "model")


@pytest.mark.parametrize("make", [version_3, version_4, three_labels, modular_classifier], ids=lambda m: m.__name__)
def test_a_classifier_without_its_head_is_damaged_not_untrained(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    edit_weights(
        folder / "model.safetensors",
        lambda weights: {name: weight for name, weight in weights.items() if not name.startswith("classifier")},
    )
    with pytest.raises(CheckpointError, match=r"lacks classifier.*: it is not a trained cross-encoder"):
        CrossEncoder(folder)


def test_a_head_of_small_layers_is_checked_like_the_backbone(tmp_path: Path) -> None:
    original = head(tmp_path / "made")
    for place, change, what in (
        ("2_Dense", lambda w: {**w, "linear.weight": w["linear.weight"] * torch.nan}, r"linear.weight .*2_Dense.* NaN"),
        ("3_LayerNorm", lambda w: {"norm.weight": w["norm.weight"]}, "3_LayerNorm/model.safetensors holds"),
        ("4_Dense", lambda w: {**w, "linear.bias": torch.zeros(4)}, "4_Dense/model.safetensors holds"),
    ):
        folder = Path(shutil.copytree(original, tmp_path / place))
        edit_weights(folder / place / "model.safetensors", change)
        with pytest.raises(CheckpointError, match=what):
            CrossEncoder(folder)
    edit_weights(original / "4_Dense" / "model.safetensors", lambda w: {**w, "linear.bias": torch.tensor([1e9])})
    CrossEncoder(original)
    with pytest.raises(CheckpointError, match=r"NaN or infinite in torch.float16"):
        CrossEncoder(original, dtype="float16")
    (original / "4_Dense" / "model.safetensors").rename(original / "4_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"4_Dense/model.safetensors is missing: .*save it as safetensors"):
        CrossEncoder(original)
