"""HF peft's LoRA or DoRA on peftkernels' kernels, beside stock peft in the same run:

    python examples/peft_lora.py                         # a small Llama made from a configuration, nothing downloaded
    python examples/peft_lora.py --model DIR --dora      # a causal language model that save_pretrained() wrote

Needs `pip install 'peftkernels[hf]'`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import Step, base_model, parser, race
from torch import Tensor, nn

import peftkernels


def training_step(model: nn.Module) -> Step:
    """One step of AdamW on a batch; gives the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step(ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--dora", action="store_true", help="DoRA in place of LoRA")
    options = options_parser.parse_args(arguments)

    torch.manual_seed(0)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        use_dora=options.dora,
        target_modules="all-linear",
    )
    stock = get_peft_model(base_model(options.model), config)
    patched = copy.deepcopy(stock)
    print(peftkernels.apply_to_peft(patched), "\n")

    steps = {"stock peft": training_step(stock), "peftkernels": training_step(patched)}
    race(steps, stock.get_input_embeddings().num_embeddings, options.steps, options.tokens)
    print(peftkernels.stats(patched))


if __name__ == "__main__":
    main()
