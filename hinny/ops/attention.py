"""Causal softmax attention with shared key/value heads, and rotary positions.

    y_i = sum over j <= i of softmax_j(q_i . k_j / sqrt(p)) v_j      within a document

arXiv 1706.03762 section 3.2, 2305.13245 (shared heads), 2104.09864 section 3.2 (rotary positions).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hinny.ops import backend
from hinny.ops.inputs import check_rank, check_shapes, count_documents, wide, without_autocast


def attention(q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """Each query's weighted mean of the values up to its own position.

    q (b t h p); k, v (b s g p), s >= t: the queries are at the last t positions; query head i reads key/value head
    i // (h/g); segments (b s) int: nothing is read across a change of id. Returns y (b t h p) in q's dtype.
    With segments a mask (b t s) of booleans is made; without them none on a GPU in bfloat16 or float16.
    Raises ValueError for shapes that do not fit.
    """
    if backend.asked() == "reference":
        return attention_reference(q, k, v, segments=segments)
    _check(q, k, v, segments)
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


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """The definition of `attention`: all scores and their softmax, in float32 at least; the same arguments."""
    _check(q, k, v, segments)
    dtype, repeat = wide(q.dtype), q.shape[2] // k.shape[2]
    with without_autocast(q):
        keys, values = (x.to(dtype).repeat_interleave(repeat, 2) for x in (k, v))
        scores = torch.einsum("bthp,bshp->bhts", q.to(dtype), keys) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], q.device, segments), -torch.inf)
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


def rope(x: Tensor, position: Tensor, *, base: float, rope_dim: int) -> Tensor:
    """x (b t h p) with its first rope_dim dimensions rotated in pairs by an angle proportional to position.

    The pair (i, i + rope_dim/2) turns by position * base^(-2i/rope_dim); position (t,) or (b t) ints.
    The other dimensions pass. Angles are float32 at least; the result has x's dtype.
    Raises ValueError if rope_dim is odd or more than p, or position has another shape.
    """
    check_rank("rope", "x", x, "b t h p")
    b, t, _, p = x.shape
    if rope_dim % 2 or not 0 <= rope_dim <= p:
        raise ValueError(f"rope: rope_dim is {rope_dim}; it must be even and at most the head's {p} dimensions.")
    if tuple(position.shape) not in ((t,), (b, t)):
        raise ValueError(f"rope: position has shape {tuple(position.shape)}; it must be ({t},) or ({b}, {t}).")
    dtype = wide(x.dtype)
    with without_autocast(x):
        exponents = torch.arange(0, rope_dim, 2, dtype=dtype, device=x.device) / max(rope_dim, 1)
        angles = position.to(dtype)[..., None] * base ** -exponents  # ([b] t rope_dim/2)
        cos, sin = angles.cos(), angles.sin()
        if rope_dim and backend.chosen(x) == "triton":
            from hinny.ops.kernels import rope as kernels  # here alone: Triton is imported where it runs

            return kernels.rope(x, cos, sin)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        rotated, rest = x.split([rope_dim, p - rope_dim], -1)
        first, second = rotated.to(dtype).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([turned.to(x.dtype), rest], -1)


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> None:
    check_rank("attention", "q", q, "b t h p")
    check_rank("attention", "k", k, "b s g p")
    (b, t, heads, p), (s, groups) = q.shape, k.shape[1:3]
    check_shapes("attention", k=(k, (b, s, groups, p)), v=(v, (b, s, groups, p)), segments=(segments, (b, s)))
    if heads % groups:
        raise ValueError(f"attention: q has {heads} heads and k {groups}; k's heads must divide q's.")
    if s < t:
        raise ValueError(f"attention: {t} queries and {s} keys; there must be a key for every query, "
                         "the queries being at the last positions.")
