"""Choosing a backend: it acts or it raises, it says once what auto chose, and it ends with its block."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from hinny.errors import BackendError
from hinny.ops import backend, causal_conv, use_backend

X, WEIGHT = torch.ones(1, 2, 3), torch.ones(3, 4)


def _forget() -> None:
    for remembered in (backend._no_kernels, backend._no_kernel_for, backend._say_choice, backend.interpreting):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    _forget()
    yield
    _forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU; its tensors are still on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, on whatever machine this runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_is_torch_for_tensors_of_the_cpu() -> None:
    assert backend.asked() == "auto"
    assert backend.chosen(X) == "torch"
    with use_backend("auto"):
        assert backend.chosen(X.double()) == "torch"


@pytest.mark.usefixtures("no_gpu")
def test_kernels_asked_for_by_name_are_refused_without_a_gpu() -> None:
    with pytest.raises(BackendError, match=r"'triton': this machine has no GPU\. Use auto, torch or reference here"), \
            use_backend("triton"):
        pass
    assert backend.asked() == "auto"


def test_kernels_asked_for_by_name_are_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="Triton is not installed"), use_backend("triton"):
        pass


@pytest.mark.usefixtures("gpu")
def test_kernels_asked_for_by_name_refuse_a_tensor_of_the_cpu() -> None:
    with use_backend("triton"), pytest.raises(BackendError, match="the tensor is on cpu, and kernels run on a GPU"):
        causal_conv(X, WEIGHT)
    assert backend.chosen(X) == "torch"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_kernels_asked_for_by_name_refuse_a_dtype_they_have_not(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _forget()
    name = str(dtype).removeprefix("torch.")
    with use_backend("triton"), pytest.raises(BackendError, match=f"the tensor is {name}, and kernels take float32"):
        backend.chosen(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("dtype", backend.KERNEL_DTYPES)
def test_the_interpreter_takes_tensors_of_the_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _forget()
    with use_backend("triton"):
        assert backend.chosen(torch.ones(2, dtype=dtype)) == "triton"


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"'cuda' is not known\. Use one of auto, triton, torch, reference"), \
            use_backend("cuda"):
        pass


def test_the_choice_ends_with_its_block_also_after_an_error() -> None:
    assert backend.chosen(X) == "torch"
    with use_backend("reference"):
        assert backend.chosen(X) == "reference"
        with use_backend("auto"):
            assert backend.chosen(X) == "torch"
        assert backend.chosen(X) == "reference"
    with pytest.raises(ValueError, match="must"), use_backend("reference"):
        causal_conv(torch.ones(1, 2, 3), torch.ones(2, 4))
    assert backend.asked() == "auto"
    assert backend.chosen(X) == "torch"


def test_threads_share_the_choice_as_those_that_recompute_checkpoints_must() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.chosen(X)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.usefixtures("no_gpu")
def test_auto_says_once_what_it_chose_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            causal_conv(X, WEIGHT)
    assert [r.message for r in caplog.records] == ["ops backend: auto chose torch (this machine has no GPU)"]


def test_the_ops_do_not_import_triton_before_a_kernel_runs() -> None:
    code = "import sys, torch, hinny.ops as ops; ops.causal_conv(torch.ones(1, 2, 3), torch.ones(3, 4)); " \
           "sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
