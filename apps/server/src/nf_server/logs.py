"""Logging of the command line: one line per record, to stderr."""

from __future__ import annotations

import logging

LEVELS = ("debug", "info", "warning", "error")


def configure_logging(level: str) -> None:
    """Send log records of `level` and above to stderr; libraries speak up from warnings on."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for name in ("nf_server", "nf_runtime"):
        logging.getLogger(name).setLevel(level.upper())
