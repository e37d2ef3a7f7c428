"""What a patched module keeps beside peft's own: its settings, and how many of its calls our kernels served."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.compiler import is_dynamo_compiling

from peftkernels.integrations.peft.norms import KeptNorms
from peftkernels.integrations.peft.patched_model import PatchedModel
from peftkernels.integrations.peft.sharing import SharedInput

ATTRIBUTE = "_peftkernels"


class NotServedError(RuntimeError):
    """Raised under ``strict=True`` where a call of an adapter would run peft's own code."""


@dataclass
class Service:
    """Settings and counts of one adapted module that `apply_to_peft` has looked at.

    Attributes:
        impl: the implementation of `lora_linear`.
        strict: True where a call that cannot be served raises instead of running peft's own code.
        refusal: why the module was left as it is; None where it is patched.
        served: adapter calls that ran on our kernels; those inside a compiled program are not counted.
        fell_back: adapter calls that ran peft's own code.
        reasons: how many of these for which reason.
        shared: served calls whose x·Aᵀ was made together with that of others.
        input: what the module shares with its siblings; None where it has none.
        model: what the module shares with all others of the model; None where it stands for many models.
        norms: DoRA's norms, inside `frozen`; not part of copies and files.
        undo: what was changed besides the class, to be put back: the base layer's attributes by name.
    """

    impl: str = "auto"
    strict: bool = False
    refusal: str | None = None
    served: int = 0
    fell_back: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    input: SharedInput | None = None
    model: PatchedModel | None = None
    norms: KeptNorms | None = None
    undo: dict[str, Any] = field(default_factory=dict)

    def serve(self) -> None:
        """Count a call that is served."""
        # A compiled program that counted would be compiled anew for every count.
        if not is_dynamo_compiling():
            self.served += 1

    def take_back(self) -> None:
        """The call that was counted last is not served after all."""
        if not is_dynamo_compiling():
            self.served -= 1

    def fall_back(self, module: str, reason: str) -> None:
        """Count a call that runs peft's own code.

        Raises:
            NotServedError: under ``strict``.
        """
        if self.strict:
            raise NotServedError(f"{module}: strict=True, and peftkernels cannot serve the call: {reason}")
        if not is_dynamo_compiling():
            self.fell_back += 1
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def reset(self) -> None:
        """Forget all counts."""
        self.served = self.fell_back = self.shared = 0
        self.reasons.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "norms": None}
