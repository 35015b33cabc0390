"""The demo model's text: the Python standard library, its tokenizer and its training windows."""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

Tokens = npt.NDArray[np.int32]

SKIPPED_FOLDERS = {
    *("dist-packages", "site-packages"),  # not the standard library
    *("encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests"),
}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # generated when the interpreter was built
VALIDATION_SHARE = 0.05

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
# A newline and an indentation are tokens of their own, so that a prompt that ends in either is
# cut exactly as the text the model has seen.
PRE_TOKENS = r"\n|(?<![^\n])[ \t]+| ?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|[^\S\n]+"


@dataclass(frozen=True, slots=True)
class Texts:
    """The files to train on and those held out, each side in a shuffled but fixed order."""

    train: list[str]
    validation: list[str]

    def digest(self) -> str:
        """Return a digest of every file."""
        return digest_of("\0".join(self.train + self.validation))


def digest_of(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_texts() -> Texts:
    """Read this interpreter's standard library; a file's name alone decides on its side."""
    root = Path(sysconfig.get_path("stdlib"))
    digests = {
        digest_of(name.as_posix()): name
        for name in (path.relative_to(root) for path in root.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(name.parts)
        and not name.parts[0].startswith(SKIPPED_PREFIXES)
    }
    texts = Texts([], [])
    for digest, name in sorted(digests.items()):
        held_out = int(digest[:8], 16) < VALIDATION_SHARE * 2**32
        with tokenize.open(root / name) as file:
            (texts.validation if held_out else texts.train).append(file.read())
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose first token is END_OF_TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def encode(texts: list[str], tokenizer: Tokenizer) -> Tokens:
    """Join texts into one stream of tokens, each text ended by END_OF_TEXT."""
    encodings = tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array([*e.ids, END_OF_TEXT_ID], np.int32) for e in encodings])


def byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Return how many bytes of text each token stands for, int64 ``[vocab_size]``."""
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lengths = np.array([len(name) for name, _ in names])  # byte-level: a letter for every byte
    lengths[END_OF_TEXT_ID] = 0
    return lengths


class WindowSampler:
    """Draws windows of ``context + 1`` tokens, each epoch in a new order and at a new offset.

    The order of an epoch depends on the seed and the epoch's number alone, so ``(epoch, cursor)``
    is the whole random state, and training that continues sees the data it would have seen.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int) -> None:
        self._tokens = tokens
        self._context = context
        self._seed = seed
        self.seek(0, 0)

    def seek(self, epoch: int, cursor: int) -> None:
        """Go to the window number ``cursor`` of an epoch."""
        rng = np.random.default_rng([self._seed, epoch])
        offset = int(rng.integers(self._context))
        count = (len(self._tokens) - 1 - offset) // self._context
        self._starts = offset + self._context * rng.permutation(count)
        self.epoch, self.cursor = epoch, cursor

    def next_batch(self, size: int) -> torch.Tensor:
        """Return the next windows, int64 ``[size, context + 1]``."""
        if self.cursor + size > len(self._starts):
            self.seek(self.epoch + 1, 0)
        starts = self._starts[self.cursor : self.cursor + size]
        self.cursor += size
        windows = np.stack([self._tokens[s : s + self._context + 1] for s in starts])
        return torch.from_numpy(windows.astype(np.int64))
