"""Saved bytes count each storage once."""

from __future__ import annotations

import torch
from torch import nn

from demo.saved import bytes_saved_for_backward


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(8, 4, bias=False)
    model = nn.ModuleList([first, second])
    x = torch.randn(5, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        # Both layers save x (once: 160 bytes) and their weights (not counted); relu saves its output (320 bytes).
        return torch.relu(first(x)).sum() + second(x).sum()

    assert bytes_saved_for_backward(forward, model.parameters()) == 5 * 8 * 4 + 5 * 16 * 4


def test_saved_bytes_are_none_without_gradients() -> None:
    model = nn.Linear(8, 16).requires_grad_(False)
    assert bytes_saved_for_backward(lambda: model(torch.randn(5, 8)).sum(), model.parameters()) == 0
