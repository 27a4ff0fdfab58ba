"""Number formats: which one a model's forward pass uses. Knows devices, no models."""

from collections.abc import Mapping

import torch

from crossenc.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A torch dtype, given itself or by name; float32 when None, what is fast on `device` when "auto".

    Raises ConfigError for an unsupported one.
    """
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return torch.bfloat16 if is_fast_in_bfloat16(device) else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[str(dtype)]
    raise ConfigError(f"dtype is {dtype!r}: choose from {', '.join(DTYPES)}, auto")


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware: NVIDIA's since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        if hasattr(torch.cpu, "get_capabilities"):
            features: Mapping[str, object] = torch.cpu.get_capabilities()
            return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
        # Earlier versions of torch have a function for each feature; one that cannot tell is taken at its slowest.
        return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return False


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a format is so coarse that a head is computed in float32 instead."""
    return dtype in (torch.bfloat16, torch.float16)
