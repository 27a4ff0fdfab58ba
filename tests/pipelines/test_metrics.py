"""What Prometheus sees of a run: read from the endpoint of a Ray node while its driver is there."""

import io
import re
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from crossenc.engine import Engine
from crossenc.testing import tiny_checkpoint
from pipelines import metrics, train_board
from pipelines import plan as plans
from pipelines.control import RunControl
from pipelines.model import CheckpointModel
from pipelines.storage import locate
from pipelines.train import show_news
from pipelines.train_board import Figures
from pipelines.train_progress import TrainProgress
from tests.crossenc.test_engine import RunsOutOfMemory
from tests.pipelines.test_rerank import run
from tests.support.collections import Collection, make_collection
from tests.support.models import NAN, StumblingModel


def scrape() -> dict[tuple[str, str, str], float]:
    """(run, name, reason or stage) -> value now, summed over processes."""
    found: Counter[tuple[str, str, str]] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
            for name, labels, value in re.findall(r"^ray_(crossenc_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
                tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                found[tags.get("run", ""), name, tags.get("reason") or tags.get("stage") or ""] += float(value)
    return dict(found)


def scrape_run(run_tag: str) -> dict[tuple[str, str], float]:
    """(name, reason or stage) -> value now of one run."""
    return {(name, kind): value for (run, name, kind), value in scrape().items() if run == run_tag}


def wait_for(run_tag: str, wanted: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Scrapes until the wanted values are there: Ray reports them every ten seconds."""
    deadline = time.monotonic() + 60
    while True:
        found = scrape_run(run_tag)
        if wanted.items() <= found.items() or time.monotonic() > deadline:
            return found
        time.sleep(1)


class Watch:
    """Remembers the gauge's largest value of each run while the block runs."""

    def __init__(self) -> None:
        self.most: Counter[str] = Counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(1):
            self.most |= Counter({run: value for (run, name, _), value in scrape().items() if "remaining" in name})


@pytest.fixture(scope="module")
def runs(ray_cluster, tmp_path_factory):
    """Two runs that Prometheus has read: one with bad rows, and one in two phases. The first was watched meanwhile."""
    pytest.importorskip("prometheus_client", reason="needs ray[default], whose agents export metrics")
    folder = tmp_path_factory.mktemp("metrics")
    collection = make_collection(folder / "in")
    pairs = collection.pairs.copy()
    pairs.loc[3, "text"] = None
    pairs.loc[36, "text"] = f"this gives {NAN}"
    slow = StumblingModel(seconds_per_pair=0.06)  # longer than the ten seconds between reports
    with Watch() as watch:
        counts = run(
            folder / "bad", model=slow, shard_candidates=40, **Collection(pairs, folder / "b").write("pairs")
        ).counts
    run(folder / "two", shard_candidates=40, **collection.write("shuffled"))
    plans_made = [plans.load(locate(str(folder / name))) for name in ("bad", "two")]
    control = RunControl("control")
    for shard in ("a", "a", "a", "b"):
        control.begin(shard, ray.get_runtime_context().get_node_id())
    score_out_of_memory(tiny_checkpoint(folder / "model"))
    return SimpleNamespace(pairs=pairs, counts=counts, plans=plans_made, most_remaining=watch.most)


def score_out_of_memory(checkpoint: Path) -> None:
    """Scores four pairs of one length on a device that has room for two of them."""
    model = CheckpointModel(source=str(checkpoint))
    pairs = model.load_tokenizer().encode(["water"] * 4, ["the water of the river"] * 4)
    scorer = model.load_scorer(1)
    assert isinstance(scorer, Engine)
    network = RunsOutOfMemory(scorer.network, num_tokens=2 * int(pairs.lengths[0]))
    replace(scorer, network=network, may_pack=False).score(pairs)


def test_prometheus_reads_what_a_run_did_and_what_is_left(runs):
    plan, _ = runs.plans
    wanted = {
        ("crossenc_pairs_scored_total", ""): len(runs.pairs) - 2,
        ("crossenc_tokens_total", ""): runs.counts.num_tokens,
        ("crossenc_pairs_refused_total", "document_missing"): 1,
        ("crossenc_pairs_refused_total", "score_not_finite"): 1,
        ("crossenc_shards_committed_total", ""): len(plan.shards),
    }
    found = wait_for(metrics.run_tag(plan.fingerprint), wanted)
    assert wanted.items() <= found.items(), found
    assert all(found["crossenc_stage_seconds_total", stage] > 0 for stage in ("read", "tokenise", "score", "write"))
    assert 0 < runs.most_remaining[metrics.run_tag(plan.fingerprint)] <= len(plan.shards)


def test_a_pair_is_counted_once_though_its_query_is_ranked_in_a_second_phase(runs):
    _, plan = runs.plans
    assert plan.num_buckets > 0
    wanted = {
        ("crossenc_pairs_scored_total", ""): len(runs.pairs),
        ("crossenc_shards_committed_total", ""): len(plan.shards) + plan.num_buckets,
    }
    found = wait_for(metrics.run_tag(plan.fingerprint), wanted)
    assert wanted.items() <= found.items(), found


def test_a_shard_begun_again_is_counted_as_a_retry(runs):
    wanted = {("crossenc_shard_retries_total", ""): 2}
    assert wait_for("control", wanted) == wanted


def test_prometheus_reads_how_far_a_training_is_and_its_loss(ray_cluster):
    pytest.importorskip("prometheus_client", reason="needs ray[default], whose agents export metrics")
    board, display, over = train_board.start(), TrainProgress(io.StringIO()), threading.Event()
    ray.get(board.post.remote(Figures(step=7, num_steps=9, loss=0.25)))

    def drive() -> None:  # as the driver does, again and again
        while not over.wait(0.5):
            show_news(board, display, "training")

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    wanted = {("crossenc_training_step", ""): 7, ("crossenc_training_loss", ""): 0.25}
    try:
        assert wait_for("training", wanted) == wanted
    finally:
        over.set()
        driver.join()


def test_a_batch_that_does_not_fit_is_counted(runs):
    wanted = {("crossenc_out_of_memory_total", ""): 1}
    assert wait_for("", wanted) == wanted


def test_every_metric_has_been_read_here(runs):
    metrics.trained("again", 1, 0.5)
    wait_for("again", {("crossenc_training_step", ""): 1})
    names = {name for _, name, _ in scrape()}
    assert {*metrics.COUNTERS} <= names <= {*metrics.COUNTERS, *metrics.GAUGES}


def test_without_ray_nothing_is_counted_and_nothing_fails(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_metric", lambda name: pytest.fail("a metric was made"))
    metrics.out_of_memory()
    metrics.remaining("run", 3)
