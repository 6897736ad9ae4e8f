"""Every metric, file, command and option that infra/ and docs/ name exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from jobs.cli import cli
from pipelines.metrics import METRICS, PREFIX
from tests.infra.manifests import INFRA, ROOT

DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FILES = [path for path in sorted(INFRA.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
# What has happened is not rewritten: these two name what was there on their day.
DATED = {"CHANGELOG.md", "experiments.md"}

METRIC = re.compile(rf"\b{PREFIX}[a-z0-9_]+")
PLACE = re.compile(r"(?<![\w./-])(?:docs|tests|pipelines|jobs|encoder|infra)/[\w./-]*\w(?![\w*{<])")
# A command as it is written: in a line of its own, in backticks or in quotes.
COMMAND = re.compile(r"(?<![\w/.-])(?<!-n )(?<!namespace )catalog-embed((?: +[^\s`|;&#\"'>)]+| +\"[^\"\n]*\"| +'[^'\n]*')+)")
CODE = re.compile(r"`(--[a-z][^`\n]*)`")
FLAG = re.compile(r"--[a-z][a-z0-9-]*")
# Options of other programs that stand in backticks without their program's name.
FOREIGN = {"--build-arg", "--persistence"}


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


def flags(command: click.Command) -> set[str]:
    """The long options of a command."""
    own = {name for item in command.params if isinstance(item, click.Option) for name in (*item.opts, *item.secondary_opts)}
    return own | {"--help"}


def unknown(words: str) -> list[str]:
    """What a command, given by the words behind `catalog-embed`, names and the program does not know."""
    parts = re.sub(r"\"[^\"]*\"|'[^']*'", "", words).split()
    named = next((part for part in parts if part in cli.commands), "run")
    first = parts[0] if parts else ""
    lost = [first] if named == "run" and "run" not in parts and re.fullmatch(r"[a-z]+(-[a-z]+)*", first) and len(parts) > 1 else []
    given = [found[0] for part in parts if (found := FLAG.match(part))]
    return lost + [flag for flag in given if flag not in flags(cli.commands[named]) | flags(cli) | {"--version"}]


def commands(path: Path) -> Iterator[str]:
    """Every command with an option that a file names."""
    return (match[1] for match in COMMAND.finditer(text(path)) if "--" in match[1])


# The ids of a scheduler's jobs look like metrics, and stand in Python only.
@pytest.mark.parametrize("path", [path for path in [*DOCS, *FILES] if path.suffix != ".py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_metrics_that_are_named_exist(path: Path) -> None:
    known = {PREFIX + name for name in METRICS}
    assert sorted(set(METRIC.findall(text(path))) - known) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_infra_names_exist(path: Path) -> None:
    assert [name for name in PLACE.findall(text(path)) if not (ROOT / name).exists()] == []


def test_the_readme_of_infra_tells_of_every_folder() -> None:
    told = (INFRA / "README.md").read_text()
    assert [path.name for path in INFRA.iterdir() if path.is_dir() and path.name != "__pycache__" and path.name not in told] == []


def test_files_of_infra_that_the_docs_name_exist() -> None:
    lost = [
        f"{path.name}: {name}"
        for path in DOCS
        for name in PLACE.findall(text(path))
        if name.startswith("infra/") and path.name not in DATED and not (ROOT / name).exists()
    ]
    assert lost == []


@pytest.mark.parametrize("path", [*DOCS, *FILES], ids=lambda path: str(path.relative_to(ROOT)))
def test_options_of_commands_that_are_named_exist(path: Path) -> None:
    if path.name not in DATED:
        assert {words: lost for words in commands(path) if (lost := unknown(words))} == {}


def test_options_in_the_docs_that_stand_alone_are_some_command_s() -> None:
    known = flags(cli).union(*(flags(item) for item in cli.commands.values())) | FOREIGN
    lost = [
        f"{path.name}: {flag}"
        for path in DOCS
        if path.name not in DATED
        for code in CODE.findall(text(path))
        for flag in FLAG.findall(code)
        if flag not in known
    ]
    assert lost == []


def test_commands_are_found_and_a_wrong_one_is_noticed() -> None:
    assert sum(1 for path in [*DOCS, *FILES] for _ in commands(path)) > 20
    assert unknown(" -c a.yaml run --since last --wait 1h") == []
    assert unknown(' search "waterproof --shoes" --top 3') == []
    assert unknown(" -c a.yaml plan --sinse last") == ["--sinse"]
    assert unknown(" backfil --reason all") == ["backfil"]
    assert METRIC.findall("rate(catalog_embed_no_such[1h])") == ["catalog_embed_no_such"]
    assert PLACE.findall("see docs/no-such.md, `infra/kuberay/nothing`, encoder/judge*.py") == ["docs/no-such.md", "infra/kuberay/nothing"]
