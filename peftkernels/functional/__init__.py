"""The public operators: argument checks, the choice of a backend, and one autograd boundary per call."""

from peftkernels.functional.frozen_weights import weights_changed
from peftkernels.functional.function import LoraLinearFunction
from peftkernels.functional.linear import explain, lora_linear
from peftkernels.functional.shrink import shared_shrink

__all__ = ["LoraLinearFunction", "explain", "lora_linear", "shared_shrink", "weights_changed"]
