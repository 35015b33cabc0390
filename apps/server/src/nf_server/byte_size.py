"""Sizes in bytes as people write them."""

from __future__ import annotations

import typer


def parse_byte_size(text: str) -> int:
    """Bytes of "64MiB", "1.5GB" or "1048576"; for options of the command line.

    Units of 1000 are KB, MB, GB, TB; units of 1024 KiB, MiB, GiB, TiB. Case does not matter.

    Raises:
        typer.BadParameter: The text is no size.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text.strip()))
    except ValidationError as error:
        raise typer.BadParameter(
            f"{text!r} is not a size; give bytes, as 1048576, or a unit, as 64MiB or 1.5GB."
        ) from error
