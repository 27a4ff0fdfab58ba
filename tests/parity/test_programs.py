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
from torch.utils.data import DataLoader
from torch import nn
import torch
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
