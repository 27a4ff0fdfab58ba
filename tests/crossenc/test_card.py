"""Model cards: the facts that must stand in them, and what data may not do to them."""

import math
import random
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
import sentence_transformers.cross_encoder
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from crossenc import CrossEncoder, InputExample
from crossenc.card import (
    CrossEncoderModelCardData,
    ModelFacts,
    describe_dataset,
    describe_datasets,
    render_card,
    write_card,
)
from crossenc.card.render import cell, inline
from crossenc.evaluation import CrossEncoderRerankingEvaluator
from crossenc.testing import WORDS, tiny_checkpoint

FACTS = ModelFacts("me/base", "abc123", 128, 1, "torch.nn.modules.activation.Sigmoid", "CrossEncoder(...)")


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def section(card: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    level = heading.split(" ")[0]
    body = card.split(f"\n{heading}\n", 1)[1]
    return body.split(f"\n{level} ")[0]


def train(folder: Path, num_rows: int, epochs: int, words: tuple[str, ...], use_amp: bool) -> tuple[CrossEncoder, str]:
    """A model trained like the two published ones, on fewer rows; and its card."""
    rng = random.Random(0)
    examples = [
        InputExample(
            texts=[
                " ".join(rng.choices(words, k=rng.randint(2, 9))),
                " ".join(rng.choices(words, k=rng.randint(9, 20))),
            ],
            label=float(rng.random() < 0.03),
        )
        for _ in range(num_rows)
    ]
    torch.manual_seed(42)
    model = CrossEncoder(tiny_checkpoint(folder / "base-model"), device="cpu", max_length=40)
    samples = [{"query": words[0], "positive": [words[1]], "negative": [words[2], words[3]]}]
    model.fit(
        DataLoader(examples, shuffle=True, batch_size=16),
        CrossEncoderRerankingEvaluator(samples, name="dev", write_csv=False),
        epochs=epochs,
        warmup_steps=0,
        weight_decay=0.0,
        optimizer_params={"lr": 5e-5},
        use_amp=use_amp,
        output_path=str(folder / "best"),
        show_progress_bar=False,
    )
    model.save_pretrained(folder / "last")
    return model, (folder / "last" / "README.md").read_text()


RECIPES = {
    "english": {"num_rows": 310, "epochs": 3, "words": WORDS, "use_amp": False},
    "russian": {"num_rows": 124, "epochs": 5, "words": ("вода", "река", "город", "хлеб", "камень"), "use_amp": True},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_card_of_a_trained_model_has_the_facts_of_the_published_ones(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    model, card = train(tmp_path, **recipe)
    num_rows, epochs = recipe["num_rows"], recipe["epochs"]
    head = front_matter(card)
    assert head["tags"] == [
        *("sentence-transformers", "cross-encoder", "reranker", "generated_from_trainer"),
        *(f"dataset_size:{num_rows}", "loss:BinaryCrossEntropyLoss"),
    ]
    assert head["pipeline_tag"] == "text-ranking" and "base_model" not in head  # it is a local folder
    assert head["library_name"] == "sentence-transformers"
    assert "# CrossEncoder based on base-model\n" in card
    description = section(card, "### Model Description")
    assert "40 tokens" in description and "**Output labels:** 1" in description
    usage = section(card, "## Usage")
    assert "model.predict(pairs)" in usage and "model.rank(" in usage and "# (3,)" in usage
    data = section(card, "### Training Data")
    assert f"* Size: {num_rows} samples" in data
    for column in ("sentence&#95;0", "sentence&#95;1", "label"):
        assert f"<code>{column}</code>" in data
    assert "| type | string | string | float |" in data
    assert data.count(" tokens</li>") == 6 and "<li>mean&#58; 0.0" in data
    assert len([line for line in data.splitlines() if line.startswith("  | <code>")]) == 3
    assert '"pos_weight": null' in section(card, "### Loss: BinaryCrossEntropyLoss")
    changed = section(card, "#### Changed from their defaults")
    for setting in (
        "batch&#95;size</code>&#58; 16",
        f"epochs</code>&#58; {epochs}",
        "weight&#95;decay</code>&#58; 0.0",
    ):
        assert setting.replace("&#58;", ":") in changed
    assert ("use&#95;amp" in changed) == recipe["use_amp"]
    assert "max&#95;grad&#95;norm</code>: 1.0" in section(card, "#### All")
    logs = [line for line in section(card, "### Training Logs").splitlines() if line.startswith("|")]
    assert logs[0] == "| Epoch | Step | Training Loss | dev&#95;ndcg&#64;10 |"
    assert len(logs) == 2 + epochs
    assert all(line.count("|") == 5 for line in logs)
    assert sum("**" in line for line in logs) == 1 and "The bold row" in card
    evaluation = section(card, "## Evaluation")
    assert "CrossEncoderRerankingEvaluator" in evaluation and "**dev&#95;ndcg&#64;10**" in evaluation
    versions = section(card, "### Framework Versions")
    for package in ("Python", "crossenc", "transformers", "torch", "tokenizers"):
        assert f"- {package}: " in versions
    assert "@inproceedings{reimers-2019-sentence-bert" in section(card, "## Citation")
    parsed = ModelCard.load(tmp_path / "last" / "README.md")
    found = {result.metric_type: result.metric_value for result in parsed.data.eval_results}
    assert found == {
        name.removeprefix("dev_"): pytest.approx(value)
        for name, value in model.model_card_data.evaluations[0].measures.items()
    }


def test_the_card_of_a_checkpoint_that_was_not_trained_here_is_kept(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "plain")
    (folder / "README.md").write_text("# Mine\n")
    CrossEncoder(folder, device="cpu").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "# Mine\n"
    (folder / "README.md").unlink()
    CrossEncoder(folder, device="cpu").save_pretrained(tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text()
    assert "generated_from_trainer" not in card and "## Training Details" not in card
    assert str(tmp_path) not in card
    CrossEncoder(folder, device="cpu").save_pretrained(tmp_path / "none", create_model_card=False)
    assert not (tmp_path / "none" / "README.md").exists()


def test_a_card_is_the_same_each_time() -> None:
    data = CrossEncoderModelCardData(language=["en", "de"], license="mit", model_name="x", tags=["a", "b"])
    data.training = [describe_dataset([{"q": "a", "d": ["b", "c"], "label": 1}], 1, lambda texts: [1] * len(texts))]
    assert render_card(data, FACTS) == render_card(data, FACTS)
    head = front_matter(render_card(data, FACTS))
    assert (head["language"], head["license"], head["base_model"]) == (["en", "de"], "mit", "me/base")
    assert "[me/base](https://huggingface.co/me/base)" in render_card(data, FACTS)


def without_literals(card: str) -> list[str]:
    """The lines but for those of the code example that hold texts as Python literals."""
    return [line for line in card.splitlines() if not line.startswith("    (")]


NASTY = [
    *("</code><script>alert(1)</script>", "a | b\n| c", "```\n# heading", "---\nlicense: mit\n---"),
    *("{{ 7 * 7 }}{% for x in y %}", "[x](javascript:alert)", "**bold** _it_ `code`", "<!-- ", "\u202e\x00\ud800"),
]


@pytest.mark.parametrize("text", NASTY)
def test_text_of_the_data_stays_text(text: str) -> None:
    data = CrossEncoderModelCardData(model_name=text)
    rows = [{"query": text, "document": text, "docs": [text] * 7, text: 1.5}]
    data.training = [describe_dataset(rows, 1, lambda texts: [1] * len(texts), name=text)]
    data.add_log(1.0, 1, {text: 0.5})
    card = render_card(data, FACTS)
    plain = CrossEncoderModelCardData(model_name="plain")
    plain_rows = [{"query": "plain", "document": "plain", "docs": ["plain"] * 7, "x": 1.5}]
    plain.training = [describe_dataset(plain_rows, 1, lambda texts: [1] * len(texts), name="plain")]
    plain.add_log(1.0, 1, {"x": 0.5})
    expected = render_card(plain, FACTS)
    lines, expected_lines = without_literals(card), without_literals(expected)
    assert [line.count("|") for line in lines] == [line.count("|") for line in expected_lines]
    for token in ("<script", "</code>", "```", "\n# ", "\n---", "<!--", "**", "](", "{{", "{%", "49"):
        assert "\n".join(lines).count(token) == "\n".join(expected_lines).count(token), token
    card.encode()


@settings(max_examples=200)
@given(st.text())
def test_escaped_text_reads_as_the_text_and_does_nothing(text: str) -> None:
    import html

    shown = inline(text)
    assert html.unescape(shown).split() == [*" ".join(text.split()).split()] or not text.isprintable()
    assert not set(shown.replace("&#", "")) & set("\\`*_{}[]<>|~$!^=@:\"'\n")


def test_long_texts_and_lists_are_cut() -> None:
    assert cell("x" * 1001) == f"<code>{'x' * 1000}…</code>"
    assert cell(["a"] * 6) == ", ".join(["<code>a</code>"] * 5) + ", …"


def test_statistics_of_every_kind_of_column_are_right() -> None:
    rows = [
        {"text": "a b", "class": 1, "score": 0.5, "docs": ["x"], "odd": None},
        {"text": "a b c d", "class": 1, "score": 1.0, "docs": ["x", "y"], "odd": "z"},
        {"text": "a", "class": 0, "score": 0.0, "docs": [], "odd": 3},
    ]
    facts = describe_dataset(iter(rows), 12_000, lambda texts: [len(text.split()) for text in texts])
    assert facts.columns == {"text": "string", "class": "int", "score": "float", "docs": "list", "odd": "mixed"}
    assert facts.statistics["text"] == ["min: 1 tokens", "mean: 2.33 tokens", "max: 4 tokens"]
    assert facts.statistics["class"] == ["0: 33.33%", "1: 66.67%"]
    assert facts.statistics["score"] == ["min: 0.00", "mean: 0.50", "max: 1.00"]
    assert facts.statistics["docs"] == ["min: 0 elements", "mean: 1.00 elements", "max: 2 elements"]
    assert (facts.num_rows, facts.num_statistics_rows) == (12_000, 3)


def test_a_card_that_cannot_be_made_does_not_cost_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    data = CrossEncoderModelCardData()
    data.add_log(0.0, 1, {"loss": "not a number"})  # type: ignore[dict-item]
    write_card(tmp_path, data, FACTS)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "sentence-transformers"
    assert "could not be made" in caplog.text


def test_a_measure_may_come_with_its_gain_in_words(tmp_path: Path) -> None:
    data = CrossEncoderModelCardData()
    samples = [{"query": "what is water", "positive": ["river"], "documents": ["bread", "river"]}]
    evaluator = CrossEncoderRerankingEvaluator(samples, name="dev", write_csv=False)
    evaluator(type("Model", (), {"model_card_data": data, "predict": lambda self, pairs, **_: [0.1, 0.9]})())
    write_card(tmp_path, data, FACTS)
    card = ModelCard.load(tmp_path / "README.md")
    assert "1.0000 (+0.3691)" in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["ndcg@10"] == 1.0


def test_what_a_model_was_made_from_is_listed_as_text() -> None:
    assert "### Lineage" not in render_card(CrossEncoderModelCardData(), FACTS)
    data = CrossEncoderModelCardData(lineage={"train data": "sha256:abc", "a|b": "<script>\n# x"})
    lineage = section(render_card(data, FACTS), "### Lineage")
    assert lineage.split("\n") == [
        "",
        "- train data: <code>sha256&#58;abc</code>",
        "- a&#124;b: <code>&#60;script&#62; &#35; x</code>",
        "",
    ]


def test_many_log_rows_and_datasets_are_folded() -> None:
    data = CrossEncoderModelCardData()
    for step in range(101):
        data.add_log(step / 10, step, {"Training Loss": math.exp(-step)})
    rows = [{"query": "a", "document": "b"}]
    data.training = [describe_dataset(rows, 1, lambda texts: [1] * len(texts), name=f"set {i}") for i in range(4)]
    card = render_card(data, FACTS)
    assert "<details><summary>101 rows</summary>" in card and "<details><summary>4 datasets</summary>" in card
    assert card.count("<details>") == card.count("</details>")


# datasets of the package datasets

SHA = "0123456789abcdef0123456789abcdef01234567"


def dataset(
    num_rows: int = 5, source: str = f"hf://datasets/me/questions@{SHA}/data/train.parquet"
) -> datasets.Dataset:
    rows = [{"query": f"what {i}", "answer": "a city", "label": i % 2} for i in range(num_rows)]
    made = datasets.Dataset.from_list(rows, split="train")
    made.info.download_checksums = {source: {"num_bytes": 1, "checksum": None}} if source else None
    return made


def count_words(texts: Any) -> list[int]:
    return [len(text.split()) for text in texts]


def test_a_dataset_of_the_hub_is_described_with_its_id_and_revision() -> None:
    (facts,) = describe_datasets(dataset(), count_words)
    assert (facts.dataset_id, facts.revision, facts.num_rows) == ("me/questions", SHA, 5)
    assert facts.columns == {"query": "string", "answer": "string", "label": "int"}
    assert facts.statistics["query"] == ["min: 2 tokens", "mean: 2.00 tokens", "max: 2 tokens"]
    assert facts.statistics["label"] == ["0: 60.00%", "1: 40.00%"]
    assert facts.samples[0] == {"query": "what 0", "answer": "a city", "label": 0}
    data = CrossEncoderModelCardData(training=[facts])
    card = render_card(data, FACTS)
    assert front_matter(card)["datasets"] == ["me/questions"]
    assert f"[me/questions](https://huggingface.co/datasets/me/questions) at {SHA}" in card


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"hf://datasets/me/questions@{SHA}/train.parquet", ("me/questions", SHA)),
        (f"hf://datasets/squad@{SHA}/plain/train.parquet", ("squad", SHA)),
        ("hf://datasets/me/questions@main/train.parquet", ("me/questions", None)),
        ("/home/me/train.parquet", (None, None)),
        ("https://example.org/me@home/train.json", (None, None)),
        ("", (None, None)),
    ],
)
def test_the_origin_is_what_sentence_transformers_finds(source: str, expected: tuple[str | None, str | None]) -> None:
    (facts,) = describe_datasets(dataset(source=source), count_words)
    assert (facts.dataset_id, facts.revision) == expected
    (theirs,) = sentence_transformers.cross_encoder.CrossEncoderModelCardData().infer_datasets(dataset(source=source))
    assert (theirs.get("id"), theirs.get("revision")) == expected


def test_each_dataset_of_a_dict_is_described_by_its_name() -> None:
    for kind in (datasets.DatasetDict, dict):
        first, second = describe_datasets(kind(easy=dataset(), hard=dataset(3, source="")), count_words)
        assert [(facts.name, facts.num_rows, facts.dataset_id) for facts in (first, second)] == [
            ("easy", 5, "me/questions"),
            ("hard", 3, None),
        ]


def test_a_streamed_dataset_is_read_no_further_than_its_statistics_need() -> None:
    num_read = 0

    def rows() -> Any:
        nonlocal num_read
        for i in range(10_000):
            num_read += 1
            yield {"query": f"what {i}", "score": i / 2}

    streamed = datasets.IterableDataset.from_generator(rows, split=datasets.Split.TRAIN)
    (facts,) = describe_datasets(datasets.IterableDatasetDict(train=streamed), count_words)
    assert (facts.name, facts.num_rows, facts.num_statistics_rows) == ("train", None, 1000)
    assert num_read <= 1001
    assert facts.statistics["score"] == ["min: 0.00", "mean: 249.75", "max: 499.50"]
    card = render_card(CrossEncoderModelCardData(training=[facts]), FACTS)
    assert "* Size: unknown, as it was streamed" in card
    assert not any(tag.startswith("dataset_size") for tag in front_matter(card)["tags"])
    streamed.info.splits = {"train": datasets.SplitInfo("train", num_examples=10_000)}
    assert describe_datasets(streamed, count_words)[0].num_rows == 10_000


# emissions


class Tracker:
    """Stands in for codecarbon's EmissionsTracker."""

    calls: list[str]

    def __init__(self, **settings: Any) -> None:
        self.calls.append("made")

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> float:
        self.calls.append("stop")
        self.final_emissions_data = types.SimpleNamespace(
            emissions=0.0125,
            energy_consumed=0.05,
            on_cloud="N",
            cpu_model="A | CPU",
            gpu_model=None,
            ram_total_size=8.0,
        )
        return 0.0125


def train_shortly(folder: Path) -> tuple[CrossEncoder, str]:
    model = CrossEncoder(tiny_checkpoint(folder / "base"), device="cpu")
    examples = [InputExample(texts=["what", "city"], label=1.0)] * 4
    model.fit(DataLoader(examples, batch_size=2), show_progress_bar=False, output_path=str(folder / "out"))
    return model, (folder / "out" / "README.md").read_text()


def test_emissions_are_measured_where_codecarbon_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("codecarbon")
    module.EmissionsTracker = Tracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr(Tracker, "calls", [], raising=False)
    _, card = train_shortly(tmp_path)
    assert Tracker.calls == ["made", "start", "stop"]
    assert front_matter(card)["co2_eq_emissions"] == {
        "emissions": 12.5,
        "energy_consumed": 0.05,
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "on_cloud": False,
        "cpu_model": "A | CPU",
        "ram_total_size": 8.0,
    }
    impact = section(card, "### Environmental Impact")
    for line in (
        "CodeCarbon",
        "- **Carbon emitted:** 12.5 g of CO2",
        "- **Energy consumed:** 0.05 kWh",
        "A &#124; CPU",
    ):
        assert line in impact
    assert ModelCard.load(tmp_path / "out" / "README.md").data.co2_eq_emissions["emissions"] == 12.5


@pytest.mark.parametrize("method", ["__init__", "start", "stop"])
def test_emissions_that_cannot_be_measured_cost_nothing_but_a_warning(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise RuntimeError("no power meter")

    broken = type("Broken", (Tracker,), {"calls": [], method: fail})
    module = types.ModuleType("codecarbon")
    module.EmissionsTracker = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    caplog.set_level("WARNING")
    _, card = train_shortly(tmp_path)
    assert "no power meter" in caplog.text and "Environmental Impact" not in card


def test_without_codecarbon_nothing_is_said_of_emissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    model, card = train_shortly(tmp_path)
    assert not model.model_card_data.emissions and "Environmental Impact" not in card


# never fatal


def test_data_that_cannot_be_described_does_not_cost_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: CrossEncoder, texts: Any) -> None:
        raise RuntimeError("no tokens today")

    monkeypatch.setattr(CrossEncoder, "count_tokens", fail)
    caplog.set_level("WARNING")
    train_shortly(tmp_path)
    assert "no tokens today" in caplog.text and (tmp_path / "out" / "model.safetensors").exists()


def test_a_card_that_no_file_can_hold_does_not_cost_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    data = CrossEncoderModelCardData()
    data.add_loss("L", {"name": "\ud800"})
    write_card(tmp_path, data, FACTS)
    assert "could not be made" in caplog.text and (tmp_path / "README.md").exists()


def test_losses_and_evaluators_of_one_class_stand_side_by_side(tmp_path: Path) -> None:
    data = CrossEncoderModelCardData()
    for k in (5, 10, 10):
        data.add_loss("LambdaLoss", {"k": k})
        samples = [{"query": "what is water", "positive": ["river"], "documents": ["bread", "river"]}]
        evaluator = CrossEncoderRerankingEvaluator(samples, at_k=k, write_csv=False)
        evaluator(type("Model", (), {"model_card_data": data, "predict": lambda self, pairs, **_: [0.1, 0.9]})())
    card = render_card(data, FACTS)
    assert card.count("### Loss: LambdaLoss") == 2
    assert front_matter(card)["tags"].count("loss:LambdaLoss") == 1
    assert [evaluation.config["at_k"] for evaluation in data.evaluations] == [5, 10]
