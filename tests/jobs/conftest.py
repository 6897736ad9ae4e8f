"""Commands on the shop with two nights behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.commands import Command, commands


@pytest.fixture
def look(two_nights: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Commands that only look."""
    monkeypatch.chdir(tmp_path)
    return commands(capfd, two_nights)
