"""Two processes train as one: the same weights, the evaluator's figures for both, one checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crossenc.testing import tiny_checkpoint

PROGRAM = """
import json, os, pathlib, sys
from crossenc import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from tests.crossenc.training.support import PAIRS

class Length:
    primary_metric = "length"
    def __call__(self, model, output_path, epoch, steps):
        assert os.environ.get("RANK", "0") == "0"
        return {"length": 4.0}

folder, processes = sys.argv[1], int(os.environ.get("WORLD_SIZE", 1))
for kind, data in (("rows", PAIRS), ("stream", PAIRS.to_iterable_dataset())):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = CrossEncoder(folder, device="cpu", config_kwargs=no_dropout)
    args = CrossEncoderTrainingArguments(
        f"{folder}/{kind}-{processes}", max_steps=4, per_device_train_batch_size=8 // processes, optim="sgd",
        learning_rate=0.05, eval_strategy="steps", eval_steps=4, save_steps=4, report_to="none", use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None, disable_tqdm=True,
    )
    trainer = CrossEncoderTrainer(model, args, data, evaluator=Length())
    trainer.train()
    assert trainer.evaluate()["eval_length"] == 4.0
    weights = [parameter.double().sum().item() for parameter in model.parameters()]
    name = f"{kind}-{processes}-{os.environ.get('RANK', 0)}.json"
    pathlib.Path(folder, name).write_text(json.dumps(weights))
"""


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    words = ["--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1", str(program), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", [str(program), str(folder)])
    exec(compile(PROGRAM, "program", "exec"), {"__name__": "program"})
    for kind in ("rows", "stream"):
        alone, first, second = (
            json.loads((folder / f"{kind}-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
        )
        assert first == second and first == pytest.approx(alone, abs=1e-5)
        assert (folder / f"{kind}-2" / "checkpoint-4" / "modules.json").exists()
