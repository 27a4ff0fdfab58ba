"""Between the two phases where queries are spread over shards: collects queries from all scored parts.

Every scored part has one row group for each bucket of queries, so that a bucket reads only its own rows.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossenc.errors import RunConflictError
from pipelines.commit import SCORED_FOLDER, parse_footer
from pipelines.storage import FileInfo, Location, list_files, open_input


def read_bucket(output: Location, fingerprint: str, bucket: int) -> pa.Table:
    """All thin rows of one bucket, in input order."""
    return _collect(output, fingerprint, lambda part: part.read_row_group(bucket))


def read_queries(output: Location, fingerprint: str, query_ids: Sequence[str]) -> pa.Table:
    """All thin rows of the given queries, in input order."""
    wanted = pa.array(query_ids, pa.large_string())

    def chosen(part: pq.ParquetFile) -> pa.Table:
        rows = part.read()
        return rows.filter(pc.is_in(rows.column("query_id"), wanted))

    return _collect(output, fingerprint, chosen)


def _collect(output: Location, fingerprint: str, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
    """What `read` takes from each scored part, in input order."""

    def read_part(file: FileInfo) -> pa.Table:
        with open_input(file) as source:
            part = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True)
            footer = parse_footer(part.metadata)
            if footer is None or footer.fingerprint != fingerprint:
                raise RunConflictError(f"{file.location} belongs to another run; start over with --new-run")
            return read(part).replace_schema_metadata(None)

    files = [file for file in list_files(output / SCORED_FOLDER) if file.location.name.startswith("part-")]
    with ThreadPoolExecutor(16) as pool:
        rows = pa.concat_tables(pool.map(read_part, files)).combine_chunks()
    return rows.sort_by([("file", "ascending"), ("row", "ascending"), ("item", "ascending")])
