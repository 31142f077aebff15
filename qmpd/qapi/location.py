"""Where the schema files are.

The package carries them as ``qmpd/_schema``.  In a checkout that is a symbolic
link to the ``schema`` directory at the top; a wheel holds the files themselves.
Either way there is one place to look, and it does not depend on how qmpd came
to be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: The files that the programs' schemas begin with.
STORAGE_SCHEMA: Final = "qapi-schema.json"
SYSTEM_SCHEMA: Final = "system-schema.json"


def schema_directory() -> Path:
    """Return the directory that holds ``qapi-schema.json``, with links resolved.

    In a checkout this is the ``schema`` directory itself, so that messages
    about a file name the one that people edit.

    :raise FileNotFoundError: the installation is incomplete.
    """
    return (Path(__file__).parent.parent / "_schema").resolve(strict=True)
