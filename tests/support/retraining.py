"""A small world for retrainings: labels week by week, a fixed set, and stand-ins for training and scoring.

A document is relevant where it holds the word water, whatever the query. The stand-in for training makes a model as
good as the share of its labels that are right; the one for scoring lets it rank so many of the queries well.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.testing import WORDS, tiny_checkpoint
from pipelines import evaluation, rankings, retrain, train
from pipelines.evaluation_config import EvaluateConfig
from pipelines.model import checkpoint
from pipelines.retrain_config import RetrainConfig
from pipelines.storage import locate, put, read_bytes
from pipelines.train_config import TrainConfig
from pipelines.train_files import list_files
from pipelines.train_finish import Finished

_OTHERS = [word for word in WORDS if word not in ("water", "river")]
_DEPTH = 5


@dataclass(frozen=True)
class World:
    """A folder with labels/, a fixed set of queries, and a base model."""

    folder: Path

    def week(
        self, number: int, num_lists: int = 12, share_right: float = 1.0, queries: list[str] | None = None
    ) -> Path:
        """Labels of a week; in the others than the right ones an irrelevant document is labelled relevant."""
        random = np.random.default_rng(number)
        rows = []
        for place in range(num_lists):
            texts = _documents(random)
            labels = [1.0, 0.0, 0.0, 0.0, 0.0] if place < share_right * num_lists else [0.0, 1.0, 1.0, 1.0, 1.0]
            query = queries[place % len(queries)] if queries else f"{random.choice(_OTHERS)} {number} {place}"
            rows.append({"query": query, "docs": texts, "labels": labels})
        path = self.folder / f"labels/week-{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    def settings(self, **more: object) -> dict[str, Any]:
        """The settings of a job; `more` replaces some."""
        fixed = {"name": "clicks", "candidates": str(self.folder / "fixed.parquet"), "segments": ["market"]}
        fixed |= {"qrels": str(self.folder / "qrels.txt"), "query_columns": str(self.folder / "markets.parquet")}
        return {
            "labels": str(self.folder / "labels"),
            "evaluation": {"collections": [fixed], "measures": ["nDCG@10", "RR@10", "Judged@10"], "depths": [10]},
            "registry": str(self.folder / "registry"),
            "name": "reranker",
            "base": str(self.folder / "backbone"),
            "output": str(self.folder / "out"),
            "train": {"workers": {"cpus": 0.5}, "learning_rate": 5e-3, "epochs": 8, "batch_lists": 4},
            **more,
        }

    def upload(self, root: str) -> dict[str, Any]:
        """Puts everything that there is below `root`, a URI; returns the settings of a job that is there alone."""
        for path in self.folder.rglob("*"):
            if path.is_file() and "cache" not in path.parts:
                put(locate(f"{root}/{path.relative_to(self.folder)}"), path.read_bytes())
        settings: dict[str, Any] = json.loads(json.dumps(self.settings()).replace(str(self.folder), root))
        return settings

    def config(self, **more: object) -> RetrainConfig:
        return RetrainConfig.model_validate(self.settings(**more))


def make_world(folder: Path, num_queries: int = 40) -> World:
    """A fixed set whose first stage has the relevant document last, and a small random model.

    `backbone` is the same model, which does not claim that its head is trained: the job starts from that.
    """
    tiny_checkpoint(folder / "base", max_length=64)
    shutil.copytree(folder / "base", folder / "backbone")
    stated = json.loads((folder / "base/config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "backbone/config.json").write_text(json.dumps(stated))
    random = np.random.default_rng(1000)
    rows = []
    for number in range(num_queries):
        for rank, text in enumerate(reversed(_documents(random)), start=1):
            doc_id = f"d{number}-{rank}"
            row = {"query_id": f"q{number}", "query": f"Judged  {WORDS[number % 20]} {number}", "doc_id": doc_id}
            rows.append(row | {"text": text, "rank": rank})
    pd.DataFrame(rows).to_parquet(folder / "fixed.parquet", index=False)
    (folder / "qrels.txt").write_text("".join(f"q{number} 0 d{number}-{_DEPTH} 1\n" for number in range(num_queries)))
    markets = [{"query_id": f"q{number}", "market": "de" if number % 2 else "fr"} for number in range(num_queries)]
    pd.DataFrame(markets).to_parquet(folder / "markets.parquet", index=False)
    return World(folder)


def _documents(random: np.random.Generator) -> list[str]:
    """Texts of which the first one is relevant."""
    texts = [" ".join(random.choice(_OTHERS, size=4)) for _ in range(_DEPTH)]
    return [f"{texts[0]} water", *texts[1:]]


def quick_training(base: Path) -> Callable[..., train.Outcome]:
    """A stand-in for `train`: a copy of `base` that is as good as the share of its labels that are right."""

    def quick(config: TrainConfig, **_: object) -> train.Outcome:
        output = locate(config.output)
        files = [pq.read_table(pa.BufferReader(read_bytes(file.location))) for file in list_files(config.train, {})]
        right = np.concatenate([[labels[0] for labels in table.column("labels").to_pylist()] for table in files])
        card = "---\ntags:\n- reranker\n---\n\n# A model\n\n## Training Details\n\nMuch.\n"
        made = {path.name: path.read_bytes() for path in base.iterdir()} | {"README.md": card.encode()}
        made["quality.json"] = json.dumps({"quality": right.mean(), "of": config.model}).encode()
        for name, body in made.items():
            put(output / f"model/{name}", body)
        lineage = {"Parent": "a", "Training data": "b", "Configuration": "c", "Code": "crossenc 0", "Weights": "d"}
        manifest = {"lineage": lineage, "rows": {"train": len(right)}, "seconds": 90.0}
        put(output / "_manifest.json", json.dumps(manifest).encode())
        put(output / "_SUCCESS", b"")
        return train.Outcome("done", output, "done", Finished(1, 1, "", None, None))

    return quick


def quick_evaluation(world: World) -> Callable[..., evaluation.Outcome]:
    """The evaluation job with rankings in the place of models: a model of quality 0.7 ranks 7 of 10 queries well."""
    real = evaluation.evaluate
    pairs = pd.read_parquet(world.folder / "fixed.parquet")
    docs = {query: group.doc_id.tolist() for query, group in pairs.groupby("query_id", sort=False)}

    def quick(config: EvaluateConfig, **arguments: Any) -> evaluation.Outcome:
        systems = []
        for system in config.systems:
            model = checkpoint(str(system.model), config.registry, {})
            num_good = json.loads((model.folder() / "quality.json").read_text())["quality"] * len(docs)
            run = {query: found[:: -1 if n < num_good else 1] for n, (query, found) in enumerate(docs.items())}
            path = world.folder / f"{system.name}.run"
            path.write_bytes(rankings.trec_run(run))
            systems.append({"name": system.name, "ranking": str(path)})
        settings = config.model_dump() | {"systems": systems}
        return real(EvaluateConfig.model_validate(settings), **arguments)

    return quick


def quick_world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose models are trained and scored by stand-ins: everything else is as it is. The base ranks nothing."""
    monkeypatch.setenv("CROSSENC_CACHE", str(folder / "cache"))
    world = make_world(folder)
    (folder / "base/quality.json").write_text('{"quality": 0.0}')
    monkeypatch.setattr(retrain.training, "train", quick_training(folder / "base"))
    monkeypatch.setattr(retrain.evaluating, "evaluate", quick_evaluation(world))
    return world
