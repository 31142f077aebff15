from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nbd_served import Served


@pytest.fixture
def idle(tmp_path: Path) -> Served:
    """Nothing is served yet."""
    return Served(tmp_path)


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    await served.start()
    yield served
    await served.exports.close()
    await served.graph.close()
