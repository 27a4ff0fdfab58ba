"""Number formats by name, and the one that suits a device."""

from typing import Any

import pytest
import torch

from crossenc import CrossEncoder
from crossenc.engine import Engine
from crossenc.errors import ConfigError
from crossenc.precision import is_narrow, resolve_dtype
from crossenc.testing import tiny_checkpoint
from crossenc.tokenizer import load_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_a_dtype_is_given_by_name_or_itself(given: Any, found: torch.dtype) -> None:
    assert resolve_dtype(given, CPU) == found
    assert is_narrow(found) == (found != torch.float32)


@pytest.mark.parametrize("given", ["int8", "torch.float32", torch.float64, 16])
def test_another_dtype_is_refused_with_the_choice(given: Any) -> None:
    with pytest.raises(ConfigError, match="choose from float32, bfloat16, float16, auto"):
        resolve_dtype(given, CPU)


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True}, torch.float32),
    ],
)
def test_auto_is_bfloat16_on_processors_that_multiply_it(
    features: dict[str, bool], found: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_dtype("auto", CPU) == found


def test_auto_asks_earlier_versions_of_torch_for_each_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for names, found in (((), torch.float32), (("_is_amx_tile_supported",), torch.bfloat16)):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name, names=names: name in names)
        assert resolve_dtype("auto", CPU) == found


@pytest.mark.parametrize(("capability", "found"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_is_bfloat16_on_cuda_devices_since_ampere(
    capability: tuple[int, int], found: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == found


def test_auto_is_float32_on_other_devices() -> None:
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


def test_this_processor_names_the_features_that_decide() -> None:
    """Of x86; torch names none of them elsewhere."""
    features = torch.cpu.get_capabilities()
    if features["architecture"] != "x86_64":
        pytest.skip(f"torch names other features on {features['architecture']}")
    assert {"avx512_bf16", "amx_bf16"} <= features.keys()


def test_models_and_engines_take_auto(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    folder = tiny_checkpoint(tmp_path)
    assert CrossEncoder(folder, device="cpu", dtype="auto").dtype == torch.bfloat16
    engine = Engine.from_checkpoint(folder, load_tokenizer(folder), dtype="auto", device="cpu")
    assert next(engine.network.parameters()).dtype == torch.bfloat16
