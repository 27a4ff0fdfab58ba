"""Files of lines, plain or gzipped: JSON lines, and fields with tabs between. It knows nothing of what is in them."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crossenc.errors import InputError
from pipelines.inputs import first_line
from pipelines.storage import FileInfo, open_input

#: A longer line is refused, and never in memory whole.
MAX_LINE_BYTES = 64 * 2**20
_BUFFER_BYTES = 8 * 2**20


@contextmanager
def open_lines(file: FileInfo) -> Iterator[io.BufferedIOBase]:
    """The file's content, decompressed. Raises InputError where it cannot be."""
    with open_input(file) as source:
        stream: Any = io.BufferedReader(source, _BUFFER_BYTES)
        if file.location.name.lower().endswith(".gz"):
            stream = gzip.GzipFile(fileobj=stream)
        try:
            yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{file.location} is not a sound gzip file ({first_line(error)}); restore it") from None


def read_lines(stream: io.BufferedIOBase) -> Iterator[tuple[bytes, int]]:
    """Each line, and its bytes in the file; of a line that is too long only the beginning."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        num_bytes, rest = len(line), line
        while not rest.endswith(b"\n") and (rest := stream.readline(_BUFFER_BYTES)):
            num_bytes += len(rest)
        yield line, num_bytes


def numbered_lines(file: FileInfo) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1. Raises InputError for one that is too long."""
    with open_lines(file) as stream:
        for number, (line, num_bytes) in enumerate(read_lines(stream), start=1):
            if num_bytes > MAX_LINE_BYTES:
                raise InputError(f"{file.location}, line {number}: {num_bytes:,} bytes, of at most {MAX_LINE_BYTES:,}")
            if not line.isspace():
                yield number, line


def json_lines(file: FileInfo) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects in a file of JSON lines, with their line numbers from 1. Raises InputError naming what is none."""
    for number, line in numbered_lines(file):
        body, problem = parse_json(line)
        if body is None:
            raise InputError(f"{file.location}, line {number}: not a JSON object ({problem})")
        yield number, body


def parse_json(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object in a line, or None and what is wrong."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError) as error:
        return None, first_line(error)
    return (row, "") if isinstance(row, dict) else (None, "no object")
