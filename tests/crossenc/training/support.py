"""Small data and settings for tests of the trainer."""

from pathlib import Path
from typing import Any

import datasets

from crossenc import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from crossenc.testing import WORDS, tiny_checkpoint

#: A document is right when its word is one of the first four.
NUMBERS = [(i * 7 + i // 8) % 8 for i in range(32)]
PAIRS = datasets.Dataset.from_dict(
    {
        "query": [WORDS[8 + i % 16] for i in range(32)],
        "document": [WORDS[number] for number in NUMBERS],
        "label": [float(number < 4) for number in NUMBERS],
    }
)
TWO = datasets.DatasetDict({"first": PAIRS.select(range(16)), "second": PAIRS.select(range(16, 32))})


def tiny_model(folder: Path, **settings: Any) -> CrossEncoder:
    """A random model with two layers."""
    return CrossEncoder(tiny_checkpoint(folder / "model", **settings), device="cpu")


def arguments(folder: Path, **settings: Any) -> CrossEncoderTrainingArguments:
    """Settings for a short training without any output."""
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    short = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 2}
    return CrossEncoderTrainingArguments(str(folder / "out"), **{**quiet, **short, **settings})


def train(model: CrossEncoder, folder: Path, data: Any = PAIRS, **settings: Any) -> CrossEncoderTrainer:
    """A trainer that has trained; settings that arguments do not know go to the trainer."""
    own = ("eval_dataset", "loss", "evaluator", "data_collator", "callbacks", "optimizers")
    given = {name: settings.pop(name) for name in own if name in settings}
    trainer = CrossEncoderTrainer(model, arguments(folder, **settings), data, **given)
    trainer.train()
    return trainer


def distance(one: CrossEncoder, other: CrossEncoder) -> float:
    """The greatest difference between two weights."""
    weights = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in weights)


def read_card(model: CrossEncoder, folder: Path) -> str:
    """The card that is saved with the model."""
    model.save_pretrained(folder / "saved")
    return (folder / "saved" / "README.md").read_text()
