"""What each gate asks, and what to do where it fails: the words of the report and of docs/operations.md."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# In the order of the report.
GATES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "counts": (
            "The vector log, the Lance table and the FAISS segments hold as many live products as the plan says there are.",
            "A stage lost or doubled rows. Run again from the same plan; if the counts differ again, rebuild with `backfill --reason all`.",
        ),
        "deleted": (
            "No sampled product that the plan took out is found by an index or is left in the table.",
            "Deleted products would still be shown. Run again; if they stay, compact the segments or rebuild the index.",
        ),
        "self_retrieval": (
            "A sampled live product that searches with its own vector finds itself first; identical vectors may tie.",
            "Products are missing from an index or their ids are mixed up. Look at the ids with `explain`, then rebuild the index.",
        ),
        "finite": (
            "Every vector holds numbers only: no NaN, no infinity, not all zeros.",
            "The tower overflowed on these products. Embed them again in float32, and look at their texts with `explain`.",
        ),
        "unit": (
            "Every vector has length one, so that an inner product is a cosine.",
            "The tower skipped its normalisation, or a vector changed after it was embedded. Check the tower, then embed these products again.",
        ),
        "identical": (
            "Products with different texts do not share one vector, beyond a small share of the sample.",
            "The tower has collapsed, or the template renders the same words for many products. Look at the texts with `plan --explain`.",
        ),
        "fingerprint": (
            "Every vector of the generation comes from the one tower that its manifest names.",
            "Vectors of two towers cannot be compared. Rebuild the generation with one tower: `backfill --reason all`.",
        ),
        "replay": (
            "A sample embedded again, one text at a time, gives the vectors that were stored.",
            "Batch size, precision or padding changes the vectors. Do not publish: compare the device and the precision with the tower's card.",
        ),
        "recall_faiss": (
            "Recall@10 of the FAISS segments against exact search over the same vectors.",
            "Raise the number of probes, or rebuild the index: its centroids may no longer fit the catalog.",
        ),
        "recall_lance": (
            "Recall@10 of the Lance index against exact search over the same vectors.",
            "Raise the number of probes, or rebuild the index of the table; rows that no index covers are the gate `unindexed`.",
        ),
        "recall_filtered_faiss": (
            "Recall@10 of the FAISS segments under filters, in the worst of four bands of how many products pass; clearly below fails.",
            "Rare filters need more probes, or an exact scan up to more rows. Rebuild the index if only filters of one category are affected.",
        ),
        "recall_filtered_lance": (
            "Recall@10 of the Lance index under filters, in the worst of four bands of how many products pass; clearly below fails.",
            "Raise the number of probes, or rebuild the table's indexes: a filter goes through its scalar indexes first.",
        ),
        "recall_drop": (
            "No index finds clearly less than it did in the previous generation.",
            "Slow decay after many small updates is normal: rebuild the index. A sudden drop is a fault: compare the two generations.",
        ),
        "parity": (
            "FAISS and Lance agree on the ten nearest products of the query set.",
            "One of the two indexes is stale or damaged. See which one the recall gates blame, and rebuild that one.",
        ),
        "churn": (
            "The ten nearest products of the query set are mostly those of the previous generation.",
            "Results change more than a night explains. Expected after a new tower or template; otherwise compare with `diff` before publishing.",
        ),
        "delete_ratio": (
            "The share of the published products that this generation takes out.",
            "More products vanish than a night explains. Check the feed; if it is right, raise `gates.max_delete_ratio` or waive this once.",
        ),
        "checksums": (
            "Every object that a run wrote, read back from the store, has the size and sha256 that were written down; `validate` reads those of the nights before too.",
            "The store holds other bytes than were written. Check the disk or the bucket, then run again; do not publish these objects.",
        ),
        "unindexed": (
            "No row of the table is outside its vector, scalar and text indexes.",
            "Rows outside an index are found slowly or not at all. Refresh the indexes, then validate again.",
        ),
    }
)
