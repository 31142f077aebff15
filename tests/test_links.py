"""Every link from a page to another one leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from daemons import CHECKOUT

PAGES: Final = [*sorted(CHECKOUT.glob("*.md")), *sorted((CHECKOUT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Return the fragments that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page: Path) -> None:
    for name, fragment in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not fragment or fragment in anchors(target), f"{name}#{fragment}"


def test_there_are_links_to_follow() -> None:
    assert sum(page.read_text().count("](") for page in PAGES) > 30
