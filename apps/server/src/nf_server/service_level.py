"""Service levels as they are written on the command line."""

from __future__ import annotations

import typer


def parse_service_levels(texts: list[str]) -> dict[str, dict[str, float]]:
    """`["chat:0.5,0.05", "2,0.2"]` as seconds by class; the one without a class is of all others.

    Raises:
        typer.BadParameter: a text is of another form, or a class is given twice.
    """
    levels: dict[str, dict[str, float]] = {}
    for text in texts:
        name, _, targets = text.rpartition(":")
        try:
            ttft, tpot = (float(target) for target in targets.split(","))
        except ValueError:
            raise typer.BadParameter(
                f"--service-level is {text!r}; expected [CLASS:]TTFT,TPOT in seconds, as "
                "chat:0.5,0.05"
            ) from None
        if name in levels:
            raise typer.BadParameter(f"--service-level gives the class {name!r} twice.")
        levels[name] = {"ttft": ttft, "tpot": tpot}
    return levels
