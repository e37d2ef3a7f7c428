"""Who takes part in a case. Names are what result files, tables and goals call them."""

from __future__ import annotations

from dataclasses import dataclass

from bench.cases import ALLOCATOR, DEAD, MIDDLES, STRATEGIES, TRAINING, TRAINING_TOKENS, Case
from peftkernels.allocation.strategies import STRATEGIES as ALLOCATION_STRATEGIES

OURS = "peftkernels"
FROZEN = "frozen"
FLOOR = "library GEMM + addmm"
EAGER = "eager LoRA"
PEFT_LORA = "peft LoRA"
PEFT_ADALORA = "peft AdaLoRA"
# What peft makes of a bfloat16 base by default, and with autocast_adapter_dtype=False.
PEFT_LORA_FP32, PEFT_ADALORA_FP32 = "peft LoRA, fp32 factors", "peft AdaLoRA, fp32 factors"
PEFT_LORA_BF16, PEFT_ADALORA_BF16 = "peft LoRA, bf16 factors", "peft AdaLoRA, bf16 factors"
# The peft LoRA layer that is most like ours in a case of each dtype.
PEFT_LORA_OF = {"fp32": PEFT_LORA, "bf16": PEFT_LORA_BF16, "mixed": PEFT_LORA_FP32}
COMPILED = "peft LoRA, compiled"
HALF_RANK = "peftkernels, half the rank"
NO_DROPOUT = "peftkernels, no dropout"
OURS_LORA, OURS_ADALORA = "peftkernels LoRA", "peftkernels AdaLoRA"
PEFT_ALLOCATOR = "peft RankAllocator"
# Strategies go by their own names; the others are compared with this one.
ADALORA_STRATEGY = "adalora"


# Multiply-adds of a layer's product from which on a call takes so long that only the main contestants take part.
HEAVY = 30e9


def ours(case: Case) -> str:
    """The contestant that the others are compared with."""
    if case.operator == STRATEGIES:
        return ADALORA_STRATEGY
    return OURS_ADALORA if case.operator == TRAINING else OURS


NOWHERE, MIDDLE_WIDTHS, EVERYWHERE = "nowhere", "at the middle widths", "in every unmasked layer"


@dataclass(frozen=True)
class Extent:
    """Who takes part beside the usual contestants.

    Attributes:
        compiled: where peft under torch.compile does; compiling takes ten to forty seconds on two cores, once for each
            layer and pass.
        large: True where eager LoRA and all of peft's layers do in large cases, too.
    """

    compiled: str = MIDDLE_WIDTHS
    large: bool = False


USUAL, BRIEF, FULL = Extent(), Extent(compiled=NOWHERE), Extent(compiled=EVERYWHERE, large=True)


def compiles(case: Case, extent: Extent = USUAL) -> bool:
    """Return True if peft under torch.compile takes part."""
    if case.operator in (ALLOCATOR, STRATEGIES, TRAINING) or case.masking:
        return False
    usual = case.dtype == "fp32" and case.r == 16 and not case.dropout and case.bias
    middle = usual and (case.K, case.N) in MIDDLES and case.M in TRAINING_TOKENS
    return extent.compiled == EVERYWHERE or (extent.compiled == MIDDLE_WIDTHS and middle)


def contestants(case: Case, extent: Extent = USUAL) -> tuple[str, ...]:
    """Names of everyone in the case, the baseline first and ours last."""
    if case.operator == ALLOCATOR:
        return PEFT_ALLOCATOR, OURS
    if case.operator == STRATEGIES:
        return PEFT_ALLOCATOR, *ALLOCATION_STRATEGIES
    if case.operator == TRAINING:
        return FROZEN, OURS_LORA, OURS_ADALORA, PEFT_LORA, PEFT_ADALORA
    names = [FROZEN, FLOOR]
    if not extent.large and case.M * case.N * case.K > HEAVY:
        return *names, PEFT_LORA_OF[case.dtype], OURS
    if not case.masking:
        names.append(EAGER)
    if case.dtype == "fp32":
        names += [PEFT_ADALORA] if case.masking else [PEFT_LORA, PEFT_ADALORA]
    else:
        names += [PEFT_LORA_FP32, PEFT_ADALORA_FP32]
        names += [PEFT_LORA_BF16, PEFT_ADALORA_BF16] if case.dtype == "bf16" else []
    if compiles(case, extent):
        names.append(COMPILED)
    if case.masking == DEAD and case.live == 50:
        names.append(HALF_RANK)
    if case.dropout:
        names.append(NO_DROPOUT)
    return *names, OURS
