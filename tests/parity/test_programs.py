"""Programs written for sentence-transformers run here with only the import changed, and print the same.

Each is run twice, once with each library; what they print is compared, figures within a tolerance.
"""

import contextlib
import io
import random
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from crossenc.testing import tiny_checkpoint

HEAD = """
import contextlib, io
from torch.utils.data import DataLoader
from torch import nn
import torch
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TIMINGS = ("runtime", "per_second", "preparation_time", "total_flos")
"""

PROGRAMS = {
    "scores of pairs": """
        from sentence_transformers import CrossEncoder
        model = CrossEncoder("model", max_length=64)
        scores = model.predict([("How many live in the city?", "The city has a river."), ("what is water", "bread")])
        print(scores.shape, scores.dtype, *scores)
        print(model.predict(("what is water", "the river")))
    """,
    "a ranking with its documents": """
        from sentence_transformers.cross_encoder import CrossEncoder
        model = CrossEncoder("model")
        ranks = model.rank("what is water", ["the river", "bread", "music"], return_documents=True, top_k=2)
        for rank in ranks:
            print(rank["corpus_id"], rank["score"], rank["text"])
    """,
    "classes by softmax": """
        from sentence_transformers import CrossEncoder
        model = CrossEncoder("three")
        scores = model.predict([("a city", "a train"), ("music", "paper")], apply_softmax=True)
        labels = ["contradiction", "entailment", "neutral"]
        print([labels[i] for i in scores.argmax(axis=1)], *scores.ravel())
    """,
    "tensors and an activation of one's own": """
        from sentence_transformers import CrossEncoder
        model = CrossEncoder("model", activation_fn=nn.Identity(), device="cpu")
        raw = model.predict([("a city", "a train")], convert_to_tensor=True)
        soft = model.predict([("a city", "a train")], activation_fn=nn.Sigmoid(), convert_to_tensor=True)
        print(type(raw).__name__, raw.dtype, raw.item(), soft.item(), torch.sigmoid(raw).item())
        print([t.item() for t in model.predict([("a", "b"), ("c", "d")], convert_to_numpy=False)])
    """,
    "fit with examples and an evaluator": """
        from sentence_transformers import CrossEncoder, InputExample
        from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
        model = CrossEncoder("model", num_labels=1)
        examples = [InputExample(texts=["water", "river" if i % 2 else "bread"], label=float(i % 2)) for i in range(32)]
        pairs, labels = [example.texts for example in examples], [int(example.label) for example in examples]
        evaluator = CrossEncoderClassificationEvaluator(pairs, labels, name="dev")
        loader = DataLoader(examples, shuffle=True, batch_size=8)
        model.fit(train_dataloader=loader, evaluator=evaluator, epochs=10, warmup_steps=4, output_path="fitted",
                  optimizer_params={"lr": 2e-3}, show_progress_bar=False)
        result = CrossEncoder("fitted").evaluate(evaluator)
        print(sorted(result), result["dev_accuracy"], result[evaluator.primary_metric])
    """,
    "a reranking evaluator": """
        from sentence_transformers import CrossEncoder
        from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
        model = CrossEncoder("model")
        samples = [
            {"query": "what is water", "positive": ["the river"], "documents": ["bread", "the river", "stone"]},
            {"query": "how is the winter", "positive": ["paper"], "documents": ["paper", "train", "doctor"]},
        ]
        evaluator = CrossEncoderRerankingEvaluator(samples, at_k=3, name="dev", write_csv=False)
        result = evaluator(model)
        print(evaluator.primary_metric, *(f"{name} {float(result[name])}" for name in sorted(result)))
    """,
    "a correlation evaluator": """
        from sentence_transformers import CrossEncoder
        from sentence_transformers.cross_encoder.evaluation import CrossEncoderCorrelationEvaluator
        model = CrossEncoder("model")
        pairs = [("water", "river"), ("bread", "stone"), ("city", "train"), ("fever", "heart")]
        result = CrossEncoderCorrelationEvaluator(sentence_pairs=pairs, scores=[0.9, 0.2, 0.5, 0.4], name="sts")(model)
        print(*(f"{name} {float(result[name])}" for name in sorted(result)))
    """,
    "losses of texts": """
        from sentence_transformers import CrossEncoder
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, LambdaLoss, MarginMSELoss
        model = CrossEncoder("model").eval()
        bce = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(2.0))
        print(bce([["water", "bread"], ["river", "stone"]], torch.tensor([1.0, 0.0])).item())
        lists = [["water", "bread"], [["river", "stone", "city"], ["paper", "music"]]]
        print(LambdaLoss(model)(lists, [torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 1.0])]).item())
        print(MarginMSELoss(model)([["water"], ["river"], ["stone"]], torch.tensor([0.5])).item())
    """,
    "saved and loaded again": """
        from sentence_transformers import CrossEncoder
        model = CrossEncoder("model", max_length=32, activation_fn=nn.Tanh())
        model.save_pretrained("saved")
        again = CrossEncoder("saved")
        print(again.predict([("water", "river " * 60)])[0], type(again.activation_fn).__name__, again.max_length)
        print(again.config.num_labels, again.num_labels, again.tokenizer.model_max_length)
    """,
    "prompts": """
        from sentence_transformers import CrossEncoder
        model = CrossEncoder("model", prompts={"web": "the city "}, default_prompt_name="web")
        print(*model.predict([("water", "river")]), *model.predict([("water", "river")], prompt="of music "))
        print([rank["corpus_id"] for rank in model.rank("water", ["river", "stone", "bread"], prompt_name="web")])
    """,
    "a trainer with its arguments, data and evaluator": """
        from datasets import Dataset
        from sentence_transformers.cross_encoder import (
            CrossEncoder,
            CrossEncoderModelCardData,
            CrossEncoderTrainer,
            CrossEncoderTrainingArguments,
        )
        from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
        card = CrossEncoderModelCardData(language="en", license="apache-2.0", model_name="A reranker")
        model = CrossEncoder("model", num_labels=1, device="cpu", config_kwargs=NO_DROPOUT, model_card_data=card)
        words = ["water", "river", "bread", "stone", "city", "train", "fever", "heart"]
        rows = {
            "question": [words[i % 8] for i in range(40)],
            "answer": [words[i * 3 % 8] for i in range(40)],
            "label": [float(i % 3 == 0) for i in range(40)],
        }
        train_dataset, eval_dataset = Dataset.from_dict(rows), Dataset.from_dict(rows).select(range(8))
        loss = BinaryCrossEntropyLoss(model=model, pos_weight=torch.tensor(2.0))
        pairs = list(zip(eval_dataset["question"], eval_dataset["answer"]))
        evaluator = CrossEncoderClassificationEvaluator(pairs, [int(x) for x in eval_dataset["label"]], name="dev")
        evaluator(model)
        args = CrossEncoderTrainingArguments(
            output_dir="trained",
            num_train_epochs=2,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=1e-3,
            warmup_ratio=0.1,
            bf16=False,
            seed=12,
            eval_strategy="steps",
            eval_steps=5,
            save_strategy="steps",
            save_steps=5,
            save_total_limit=2,
            logging_steps=5,
            run_name="reranker",
            load_best_model_at_end=True,
            metric_for_best_model="eval_dev_average_precision",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = CrossEncoderTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            loss=loss,
            evaluator=evaluator,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        for entry in trainer.state.log_history:
            print(*(f"{k} {float(v)}" for k, v in sorted(entry.items()) if not k.endswith(TIMINGS)))
        print(trainer.state.best_global_step, float(evaluator(model)["dev_average_precision"]))
        model.save_pretrained("trained/final")
        print(float(CrossEncoder("trained/final").predict(("water", "river"))))
    """,
    "several datasets with a loss each": """
        from datasets import Dataset, DatasetDict
        from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, MSELoss
        model = CrossEncoder("model", device="cpu", config_kwargs=NO_DROPOUT)
        pairs = Dataset.from_dict({"a": ["water", "bread"] * 8, "b": ["river", "music"] * 8, "label": [1, 0] * 8})
        scored = Dataset.from_dict({"a": ["city"] * 6, "b": ["train", "stone"] * 3, "score": [0.9, 0.1] * 3})
        losses = {"pairs": BinaryCrossEntropyLoss(model), "scored": MSELoss(model)}
        args = CrossEncoderTrainingArguments(
            "several",
            num_train_epochs=1,
            per_device_train_batch_size=2,
            multi_dataset_batch_sampler="round_robin",
            prompts={"pairs": "what is ", "scored": "how is "},
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = DatasetDict({"pairs": pairs, "scored": scored})
        trainer = CrossEncoderTrainer(model, args, data, data, losses)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
            found = trainer.evaluate()
        print(trainer.state.global_step, found["eval_pairs_loss"], found["eval_scored_loss"])
        print(*model.predict([("water", "river"), ("city", "stone")]).astype(float))
    """,
    "a model and a loss of lists that the trainer makes": """
        from datasets import Dataset
        from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
        from sentence_transformers.cross_encoder.losses import ListNetLoss
        rows = {
            "query": ["water", "bread", "city", "fever"] * 2,
            "docs": [["river", "music", "stone"], ["paper", "bread"], ["train", "city"], ["heart", "doctor"]] * 2,
            "labels": [[1, 0, 0], [0, 1], [1, 0], [0, 1]] * 2,
        }
        args = CrossEncoderTrainingArguments(
            output_dir="lists",
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            optim="sgd",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = CrossEncoderTrainer(
            args=args,
            train_dataset=Dataset.from_dict(rows),
            loss=lambda model: ListNetLoss(model),
            model_init=lambda: CrossEncoder("model", device="cpu", config_kwargs=dict(NO_DROPOUT)),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        print(*trainer.model.predict([("water", "river"), ("city", "stone")]).astype(float))
    """,
    "half precision and torch.compile": """
        from sentence_transformers import CrossEncoder
        model = CrossEncoder("model", model_kwargs={"torch_dtype": torch.bfloat16})
        print(model.dtype, model.predict([("water", "river")]).dtype)
        model = CrossEncoder("model", device="cpu")
        model.compile(backend="eager")
        print(model.predict([("water", "river")], batch_size=1)[0], next(model.parameters()).device)
    """,
}


