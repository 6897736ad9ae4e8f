"""Errors, grouped by what the handler will do; each class owns its exit code.

CatalogEmbedError          1   something failed; the message says what to do
├── InputError             2   fix the configuration, the command line or the catalog's layout
├── SourceError            1   the catalog could not be read: check the address, the rights, the network
│   └── SourceMoved        1   the catalog changed since it was pinned: plan again
├── StoreError             1   the store failed: retry, or see `doctor`
│   ├── NotFound           1   the object is not there
│   ├── AlreadyExists     11   put-if-absent lost: another run was first
│   └── CorruptObject      1   bytes differ from the manifest: roll back
├── LeaseHeld             11   another run is writing: wait for it, or look at `status`
├── EmbedError             1   the tower failed on more than single rows: see its message, run again to resume
├── ManifestError          1   the manifest is unreadable or was written by a newer version
│   └── OldFormat          1   it was written by an older version, and is made anew by the next run
└── PlanError              1   the plan could not be made, or does not fit its base: plan again

Guards are not errors: a plan carries them as data, and `pipelines.plan` gives their exit codes (12, 13).
"""

from __future__ import annotations


class CatalogEmbedError(Exception):
    """Base of everything that this package raises on purpose. The message is for a person."""

    exit_code = 1


class InputError(CatalogEmbedError, ValueError):
    """The caller's mistake: configuration, argument or catalog layout."""

    exit_code = 2


class SourceError(CatalogEmbedError):
    """The catalog could not be read."""


class SourceMoved(SourceError):
    """The catalog is no longer what was pinned."""


class StoreError(CatalogEmbedError):
    """The store failed or breaks a promise that the publish protocol needs."""


class NotFound(StoreError):
    """No object under this key."""


class AlreadyExists(StoreError):
    """Put-if-absent found an object: another writer was first."""

    exit_code = 11


class CorruptObject(StoreError):
    """The bytes are not those that were written."""


class LeaseHeld(CatalogEmbedError):
    """Another run holds the lease, or took it over."""

    exit_code = 11


class ClusterError(CatalogEmbedError):
    """The Ray cluster cannot be reached now, or does not take the work: try again when it stands."""


class EmbedError(CatalogEmbedError):
    """The embed stage failed as a whole."""


class ManifestError(CatalogEmbedError):
    """A manifest cannot be read, or contradicts itself."""


class OldFormat(ManifestError):
    """A document of a format that is no longer read."""


class PlanError(CatalogEmbedError):
    """A plan cannot be made or no longer fits."""
