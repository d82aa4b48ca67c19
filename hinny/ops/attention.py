"""Causal softmax attention with shared key/value heads.

    y_i = sum over j <= i of softmax_j(q_i . k_j / sqrt(p)) v_j      within a document

arXiv 1706.03762 section 3.2, 2305.13245 (shared heads).
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hinny.ops import backend
from hinny.ops.inputs import check_rank, check_shapes, count_documents, wide, without_autocast


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, lengths: Tensor | None = None,
) -> Tensor:
    """Each query's weighted mean of the values up to its own position.

    q (b t h p); k, v (b s g p), s >= t: the queries are at the last t positions; query head i reads key/value head
    i // (h/g); segments (b s) int: nothing is read across a change of id. lengths (b,) int64, t to s: row r has the
    first lengths[r] keys alone, and the queries are at the last t of these; the other keys may be any finite numbers.
    Lengths and segments exclude each other, and the numbers in lengths are checked on the CPU alone.
    Returns y (b t h p) in q's dtype.
    With segments a mask (b t s) of booleans is made, with lengths (b t*h/g s); none on a GPU in bfloat16 or float16
    without them, nor with lengths where no gradient is recorded, nor with segments where kernels of ours take them:
    in these types, with as many queries as keys and p of 16, 32, 64 or 128.
    Raises ValueError for shapes that do not fit.
    """
    if backend.asked() == "reference":
        return attention_reference(q, k, v, segments=segments, lengths=lengths)
    _check(q, k, v, segments, lengths)
    if segments is not None and backend.chosen(q) == "triton":
        from hinny.ops.kernels import attention as kernels  # here alone: Triton is imported where it runs

        if kernels.takes(q, k):
            return kernels.attention(q, k, v, segments)
    if lengths is not None:
        return _counted(q, k, v, lengths) if _counts_keys(q, k, v) else _of_unequal_rows(q, k, v, lengths)
    t, s, heads, groups = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    # a single query sees all keys; torch's is_causal puts query 0 at key 0, right only if s == t
    causal = segments is None and s == t and t > 1
    if segments is None and 1 < t < s and q.is_cuda:
        mask: Tensor | None = last_queries(t, s)
    else:
        mask = None if causal or (segments is None and t == 1) else visible(t, s, q.device, segments)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       is_causal=causal, enable_gqa=heads != groups)
    return y.transpose(1, 2).to(q.dtype)


def _of_unequal_rows(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """`attention` with lengths. The query heads that share a key head become queries of one head: torch's kernels take
    a mask or shared heads, and would else hold all scores.
    """
    b, t, heads, p = q.shape
    groups, repeat = k.shape[2], heads // k.shape[2]
    queries = q.view(b, t, groups, repeat, p).permute(0, 2, 1, 3, 4).reshape(b, groups, t * repeat, p)
    mask = visible_to_rows(lengths, t, k.shape[1])
    if t > 1 and repeat > 1:  # one query's mask serves all its heads as it is
        mask = mask.repeat_interleave(repeat, 2)
    y = F.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return y.view(b, groups, t, repeat, p).permute(0, 2, 1, 3, 4).reshape(q.shape).to(q.dtype)


def _counted(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """`attention` with lengths by torch's kernels for unequal sequences: no mask, no key behind a length is read."""
    from torch.nn.attention.varlen import varlen_attn  # here alone: it registers ops

    (b, t, heads, _), (s, groups, p) = q.shape, k.shape[1:]
    room = k.stride(0) // k.stride(1)  # keys from one row's first to the next row's: they may be part of a buffer
    keys, values = (x.as_strided(((b - 1) * room + s, groups, p), x.stride()[1:]) for x in (k, v))
    row = torch.arange(b + 1, dtype=torch.int32, device=q.device)
    # one query is the last in any case; its heads share what is loaded if no window is named
    y = varlen_attn(q.flatten(0, 1), keys, values, row * t, row * room, t, s, enable_gqa=heads != groups,
                    window_size=(-1, 0) if t > 1 else (-1, -1), seqused_k=lengths.int())
    return cast(Tensor, y).view(q.shape)


