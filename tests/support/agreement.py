"""Asking two libraries whether their releases work together, before a test of ours needs them to."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def skip_unless_they_agree(ask: Callable[[], object]) -> None:
    """Skip in the libraries' own words where `ask`, a check of theirs, raises."""
    try:
        ask()
    except (ImportError, ValueError) as disagreement:
        pytest.skip(str(disagreement))


def transformers_takes_this_peft() -> None:
    """What `model.add_adapter` of transformers asks of peft; raises ValueError in its words."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    check_peft_version(min_version=MIN_PEFT_VERSION)
