import subprocess
import sys
from pathlib import Path

import pytest

import crossenc

ROOT = Path(__file__).parents[2]


def test_the_public_names_are_these() -> None:
    assert crossenc.__all__ == sorted(crossenc.__all__)
    assert crossenc.__all__ == [
        "BatchSamplers",
        "Candidates",
        "CheckpointError",
        "ConfigError",
        "CrossEncError",
        "CrossEncoder",
        "CrossEncoderDataCollator",
        "CrossEncoderModelCardData",
        "CrossEncoderTrainer",
        "CrossEncoderTrainingArguments",
        "InputError",
        "InputExample",
        "MultiDatasetBatchSamplers",
        "Ranking",
        "RunConflictError",
        "ScoreError",
        "ScoredDoc",
        "StorageError",
        "__version__",
        "rank",
    ]
    assert all(getattr(crossenc, name) is not None for name in crossenc.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="CrossEncodr"):
        crossenc.CrossEncodr  # type: ignore[attr-defined]


def test_importing_the_library_imports_no_framework_and_changes_nothing() -> None:
    code = """
import logging, os, sys, warnings
import numpy
before = dict(os.environ), logging.root.level, list(logging.root.handlers), list(warnings.filters)
import crossenc
from crossenc import Candidates, rank
import crossenc.batching, crossenc.testing, crossenc.tokenizer
assert (dict(os.environ), logging.root.level, list(logging.root.handlers), list(warnings.filters)) == before
heavy = {"torch", "transformers", "tokenizers", "ray", "pyarrow", "s3fs", "fsspec"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_importing_the_model_imports_no_ray_pyarrow_or_s3fs_and_changes_nothing() -> None:
    code = """
import logging, os, sys
before = dict(os.environ), logging.root.level, list(logging.root.handlers)
import crossenc.model, torch
assert (dict(os.environ), logging.root.level, list(logging.root.handlers)) == before
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
assert not {"ray", "pyarrow", "s3fs"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