def converted(program: str) -> str:
    """The program with nothing changed but the module that it imports from."""
    program = program.replace("sentence_transformers.cross_encoder.", "crossenc.")
    return program.replace("sentence_transformers.cross_encoder", "crossenc").replace(
        "sentence_transformers", "crossenc"
    )


def printed(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the program prints when it is run in a folder of its own with the models."""
    folder.mkdir()
    tiny_checkpoint(folder / "model")
    tiny_checkpoint(folder / "three", num_labels=3)
    monkeypatch.chdir(folder)
    random.seed(0)
    torch.manual_seed(0)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(HEAD + textwrap.dedent(program), "program", "exec"), {"__name__": "program"})
    return out.getvalue()


@pytest.mark.filterwarnings("ignore")  # what the other library warns of is its own affair
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_prints_the_same_with_only_its_import_changed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    program = PROGRAMS[name]
    ours = printed(converted(program), tmp_path / "ours", monkeypatch)
    # Their fit needs a package more, and is what their old_fit was.
    theirs = printed(program.replace("model.fit(", "model.old_fit("), tmp_path / "theirs", monkeypatch)
    number = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    assert number.sub("#", ours) == number.sub("#", theirs)
    np.testing.assert_allclose(
        [float(found) for found in number.findall(ours)],
        [float(found) for found in number.findall(theirs)],
        rtol=0,
        atol=1e-5 if "fit" not in name else 0.2,
    )
