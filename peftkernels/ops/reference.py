"""What every operator means, in plain PyTorch, at any floating-point precision.

This file is the oracle: it is written to be read, it imports nothing else of the package, and it is run in float64
to judge every other implementation. Rank states are 0 (DEAD), 1 (PROBE) and 2 (ACTIVE); see `rank_plan.RankState`.

    X = drop(x)        S = X·Aᵀ        y = x·Wᵀ + bias + scaling · (S ⊙ ĝ)·Bᵀ        ĝ_i = gate_i if ACTIVE, else 0
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if p == 0.0:
        return x
    assert seed is not None
    return x * dropout_factor(seed, p, x.shape[0], x.shape[1]).to(x.dtype)


def _live_factors(
    lora_A: Tensor, lora_B: Tensor, gate: Tensor | None, rank_state: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Indices of the live ranks, their rows of A, columns of B, gates, and which of them are ACTIVE."""
    r = lora_A.shape[0]
    state = torch.full((r,), 2, device=lora_A.device) if rank_state is None else rank_state
    live = (state > 0).nonzero().squeeze(1)
    gates = torch.ones(r, dtype=dtype, device=lora_A.device) if gate is None else gate.reshape(-1).to(dtype)
    return live, lora_A.to(dtype)[live], lora_B.to(dtype)[:, live], gates[live], state[live] == 2


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    rank_state: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    given_shrink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output y (..., N) in x's dtype and the shrink S (M, r), float32 where x is float16; a DEAD rank's column of S
    is zero.

    An S that is given stands in the place of drop(x)·Aᵀ, whatever it holds.

    x (..., K), weight (N, K), lora_A (r, K), lora_B (N, r), bias (N,), gate (r,) or (r, 1), rank_state uint8 (r,),
    dropout_seed int64 (). Factors and gate may have any float dtype and are cast to S's.
    """
    dtype, low = x.dtype, rank_dtype(x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    live, factor_A, factor_B, gates, active = _live_factors(lora_A, lora_B, gate, rank_state, low)

    if given_shrink is None:
        shrink_live = _dropped(rows.to(low), dropout_p, dropout_seed) @ factor_A.T
    else:
        shrink_live = given_shrink[:, live]
    gated = shrink_live[:, active] * gates[active] * scaling
    y = rows @ weight.to(dtype).T + gated.to(low) @ factor_B[:, active].T
    if bias is not None:
        y = y + bias.to(dtype)

    shrink = rows.new_zeros((rows.shape[0], lora_A.shape[0]), dtype=low)
    shrink[:, live] = shrink_live
    return y.to(dtype).reshape(*x.shape[:-1], weight.shape[0]), shrink


def lora_shrink(x: Tensor, lora_A: list[Tensor]) -> Tensor:
    """S = x·Aᵀ of several adapters side by side, (M, Σr) in x's dtype, or in float32 where that is float16."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(rank_dtype(x.dtype))
    return torch.cat([rows @ factor.to(rows.dtype).T for factor in lora_A], 1)


def lora_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    shrink: Tensor,
    rank_state: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, lora_A, lora_B, bias and gate, given G = ∂L/∂y (..., N) and the forward's shrink S.

    H = G·B      ∂gate_i = scaling · Σ_t S_ti·H_ti                      (ACTIVE and PROBE)
    ∂A_i = scaling · ĝ_i · Σ_t H_ti·X_t      ∂B_i = scaling · ĝ_i · Σ_t S_ti·G_t      (ACTIVE; zero elsewhere)
    ∂x = G·W + drop'(scaling · (H ⊙ ĝ)·A)      ∂W = Gᵀ·x      ∂bias = Σ_t G_t
    """
    dtype, low = x.dtype, rank_dtype(x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    grads = grad_y.reshape(rows.shape[0], weight.shape[0])
    live, factor_A, factor_B, gates, active = _live_factors(lora_A, lora_B, gate, rank_state, low)

    expanded = grads.to(low) @ factor_B
    gated_grad = (expanded[:, active] * gates[active] * scaling).to(low)
    gated_shrink = (shrink[:, live][:, active] * gates[active] * scaling).to(low)

    grad_A = torch.zeros_like(lora_A)
    dropped = _dropped(rows.to(low), dropout_p, dropout_seed)
    grad_A[live[active]] = (gated_grad.T @ dropped).to(lora_A.dtype)
    grad_B = torch.zeros_like(lora_B)
    grad_B[:, live[active]] = (grads.to(low).T @ gated_shrink).to(lora_B.dtype)

    gate_like = torch.ones(lora_A.shape[0], dtype=dtype, device=x.device) if gate is None else gate
    grad_gate = torch.zeros_like(gate_like)
    grad_gate.view(-1)[live] = ((shrink[:, live] * expanded).sum(0) * scaling).to(gate_like.dtype)

    grad_x = grads @ weight.to(dtype) + _dropped(gated_grad @ factor_A[active], dropout_p, dropout_seed)
    return grad_x.to(dtype).reshape(x.shape), grads.T @ rows, grad_A, grad_B, grads.sum(0), grad_gate
