"""Rerank jobs whose inputs and output lie in a bucket, run by driver processes.

Knows the drivers, the layout of an output and any S3Server; knows nothing of what a test does to them.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import RerankConfig
from pipelines.rerank import rerank
from tests.support.collections import Collection, make_collection, read_quarantine, read_results, write_job
from tests.support.models import StumblingModel
from tests.support.processes import DriverProcess
from tests.support.rerank_driver import Drivers
from tests.support.s3 import S3Server

#: Settings of all jobs here: shards of a few queries, and an actor that fits beside other work.
SETTINGS: Mapping[str, object] = {"shard_candidates": 40, "scoring": {"cpus_per_actor": 1}}
#: Options of a driver: twenty shards of half a second, to be interrupted.
SLOW = ("--set", "shard_candidates=10", "--seconds-per-pair", "0.05")
_TABLES = ("results", "completeness", "quarantine")


def collection_with_a_gap(folder: Path) -> Collection:
    """Twenty queries with ten documents each, one of which is missing, so that there is something to refuse."""
    pairs = make_collection(folder).pairs
    texts = pairs.text.astype(object)
    texts[3] = None
    pairs["text"] = texts.where(pairs.doc_id != pairs.doc_id[3], None)
    return Collection(pairs, folder)


def run_on_disk(collection: Collection, layout: str, output: Path) -> dict[str, pa.Table]:
    """The tables of the same job on a local disk, run by this process's Ray."""
    config = RerankConfig(model="fake", output=str(output), **collection.write(layout), **SETTINGS)
    rerank(config, connect=lambda: 2, stream=io.StringIO(), model=StumblingModel())
    return tables(output)


@dataclass
class S3Job:
    """A job on a bucket: everything lies below `prefix` there. `env` is added to the environment of the drivers."""

    server: S3Server
    bucket: str
    folder: Path
    drivers: Drivers
    prefix: str = "search"
    env: dict[str, str] = field(default_factory=dict)

    @property
    def output(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}/out"

    def upload(self, local: Path) -> str:
        """Copies a file, or all files of a folder, into the bucket; returns the URI."""
        for file in [local] if local.is_file() else sorted(local.rglob("*")):
            if file.is_file():
                name = file.relative_to(local.parent)
                self.server.put(f"{self.bucket}/{self.prefix}/in/{name}", file.read_bytes())
        return f"s3://{self.bucket}/{self.prefix}/in/{local.name}"

    def write(self, collection: Collection, layout: str, **settings: object) -> str:
        """Uploads the collection and writes a job file that names it; returns the job file's path."""
        uris = {role: self.upload(Path(path)) for role, path in collection.write(layout).items()}
        return write_job(self.folder / "job.yaml", **{"output": self.output, **uris, **SETTINGS, **settings})

    def start(self, *args: str, module: str = "tests.support.rerank_driver") -> DriverProcess:
        """Starts a driver, by default the one with the fake model."""
        env = {**self.server.env, "CROSSENC_CACHE": str(self.folder / "cache"), **self.env}
        return self.drivers.start(*args, module=module, **env)

    def run(self, *args: str, module: str = "tests.support.rerank_driver") -> DriverProcess:
        """Runs a driver to its end; nothing that it started is left."""
        driver = self.start(*args, module=module)
        driver.wait(240)
        driver.cleanup()
        return driver

    def objects(self, below: str = "") -> dict[str, str]:
        """Name below the output -> version and time of creation, of every object whose name starts with `below`."""
        root = f"{self.prefix}/out/"
        pages = self.server.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + below)
        entries = [entry for page in pages for entry in page.get("Contents", [])]
        return {entry["Key"].removeprefix(root): f"{entry['ETag']} {entry['LastModified']}" for entry in entries}

    def download(self) -> Path:
        """A local copy of the whole output."""
        for name in self.objects():
            path = self.folder / "copy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.server.get(f"{self.bucket}/{self.prefix}/out/{name}"))
        return self.folder / "copy"


def kill_after(job: S3Job, path: str, num_parts: int, folder: str = "results/") -> dict[str, str]:
    """Starts a driver and kills it when `folder` has `num_parts` parts, of twenty; returns which those are."""
    with job.start(path, *SLOW) as driver:
        driver.wait_until(lambda: len(job.objects(folder)) >= num_parts, 120)
        driver.kill9()
    done = job.objects(folder)
    assert len(done) < 20, "the driver was killed too late to leave anything to do"
    return done


def succeeded(driver: DriverProcess) -> bool:
    """Whether the driver ended with 0; what it said is shown otherwise."""
    if driver.process.returncode != 0:
        print(driver.tail())
    return driver.process.returncode == 0


def said(driver: DriverProcess) -> str:
    """Everything that the driver wrote to stdout and stderr."""
    return driver.stdout_path.read_text() + driver.stderr_path.read_text()


def messages(driver: DriverProcess) -> list[str]:
    """What the driver told people while it worked."""
    lines = [json.loads(line) for line in driver.stderr_path.read_text().splitlines() if line.startswith("{")]
    return [line["text"] for line in lines if line["event"] == "message"]


def tables(output: Path) -> dict[str, pa.Table]:
    """The rows of results, completeness and quarantine, in the order of their parts.

    Two places are compared by this: names and footers of parts, and the column `file`, which is left out here,
    hold the URIs of the inputs or digests of them.
    """
    return {name: _rows(output / name) for name in _TABLES}


def _rows(folder: Path) -> pa.Table:
    parts = [pq.read_table(path).replace_schema_metadata(None) for path in sorted(folder.glob("*.parquet"))]
    rows = pa.concat_tables(parts)
    return rows.drop_columns([name for name in ("file",) if name in rows.column_names])


def pairs_in(output: Path) -> Counter[tuple[str, str]]:
    """How often each (query id, doc id) was ranked or refused."""
    both = [read_results(output), read_quarantine(output)]
    return Counter(pair for rows in both for pair in zip(rows.query_id, rows.doc_id, strict=True))


def readable_text(output: Path) -> str:
    """All that can be read in the files of an output, Parquet decoded."""
    found = []
    for path in sorted(output.rglob("*")):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found.append(f"{table.schema.metadata}\n{table.to_pydict()}")
        elif path.is_file():
            found.append(path.read_bytes().decode("utf-8", "replace"))
    return "\n".join(found)
