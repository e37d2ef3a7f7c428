"""How wrong the orthogonality term may be that is computed with sums in float32.

    G = A·Aᵀ    M = G - I    value w/(2n)·Σ‖M‖_F    gradient g = c·M·A, c = (w/n)/‖M‖_F    (B: Bᵀ·B and c·B·M)

The error does not scale with the result: entries of G near 1 lose their leading digits to I, and what remains of their
rounding is multiplied by A/‖M‖_F. So the bounds are computed, in float64, from the factors themselves.

A rounding to a number s is off by at most u·|s|, u = 2⁻²⁴, and uniform within that: its standard deviation is at most
u·|s|/√3. In a chain of n additions, in whatever order, the partial sum after j of them is about j/n of the whole sum
where terms have one sign, and √(j/n) of the root of the sum of the terms' squares where they do not. Both lie below
√(j/n)·scale with scale² = Σ terms² + (Σ terms)², which is 2·(Σ terms)² at most for terms of one sign. So the sum's
error has the standard deviation u/√3·√(Σ_j j/n)·scale = u·√(n/6)·scale, and six of them are

    chain(n, scale) = √6·u·√n·scale

which 32768 numbers exceed once in 15000 draws if every estimate above is met with equality. Roundings that do not grow
with n are counted with the whole u. Errors of different entries of G are independent and add as the root of the sum of
their squares, but for the two of an entry and its mirror image, which are one number.

    δ_ij   = chain(K, scale of Σ_k A_ik·A_jk) + u·|M_ij|        M, the subtraction rounded too
    η      = √(2·Σ(M_ij·δ_ij)²)/‖M‖_F + u·(√3·r + 1)·‖M‖_F   ‖M‖_F: half the error of Σ M_ij², and the root
    |Δg|   = c·√(Σ_j δ_ij²·A_jk²) + c·chain(r + 1, scale of Σ_j M_ij·A_jk) + (η/‖M‖_F + 4u)·|g|
    |Δvalue| = w/(2n)·√Σ η² + chain(2n, √2·value) + 3u·value

In g the r terms may each be rounded once more, where c is multiplied into M, and 4u are those of w/n, c, a product by c
and M's product by it; in value 3u are those of w/(2n), of the product by it and of the result. Ranks that take no part
are zeros, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_U = 2.0**-24


def _chain(additions: int, scale: Tensor) -> Tensor:
    return (6 * additions) ** 0.5 * _U * scale


def _scale(squares: Tensor, total: Tensor) -> Tensor:
    """Of sums whose terms' squares add up to `squares`."""
    return (squares + total.square()).sqrt()


def _of_factor(lines: Tensor, kept: Tensor | None, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """‖M‖_F, its error, and the error of the gradient, for a factor (r, K) in float64."""
    r, count = lines.shape
    kept = torch.ones(r, dtype=torch.bool, device=lines.device) if kept is None else kept
    rows = lines.where(kept[:, None], 0.0)
    gram = rows @ rows.T
    matrix = gram - torch.diag(kept.double())
    error = _chain(count, _scale(rows.square() @ rows.square().T, gram)) + _U * matrix.abs()
    norm = torch.linalg.vector_norm(matrix)
    if not norm:
        return norm, torch.zeros_like(norm), torch.zeros_like(rows)
    norm_error = 2**0.5 * torch.linalg.vector_norm(matrix * error) / norm + _U * (3**0.5 * r + 1) * norm
    product, coefficient = matrix @ rows, 2 * share / norm
    from_matrix = (error.square() @ rows.square()).sqrt()
    from_sums = _chain(r + 1, _scale(matrix.square() @ rows.square(), product))
    from_coefficient = (norm_error / norm + 4 * _U) * product.abs()
    return norm, norm_error, coefficient * (from_matrix + from_sums + from_coefficient)


def term_errors(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weight: float, keep: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Bounds for the error of `AllocationKernels.orthogonality`'s value and, element by element, of its gradients."""
    n = len(lora_A)
    share = weight / (2 * n)
    lines = [*(a.double() for a in lora_A), *(b.double().T for b in lora_B)]
    found = [_of_factor(each, None if keep is None else keep[i % n], share) for i, each in enumerate(lines)]
    norms, norm_errors = torch.stack([norm for norm, _, _ in found]), torch.stack([error for _, error, _ in found])
    value = share * norms.sum()
    of_value = share * torch.linalg.vector_norm(norm_errors) + _chain(2 * n, 2**0.5 * value) + 3 * _U * value
    return of_value, [error if i < n else error.T for i, (_, _, error) in enumerate(found)]


def added_error(error: Tensor, gradient: Tensor, scale: float, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A bound for what differs from `exact`, in tensors of `dtype` to which scale·gradient was added.

    The product is rounded in float32 and to `dtype`, and the sum to `dtype`, each by half a unit in its last place.
    """
    half, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    part = abs(scale) * (error + _U * gradient.abs())
    part = part + half * (abs(scale) * gradient.abs() + part) + smallest / 2
    return part + half * (exact.abs() + part) + smallest / 2


def assert_within(found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Every element of `found` is off from `exact` by no more than `allowed`."""
    off = (found.double() - exact).abs()
    # Not `(off <= allowed).all()` alone: the message says by how much, and a NaN is no pass.
    if not bool((off <= allowed).all()):
        share = (off / allowed).nan_to_num(torch.inf, torch.inf)
        worst = int(share.argmax())
        raise AssertionError(
            f"{tuple(found.shape)}: element {worst} is off by {float(off.view(-1)[worst]):.3e}, allowed are "
            f"{float(allowed.reshape(-1)[worst]):.3e}"
        )
