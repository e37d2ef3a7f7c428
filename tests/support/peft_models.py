"""Small models with HF peft's adapters, and how far stock and patched ones are apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftkernels

VOCABULARY = 96
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def llama(layers: int = 2, width: int = 32) -> LlamaForCausalLM:
    """A causal language model of nn.Linear without biases."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
        )
    )


def bert() -> BertModel:
    """An encoder of nn.Linear with biases, without the pooler, whose adapters would get no gradient here."""
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def gpt2() -> GPT2LMHeadModel:
    """A causal language model of transformers' Conv1D, which keeps weights transposed."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "gpt2": gpt2}


def config(kind: str, model: str = "llama", **changes: Any) -> peft.PeftConfig:
    """peft's configuration of LoRA ("lora", "rslora", "lora-bias", "dora") or AdaLoRA ("adalora") for a model."""
    common = {"target_modules": TARGETS[model], "fan_in_fan_out": model == "gpt2", "lora_alpha": 6}
    if kind == "adalora":
        return peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 100, **common, **changes})
    special: dict[str, dict[str, Any]] = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "lora-bias": {"lora_bias": True},
        "base-bias": {"bias": "all"},
        "dora": {"use_dora": True},
    }
    return peft.LoraConfig(**{"r": 4, **common, **special[kind], **changes})


def adapted(kind: str, model: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A PeftModel whose factors are all away from zero (standard deviation 0.05: larger ones are ill-conditioned)."""
    torch.manual_seed(0)
    return away_from_zero(peft.get_peft_model(MODELS[model]().to(dtype), config(kind, model, **changes)))


class OneLayer(nn.Module):
    """y (…, 24) of x (…, 16) by one linear layer, `layer`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        found: Tensor = self.layer(x)
        return found


def one_layer(kind: str, **changes: Any) -> Any:
    """A stock PeftModel of one adapted layer, whose factors are away from zero."""
    torch.manual_seed(0)
    made = config(kind, **{"target_modules": ["layer"], **changes})
    return away_from_zero(peft.get_peft_model(OneLayer(), made))


def layer_in(model: Any) -> Any:
    """The adapted layer of `one_layer`."""
    return model.base_model.model.layer


def away_from_zero(model: Any) -> Any:
    """The model with factors drawn anew, and with `ranknum` as the constant that it is: peft makes it trainable on
    bases that are not float32."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, 0, 0.05)
        elif "magnitude" in name:
            with torch.no_grad():
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
        if "ranknum" in name:
            parameter.requires_grad_(False)
    return model


def pair(kind: str, model: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """The same model twice: stock, and patched in strict mode."""
    stock = adapted(kind, model, dtype, **changes)
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched, strict=True)
    return stock, patched


def tokens(seed: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    """Random input."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The language model's loss, or of an encoder the mean square of its output."""
    if isinstance(model.get_base_model(), BertModel):
        hidden: Tensor = model(input_ids=ids).last_hidden_state
        return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).float().square().mean()
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Of the loss, by parameter; the model's are cleared afterwards."""
    loss_of(model, ids).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ for every tensor; both must have the same names."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - own.double()).norm() / own.double().norm())
        for name, own in expected.items()
    }
