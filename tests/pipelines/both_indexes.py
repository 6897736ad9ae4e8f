"""A catalog of vectors in both indexes, FAISS segments and a Lance table, that lives through nights; no tower and no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.hashes import id_hashes, text_hashes, vids
from pipelines.health import Subject
from pipelines.index.triggers import RefreshOptions
from pipelines.manifest import Manifest, ManifestObject, TablePin
from pipelines.schema import ATTR_HASH, HASH, ID, ID_HASH, LOCALE, TEXT_HASH, VECTOR, VID, ProductSchema, table_schema
from pipelines.stores import lance
from tests.pipelines.index_nights import DIMS, PATIENT, Floats, Shop

SPEC = lance.TableSpec(schema=table_schema(ProductSchema(text=("title",), filters={"brand": "string"}), dims=DIMS, vector="float32"))
# Eight lists, of which a search visits one unless it is told otherwise.
LISTED = replace(PATIENT, factory="IVF8,SQ8")


@dataclass
class Twins:
    """A store with both indexes. Every night gives a generation to look at."""

    root: Path
    options: RefreshOptions = PATIENT
    spec: lance.TableSpec = SPEC
    tower: str = "3fa1c9"
    attachments: tuple[ManifestObject, ...] = ()
    brands: Mapping[str, str] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shop = Shop(self.root, self.options)
        self.pin: TablePin | None = None

    def night(
        self, add: Mapping[str, Floats] | None = None, change: Mapping[str, Floats] | None = None, delete: Sequence[str] = ()
    ) -> Subject:
        """Live through one night; return its generation."""
        new = {**(add or {}), **(change or {})}
        for name in new:
            self.texts[name] = self.texts.get(name, -1) + 1
        found = self.shop.next(dict(add or {}), dict(change or {}), delete)
        self.shop.manifest = replace(self.shop.opened(), indexes={"faiss": found.use})
        return self.subject(self._manifest(self._applied(new, delete)))

    def subject(self, manifest: Manifest) -> Subject:
        return Subject.of(self.shop.store, manifest, {})

    def _manifest(self, version: int) -> Manifest:
        store, key = self.shop.store, "tables/both.lance"
        self.pin = lance.pin(
            store.uri(key), version=version, tag=f"g{self.shop.night:06d}", previous=self.pin, store=store, key=key, options={}
        )
        parent = f"g{self.shop.night - 1:06d}" if self.shop.night > 1 else None
        counts = {"live": len(self.shop.live), "rejected": 0, "read": len(self.shop.live)}
        made: dict[str, Any] = {"table": self.pin, "parent": parent, "counts": counts, "tower": self.tower, "attachments": self.attachments}
        return replace(self.shop.opened(), **made)

    def _applied(self, new: Mapping[str, Floats], delete: Sequence[str]) -> int:
        uri = self.shop.store.uri("tables/both.lance")
        if self.shop.night == 1:
            lance.build(uri, [self._rows(new)], self.spec, {})
        else:
            gone = id_hashes(pa.array(list(delete), pa.string()))
            deletes = [pa.table({ID_HASH: gone.cast(HASH)})] if delete else []
            upserts = [self._rows(new)] if new else []
            lance.apply(uri, upserts=upserts, attrs=[], deletes=deletes, spec=self.spec, options={}, expect_live=len(self.shop.live))
        return lance.refresh_indexes(uri, self.spec, {}).version

    def _rows(self, products: Mapping[str, Floats]) -> pa.Table:
        ids = pa.array(list(products), pa.string())
        hashes = id_hashes(ids)
        vectors = pa.array(np.concatenate(list(products.values())).astype(np.float32))
        columns = {
            ID: ids,
            ID_HASH: hashes,
            VID: pa.array(vids(hashes)),
            TEXT_HASH: text_hashes(pa.array([f"{name} {self.texts[name]}" for name in products])),
            ATTR_HASH: hashes,
            LOCALE: pa.array(["en"] * len(ids)),
            "brand": pa.array([self.brands.get(name) for name in products], pa.string()),
            VECTOR: pa.FixedSizeListArray.from_arrays(vectors, DIMS),
        }
        return pa.table([columns[name] for name in self.spec.schema.names], schema=self.spec.schema)
