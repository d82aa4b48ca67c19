"""Choosing a backend: it acts or it raises, and it ends with its block."""

from __future__ import annotations

import logging

import pytest
import torch

from hinny.errors import BackendError
from hinny.ops import backend, causal_conv, use_backend


def test_triton_is_refused_because_there_are_no_kernels() -> None:
    with pytest.raises(BackendError, match="no kernels yet"), use_backend("triton"):
        pass


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"'cuda' is not known\. Use one of auto, torch, reference"), \
            use_backend("cuda"):
        pass


def test_the_choice_ends_with_its_block_also_after_an_error() -> None:
    assert backend.chosen() == "torch"
    with use_backend("reference"):
        assert backend.chosen() == "reference"
        with use_backend("auto"):
            assert backend.chosen() == "torch"
        assert backend.chosen() == "reference"
    with pytest.raises(ValueError, match="must"), use_backend("reference"):
        causal_conv(torch.ones(1, 2, 3), torch.ones(2, 4))
    assert backend.chosen() == "torch"


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    backend._say_choice.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            causal_conv(torch.ones(1, 2, 3), torch.ones(3, 4))
    assert [r.message for r in caplog.records] == ["ops backend: auto chose torch (this build has no kernels)"]
