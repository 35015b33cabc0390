"""Sizes on the command line."""

import pytest
import typer

from nf_server.byte_size import parse_byte_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        ("64MiB", 64 * 2**20),
        ("64mib", 64 * 2**20),
        (" 1.5 GB ", 1_500_000_000),
        ("2TiB", 2 * 2**40),
        ("0", 0),
    ],
)
def test_a_size(text: str, size: int) -> None:
    assert parse_byte_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-5", "64 apples", "1e3", "inf", "nan", "0x10"])
def test_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a size; give bytes, as 1048576, or a"):
        parse_byte_size(text)
