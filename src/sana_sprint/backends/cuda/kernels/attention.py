"""ReLU linear attention (SANA, section 2.2) with its norms of queries and keys, in three launches; needs Triton.

Tokens are read where the projections left them: heads are neither split nor copied, nor is anything kept in fp32 but
the sums over tokens, E x (E + 1) numbers a head. Products of 16-bit keys and values are exact (both fit tf32, which is
bf16 and fp16 in one) and added in fp32, and what multiplies those sums is fp32, as in `models.layers.linear_attention`.
Every sum has one order: results repeat.
Axes: B batch, N tokens, D width, K heads, E head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_sprint.backends.cuda.kernels.norms import inverse_rms

TOKENS_PER_SPLIT = 256  # at batch 1 and 1024 tokens, 70 heads alone would leave half of a large GPU idle
MOST_SPLITS = 16  # every block of queries reads the sums of all


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    eps: float,
    norms: tuple[Tensor, Tensor, float] | None = None,
    block_n: int = 128,
) -> Tensor:
    """As `models.layers.linear_attention` of queries and keys after their norms, in the dtype of v.

    Args:
        q, k, v: (B,N,D), contiguous, one dtype.
        num_heads: K, where D = K E.
        eps: added to the denominator.
        norms: weights (D,) of the RMS norms of q and k, over all heads together, and their eps; None for none.
        block_n: tokens that a program handles at a time, a power of 2 from 16 up.
    """
    out = torch.empty_like(v)
    heads = [x.unflatten(-1, (num_heads, -1)) for x in (q, k, v, out)]
    attend_heads(*heads, eps=eps, norms=norms, inverse=norms and inverse_rms(q, k, norms[2]), block_n=block_n)
    return out


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    eps: float,
    norms: tuple[Tensor, Tensor, float] | None = None,
    inverse: Tensor | None = None,
    block_n: int = 128,
) -> None:
    """Linear attention of heads wherever they lie, into `out`.

    Args:
        q, k, v: (B,N,K,E) of one dtype and the same strides, a head's channels side by side.
        out: (B,N,K,E), its channels side by side.
        eps, norms, block_n: see `linear_attention`.
        inverse: with norms, what `norms.inverse_rms` says of q and k.
    """
    B, N, K, E = q.shape  # noqa: N806 (axis letters)
    assert q.stride() == k.stride() == v.stride()
    assert q.stride(-1) == out.stride(-1) == 1
    block_e = max(16, triton.next_power_of_2(E))
    chunk = max(TOKENS_PER_SPLIT, triton.cdiv(triton.cdiv(N, MOST_SPLITS), block_n) * block_n)
    splits = triton.cdiv(N, chunk)
    q_weight, k_weight = (q, k) if norms is None else norms[:2]
    inverse = q if inverse is None else inverse
    sums = torch.empty(B, K, splits, block_e + 1, block_e, dtype=torch.float32, device=q.device)
    strides = q.stride()[:3]
    shape = {"head_dim": E, "block_e": block_e, "block_n": block_n, "has_norm": norms is not None}
    _sum_tokens[(splits, K, B)](
        k,
        v,
        k_weight,
        inverse,
        sums,
        N,
        *strides,
        chunk=chunk,
        precision="ieee" if k.dtype == torch.float32 else "tf32",
        **shape,
    )
    _attend[(triton.cdiv(N, block_n), K, B)](
        q,
        q_weight,
        inverse,
        sums,
        out,
        N,
        *strides,
        *out.stride()[:3],
        eps,
        splits=splits,
        # Three tf32 products add up to an fp32 one: queries fit tf32, and sums are three parts that do.
        precision="ieee" if q.dtype == torch.float32 else "tf32x3",
        **shape,
    )


@triton.jit
def _features(x, weight_ptr, inverse_ptr, rows, tokens_ok, channels, channels_ok, has_norm: tl.constexpr):
    """relu(norm(x)), rounded to the dtype of x, in fp32; NaN stays NaN, so that it is found."""
    if has_norm:
        weight = tl.load(weight_ptr + channels, mask=channels_ok, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + rows, mask=tokens_ok, other=0.0)
        x = (x.to(tl.float32) * inverse[:, None] * weight[None, :]).to(x.dtype)
    x = x.to(tl.float32)
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _sum_tokens(
    k_ptr,
    v_ptr,
    weight_ptr,
    inverse_ptr,
    sums_ptr,
    tokens,
    image_stride,
    token_stride,
    head_stride,
    chunk: tl.constexpr,
    precision: tl.constexpr,
    head_dim: tl.constexpr,
    block_e: tl.constexpr,
    block_n: tl.constexpr,
    has_norm: tl.constexpr,
):
    """Over a chunk of tokens, for a head: sum relu(k)^T v (E,E), and below it sum relu(k) (E)."""
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads, images = tl.num_programs(1), tl.num_programs(2)
    inner = tl.arange(0, block_e)
    inner_ok = inner < head_dim
    channels = head * head_dim + inner
    products = tl.zeros((block_e, block_e), tl.float32)
    keys = tl.zeros((block_e,), tl.float32)
    for start in range(0, chunk, block_n):
        token = split * chunk + start + tl.arange(0, block_n)
        token_ok = token < tokens
        rows = batch.to(tl.int64) * tokens + token
        start_of_head = batch.to(tl.int64) * image_stride + head.to(tl.int64) * head_stride
        place = start_of_head + token.to(tl.int64)[:, None] * token_stride + inner[None, :]
        ok = token_ok[:, None] & inner_ok[None, :]
        k = tl.load(k_ptr + place, mask=ok, other=0.0)
        v = tl.load(v_ptr + place, mask=ok, other=0.0)
        key_rows = images * tokens + rows  # those of q come first
        k = _features(k, weight_ptr, inverse_ptr, key_rows, token_ok, channels, inner_ok, has_norm)
        products += tl.dot(tl.trans(k), v.to(tl.float32), input_precision=precision)
        keys += tl.sum(k, 0)
    base = sums_ptr + ((batch * num_heads + head) * tl.num_programs(0) + split) * (block_e + 1) * block_e
    tl.store(base + inner[:, None] * block_e + inner[None, :], products)
    tl.store(base + block_e * block_e + inner, keys)


@triton.jit
def _attend(
    q_ptr,
    weight_ptr,
    inverse_ptr,
    sums_ptr,
    out_ptr,
    tokens,
    image_stride,
    token_stride,
    head_stride,
    out_image_stride,
    out_token_stride,
    out_head_stride,
    eps,
    splits: tl.constexpr,
    precision: tl.constexpr,
    head_dim: tl.constexpr,
    block_e: tl.constexpr,
    block_n: tl.constexpr,
    has_norm: tl.constexpr,
):
    """For a block of tokens of a head: relu(q) times the sums over all tokens, normalised."""
    head, batch = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    inner = tl.arange(0, block_e)
    inner_ok = inner < head_dim
    channels = head * head_dim + inner
    products = tl.zeros((block_e, block_e), tl.float32)
    keys = tl.zeros((block_e,), tl.float32)
    for split in range(splits):
        base = sums_ptr + ((batch * num_heads + head) * splits + split) * (block_e + 1) * block_e
        products += tl.load(base + inner[:, None] * block_e + inner[None, :])
        keys += tl.load(base + block_e * block_e + inner)
    token = tl.program_id(0) * block_n + tl.arange(0, block_n)
    token_ok = token < tokens
    rows = batch.to(tl.int64) * tokens + token
    ok = token_ok[:, None] & inner_ok[None, :]
    start_of_head = batch.to(tl.int64) * image_stride + head.to(tl.int64) * head_stride
    place = start_of_head + token.to(tl.int64)[:, None] * token_stride + inner[None, :]
    q = tl.load(q_ptr + place, mask=ok, other=0.0)
    q = _features(q, weight_ptr, inverse_ptr, rows, token_ok, channels, inner_ok, has_norm)
    numerator = tl.dot(q, products, input_precision=precision)
    denominator = tl.sum(q * keys[None, :], 1) + eps
    out = numerator / denominator[:, None]
    start_of_head = batch.to(tl.int64) * out_image_stride + head.to(tl.int64) * out_head_stride
    place = start_of_head + token.to(tl.int64)[:, None] * out_token_stride + inner[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=ok)
