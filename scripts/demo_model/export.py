"""The demo model's folder: weights, tokenizer, configuration, and a model card with its losses."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from demo_model.corpus import END_OF_TEXT, END_OF_TEXT_ID, SKIPPED_FOLDERS, Tokens, byte_lengths
from demo_model.training import Training, loss_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
MODEL_CARD = Path(__file__).with_name("model_card.md")
SAMPLE_PROMPTS = ("def fibonacci(n):", "class Stack:", "import os\n\ndef read_lines(path):")


def export(training: Training, folder: Path) -> None:
    """Write the trained model into a folder as Hugging Face lays it out, weights in bf16."""
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=training.tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=training.recipe.context_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    model: Any = training.recipe.build_model()
    model.load_state_dict(training.model.state_dict())
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
        do_sample=True,
        temperature=0.4,
        top_p=0.95,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(training, folder), encoding="utf-8")


def model_card(training: Training, folder: Path) -> str:
    """Load the exported model as a user would, measure it, and return its model card."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sides = (training.train, training.validation)
    recipe = training.recipe
    trained = training.steps * recipe.batch_size * recipe.context_length
    lengths = byte_lengths(training.tokenizer)
    torch.manual_seed(recipe.seed)
    return MODEL_CARD.read_text(encoding="utf-8").format(
        recipe=recipe,
        parameters=model.num_parameters() / 1e6,
        python=platform.python_version(),
        skipped=", ".join(sorted(SKIPPED_FOLDERS)),
        files=[np.count_nonzero(side == END_OF_TEXT_ID) for side in sides],
        megabytes=[lengths[side].sum() / 1e6 for side in sides],
        tokens=[len(side) for side in sides],
        steps=training.steps,
        cpu_minutes=training.cpu_seconds / 60,
        wall_minutes=training.wall_seconds / 60,
        trained=trained / 1e6,
        epochs=trained / len(training.train),
        torch=torch.__version__.partition("+")[0],
        precision="bf16 autocast" if training.bf16 else "fp32",
        rows=loss_rows(training, model),
        greedy="\n\n".join(complete(model, tokenizer, p, do_sample=False) for p in SAMPLE_PROMPTS),
        sampled=complete(model, tokenizer, SAMPLE_PROMPTS[0]),
    )


def complete(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    """Continue a prompt as a chat does, up to the last whole line; return a block of Markdown."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=100, **options)
    text, _, _ = tokenizer.decode(output[0], skip_special_tokens=True).rpartition("\n")
    return f"```python\n{text.rstrip()}\n```"


def loss_rows(training: Training, model: LlamaForCausalLM) -> str:
    """Measure the model and the baseline on both sides: rows of the card's table."""
    context = training.recipe.context_length
    whole = (len(training.validation) - 1) // context * context + 1
    sides = [training.train[:whole], training.validation[:whole]]
    bigram = Bigram(training.train, training.recipe.vocab_size)
    k = min((10.0**-e for e in range(6)), key=lambda k: bigram.loss(sides[1], k))
    losses = {
        "This model": [evaluate(model, side, bf16=training.bf16) for side in sides],
        f"Bigram, add-{k:g}": [bigram.loss(side, k) for side in sides],
    }
    lengths = byte_lengths(training.tokenizer)
    bits = [(whole - 1) / math.log(2) / lengths[side[1:]].sum() for side in sides]
    rows = []
    for name, values in losses.items():
        cells = [f"{x:.3f} ({x * scale:.3f})" for x, scale in zip(values, bits, strict=True)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokens: Tokens, *, bf16: bool) -> float:
    """Return the mean loss in nats per token over consecutive windows of the full context."""
    context = model.config.max_position_embeddings
    windows = torch.from_numpy(tokens.astype(np.int64)).unfold(0, context + 1, context)
    return float(torch.stack([loss_of(model, w[None], bf16=bf16) for w in windows]).mean())


class Bigram:
    """Predicts a token from the one before it, by counts to which ``k`` is added."""

    def __init__(self, tokens: Tokens, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._pairs = np.bincount(self._keys(tokens), minlength=vocab_size**2)
        self._firsts = np.bincount(tokens[:-1], minlength=vocab_size)

    def _keys(self, tokens: Tokens) -> npt.NDArray[np.int64]:
        return tokens[:-1].astype(np.int64) * self._vocab_size + tokens[1:]

    def loss(self, tokens: Tokens, k: float) -> float:
        """Return the mean loss in nats per token."""
        pairs = self._pairs[self._keys(tokens)] + k
        return float(-np.log(pairs / (self._firsts[tokens[:-1]] + k * self._vocab_size)).mean())
