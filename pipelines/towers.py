"""The tower's files in the store, `towers/<fingerprint>/`, and back on a machine that embeds or searches: verified both ways.

There the tower is opened, at the pace that suits the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder.registry import CARD, RECORD, TowerCard, TowerOptions
from pipelines.contracts import ObjectRef
from pipelines.errors import AlreadyExists, CorruptObject, InputError
from pipelines.manifest import ManifestObject
from pipelines.storage import MAX_CONDITIONAL_BYTES, Store

ROLE = "tower"
_PIECE_BYTES = 32 * 1024 * 1024


def install(store: Store, directory: Path, card: TowerCard) -> tuple[ManifestObject, ...]:
    """Put the files of a tower into the store, its card last, and return them all; what is there already is compared."""
    folder = f"towers/{card.fingerprint[:16]}"
    objects = [
        _put(store, ObjectRef(key=f"{folder}/{item.name}", size=item.size, sha256=item.sha256), directory / item.name)
        for item in card.files
    ]
    said = card.to_json()
    ref = ObjectRef(key=f"{folder}/{CARD}", size=len(said), sha256=hashlib.sha256(said).hexdigest())
    objects.append(_put(store, ref, said))
    objects += _record(store, folder, directory)
    return tuple(ManifestObject.of(item, role=ROLE) for item in sorted(objects, key=lambda item: item.key))


def _record(store: Store, folder: str, directory: Path) -> list[ObjectRef]:
    """Keep the record of a trained tower's training; one that is there stays: the same weights may be exported twice."""
    key, path = f"{folder}/{RECORD}", directory / RECORD
    if store.head(key) is None:
        if not path.is_file():
            return []
        with contextlib.suppress(AlreadyExists):
            store.put_if_absent(key, path.read_bytes())
    said = store.get(key)
    return [ObjectRef(key=key, size=len(said), sha256=hashlib.sha256(said).hexdigest())]


def fetch(store: Store, objects: Sequence[ManifestObject], cache: Path | None = None) -> Path:
    """Return a local directory with these files, every one compared with its sha256.

    A store on a local disk is read where it is. Another is copied once for each machine, into a folder that is named
    for its content and appears whole: any number of workers may ask at the same time.
    """
    folders = {item.key.split("/")[1] for item in objects if item.key.startswith("towers/")}
    if len(folders) != 1 or any(not item.key.startswith("towers/") for item in objects):
        raise InputError(
            f"a tower is a set of files below one folder of towers/, not below {sorted(folders)[:3]}. Pass what `install` returned."
        )
    prefix = f"towers/{folders.pop()}"
    if "://" not in store.uri(prefix):
        for item in objects:
            store.verify(item)
        return Path(store.uri(prefix))
    target = machine_folder(cache) / _name(objects)
    if target.is_dir() and _intact(target, objects, prefix):
        return target
    return _download(store, objects, prefix, target)


def bring(url: str, options: Mapping[str, str], cache: Path | None = None) -> Path:
    """Return a local directory with the tower that a bucket holds below an address, copied once for each machine.

    What is listed there names the copy, so that a tower that is exported anew to the same address is copied anew.
    """
    store = Store.open(url, options=options)
    found = list(store.list())
    if not found:
        raise InputError(f"`tower.path` {url} holds no file. Copy the tower's directory there, or name the folder that holds it.")
    lines = [f"{url} {item.key} {item.size} {item.modified}" for item in found]
    target = machine_folder(cache) / f"brought-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:32]}"
    if target.is_dir():
        return target
    own = target.parent / f".{target.name}-{secrets.token_hex(8)}"
    try:
        for item in found:
            _copy(store, item.key, item.size, own / item.key)
        # Another process of this machine may be first, with the same files.
        with contextlib.suppress(OSError):
            own.rename(target)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    if not target.is_dir():
        raise InputError(f"cannot keep a copy of {url} at {target}. Check the space and the rights there, or set TMPDIR.")
    return target


