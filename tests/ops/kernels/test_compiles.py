"""Every kernel with every shipped launch configuration compiles for every target, fits it, and spills no registers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from hinny.ops.kernels.compile import SHARED_LIMIT, TARGETS, Compilation, compile_for, kernel_modules
from hinny.ops.kernels.launches import FALLBACK, rules, tables


def _cases() -> list[pytest.param]:
    """(target, compilation): each target with the table that it is launched by, and the kernels meant for it."""
    return [pytest.param(target, case, id=f"{target}-{case.name}")
            for target in TARGETS for case in _compilations(target) if target in case.targets]


def _compilations(target: str) -> list[Compilation]:
    found = [case for module in kernel_modules()
             for case in module.compilations(target if target in tables() else FALLBACK)]
    # minutes of compiling: where there is neither a table of its own nor the least shared memory, dtypes and arguments
    # that may be left out are not tried one by one
    return _fullest(found) if target in ("sm80", "sm100") else found


def _fullest(cases: list[Compilation]) -> list[Compilation]:
    """For each kernel and configuration, the compilation with the most arguments."""
    best: dict[object, Compilation] = {}
    for case in cases:
        sizes = tuple(sorted((name, value) for name, value in case.constants.items() if type(value) is int))
        key = (case.kernel, case.num_warps, case.num_stages, sizes)
        if key not in best or len(case.signature) > len(best[key].signature):
            best[key] = case
    return list(best.values())


@pytest.mark.parametrize(("target", "case"), _cases())
def test_a_configuration_compiles_fits_and_spills_nothing(target: str, case: Compilation) -> None:
    report = compile_for(target, case)
    assert report.shared <= SHARED_LIMIT[target]
    if target == "sm90" and not case.may_spill:
        assert report.spills == 0, f"{report.spills} bytes a thread, {report.registers} registers"


def test_every_kernel_of_every_table_is_compiled() -> None:
    """A table's kernel that no compilation is named after would be launched unseen."""
    for name in tables():
        compiled = [case.name for module in kernel_modules() for case in module.compilations(name)]
        unseen = [kernel for kernel in rules(name) if not any(case.split("-")[0] == kernel for case in compiled)]
        assert not unseen, name
        assert len(compiled) == len(set(compiled)), "two compilations with one name"


def test_every_candidate_for_tuning_is_launched_like_the_shipped_ones() -> None:
    shipped = {kernel: found for name in tables() for kernel, found in rules(name).items()}
    for module in kernel_modules():
        for kernel, uses in module.candidates().items():
            keys = set(shipped[kernel][0]["use"])
            assert uses, kernel
            assert all(set(use) == keys for use in uses), kernel
