"""What a model card says of a training by the trainer."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml
from transformers import TrainerCallback

from crossenc import CrossEncoder, CrossEncoderModelCardData, CrossEncoderTrainer
from crossenc.evaluation import CrossEncoderClassificationEvaluator
from crossenc.losses import LambdaLoss
from tests.crossenc.training.support import PAIRS, TWO, arguments, read_card, tiny_model, train

TRIPLETS = datasets.Dataset.from_dict(
    {name: [f"{name} {i}" for i in range(1, 11)] for name in ("anchor", "positive", "negative")}
)


def section(card: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    level = heading.split(" ")[0]
    return card.split(f"\n{heading}\n", 1)[1].split(f"\n{level} ")[0]


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def log_rows(card: str) -> list[list[str]]:
    lines = [line for line in section(card, "### Training Logs").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_card_that_came_with_the_model_is_kept_until_there_is_a_trainer(tmp_path: Path) -> None:
    tiny_model(tmp_path).save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "README.md").write_text("# Written by hand\n")
    model = CrossEncoder(tmp_path / "published", device="cpu")
    assert read_card(model, tmp_path) == "# Written by hand\n"
    CrossEncoderTrainer(model, arguments(tmp_path))
    card = read_card(model, tmp_path)
    assert "Written by hand" not in card and "generated_from_trainer" in front_matter(card)["tags"]


@pytest.mark.parametrize("num_datasets", [0, 1, 2, 10])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_card_names_data_and_loss(num_datasets: int, num_labels: int, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, num_labels=num_labels)
    data = datasets.DatasetDict({f"train_{i}": TRIPLETS for i in range(num_datasets)}) if num_datasets else TRIPLETS
    CrossEncoderTrainer(model, arguments(tmp_path), data)
    card = read_card(model, tmp_path)
    loss = "BinaryCrossEntropyLoss" if num_labels == 1 else "CrossEntropyLoss"
    tags = front_matter(card)["tags"]
    assert f"loss:{loss}" in tags and f"dataset_size:{10 * max(num_datasets, 1)}" in tags
    assert f"### Loss: {loss}\n" in card and "('anchor 1', 'positive 1')" in card
    assert front_matter(card)["pipeline_tag"] == ("text-ranking" if num_labels == 1 else "text-classification")
    names = [f"train&#95;{i}" for i in range(num_datasets)] or ["Unnamed dataset"]
    assert re.findall("^#### (.*)$", section(card, "### Training Data"), re.MULTILINE) == names
    assert card.count("| <code>anchor 1</code> | <code>positive 1</code> | <code>negative 1</code> |") == len(names)
    assert ("10 datasets</summary>" in card) == (num_datasets == 10)


def test_columns_are_those_after_a_transform(tmp_path: Path) -> None:
    data = TRIPLETS.select(range(10))
    data.set_transform(lambda batch: {f"new {name}": [text.upper() for text in batch[name]] for name in batch})
    model = tiny_model(tmp_path)
    CrossEncoderTrainer(model, arguments(tmp_path), data)
    card = read_card(model, tmp_path)
    assert "<code>new anchor</code>" in card and "ANCHOR 1" in card and "<code>anchor</code>" not in card


def test_the_hub_ids_and_revisions_of_datasets_are_known(tmp_path: Path) -> None:
    files = {"hf://datasets/me/questions@0123456789abcdef0123456789abcdef01234567/data/train.parquet": {"num_bytes": 1}}
    known = datasets.Dataset.from_dict(PAIRS[:], info=datasets.DatasetInfo(download_checksums=files))
    model = tiny_model(tmp_path)
    CrossEncoderTrainer(model, arguments(tmp_path), known, {"dev": known})
    card = read_card(model, tmp_path)
    assert front_matter(card)["datasets"] == ["me/questions"]
    assert "**Training data:** me/questions\n" in card
    data = section(card, "### Training Data")
    assert "https://huggingface.co/datasets/me/questions) at 0123456789abcdef0123456789abcdef01234567" in data
    assert "#### dev\n" in section(card, "### Validation Data")


def test_names_that_the_user_gave_are_kept(tmp_path: Path) -> None:
    mine = CrossEncoderModelCardData(train_datasets=[{"name": "My questions", "id": "me/mine"}], language="en")
    folder = tmp_path / "model"
    tiny_model(tmp_path)
    model = CrossEncoder(folder, device="cpu", model_card_data=mine)
    CrossEncoderTrainer(model, arguments(tmp_path, hub_model_id="me/reranker"), PAIRS)
    card = read_card(model, tmp_path)
    assert "#### My questions\n" in card and front_matter(card)["datasets"] == ["me/mine"]
    assert 'CrossEncoder("me/reranker")' in card


def test_logs_have_a_row_a_step_and_the_kept_one_is_bold(tmp_path: Path) -> None:
    rising = iter([0.2, 0.9, 0.4])

    class Rising(CrossEncoderClassificationEvaluator):
        def __call__(self, *args: Any, **settings: Any) -> dict[str, float]:
            value = next(rising)
            metrics = {"dev_average_precision": value, "dev_f1": value / 2}
            self.primary_metric = "dev_average_precision"
            self.store_metrics_in_model_card_data(args[0], metrics, settings["epoch"], settings["steps"])
            return metrics

    model = tiny_model(tmp_path)
    evaluator = Rising([("a", "b"), ("c", "d")], [0, 1], name="dev")
    steps = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "dev_average_precision"}
    trainer = train(model, tmp_path, eval_dataset=TWO, evaluator=evaluator, max_steps=12, **steps, **best, seed=3)
    card = read_card(model, tmp_path)
    header, *rows = log_rows(card)
    assert header[:3] == ["Epoch", "Step", "Training Loss"]
    assert sorted(header[3:]) == ["dev&#95;average&#95;precision", "first loss", "second loss"]
    assert [row[1] for row in rows] == ["2", "4", "6", "**8**", "10", "12"]
    bold = dict(zip(header, rows[3], strict=True))
    assert bold["dev&#95;average&#95;precision"] == "**0.9000**" and bold["Epoch"] == "**2.0000**"
    logged = next(entry for entry in trainer.state.log_history if entry["step"] == 8 and "loss" in entry)
    assert bold["Training Loss"] == f"**{logged['loss']:.4f}**"
    # The figures of the model that is saved, which is not the last one.
    assert "| dev&#95;f1 | 0.4500 |" in section(card, "## Evaluation")
    changed = section(card, "#### Changed from their defaults")
    assert re.findall(r"<code>(.*?)</code>: (.*)", changed) == [
        ("max&#95;steps", "12"),
        ("learning&#95;rate", "0.003"),
        ("load&#95;best&#95;model&#95;at&#95;end", "True"),
        ("seed", "3"),
    ]
    assert str(tmp_path) not in card


def test_figures_before_and_after_training_have_rows_of_their_own(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    pairs = list(zip(PAIRS["query"], PAIRS["document"], strict=True))
    evaluator = CrossEncoderClassificationEvaluator(pairs, [int(label) for label in PAIRS["label"]])
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = CrossEncoderTrainer(model, args, PAIRS, PAIRS, evaluator=evaluator)
    before = trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    rows = log_rows(read_card(model, tmp_path))
    assert [row[1] for row in rows] == ["Step", "-1", "2", "-1"] and "Validation Loss" in rows[0]
    assert all(len(set(row[3:])) == 2 for row in rows[1:])
    assert f"{before['eval_loss']:.4f}" in rows[1] and rows[1] != rows[2]


def test_a_card_cites_the_loss_and_shows_its_settings(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    CrossEncoderTrainer(model, arguments(tmp_path), loss={"one": LambdaLoss(model, k=7)})
    card = read_card(model, tmp_path)
    assert '"k": 7' in section(card, "### Loss: LambdaLoss") and "wang2018lambdaloss" in section(card, "## Citation")


def test_the_time_of_training_is_not_the_time_until_saving(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    started = time.monotonic()
    trainer = CrossEncoderTrainer(model, arguments(tmp_path, max_steps=2), PAIRS)
    time.sleep(0.3)
    trainer.train()
    took = time.monotonic() - started
    seconds = model.model_card_data.training_seconds
    time.sleep(0.3)
    assert "### Training Time" in read_card(model, tmp_path)
    assert seconds == model.model_card_data.training_seconds and 0 < seconds <= took - 0.3


def test_emissions_that_codecarbon_measured_are_shown(tmp_path: Path) -> None:
    class CodeCarbon(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found = {"emissions": 0.01234, "energy_consumed": 0.5, "cpu_model": "An old CPU", "gpu_model": None}
            found |= {"on_cloud": "N", "ram_total_size": 24.0}
            self.tracker = SimpleNamespace(final_emissions_data=SimpleNamespace(**found))

    model = tiny_model(tmp_path)
    train(model, tmp_path, max_steps=1, callbacks=[CodeCarbon()])
    impact = section(read_card(model, tmp_path), "### Environmental Impact")
    assert "**Carbon emitted:** 12.34 g of CO2" in impact and "**CPU:** An old CPU" in impact
    assert "GPU" not in impact


def test_a_stream_that_can_be_read_only_once_is_left_for_training(tmp_path: Path) -> None:
    from torch.utils.data import IterableDataset

    class Once(IterableDataset[dict[str, Any]]):
        def __init__(self) -> None:
            self.rows = iter([dict(row) for row in PAIRS])

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> dict[str, Any]:
            return next(self.rows)

    model = tiny_model(tmp_path)
    trainer = train(model, tmp_path, Once(), max_steps=4)
    assert trainer.state.global_step == 4
    assert "* Size: unknown, as it was streamed" in read_card(model, tmp_path)
