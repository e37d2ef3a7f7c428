"""Plots of a GPU's results: what an adapter costs beside the bare library product, as one thing grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import lineup
from bench.cases import DEAD, PASSES, PROBE, RANK, Case
from bench.gpu.cases import LIVE_RANK, LIVE_SHARES, MIDDLE, MIDDLE_TOKENS, RANKS, TOKENS
from bench.plots import Plot, RatioLines, draw_ratios, provenance
from bench.results import Row

_PEFT = (lineup.PEFT_LORA_BF16, lineup.PEFT_LORA_FP32, lineup.PEFT_ADALORA_BF16)
_EVERYONE = (lineup.OURS, lineup.FLOOR, *_PEFT, lineup.COMPILED)
_MASKED = (lineup.OURS, lineup.FLOOR, lineup.PEFT_ADALORA_BF16, lineup.PEFT_ADALORA_FP32)
_WIDTH = f"K = {MIDDLE[0]}, N = {MIDDLE[1]}"
_ROWS = MIDDLE_TOKENS[-1]
# The label of 8192 would run into that of 16384.
_TOKENS_SHOWN = tuple(m for m in TOKENS if m != 8192)


def draw_all(rows: Sequence[Row], folder: Path, prefix: str = "") -> list[Plot]:
    """Every plot that `rows` has at least two points of a line for, as PNG files in `folder`."""
    if not rows:
        return []
    found, note = RatioLines(rows), provenance(rows)
    folder.mkdir(parents=True, exist_ok=True)

    def layer(direction: str) -> Case:
        return Case(direction=direction, K=MIDDLE[0], N=MIDDLE[1], M=_ROWS, dtype="bf16", bias=False)

    tokens, ranks, shares = [], [], []
    for direction in PASSES:
        case = layer(direction)
        by_tokens = [(float(m), replace(case, M=m)) for m in TOKENS]
        tokens.append((direction, [found.line(name, by_tokens) for name in _EVERYONE]))
        by_rank = [(float(r), replace(case, r=r)) for r in RANKS]
        ranks.append((direction, [found.line(name, by_rank) for name in _EVERYONE if name != lineup.COMPILED]))
        by_share = [
            (float(share), replace(case, r=LIVE_RANK, live=share, masking=PROBE if share == 100 else DEAD))
            for share in LIVE_SHARES
        ]
        shares.append((direction, [found.line(name, by_share) for name in _MASKED]))
    plots = [
        draw_ratios(
            folder / f"{prefix}ratio-against-tokens.png",
            f"Cost of a LoRA layer against rows of x ({_WIDTH}, r = {RANK}, bf16)",
            note,
            tokens,
            "rows of x (tokens)",
            _TOKENS_SHOWN,
        ),
        draw_ratios(
            folder / f"{prefix}ratio-against-rank.png",
            f"Cost of a LoRA layer against its rank ({_WIDTH}, {_ROWS} rows, bf16)",
            note,
            ranks,
            "rank",
            RANKS,
        ),
        draw_ratios(
            folder / f"{prefix}ratio-against-active-share.png",
            f"Cost of an AdaLoRA layer against the share of ranks that are not DEAD ({_WIDTH}, {_ROWS} rows, "
            f"r = {LIVE_RANK}, bf16)",
            note,
            shares,
            "ACTIVE ranks, %",
            LIVE_SHARES,
            logarithmic=False,
        ),
    ]
    return [plot for plot in plots if plot is not None]
