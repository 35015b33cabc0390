"""The digest of weights: the same for the same numbers, another for any others."""

from __future__ import annotations

import pytest
import torch

from nf_kvcache import weights_digest as module
from nf_kvcache.weights_digest import weights_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    numbers = torch.arange(2 * 3 * 8).reshape(2, 3, 8) % 7
    return {"first": numbers.to(dtype), "second": numbers[0].to(dtype), "scale": torch.tensor(2.0)}


def digest(weights: dict[str, torch.Tensor]) -> str:
    return weights_digest(weights.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_and_strides_do_not_matter(dtype: torch.dtype) -> None:
    plain = tensors(dtype)
    turned = {
        name: value.mT.contiguous().mT if value.ndim else value for name, value in plain.items()
    }
    assert not turned["first"].is_contiguous()
    assert digest(dict(reversed(turned.items()))) == digest(plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_matters(dtype: torch.dtype) -> None:
    plain = tensors(dtype)
    digests = {digest(plain)}
    for i in range(plain["first"].numel()):
        changed = tensors(dtype)
        numbers = changed["first"].reshape(-1)
        numbers[i] = 1 if numbers[i] == 0 else 0
        digests.add(digest(changed))
    assert len(digests) == 1 + plain["first"].numel()


def test_names_types_and_shapes_matter() -> None:
    data = torch.zeros(4, dtype=torch.int16)
    variants = [
        {"a": data},
        {"b": data},
        {"a": data.view(torch.float16)},
        {"a": data.reshape(2, 2)},
        {"a": data, "b": data},
        {"a": data[:2], "b": data[2:]},
        {"a": data[:0], "b": data},
        {},
    ]
    assert len({digest(variant) for variant in variants}) == len(variants)


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.arange(2 * 5 * 30).reshape(2, 5, 30)}
    whole = digest(weights)
    turned = {"a": weights["a"].permute(2, 1, 0).contiguous().permute(2, 1, 0)}
    for piece_bytes in (8, 100, 600, 10**6):  # numbers, parts of a row, rows, all
        monkeypatch.setattr(module, "_PIECE_BYTES", piece_bytes)
        pieces = list(module._pieces(turned["a"]))
        assert all(piece.nbytes <= piece_bytes for piece in pieces)
        assert digest(turned) == whole
        assert len(list(module._pieces(weights["a"]))) == 1


@pytest.mark.gpu
def test_the_device_does_not_matter() -> None:
    weights = tensors(torch.bfloat16)
    assert digest({name: value.cuda() for name, value in weights.items()}) == digest(weights)


def test_what_cannot_be_digested_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' twice"):
        weights_digest([("a", torch.zeros(1)), ("a", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"'a' is torch\.strided on meta"):
        digest({"a": torch.zeros(1, device="meta")})
    with pytest.raises(ValueError, match=r"'a' is torch\.sparse_coo on cpu"):
        digest({"a": torch.eye(2).to_sparse()})
