"""An engine in this process, to measure plans on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nf_runtime.engine import Engine
    from nf_runtime.probe import Probe

INTERRUPTED = 130
"""Exit code after Ctrl+C."""


@contextmanager
def probing(engine_options: dict[str, Any]) -> Iterator[tuple[Engine, Probe]]:
    """Load a model, and measure what its device can do at most.

    Args:
        engine_options: Fields of `EngineConfig`.

    Raises:
        NanoFlowError: It cannot be loaded, or `overlap` names no plan.
    """
    # The imports take seconds, and come after what can be wrong without them.
    from nf_runtime import EngineConfig

    config = EngineConfig(**engine_options)
    from nf_runtime.engine import Engine
    from nf_runtime.probe import Probe

    engine = Engine(config)
    try:
        probe = Probe(engine)
        try:
            yield engine, probe
        finally:
            probe.close()
    finally:
        engine.close()


def check_output(option: str, path: str) -> None:
    """See before a long measurement whether its result can be written.

    Raises:
        ValueError: It is a folder, or its folder does not exist.
    """
    if Path(path).is_dir():
        raise ValueError(f"{option} is {path!r}, which is a folder; expected the name of a file")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{option} is {path!r}, whose folder does not exist; make it first")
