"""What the examples on HF peft share: a base model, and a race between a stock and a patched model."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

Step = Callable[[Tensor], float]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all examples have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, help="directory of a causal language model (default: a small Llama)")
    made.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    made.add_argument("--dropout", type=float, default=0.0, help="of the adapters' input (default 0)")
    made.add_argument("--steps", type=int, default=12, help="training steps of each model (default 12)")
    made.add_argument("--tokens", type=int, default=256, help="tokens of each of the two texts in a step (default 256)")
    return made


def base_model(path: Path | None) -> nn.Module:
    """The model in a directory, or a small Llama with random weights, made from a configuration."""
    if path is not None:
        found: nn.Module = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        return found
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=4096,
        )
    )


def race(steps: Mapping[str, Step], vocabulary: int, count: int, tokens: int) -> None:
    """Let both make `count` steps on the same random texts, in turns, so that what else the machine does falls on both;
    print the medians of their times, and of the ratios within a turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(count):
        ids = torch.randint(vocabulary, (2, tokens))
        # The one that goes first changes from turn to turn.
        for name in sorted(steps, reverse=bool(number % 2)):
            began = time.perf_counter()
            losses[name].append(steps[name](ids))
            seconds[name].append(time.perf_counter() - began)
    # The first steps fill caches.
    warm = {name: found[2:] or found for name, found in seconds.items()}
    for name, found in warm.items():
        milliseconds, curve = 1000 * statistics.median(found), losses[name]
        print(f"{name}: {milliseconds:.0f} ms a step, loss {curve[0]:.4f} → {curve[-1]:.4f}")
    stock, patched = warm.values()
    ratios = [theirs / ours for theirs, ours in zip(stock, patched, strict=True)]
    print(f"peftkernels is {statistics.median(ratios):.2f} times as fast")
