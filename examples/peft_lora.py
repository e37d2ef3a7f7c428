"""HF peft's LoRA or DoRA on peftkernels' kernels, beside stock peft in the same run:

    python examples/peft_lora.py                         # a small Llama made from a configuration, nothing downloaded
    python examples/peft_lora.py --model DIR --dora      # a causal language model that save_pretrained() wrote

Needs `pip install 'peftkernels[hf]'`. Steps of the stock and the patched model take turns, so that what else the
machine does falls on both; printed are the medians of their times and of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftkernels


def base_model(path: Path | None) -> nn.Module:
    """A model of yours, or a small Llama with random weights."""
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
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


def training_step(model: nn.Module, lr: float) -> Callable[[Tensor], float]:
    """One step of AdamW on a batch; gives the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)

    def step(ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a causal language model (default: a small Llama)")
    parser.add_argument("--dora", action="store_true", help="DoRA in place of LoRA")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' input (default 0)")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each model (default 12)")
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens of each of the two texts in a step (default 256)"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base = base_model(options.model)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        use_dora=options.dora,
        target_modules="all-linear",
    )
    stock = get_peft_model(base, config)
    patched = copy.deepcopy(stock)
    print(peftkernels.apply_to_peft(patched), "\n")

    steps = {"stock peft": training_step(stock, 1e-3), "peftkernels": training_step(patched, 1e-3)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    vocabulary = stock.get_input_embeddings().num_embeddings
    for number in range(options.steps):
        ids = torch.randint(vocabulary, (2, options.tokens))
        # The one that goes first changes from turn to turn.
        for name in sorted(steps, reverse=bool(number % 2)):
            began = time.perf_counter()
            losses[name].append(steps[name](ids))
            seconds[name].append(time.perf_counter() - began)

    print(peftkernels.stats(patched), "\n")
    # The first steps fill caches.
    warm = {name: found[2:] or found for name, found in seconds.items()}
    for name, found in warm.items():
        milliseconds, curve = 1000 * statistics.median(found), losses[name]
        print(f"{name}: {milliseconds:.0f} ms a step, loss {curve[0]:.4f} → {curve[-1]:.4f}")
    ratios = [theirs / ours for theirs, ours in zip(warm["stock peft"], warm["peftkernels"], strict=True)]
    print(f"peftkernels is {statistics.median(ratios):.2f} times as fast")


if __name__ == "__main__":
    main()
