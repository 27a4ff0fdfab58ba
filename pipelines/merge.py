"""The second phase where queries are spread over shards: collects a bucket of queries from all scored parts.

Every scored part has one row group for each bucket, so that a bucket reads only its own rows.
"""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from crossenc.errors import StorageError
from pipelines.commit import SCORED_FOLDER, parse_footer
from pipelines.storage import FileInfo, Location, list_files, open_input


def read_bucket(output: Location, fingerprint: str, bucket: int) -> pa.Table:
    """All thin rows of one bucket, in input order."""
    parts = [file for file in list_files(output / SCORED_FOLDER) if file.location.name.startswith("part-")]
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(lambda part: _read_group(part, fingerprint, bucket), parts))
    rows = pa.concat_tables(tables).combine_chunks()
    keys = [("file", "ascending"), ("row", "ascending"), ("item", "ascending")]
    return rows.sort_by(keys)


def _read_group(part: FileInfo, fingerprint: str, bucket: int) -> pa.Table:
    with open_input(part) as source:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        footer = parse_footer(file.metadata)
        if footer is None or footer.fingerprint != fingerprint:
            raise StorageError(f"{part.location} belongs to another run; start over with --new-run")
        return file.read_row_group(bucket).replace_schema_metadata(None)