def _counts_keys(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `_counted` takes these tensors: FlashAttention's types and widths, rows of whole keys, no gradients."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    key = k.shape[2] * k.shape[3]
    rows = all(x.stride()[1:] == (key, k.shape[3], 1) and x.stride(0) % key == 0 for x in (k, v))
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
            and q.shape[3] % 8 == 0 and q.shape[3] <= 256 and k.stride() == v.stride() and rows
            and not recorded and _knows_used_keys())


@cache
def _knows_used_keys() -> bool:
    """Whether this PyTorch's varlen_attn takes the number of keys in use; the oldest that this package allows may not.
    """
    from torch.nn.attention.varlen import varlen_attn

    return "seqused_k" in inspect.signature(varlen_attn).parameters


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, lengths: Tensor | None = None,
) -> Tensor:
    """The definition of `attention`: all scores and their softmax, in float32 at least; the same arguments."""
    _check(q, k, v, segments, lengths)
    dtype, repeat = wide(q.dtype), q.shape[2] // k.shape[2]
    with without_autocast(q):
        keys, values = (x.to(dtype).repeat_interleave(repeat, 2) for x in (k, v))
        scores = torch.einsum("bthp,bshp->bhts", q.to(dtype), keys) / q.shape[-1] ** 0.5
        t, s = q.shape[1], k.shape[1]
        mask = visible(t, s, q.device, segments) if lengths is None else visible_to_rows(lengths, t, s)
        scores = scores.masked_fill(~mask, -torch.inf)
        return torch.einsum("bhts,bshp->bthp", scores.softmax(-1), values).to(q.dtype)


def last_queries(t: int, s: int) -> Tensor:
    """What stands for the mask of the last t of s positions in torch's attention; its kernels need no numbers for it,
    and where none takes the tensors it becomes `visible`'s.
    """
    # here alone: the import takes torch's compiler along, 1.4 s
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(t, s)


def visible(t: int, s: int, device: torch.device, segments: Tensor | None) -> Tensor:
    """Which of s keys the last t positions may read: (t s), or (b 1 t s) with segments (b s)."""
    mask = torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)
    if segments is None:
        return mask
    documents = count_documents(segments)
    return (mask & (documents[:, s - t:, None] == documents[:, None, :])).unsqueeze(1)


def visible_to_rows(lengths: Tensor, t: int, s: int) -> Tensor:
    """Which of s keys the last t of the lengths (b,) of each row may read: (b 1 t s)."""
    last = lengths[:, None] - t + torch.arange(t, device=lengths.device)  # (b t)
    return (torch.arange(s, device=lengths.device) <= last[..., None]).unsqueeze(1)


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, lengths: Tensor | None) -> None:
    check_rank("attention", "q", q, "b t h p")
    check_rank("attention", "k", k, "b s g p")
    (b, t, heads, p), (s, groups) = q.shape, k.shape[1:3]
    check_shapes("attention", k=(k, (b, s, groups, p)), v=(v, (b, s, groups, p)), segments=(segments, (b, s)),
                 lengths=(lengths, (b,)))
    if heads % groups:
        raise ValueError(f"attention: q has {heads} heads and k {groups}; k's heads must divide q's.")
    if s < t:
        raise ValueError(f"attention: {t} queries and {s} keys; there must be a key for every query, "
                         "the queries being at the last positions.")
    if lengths is None:
        return
    if segments is not None:
        raise ValueError("attention: segments and lengths exclude each other; a packed row must be full.")
    if lengths.dtype != torch.int64:
        raise ValueError(f"attention: lengths are {lengths.dtype}; they must be torch.int64.")
    if lengths.device.type == "cpu" and not t <= int(lengths.min()) <= int(lengths.max()) <= s:
        raise ValueError(f"attention: lengths are {int(lengths.min())} to {int(lengths.max())}; they must be {t} to "
                         f"{s}, as many as the queries at least and the keys at most.")
