"""HF peft's AdaLoRA in a training loop of one's own, on peftkernels' kernels and beside stock peft:

    python examples/own_loop.py                          # a small Llama made from a configuration, nothing downloaded
    python examples/own_loop.py --model DIR              # a causal language model that save_pretrained() wrote

Needs `pip install 'peftkernels[hf]'`. What a loop must not forget: `update_and_allocate` after every optimizer step and
before `zero_grad`. Without it AdaLoRA never gives up a rank.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from side_by_side import Step, base_model, parser, race
from torch import Tensor

import peftkernels


def training_step(model: Any) -> Step:
    """One step of AdamW and of the rank allocator on a batch; gives the loss, the orthogonality term included."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=True)
    done = 0

    def step(ids: Tensor) -> float:
        nonlocal done
        done += 1
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(done)
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def kept_ranks(model: Any) -> int:
    """Ranks that the last mask kept."""
    return sum(sum(kept) for kept in model.peft_config["default"].rank_pattern.values())


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)

    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=options.rank,
        target_r=max(1, options.rank // 2),
        lora_alpha=4 * options.rank,
        lora_dropout=options.dropout,
        orth_reg_weight=0.1,
        total_step=options.steps,
        tinit=1,
        tfinal=options.steps // 3,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        # Without a task peft leaves the orthogonality term out of the loss.
        task_type="CAUSAL_LM",
    )
    stock = get_peft_model(base_model(options.model), config)
    # peft re-creates it as a trainable parameter on bases that are not float32; it is a constant of the scale.
    for name, parameter in stock.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    patched = copy.deepcopy(stock)
    print(peftkernels.apply_to_peft(patched), "\n")

    steps = {"stock peft": training_step(stock), "peftkernels": training_step(patched)}
    race(steps, stock.get_input_embeddings().num_embeddings, options.steps, options.tokens)
    print(f"ranks kept at the end: {kept_ranks(stock)} stock, {kept_ranks(patched)} patched")
    print(peftkernels.stats(patched))


if __name__ == "__main__":
    main()
