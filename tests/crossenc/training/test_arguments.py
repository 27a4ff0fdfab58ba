"""The trainer's settings and its collator: what they take, change and refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from crossenc import (
    BatchSamplers,
    CrossEncoderDataCollator,
    CrossEncoderTrainingArguments,
    MultiDatasetBatchSamplers,
)
from crossenc.errors import ConfigError, InputError
from crossenc.training import DefaultBatchSampler


def made(**settings: Any) -> CrossEncoderTrainingArguments:
    return CrossEncoderTrainingArguments("unused", use_cpu=True, report_to="none", **settings)


def test_samplers_are_given_by_name_member_or_class() -> None:
    default = made()
    assert default.batch_sampler is BatchSamplers.BATCH_SAMPLER
    assert default.multi_dataset_batch_sampler is MultiDatasetBatchSamplers.PROPORTIONAL
    args = made(batch_sampler="no_duplicates", multi_dataset_batch_sampler="round_robin")
    assert args.batch_sampler is BatchSamplers.NO_DUPLICATES
    assert args.multi_dataset_batch_sampler is MultiDatasetBatchSamplers.ROUND_ROBIN
    assert args.to_dict()["batch_sampler"] == "no_duplicates"
    own = made(batch_sampler=DefaultBatchSampler)
    assert own.batch_sampler is DefaultBatchSampler
    assert json.loads(own.to_json_string())["batch_sampler"] == "crossenc.training.samplers.DefaultBatchSampler"
    with pytest.raises(ValueError, match=r"shuffled is not a valid BatchSamplers, please select one of .*no_dupl"):
        made(batch_sampler="shuffled")


def test_dicts_come_as_json_too() -> None:
    args = made(learning_rate_mapping='{"classifier": 0.1}', router_mapping='{"a": "rerank"}', prompts='{"a": "find "}')
    assert args.learning_rate_mapping == {"classifier": 0.1} and args.router_mapping == {"a": "rerank"}
    assert args.prompts == {"a": "find "} and made(prompts="find ").prompts == "find "
    assert made(learning_rate_mapping=None).learning_rate_mapping == {}
    with pytest.raises(ConfigError, match=r"learning_rate_mapping is 'classifier=0\.1': give a dict, or one as JSON"):
        made(learning_rate_mapping="classifier=0.1")


def test_without_accelerate_there_is_a_word_on_what_to_install() -> None:
    code = "import sys; sys.modules['accelerate'] = None; from crossenc import CrossEncoderTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert (
        "ImportError: training needs the packages accelerate and datasets: pip install 'crossenc[train]'" in done.stderr
    )


def test_a_command_line_sets_them(tmp_path: Path) -> None:
    words = f"--output_dir {tmp_path} --use_cpu --batch_sampler no_duplicates --prompts find --report_to none"
    (args,) = HfArgumentParser(CrossEncoderTrainingArguments).parse_args_into_dataclasses(words.split())
    assert args.batch_sampler is BatchSamplers.NO_DUPLICATES and args.prompts == "find" and args.use_cpu


def test_a_warmup_ratio_is_understood_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="warmup_ratio is deprecated: write warmup_steps"):
        args = made(warmup_ratio=0.1)
    assert args.get_warmup_steps(50) == 5 and args.warmup_ratio is None
    with pytest.warns(DeprecationWarning):
        assert made(warmup_ratio=0.1, warmup_steps=7).warmup_steps == 7


def test_only_losses_are_computed_in_evaluation() -> None:
    assert made(prediction_loss_only=False).prediction_loss_only and not made().ddp_broadcast_buffers


def test_columns_keep_their_order_and_labels_become_tensors() -> None:
    rows = [{"b": "x", "score": 0.5, "a": "y"}, {"b": "z", "score": 1.0, "a": "w"}]
    batch = CrossEncoderDataCollator()(rows)
    assert [*batch] == ["label", "b", "a"] and batch["b"] == ["x", "z"]
    assert batch["label"].dtype == torch.float32 and batch["label"].tolist() == [0.5, 1.0]
    classes = CrossEncoderDataCollator()([{"a": "x", "labels": 2}, {"a": "y", "labels": 0}])["label"]
    assert classes.dtype == torch.int64 and classes.tolist() == [2, 0]
    lists = CrossEncoderDataCollator()([{"a": "x", "label": [1, 0]}, {"a": "y", "label": [1.0]}])["label"]
    assert [label.tolist() for label in lists] == [[1, 0], [1.0]]
    assert "label" not in CrossEncoderDataCollator()([{"a": "x", "b": "y"}])
    own = CrossEncoderDataCollator(valid_label_columns=["gold"])([{"gold": 1, "score": "x"}])
    assert own["label"].tolist() == [1] and own["score"] == ["x"]


def test_labels_that_are_tensors_already_stay_so() -> None:
    single = CrossEncoderDataCollator()([{"a": "x", "label": torch.tensor(1.0)}] * 2)["label"]
    assert single.tolist() == [1.0, 1.0]
    lists = CrossEncoderDataCollator()([{"a": "x", "label": torch.tensor([1.0, 0.0])}] * 2)["label"]
    assert [label.tolist() for label in lists] == [[1.0, 0.0]] * 2


def test_prompts_are_for_all_datasets_or_by_name() -> None:
    row = {"dataset_name": "one", "a": "x"}
    assert CrossEncoderDataCollator(prompts="find ")([{"a": "x"}])["prompt"] == "find "
    assert CrossEncoderDataCollator(prompts={"one": "find "})([row])["prompt"] == "find "
    assert "prompt" not in CrossEncoderDataCollator(prompts={"two": "find "})([row])
    assert "prompt" not in CrossEncoderDataCollator(prompts={"one": "find "})([{"a": "x"}])
    assert CrossEncoderDataCollator(prompts="")([{"a": "x"}])["prompt"] == ""  # none, not even the default one
    assert CrossEncoderDataCollator(router_mapping={"one": "rerank"})([row])["task"] == "rerank"


def test_a_column_may_be_called_prompt_unless_there_is_one() -> None:
    assert CrossEncoderDataCollator()([{"prompt": "x", "response": "y"}])["prompt"] == ["x"]
    with pytest.raises(InputError, match="a column is called 'prompt', as the batch's own prompt is: rename"):
        CrossEncoderDataCollator(prompts="find ")([{"prompt": "x", "response": "y"}])


@pytest.mark.parametrize("name", ["prompts", "router_mapping"])
def test_columns_cannot_have_their_own_prompt_or_task(name: str) -> None:
    with pytest.raises(ValueError, match=f"CrossEncoder {name} cannot be per-column"):
        CrossEncoderDataCollator(preprocess_fn=print, **{name: {"one": {"query": "find "}}})
