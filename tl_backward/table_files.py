"""Parquet files with metadata about their contents and checksums against damage."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"tl_backward"
VERSION = 2
METADATA_OF_VERSION_1 = b"tl_backward.sweep"


def write(file: Path, table: pa.Table, contents: dict[str, Any]) -> None:
    """Write a table atomically: a failed write leaves no partial file.

    Args:
        file: The file. Its folder must exist.
        table: The table.
        contents: JSON-serialisable metadata about the table.

    Raises:
        OSError: If the file cannot be written.
    """
    import pyarrow.parquet as pq

    rows = _checksum(table.num_rows, table.to_pydict())
    head = _checksum(contents, rows, *_head(table.schema))
    described = {"version": VERSION, "contents": contents, "rows": rows, "head": head}
    metadata = {**_foreign_metadata(table.schema), METADATA: json.dumps(described)}
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        pq.write_table(table.replace_schema_metadata(metadata), unfinished)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read the table and the contents written by :func:`write`, and verify their checksums.

    Raises:
        ValueError: If the file is damaged, has another version, or was not written by
            :func:`write`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, contents = read_schema(file)
    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read()
        rows = _checksum(table.num_rows, table.to_pydict())
    except (pa.ArrowException, OSError, RecursionError, ValueError) as error:
        raise damaged(file, error) from error
    if json.loads(schema.metadata[METADATA])["rows"] != rows:
        raise damaged(file, "the checksum of its rows does not match")
    return table, contents


def read_schema(file: Path) -> tuple[pa.Schema, dict[str, Any]]:
    """Read the columns and the contents, without the rows.

    Raises:
        ValueError: As :func:`read`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise damaged(file, "it is not a file")
    try:
        schema = pq.read_schema(file)
        metadata = schema.metadata or {}
        if METADATA_OF_VERSION_1 in metadata:
            version, contents = 1, {}
        else:
            described = json.loads(metadata[METADATA])
            version, contents = described["version"], described["contents"]
            head = _checksum(contents, described["rows"], *_head(schema))
    except (pa.ArrowException, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise damaged(file, error) from error
    if version != VERSION:
        todo = "upgrade it" if isinstance(version, int) and version > VERSION else "delete the file"
        raise ValueError(
            f"{file} has format version {version!r}, but this tl_backward reads version "
            f"{VERSION}; {todo}, or pass a new folder"
        )
    if described.get("head") != head or not isinstance(contents, dict):
        raise damaged(file, "the checksum of its metadata does not match")
    return schema, contents


def damaged(file: Path, why: object) -> ValueError:
    """The error for a file that is damaged or not ours."""
    return ValueError(
        f"{file} is damaged, or not from tl_backward ({why}); delete it, or pass another folder"
    )


def _checksum(*seen: Any) -> str:
    return sha256(json.dumps(seen, default=repr).encode()).hexdigest()


def _head(schema: pa.Schema) -> tuple[list[str], dict[str, str]]:
    """The columns, and the metadata of other writers."""
    metadata = {str(key): str(value) for key, value in _foreign_metadata(schema).items()}
    return schema.names, metadata


def _foreign_metadata(schema: pa.Schema) -> dict[bytes, bytes]:
    """Metadata of other writers, such as pandas."""
    return {key: value for key, value in (schema.metadata or {}).items() if key != METADATA}
