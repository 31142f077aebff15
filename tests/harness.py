"""The conformance harness as a module: `qmpdiff` is a script whose name has no ending."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

SCRIPT: Final = Path(__file__).parent / "conformance" / "qmpdiff"


def load_qmpdiff() -> ModuleType:
    """Import it anew: each test file may set it up in its own way."""
    loader = importlib.machinery.SourceFileLoader("qmpdiff", str(SCRIPT))
    spec = importlib.util.spec_from_loader("qmpdiff", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qmpdiff"] = module  # dataclasses look their module up by its name
    loader.exec_module(module)
    return module
