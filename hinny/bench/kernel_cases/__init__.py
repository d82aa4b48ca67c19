"""What `hinny bench kernels` times: one file a subject, one row of the result a case."""

from __future__ import annotations

from hinny.bench.kernel_cases import conv, decode, loss, norm, paged, scan, ssd, transformer
from hinny.bench.kernel_cases.case import Case

__all__ = ["Case", "all_cases"]


def all_cases() -> list[Case]:
    """Every case, in the order of the results."""
    return [case for subject in (ssd, conv, norm, decode, paged, scan, loss, transformer) for case in subject.cases()]