def open_encoder(directory: Path, *, tower: TowerOptions, fingerprint: str, calibrate: bool = False, **how: Any) -> Any:
    """Open the tower of a directory, on the worker that is going to use it; `how` are fields of its EncodeOptions.

    Where they leave the pace open, it is the one that is kept for this machine, or is tried out first where it is worth it.
    """
    from encoder import calibration  # noqa: PLC0415  torch loads only where texts are embedded
    from encoder.inference import EncodeOptions, Encoder  # noqa: PLC0415

    encoder = Encoder(directory, tower=tower, fingerprint=fingerprint, options=EncodeOptions(**how))
    if (
        how.get("token_budget") is None
        and how.get("lanes") is None
        and not calibration.recall(encoder, cache=machine_folder())
        and calibrate
    ):
        calibration.calibrate(encoder, cache=machine_folder())
    return encoder


def machine_folder(cache: Path | None = None) -> Path:
    """Return a folder of this machine that belongs to this user alone, because whoever can write to it chooses what is read."""
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        return cache
    folder = Path(tempfile.gettempdir()) / f"catalog-embed-towers-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise InputError(f"{folder} belongs to another user. Remove it, or set TMPDIR to a folder of your own.")
    return folder


def _put(store: Store, ref: ObjectRef, data: Path | bytes) -> ObjectRef:
    """Store one file under its content's name, or compare what is there."""
    large = ref.size > MAX_CONDITIONAL_BYTES
    try:
        if large and store.head(ref.key) is not None:
            store.verify(ref)
            return ref
        written = store.put(ref.key, data) if large else store.put_if_absent(ref.key, data)
    except AlreadyExists:
        store.verify(ref)
        return ref
    if written != ref:
        store.delete(ref.key)
        raise CorruptObject(f"{store.uri(ref.key)}: the tower's file changed while it was copied. Export the tower again, and run again.")
    return ref


def _name(objects: Sequence[ManifestObject]) -> str:
    """Return a name for exactly these files."""
    lines = sorted(f"{item.key} {item.sha256}" for item in objects)
    return f"{objects[0].key.split('/')[1]}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def _intact(folder: Path, objects: Sequence[ManifestObject], prefix: str) -> bool:
    """Say whether the folder holds these files and no others, all with their sha256."""
    wanted = {item.key.removeprefix(f"{prefix}/"): item for item in objects}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    try:
        return found == wanted.keys() and all(_sha256(folder / name) == item.sha256 for name, item in wanted.items())
    except FileNotFoundError:  # another worker is just replacing it
        return False


def _download(store: Store, objects: Sequence[ManifestObject], prefix: str, target: Path) -> Path:
    """Copy the files beside the target, and move them there at once; another worker may be first."""
    own = target.parent / f".{target.name}-{secrets.token_hex(8)}"
    try:
        for item in objects:
            path = own / item.key.removeprefix(f"{prefix}/")
            _copy(store, item.key, item.size, path)
            if (found := _sha256(path)) != item.sha256:
                raise CorruptObject(f"{store.uri(item.key)}: expected sha256 {item.sha256}, found {found}. Install the tower again.")
        if target.exists() and not _intact(target, objects, prefix):
            # A damaged copy goes aside in one step, so that nobody sees half of it.
            with contextlib.suppress(FileNotFoundError):
                target.rename(own.with_suffix(".damaged"))
        try:
            own.rename(target)
        except OSError:
            if not _intact(target, objects, prefix):
                raise
    finally:
        for leftover in (own, own.with_suffix(".damaged")):
            shutil.rmtree(leftover, ignore_errors=True)
    return target


def _copy(store: Store, key: str, size: int, path: Path) -> None:
    """Write an object to a new file, piece by piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, _PIECE_BYTES):
            file.write(store.get_range(key, start=start, length=min(_PIECE_BYTES, size - start)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
