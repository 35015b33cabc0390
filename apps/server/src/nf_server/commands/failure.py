"""How a command ends when the user has to change something."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(message: object, code: int = 1) -> NoReturn:
    """Print `nanoflow: error: <message>` to stderr and exit."""
    text = " ".join(str(message).split())
    sys.stderr.write(f"nanoflow: error: {text}\n")
    raise SystemExit(code)
