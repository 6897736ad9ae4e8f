"""Rows on their way to the diff: streamed to local Parquet files, partitioned by `id_hash`, so that no side is held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.hashes import as_uuids
from pipelines.schema import HASH, ID_HASH, SHARD

# Rows gathered before a row group is written: below, Parquet pays for itself; above, memory grows with the partitions.
_GROUP_ROWS = 1 << 17


class Spool:
    """Open files, one for each partition of one side. Close it to get their paths."""

    def __init__(self, directory: Path, name: str, schema: pa.Schema, *, partitions: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.paths = [directory / f"{name}-{index:03d}.parquet" for index in range(partitions)]
        self.num_rows = 0
        self._schema = as_uuids(schema.empty_table()).schema
        self._waiting: list[list[pa.Table]] = [[] for _ in self.paths]
        # Hashes and times do not compress; names of shards do.
        self._writers = [
            pq.ParquetWriter(path, self._schema, compression="none", use_dictionary=[SHARD] if SHARD in schema.names else False)
            for path in self.paths
        ]

    def add(self, table: pa.Table) -> None:
        """Take a batch; rows go to the partition that the first two bytes of their id hash name."""
        self.num_rows += table.num_rows
        for index, part in enumerate(self._split(table)):
            self._waiting[index].append(part)
            if sum(item.num_rows for item in self._waiting[index]) >= _GROUP_ROWS:
                self._flush(index)

    def close(self) -> list[Path]:
        """Write what waits, close every file and return the paths in partition order."""
        for index, writer in enumerate(self._writers):
            self._flush(index)
            writer.close()
        return self.paths

    def _split(self, table: pa.Table) -> list[pa.Table]:
        if len(self.paths) == 1:
            return [table]
        hashes = table.column(ID_HASH).combine_chunks()
        data = np.frombuffer(hashes.buffers()[1], dtype=np.uint8).reshape(-1, HASH.byte_width)[hashes.offset : hashes.offset + len(hashes)]
        partition = (data[:, 0].astype(np.uint32) * 256 + data[:, 1]) * len(self.paths) >> 16
        return [table.filter(pa.array(partition == index)) for index in range(len(self.paths))]

    def _flush(self, index: int) -> None:
        if self._waiting[index]:
            rows = pa.concat_tables(self._waiting[index]).combine_chunks()
            self._writers[index].write_table(as_uuids(rows), row_group_size=_GROUP_ROWS)
            self._waiting[index] = []
