"""CrossEncoderTrainer against that of sentence-transformers: the same data, seed and model give the same weights."""

import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import crossenc
from crossenc import losses
from crossenc.testing import WORDS, tiny_checkpoint

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

PAIRS = datasets.Dataset.from_dict(
    {
        "query": [WORDS[i % 24] for i in range(30)],
        "document": [f"{WORDS[i * 5 % 24]} {WORDS[i * 7 % 24]}" for i in range(30)],
        "label": [float(i % 3 == 0) for i in range(30)],
    }
)
LISTS = datasets.Dataset.from_dict(
    {
        "query": [WORDS[i] for i in range(12)],
        "documents": [[WORDS[(i + 3 * j) % 24] for j in range(2 + i % 3)] for i in range(12)],
        "labels": [[float((i + j) % 3) for j in range(2 + i % 3)] for i in range(12)],
    }
)
TRIPLETS = datasets.Dataset.from_dict(
    {
        "query": [WORDS[i % 9] for i in range(30)],
        "positive": [WORDS[i % 11] for i in range(30)],
        "negative": [WORDS[i % 13] for i in range(30)],
    }
)
HALVES = datasets.DatasetDict({"first": PAIRS.select(range(18)), "second": PAIRS.select(range(18, 30))})

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
# Adam makes whole steps out of the rounding of gradients that are zero, as those of key biases are.
BY_SGD = {"optim": "sgd", "learning_rate": 1e-2}


def trained(library: Any, loss_library: Any, folder: Path, data: Any, loss: str, **settings: Any) -> torch.nn.Module:
    """The transformers model after training."""
    model = library.CrossEncoder(str(folder), device="cpu", config_kwargs=dict(NO_DROPOUT))
    rate = {"learning_rate_mapping": {r"classifier\.": 1e-2}} if "learning_rate_mapping" in settings else {}
    options = {"num_negatives": None} if loss.startswith("Multiple") else {}  # or they would be drawn by chance
    args = library.CrossEncoderTrainingArguments(str(folder / "out"), **{**SETTINGS, **settings, **rate})
    library.CrossEncoderTrainer(model, args, data, loss=getattr(loss_library, loss)(model, **options)).train()
    shutil.rmtree(folder / "out", ignore_errors=True)
    return model[0].model


@pytest.mark.filterwarnings("ignore")  # what the other library warns of is its own affair
@pytest.mark.parametrize(
    ("data", "loss", "settings"),
    [
        (PAIRS, "BinaryCrossEntropyLoss", {"gradient_accumulation_steps": 3, "weight_decay": 0.1}),
        (PAIRS, "MSELoss", {"learning_rate_mapping": {}, "max_steps": 5}),
        (PAIRS, "BinaryCrossEntropyLoss", {"batch_sampler": "group_by_label", "bf16": True}),
        (LISTS, "LambdaLoss", {"dataloader_drop_last": True, **BY_SGD}),
        (TRIPLETS, "MultipleNegativesRankingLoss", {"batch_sampler": "no_duplicates", **BY_SGD}),
        (HALVES, "BinaryCrossEntropyLoss", {}),
        (HALVES, "BinaryCrossEntropyLoss", {"multi_dataset_batch_sampler": "round_robin"}),
    ],
)
def test_training_gives_the_same_weights(
    data: Any, loss: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    from sentence_transformers import cross_encoder

    folder = tiny_checkpoint(tmp_path / "model")
    before = crossenc.CrossEncoder(folder, device="cpu").model.state_dict()
    ours = trained(crossenc, losses, folder, data, loss, **settings).state_dict()
    theirs = trained(cross_encoder, cross_encoder.losses, folder, data, loss, **settings).state_dict()
    assert set(ours) == set(theirs)
    moved = max((ours[name] - before[name]).abs().max().item() for name in ours)
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert moved > 1e-3 and apart <= 1e-6
