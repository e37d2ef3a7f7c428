"""What every operator means, in plain PyTorch, at any floating-point precision.

This file is the oracle: it is written to be read, it takes nothing but the records of a call from the package, and it
is run in float64 to judge every other implementation. Rank states are 0 (DEAD), 1 (PROBE) and 2 (ACTIVE); see
`rank_plan.RankState`.

    X = drop(x)        S = X·Aᵀ        y = x·Wᵀ + bias + scaling · (S ⊙ ĝ)·Bᵀ        ĝ_i = gate_i if ACTIVE, else 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkernels.ops.call import Adapter, Backward, Forward, Shrink

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: four int64 tensors of one shape, key: two int64 tensors that broadcast against them; every value holds
    an unsigned 32-bit word. Returns four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product may wrap around the sign bit; shift and mask recover its two unsigned halves.
        product0 = c0 * _PHILOX_MULTIPLIERS[0]
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """The smallest 32-bit word that keeps an element: an element is kept where its random word is >= round(p·2³²)."""
    return round(p * 2.0**32)


def dropout_factor(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """What each element of x, viewed as (rows, columns), is multiplied by: 0 with probability p, else 1/(1-p).

    Element i = row·columns + column takes word i mod 4 of philox4x32_10 at counter (i div 4, as two words), 0, 0 and
    key `seed` (two words). Returns float64 (rows, columns) on the seed's device; p = 1 gives zeros.
    """
    device = seed.device
    if p >= 1.0:
        return torch.zeros((rows, columns), dtype=torch.float64, device=device)
    count = rows * columns
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    words = philox4x32_10(
        (block & _MASK32, (block >> 32) & _MASK32, zero, zero), (seed & _MASK32, (seed >> 32) & _MASK32)
    )
    bits = torch.stack(words, dim=1).reshape(-1)[:count].reshape(rows, columns)
    return (bits >= dropout_threshold(p)).to(torch.float64) * (1.0 / (1.0 - p))


def rank_dtype(dtype: torch.dtype) -> torch.dtype:
    """What factors, S and H are computed in: float16 is too low for them."""
    return torch.float32 if dtype is torch.float16 else dtype


def _dropped(x: Tensor, adapter: Adapter) -> Tensor:
    if adapter.dropout_p == 0.0:
        return x
    assert isinstance(adapter.dropout_seed, Tensor)
    return x * dropout_factor(adapter.dropout_seed, adapter.dropout_p, x.shape[0], x.shape[1]).to(x.dtype)


def _live_factors(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Indices of the live ranks, their rows of A, columns of B, gates, and which of them are ACTIVE."""
    lora_A, lora_B, gate = adapter.lora_A, adapter.lora_B, adapter.gate
    r = lora_A.shape[0]
    state = torch.full((r,), 2, device=lora_A.device) if adapter.rank_state is None else adapter.rank_state
    live = (state > 0).nonzero().squeeze(1)
    gates = torch.ones(r, dtype=dtype, device=lora_A.device) if gate is None else gate.reshape(-1).to(dtype)
    return live, lora_A.to(dtype)[live], lora_B.to(dtype)[:, live], gates[live], state[live] == 2


def lora_linear_forward(call: Forward) -> tuple[Tensor, Tensor]:
    """The output y (..., N) in x's dtype and the shrink S (M, r), float32 where x is float16; a DEAD rank's column of S
    is zero.

    An S that is given stands in the place of drop(x)·Aᵀ, whatever it holds. Factors and gate may have any float dtype
    and are cast to S's.
    """
    x, adapter = call.x, call.adapter
    dtype, low = x.dtype, rank_dtype(x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    live, factor_A, factor_B, gates, active = _live_factors(adapter, low)

    if call.given_shrink is None:
        shrink_live = _dropped(rows.to(low), adapter) @ factor_A.T
    else:
        shrink_live = call.given_shrink[:, live]
    gated = shrink_live[:, active] * gates[active] * adapter.scale
    y = rows @ call.weight.to(dtype).T + gated.to(low) @ factor_B[:, active].T
    if call.bias is not None:
        y = y + call.bias.to(dtype)

    shrink = rows.new_zeros((rows.shape[0], adapter.lora_A.shape[0]), dtype=low)
    shrink[:, live] = shrink_live
    return y.to(dtype).reshape(*x.shape[:-1], call.weight.shape[0]), shrink


def lora_shrink(call: Shrink) -> Tensor:
    """S = x·Aᵀ of several adapters side by side, (M, Σr) in x's dtype, or in float32 where that is float16."""
    x = call.x
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(rank_dtype(x.dtype))
    return torch.cat([rows @ factor.to(rows.dtype).T for factor in call.lora_A], 1)


def lora_linear_backward(call: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All gradients, needed or not, of x, weight, lora_A, lora_B, bias and gate, given G = ∂L/∂y (..., N), x and S.

    H = G·B      ∂gate_i = scaling · Σ_t S_ti·H_ti                      (ACTIVE and PROBE)
    ∂A_i = scaling · ĝ_i · Σ_t H_ti·X_t      ∂B_i = scaling · ĝ_i · Σ_t S_ti·G_t      (ACTIVE; zero elsewhere)
    ∂x = G·W + drop'(scaling · (H ⊙ ĝ)·A)      ∂W = Gᵀ·x      ∂bias = Σ_t G_t
    """
    x, shrink, gate, adapter = call.x, call.shrink, call.gate, call.adapter
    assert x is not None and shrink is not None
    dtype, low = x.dtype, rank_dtype(x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    grads = call.grad_y.reshape(rows.shape[0], call.weight.shape[0])
    live, factor_A, factor_B, gates, active = _live_factors(adapter, low)

    expanded = grads.to(low) @ factor_B
    gated_grad = (expanded[:, active] * gates[active] * adapter.scale).to(low)
    gated_shrink = (shrink[:, live][:, active] * gates[active] * adapter.scale).to(low)

    grad_A = torch.zeros_like(adapter.lora_A)
    grad_A[live[active]] = (gated_grad.T @ _dropped(rows.to(low), adapter)).to(grad_A.dtype)
    grad_B = torch.zeros_like(adapter.lora_B)
    grad_B[:, live[active]] = (grads.to(low).T @ gated_shrink).to(grad_B.dtype)

    gate_like = torch.ones(grad_A.shape[0], dtype=dtype, device=x.device) if gate is None else gate
    grad_gate = torch.zeros_like(gate_like)
    grad_gate.view(-1)[live] = ((shrink[:, live] * expanded).sum(0) * adapter.scale).to(gate_like.dtype)

    grad_x = grads @ call.weight.to(dtype) + _dropped(gated_grad @ factor_A[active], adapter)
    return grad_x.to(dtype).reshape(x.shape), grads.T @ rows, grad_A, grad_B, grads.sum(0), grad_gate
