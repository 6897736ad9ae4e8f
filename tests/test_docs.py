"""What the README and the docs say is true: their commands run, their outputs are real, their tables are the code's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from jobs.settings import SECTIONS
from pipelines.gate_advice import GATES
from pipelines.normalize.reasons import REASONS
from pipelines.report import LATE_REASONS

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)

# What differs between two machines or two days, on both sides.
MASKS = [
    (re.compile(r"pin [0-9a-f]{12}"), "pin ..."),
    (re.compile(r"\d{2}:\d{2}:\d{2}Z "), ""),
    (re.compile(r"\S*/catalog\b"), "catalog"),
    (re.compile(r"[\d.]+ [kM]B"), "N MB"),
    (re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}"), "RUN"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d \.\. \d\d:\d\d:\d\d)? UTC"), "TIME"),
    (re.compile(r"\b(\d+m)?\d+(\.\d+)?s\b"), "SECONDS"),
    (re.compile(r"[\d,]+ (rows|tokens)/s"), "RATE"),
    (re.compile(r"\b\d+%"), "SHARE"),
    (re.compile(r"  +"), "  "),
]


def masked(text: str) -> str:
    for pattern, word in MASKS:
        text = pattern.sub(word, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def commands(path: Path) -> list[tuple[str, str]]:
    """Every `$ command` of a page's console blocks, in order, with the output shown below it."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.findall(path.read_text()):
        for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = piece.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = command[:-1] + more.strip()
            found.append((command, output))
    return found


def test_readme_commands_run_and_print_what_it_shows(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for command, shown in commands(ROOT / "README.md"):
        if command.startswith(("make ", "git ", "cd ")):
            continue
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)  # noqa: S602  the README's own commands
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if shown.strip():
            assert masked(done.stdout) == masked(shown), command
        ran += 1
    assert ran >= 4


def test_make_targets_in_readme_and_contributing_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"make ([a-z-]+)", (ROOT / page).read_text()):
            if target not in ("a", "sure", "it", "no"):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_operations_lists_every_reason_as_the_code_has_it() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    shown = page.split("<!-- reasons -->")[1].split("<!-- /reasons -->")[0]
    for code, reason in REASONS.items():
        word = "quarantined" if reason.action == "quarantine" else "repaired"
        assert f"| `{code}` | {word} | {reason.meaning} | {reason.advice} |" in shown
    for code, (meaning, advice) in LATE_REASONS.items():
        assert f"| `{code}` | quarantined | {meaning} | {advice} |" in shown
    assert shown.count("\n| `") == len(REASONS) + len(LATE_REASONS)


def test_operations_lists_every_gate_as_the_code_has_it() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    shown = page.split("<!-- gates -->")[1].split("<!-- /gates -->")[0]
    assert shown.strip().splitlines()[2:] == [f"| `{name}` | {meaning} | {advice} |" for name, (meaning, advice) in GATES.items()]


def test_files_that_the_docs_name_exist() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"(?<![\w/-])((?:docs|tests|pipelines|jobs|encoder|infra)/[\w./-]+\.(?:py|md))", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_settings_that_the_docs_name_exist() -> None:
    from dataclasses import fields

    known = {f"{section}: {item.name}" for section, owners in SECTIONS.items() for owner in owners for item in fields(owner)}
    for page in ("operations.md", "architecture.md"):
        for name in re.findall(
            r"`((?:source|document|store|plan|gates|publish|ray|tower|embed|index|refresh): \w+)", (ROOT / "docs" / page).read_text()
        ):
            assert name in known, f"{page}: {name}"


def test_shell_words_of_readme_commands_parse() -> None:
    for command, _ in commands(ROOT / "README.md"):
        assert shlex.split(command)
