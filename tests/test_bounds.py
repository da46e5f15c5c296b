"""What pyproject.toml promises of other packages' versions is what the two sets of constraints try."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
DEPENDENCIES = PROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
NEEDED = [Requirement(text) for text in re.findall(r'^ +"([^"]+)"', DEPENDENCIES, re.MULTILINE)]
HIGHEST, LOWEST = "constraints.txt", "constraints-oldest.txt"


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()
    found = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(package): Version(version) for package, version in found}


@pytest.mark.parametrize("needed", NEEDED, ids=str)
def test_the_lowest_version_is_tried(needed: Requirement) -> None:
    [lowest] = [Version(bound.version) for bound in needed.specifier if bound.operator == ">="]
    assert pins(LOWEST)[canonicalize_name(needed.name)] == lowest


@pytest.mark.parametrize("needed", NEEDED, ids=str)
def test_the_highest_version_that_is_tried_is_allowed(needed: Requirement) -> None:
    assert pins(HIGHEST)[canonicalize_name(needed.name)] in needed.specifier
