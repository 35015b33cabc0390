"""Train NanoFlow's demo model: a small Llama that completes Python code.

The text is the Python standard library of the interpreter that runs this script. The result is a
folder in the standard Hugging Face layout, with its own byte-level BPE tokenizer, a chat template
and a model card. Training is bound by time, not by steps: the learning rate follows the share of
``--max-minutes`` that is spent, so it reaches zero whatever the speed of the machine. It can be
interrupted at any time; the same command continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch
from demo_model.export import export
from demo_model.training import Recipe, Training

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the demo model on the Python standard library's source text. "
        "Interrupt it at any time: the same command continues from the last checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for flag, default, meaning in (
        ("--max-minutes", 40.0, "training time, all sittings together, as CPU time per thread"),
        ("--save-every", 2.0, "the same between two checkpoints"),
        ("--threads", torch.get_num_threads(), "CPU threads to use"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=meaning)
    for flag, folder, meaning in (
        ("--output-dir", ROOT / "models" / "nanoflow-demo", "the model, replaced if it exists"),
        ("--work-dir", ROOT / "build" / "demo-model", "where the checkpoint is kept"),
    ):
        parser.add_argument(flag, type=Path, default=folder, help=meaning)
    arguments = parser.parse_args()
    for flag in ("max_minutes", "save_every", "threads"):
        value = getattr(arguments, flag)
        if not 0 < value < math.inf:
            parser.error(f"--{flag.replace('_', '-')} must be above 0 and finite, got {value}")
    return arguments


def main() -> int:
    """Train or continue, then write and measure the model; return the exit status."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        training = Training(Recipe(), arguments.work_dir / "checkpoint.safetensors")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    cpu_seconds = 60 * arguments.threads  # in a minute
    if not training.run(arguments.max_minutes * cpu_seconds, arguments.save_every * cpu_seconds):
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    folder: Path = arguments.output_dir
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    export(training, new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
