"""Remove versions of a table that nothing keeps, and the files that only they name."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipelines.stores.lance.opening import explained, open_table, steady


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The versions that went, or would go, and their bytes."""

    versions_removed: tuple[int, ...]
    bytes: int


def sweep(uri: str, *, keep_versions: AbstractSet[int], older_than: timedelta, options: Mapping[str, str], dry_run: bool) -> SweepResult:
    """Remove what is older, and neither kept nor tagged nor the latest version.

    Files that no version names may belong to a living writer, so Lance removes them only a week after they were written.
    """
    dataset = open_table(uri, options=options)
    with explained("sweep", uri):
        tagged = {tag["version"] for tag in steady(dataset.tags.list).values()}
        before = datetime.now(UTC) - older_than
        versions = {item["version"]: item["timestamp"].astimezone(UTC) for item in steady(dataset.versions)}
        kept = {*keep_versions, *tagged, dataset.version}
        goes = sorted(version for version, moment in versions.items() if version not in kept and moment < before)
        if not goes:
            return SweepResult(versions_removed=(), bytes=0)
        if dry_run:
            stats = steady(lambda: dataset.explain_cleanup_old_versions(versions=goes, error_if_tagged_old_versions=False).stats)
        else:
            stats = steady(lambda: dataset.cleanup_old_versions(versions=goes, error_if_tagged_old_versions=False))
    return SweepResult(versions_removed=tuple(goes), bytes=int(stats.bytes_removed))


def stray_tags(uri: str, *, keep: AbstractSet[str], older_than: timedelta, options: Mapping[str, str]) -> tuple[str, ...]:
    """Return the tags that nothing keeps, at versions older than this: a run that died between tagging and writing left them."""
    dataset = open_table(uri, options=options)
    with explained("list the tags of", uri):
        before = datetime.now(UTC) - older_than
        moments = {item["version"]: item["timestamp"].astimezone(UTC) for item in steady(dataset.versions)}
        tags = {name: tag["version"] for name, tag in steady(dataset.tags.list).items()}
    return tuple(sorted(name for name, version in tags.items() if name not in keep and version in moments and moments[version] < before))
