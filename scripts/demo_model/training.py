"""The demo model's training: its recipe, its state, its checkpoint and its loop."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from demo_model.corpus import END_OF_TEXT_ID, WindowSampler, encode, read_texts, train_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the training depends on besides the text; a checkpoint continues only its own."""

    vocab_size: int = 4096
    context_length: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    batch_size: int = 4
    matrix_learning_rate: float = 1e-2
    learning_rate: float = 3e-3
    warmup_share: float = 0.02
    weight_decay: float = 0.1
    seed: int = 0

    def learning_rate_factor(self, progress: float) -> float:
        """Return the factor at a share of the time budget: linear warmup, then a cosine."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return min(progress / self.warmup_share, 1.0) * cosine

    def build_model(self) -> LlamaForCausalLM:
        """Build the model with random fp32 weights that depend on the seed alone."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.context_length,
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
        )
        return LlamaForCausalLM(config)

    def build_optimizers(self, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
        """Build Muon for the layers' matrices, and AdamW for the embedding and the norms.

        In equal time Muon reaches a far lower loss than AdamW alone on a run as short as this one.
        """
        embedding = model.get_input_embeddings().weight
        norms = [p for p in model.parameters() if p.ndim == 1]
        matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
        return [
            torch.optim.Muon(
                matrices,
                lr=self.matrix_learning_rate,
                weight_decay=self.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [embedding, *norms],
                lr=self.learning_rate,
                betas=(0.9, 0.95),
                weight_decay=0.0,
                fused=True,
            ),
        ]


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor, *, bf16: bool) -> torch.Tensor:
    """Return the mean next-token loss in nats over windows, int64 ``[n, context + 1]``."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    targets = windows[:, 1:].flatten()
    # A few rows at a time stay in the processor's cache: seven times as fast as all at once.
    pieces = zip(logits.flatten(0, 1).split(128), targets.split(128), strict=True)
    losses = [functional.cross_entropy(a.float(), b, reduction="sum") for a, b in pieces]
    return torch.stack(losses).sum() / len(targets)


def bf16_is_faster(model: LlamaForCausalLM, windows: torch.Tensor) -> bool:
    """Measure whether this machine trains faster in bf16 autocast than in fp32."""
    seconds = {False: math.inf, True: math.inf}
    for bf16 in (False, True) * 3:  # the best of three: other work may hold up any one of them
        started = time.monotonic()
        torch.autograd.backward(loss_of(model, windows, bf16=bf16))
        seconds[bf16] = min(seconds[bf16], time.monotonic() - started)
        model.zero_grad()
    return seconds[True] < seconds[False]


class Training:
    """A training run that starts, or continues from its checkpoint file if there is one.

    Raises:
        ValueError: The checkpoint belongs to another recipe or to other texts.
    """

    def __init__(self, recipe: Recipe, checkpoint: Path) -> None:
        self.recipe = recipe
        self.steps, self.loss = 0, math.nan
        self.cpu_seconds, self.wall_seconds = 0.0, 0.0
        self._checkpoint = checkpoint
        texts = read_texts()
        self._identity = {**asdict(recipe), "texts": texts.digest()}
        self.model = recipe.build_model()
        self._optimizers = recipe.build_optimizers(self.model)
        if checkpoint.exists():
            epoch, cursor = self._load()
        else:
            epoch, cursor = 0, 0
            self.tokenizer = train_tokenizer(texts.train, recipe.vocab_size)
        self.train = encode(texts.train, self.tokenizer)
        self.validation = encode(texts.validation, self.tokenizer)
        self._sampler = WindowSampler(self.train, recipe.context_length, recipe.seed)
        self.bf16 = bf16_is_faster(self.model, self._sampler.next_batch(recipe.batch_size))
        self._sampler.seek(epoch, cursor)

    def save(self) -> None:
        """Write the checkpoint; a crash meanwhile leaves the previous one intact."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for optimizer in self._optimizers:
            for index, moments in optimizer.state_dict()["state"].items():
                prefix = f"{type(optimizer).__name__}.{index}"
                tensors |= {f"{prefix}.{name}": tensor for name, tensor in moments.items()}
        state = {
            "identity": self._identity,
            "tokenizer": self.tokenizer.to_str(),
            "steps": self.steps,
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "loss": self.loss,
            "data": (self._sampler.epoch, self._sampler.cursor),
        }
        partial = self._checkpoint.with_suffix(".partial")
        save_file(tensors, partial, {"state": json.dumps(state)})
        os.replace(partial, self._checkpoint)

    def _load(self) -> tuple[int, int]:
        """Read the checkpoint and return the sampler's state."""
        with safe_open(self._checkpoint, "pt") as file:
            state = json.loads(file.metadata()["state"])
            if state["identity"] != self._identity:
                raise ValueError(
                    f"{self._checkpoint} belongs to another recipe or another standard library: "
                    "choose another --work-dir, or delete the file to start over"
                )
            states = {type(o).__name__: o.state_dict() for o in self._optimizers}
            for key in file.keys():  # noqa: SIM118 - no dictionary
                kind, _, name = key.partition(".")
                if kind == "model":
                    self.model.get_parameter(name).data.copy_(file.get_tensor(key))
                else:
                    index, _, moment = name.partition(".")
                    moments = states[kind]["state"].setdefault(int(index), {})
                    moments[moment] = file.get_tensor(key)
        for optimizer in self._optimizers:
            optimizer.load_state_dict(states[type(optimizer).__name__])
        self.tokenizer = Tokenizer.from_str(state["tokenizer"])
        self.steps, self.loss = state["steps"], state["loss"]
        self.cpu_seconds, self.wall_seconds = state["cpu_seconds"], state["wall_seconds"]
        print(f"continuing after {self.steps} steps", file=sys.stderr)
        epoch, cursor = state["data"]
        return epoch, cursor

    def run(self, budget: float, save_every: float) -> bool:
        """Train until ``budget`` seconds of CPU time are spent, all sittings together.

        CPU time is wall time by threads on a machine that does nothing else, and what other work
        takes is not lost.

        Args:
            budget: CPU seconds, summed over threads.
            save_every: CPU seconds between two checkpoints.

        Returns:
            Whether the budget is spent; False after an interrupt, which leaves a checkpoint.
        """
        interrupts: list[int] = []  # heeded between two steps, so that none is cut in half
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _frame: interrupts.append(received))
        saved_at = self.cpu_seconds
        layout = "{percentage:3.0f}% |{bar:24}| {elapsed}, left {remaining}{postfix}"
        with tqdm(total=budget, initial=min(saved_at, budget), bar_format=layout) as bar:
            while self.cpu_seconds < budget and not interrupts:
                cpu, wall = time.process_time(), time.monotonic()
                self._step(self.cpu_seconds / budget)
                self.cpu_seconds += time.process_time() - cpu
                self.wall_seconds += time.monotonic() - wall
                bar.set_postfix_str(
                    f"step {self.steps}, epoch {self._sampler.epoch}, loss {self.loss:.3f}",
                    refresh=False,
                )
                bar.update(min(self.cpu_seconds, budget) - bar.n)
                if self.cpu_seconds - saved_at >= save_every:
                    self.save()
                    saved_at = self.cpu_seconds
        self.save()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self.cpu_seconds >= budget

    def _step(self, progress: float) -> None:
        """Do one step at a share of the time budget; ``loss`` is a running mean."""
        loss = loss_of(self.model, self._sampler.next_batch(self.recipe.batch_size), bf16=self.bf16)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * self.recipe.learning_rate_factor(progress)
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        self.loss = loss.item() if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss.item()
