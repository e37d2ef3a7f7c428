"""Which of peft's classes of layers is served by which of ours."""

from __future__ import annotations

from typing import Any

from peft.import_utils import is_bnb_4bit_available
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear

from peftkernels.integrations.peft.layers import PeftKernelsLinear, PeftKernelsSVDLinear

CLASSES: dict[type, Any] = {Linear: PeftKernelsLinear, SVDLinear: PeftKernelsSVDLinear}
# Those of them that AdaLoRA makes; LoRA the others.
ADALORA: set[type] = {SVDLinear}

if is_bnb_4bit_available():
    from peft.tuners.adalora.bnb import SVDLinear4bit
    from peft.tuners.lora.bnb import Linear4bit

    from peftkernels.integrations.peft.quantised import PeftKernelsLinear4bit, PeftKernelsSVDLinear4bit

    CLASSES |= {Linear4bit: PeftKernelsLinear4bit, SVDLinear4bit: PeftKernelsSVDLinear4bit}
    ADALORA.add(SVDLinear4bit)
