"""Parquet tables, read without taking more memory than is sensible for a table, whatever a small file claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import compute, parquet

LARGEST_TEXT = 256 * 2**20
"""Bytes of the largest text that is read, unpacked."""
LARGEST_TABLE = 20_000_000
"""Cells of the largest table."""


class TooLarge(ValueError):
    """A table that would take too much memory; the message says how much is read."""


def read_parquet(path: Path) -> pd.DataFrame:
    """A Parquet table; a word that is repeated a million times is counted before it is written out.

    Raises:
        TooLarge: more cells or more text than is read.
        OSError, ValueError: damaged.
    """
    with parquet.ParquetFile(path) as file:
        rows, groups = file.metadata.num_rows, map(file.metadata.row_group, range(file.metadata.num_row_groups))
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        cells = sum(chunk.num_values for chunk in chunks)
        packed = sum(chunk.total_uncompressed_size for chunk in chunks)
        if packed > LARGEST_TEXT:
            raise TooLarge(f"a table of {packed:,} bytes; over {LARGEST_TEXT:,} are not read")
        if cells > LARGEST_TABLE:
            raise TooLarge(f"a table of {rows:,} rows and {cells:,} cells; over {LARGEST_TABLE:,} are not read")
        kinds = {field.name: field.type for field in file.schema_arrow}
        text = [name for name, kind in kinds.items() if str(kind) in ("string", "large_string", "binary")]
    with parquet.ParquetFile(path, read_dictionary=text) as file:
        table = file.read()
    for i, name in enumerate(table.column_names):
        if name in text and (size := sum(map(_size, table[name].chunks))) > LARGEST_TEXT:
            raise TooLarge(f"{size:,} bytes of text in column {name!r}; over {LARGEST_TEXT:,} are not read")
        if name in text:
            table = table.set_column(i, name, table[name].cast(kinds[name]))
    try:
        return table.to_pandas()
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"what pandas noted in it is damaged ({type(error).__name__}: {error})") from None


def _size(words: Any) -> int:
    """Bytes of text in a dictionary array, once it is written out."""
    lengths = compute.call_function("binary_length", [words.dictionary])
    return compute.call_function("sum", [lengths.take(words.indices)]).as_py() or 0
