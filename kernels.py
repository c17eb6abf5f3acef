"""The gated delta rule of Gated DeltaNet: recurrence, chunked PyTorch, Triton (forward, backward, decoding), one switch.

    python kernels.py                    check every backend against the fp64 recurrence, then benchmark: table and PNG in benchmark/
    HYBRID_DISTILL_BACKEND=torch ...     what backend="auto" means, for a whole process: torch or triton
    TRITON_INTERPRET=1 ...               run the Triton kernels in Python, without a GPU (slow; for tests)

Reading list
    [1] Gated Delta Networks, arXiv 2412.06464        the recurrence and its chunkwise form
    [2] DeltaNet over sequence length, arXiv 2406.06484   the chunkwise form without decay, (I + A)^-1
    [3] flash-linear-attention, github.com/fla-org    the kernels this file is measured against; same keyword names

Glossary: a tensor is [B, T, H, D] everywhere, a state [B, HV, Dk, Dv]
    q, k          [B, T, H, Dk]      queries, keys; HV / H value heads share one head of them (head h uses h // (HV / H))
    Q, K, V       [C, D]             the rows of one chunk: Q = scale q / |q| and K = k / |k|, the lengths only with the L2-norm
    v, o          [B, T, HV, Dv]     values, outputs
    g, alpha      [B, T, HV]         log-decay <= 0, alpha = exp(g)
    beta          [B, T, HV]         write strength
    S             [B, HV, Dk, Dv]    the state; S_0 and S_C at the start and the end of a chunk
    C             at most 64         chunk length (triton_tiles, chunk_torch)
    gamma         [C]                cumulative decay in the chunk, exp(cumsum(g)); gamma_C is the last one
    D             [C, C]             D_ij = gamma_i / gamma_j for i >= j, else 0
    M, P          [C, C]             M = strictLower(D K K^T), P = tril(D Q K^T)
    N             [C, C]             -(I + M beta)^-1 M, so that (I + M beta)^-1 = I + N beta
    V~            [C, Dv]            V - gamma K S_0 - M beta V~ = (I + N beta)(V - gamma K S_0): v_t - S~_t^T k_t of every token
    U~            [C, Dv]            beta V~: what the chunk writes
    X             [C, Dv]            dU~ - M^T beta X = dU~ + N^T beta dU~: the gradient of what is written, later readers included

In the kernels bx is the tile of x in registers, b that of beta, bV that of V~, which is `error` in memory; v0 the first column;
|q| and scale, being factors of rows, are never multiplied into q and k but into fq, fk, fr, P, dP and dM.

Where it differs from [1] and [3], and why: their T = (I + beta M)^-1 beta and W = T gamma K are never formed. The one matrix N
serves forward and backward, and what is kept is the error V~: then dV = beta X, dM = -beta X U~^T and dbeta = X.V~, a product of
two numbers instead of a difference of sums, and beta = 0 needs no care.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.machinery
import importlib.util
import inspect
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
    jit = triton.jit(do_not_specialize=["tokens", "stride"])          # T = 1 is no other program than T = 2
except ImportError:                                                   # no Triton here: the PyTorch backend alone
    triton, tl, jit = None, None, lambda function: function


# ------------------------------------------------------------------------------------------- the recurrence (ground truth)

def recurrent_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               use_qk_l2norm_in_kernel=False):
    """The gated delta rule token by token: the definition every other function of this file is held against.

        S~_t = alpha_t S_{t-1}                              decay first,
        S_t  = S~_t + k_t (x) beta_t (v_t - S~_t^T k_t)     then correct the error of the prediction (delta rule)
        o_t  = scale S_t^T q_t                              scale = Dk^-1/2 unless given

    Arguments: q, k [B, T, H, Dk]; v [B, T, HV, Dv]; g (log-decay <= 0), beta [B, T, HV]; initial_state [B, HV, Dk, Dv] or
    None (zero); use_qk_l2norm_in_kernel divides q and k by their length first (l2norm). Works in fp32, or in fp64 if q is, also
    under autocast.
    Returns o [B, T, HV, Dv] in the dtype of v, and the final state [B, HV, Dk, Dv] (fp32 or fp64) or None.
    Source: [1]; transformers' torch_recurrent_gated_delta_rule computes the same.
    """
    T, groups = q.shape[1], v.shape[2] // q.shape[2]
    dtype, work = v.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta = (x.to(work) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q, k = (x.repeat_interleave(groups, 2) for x in (q * scale, k))                # [B, T, HV, Dk]
    S = q.new_zeros(q.shape[0], *v.shape[2:3], q.shape[3], v.shape[3]) if initial_state is None else initial_state.to(work)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(T):
            S = S * g[:, t, :, None, None].exp()                                   # decay first
            error = v[:, t] - (k[:, t, :, None, :] @ S).squeeze(-2)                # v_t - S~^T k_t
            S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
            outputs.append((q[:, t, :, None, :] @ S).squeeze(-2))
    return torch.stack(outputs, 1).to(dtype), S if output_final_state else None


def l2norm(x, eps=1e-6):
    """x / |x| over the last dimension, |x|^2 = sum of squares + eps."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


# ------------------------------------------------------------------------------------------- chunked, in PyTorch

class ChunkedTorch(torch.autograd.Function):
    """The chunkwise form of one batch of rows, with its backward written out: q, k, v, g, beta [chunks, BH, C, ...].

    It walks chunk by chunk, so that what a chunk needs stays in the cache of a CPU. q carries the scale. Returns
    o [chunks, BH, C, Dv] and the final state [BH, Dk, Dv]. The steps are those of the Triton kernels below.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S0):
        chunks, BH, C, _ = k.shape
        # log gamma = cumsum(g) in fp64: its differences are exponents, and -1000.0 - (-1000.1) loses four digits in fp32
        log_gamma = g.double().cumsum(-1)
        gamma = log_gamma.exp().to(k.dtype)[..., None]                              # [N, BH, C, 1]
        rest = (log_gamma[..., -1:] - log_gamma).exp().to(k.dtype)[..., None]       # gamma_C / gamma
        b = beta[..., None]
        D, N = k.new_empty(chunks, BH, C, C), k.new_empty(chunks, BH, C, C)
        error, o, S = torch.empty_like(v), torch.empty_like(v), k.new_empty(chunks + 1, *S0.shape)
        S[0] = S0
        for n in range(chunks):
            # 1. D_ij = gamma_i / gamma_j for i >= j (above the diagonal exp may overflow; tril_ writes zeros over it)
            D[n].copy_(log_gamma[n, :, :, None] - log_gamma[n, :, None, :]).exp_().tril_()
            # 2. M = strictLower(D K K^T),  N = -(I + M beta)^-1 M by substitution
            M = torch.bmm(k[n], k[n].mT).mul_(D[n]).tril_(-1)
            N[n] = torch.linalg.solve_triangular(M * b[n].mT, M.neg(), upper=False, unitriangular=True)
            # 3. V~ = (I + N beta)(V - gamma K S_0),  U~ = beta V~
            raw = torch.baddbmm(v[n], k[n] * gamma[n], S[n], alpha=-1)
            U = torch.baddbmm(raw, N[n], raw * b[n], out=error[n]) * b[n]
            # 4. O = gamma Q S_0 + tril(Q K^T D) U~
            torch.bmm(q[n] * gamma[n], S[n], out=o[n])
            o[n].baddbmm_(torch.bmm(q[n], k[n].mT).mul_(D[n]), U)
            # 5. S_C = gamma_C S_0 + (gamma_C / gamma K)^T U~
            torch.mul(S[n], gamma[n, :, -1:], out=S[n + 1]).baddbmm_((k[n] * rest[n]).mT, U)
        ctx.save_for_backward(q, k, beta, gamma, rest, D, N, error, S)
        return o, S[-1].clone()

    @staticmethod
    def backward(ctx, do, dS):
        refuse_double_backward()
        q, k, beta, gamma, rest, D, N, error, S = ctx.saved_tensors
        dq, dk, dv, dbeta = (torch.empty_like(x) for x in (q, k, error, beta))
        dlog = torch.empty_like(beta, dtype=torch.float64)                          # gradient of log gamma
        with torch.autocast(q.device.type, enabled=False):
            for n in reversed(range(len(q))):
                qn, kn, b, Dn = q[n], k[n], beta[n, ..., None], D[n]
                P, M, U = torch.bmm(qn, kn.mT).mul_(Dn), torch.bmm(kn, kn.mT).mul_(Dn), error[n] * b
                # 1. dU~ = P^T dO + gamma_C / gamma K dS_C,  X = dU~ + N^T beta dU~,  dV = beta X,  dbeta = X.V~
                dU = torch.bmm(P.mT, do[n]).baddbmm_(kn * rest[n], dS)
                X = torch.baddbmm(dU, N[n].mT, dU * b)
                torch.mul(X, b, out=dv[n])
                torch.sum(X.mul_(error[n]), -1, out=dbeta[n])
                # 2. Y = gamma dO S_0^T,  Z = gamma dV S_0^T,  R = gamma_C / gamma U~ dS_C^T
                Y, Z = torch.bmm(do[n], S[n].mT).mul_(gamma[n]), torch.bmm(dv[n], S[n].mT).mul_(gamma[n])
                R = torch.bmm(U, dS.mT).mul_(rest[n])
                # 3. dP = dO U~^T,  dM = -dV U~^T;  E = dP P,  F = dM M (both belong to log gamma)
                dP, dM = torch.bmm(do[n], U.mT), torch.bmm(dv[n], U.mT).neg_().tril_(-1)
                E = P.mul_(dP).add_(M.mul_(dM))                                     # E + F
                dP.mul_(Dn)
                dM.mul_(Dn)
                # 4. dQ = Y + dP K,  dK = R - Z + dP^T Q + dM K + dM^T K
                torch.baddbmm(Y, dP, kn, out=dq[n])
                torch.sub(R, Z, out=dk[n]).baddbmm_(dP.mT, qn).baddbmm_(dM, kn).baddbmm_(dM.mT, kn)
                # 5. dlog gamma = rows(E + F) - cols(E + F) + Q.Y - K.Z - K.R, its last one + sum(K.R) + gamma_C S_0.dS_C
                kr = (kn * R).sum(-1)
                dlog[n] = E.sum(-1, dtype=torch.float64) - E.sum(-2, dtype=torch.float64) + (qn * Y).sum(-1) - (kn * Z).sum(-1) - kr
                dlog[n, :, -1] += kr.sum(-1) + gamma[n, :, -1, 0] * (S[n] * dS).sum((-1, -2))
                # 6. dS_0 = gamma_C dS_C + (gamma Q)^T dO - (gamma K)^T dV
                dS = (dS * gamma[n, :, -1:]).baddbmm_((qn * gamma[n]).mT, do[n]).baddbmm_((kn * gamma[n]).mT, dv[n], alpha=-1)
        return dq, dk, dv, dlog.flip(-1).cumsum(-1).flip(-1).to(k.dtype), dbeta, dS    # dg_t = sum over i >= t of dlog gamma_i


def chunk_torch(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel):
    """chunk_gated_delta_rule in PyTorch: any device, fp32 (fp64 stays fp64). Returns o and the final state."""
    B, T, H, Dk = q.shape
    HV, Dv = v.shape[2:]
    work = torch.promote_types(q.dtype, torch.float32)
    C = min(64 if max(Dk, Dv) > 32 else 32, T)                                     # measured: small heads like small chunks

    def chunks(x):                                                                 # [B, T, H or HV, ...] -> [chunks, B HV, C, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -T % C))                          # k = v = beta = g = 0 changes nothing
        x = x.unflatten(1, (-1, C)).transpose(2, 3).transpose(0, 1)
        return x.repeat_interleave(HV // x.shape[2], 2).flatten(1, 2).contiguous()

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = (x.to(work) for x in (q, k, v, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = l2norm(q), l2norm(k)
        S0 = k.new_zeros(B * HV, Dk, Dv) if initial_state is None else initial_state.to(work).flatten(0, 1)
        o, S = ChunkedTorch.apply(*map(chunks, (q * scale, k, v, g, beta)), S0)
        return o.unflatten(1, (B, HV)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T], S.unflatten(0, (B, HV))


# ------------------------------------------------------------------------------------------- tiles in and out (Triton)

@jit
def sequence(cu_seqlens, first_chunk, s, tokens, C: tl.constexpr):
    """Sequence s: its first token, its length, the number of its first chunk (64-bit: they are multiplied by H D)."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        return start, tl.load(cu_seqlens + s + 1).to(tl.int64) - start, tl.load(first_chunk + s).to(tl.int64)
    else:
        s = s.to(tl.int64)
        return s * tokens, tokens.to(tl.int64), s * tl.cdiv(tokens, C)


@jit
def place(DV: tl.constexpr, BV: tl.constexpr, HV: tl.constexpr):
    """This program's first column of the state, sequence and head. One axis for all three: a second one ends at 65,535."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    n = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles * BV, n // HV, n % HV


@jit
def chunk_rows(c, cu_seqlens, first_chunk, chunk_seq, tokens, C: tl.constexpr):
    """Chunk c: its first token, and the rows from there to the end of its sequence (0: there is no such chunk)."""
    s = tl.load(chunk_seq + c) if chunk_seq is not None else c // tl.cdiv(tokens, C)
    start, length, first = sequence(cu_seqlens, first_chunk, tl.maximum(s, 0), tokens, C)
    return start + (c - first) * C, tl.where(s < 0, 0, length - (c - first) * C)


@jit
def load_rows(x, token, left, head, HEADS: tl.constexpr, D: tl.constexpr, d0, C: tl.constexpr, BD: tl.constexpr):
    """Tile [C, BD] of x [tokens, HEADS, D] from row `token` and column d0 on; zero behind `left` rows and D columns."""
    r, d = tl.arange(0, C), d0 + tl.arange(0, BD)
    x += (token * HEADS + head) * D                                      # 64-bit once; 32-bit inside the tile
    return tl.load(x + r[:, None] * (HEADS * D) + d[None, :], mask=(r < left)[:, None] & (d < D)[None, :], other=0.0)


@jit
def store_rows(x, value, token, left, head, HEADS: tl.constexpr, D: tl.constexpr, d0, C: tl.constexpr, BD: tl.constexpr):
    """The inverse of load_rows, in the dtype of x."""
    r, d = tl.arange(0, C), d0 + tl.arange(0, BD)
    x += (token * HEADS + head) * D
    tl.store(x + r[:, None] * (HEADS * D) + d[None, :], value.to(x.dtype.element_ty),
             mask=(r < left)[:, None] & (d < D)[None, :])


@jit
def load_gate(x, token, left, head, HEADS: tl.constexpr, C: tl.constexpr):
    """Rows [C] of x [tokens, HEADS], zero behind the end."""
    r = tl.arange(0, C)
    return tl.load(x + (token * HEADS + head) + r * HEADS, mask=r < left, other=0.0)


@jit
def store_gate(x, value, token, left, head, HEADS: tl.constexpr, C: tl.constexpr):
    """The inverse of load_gate."""
    r = tl.arange(0, C)
    tl.store(x + (token * HEADS + head) + r * HEADS, value, mask=r < left)


@jit
def load_matrix(x, n, v0, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Tile [BK, BV] of matrix n of x [..., DK, DV] from column v0 on, zero outside."""
    return load_rows(x, n * DK, DK, 0, 1, DV, v0, BK, BV)


@jit
def store_matrix(x, value, n, v0, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The inverse of load_matrix, in the dtype of x."""
    store_rows(x, value, n * DK, DK, 0, 1, DV, v0, BK, BV)


@jit
def decay(g, C: tl.constexpr):
    """log-decays [C] -> D [C, C], gamma [C], gamma_C / gamma [C], gamma_C.

    log gamma = cumsum(g) is summed in fp64 (C numbers) and split into hi + lo: its differences are exponents, and
    -1000.0 - (-1000.1) loses four digits in fp32. D is masked before exp (above the diagonal it overflows) and after.
    """
    g = g.to(tl.float64)
    total, log_gamma = tl.sum(g, 0), tl.cumsum(g, 0)
    hi = log_gamma.to(tl.float32)
    lo = (log_gamma - hi.to(tl.float64)).to(tl.float32)
    r = tl.arange(0, C)
    lower = r[:, None] >= r[None, :]
    log_D = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
    D = tl.where(lower, tl.exp(tl.where(lower, log_D, 0.0)), 0.0)
    return D, tl.exp(hi), tl.exp((total - log_gamma).to(tl.float32)), tl.exp(total.to(tl.float32))


@jit
def inverse_length(x, NORM: tl.constexpr):
    """1 / |x_i| of each row, or 1. The L2-norm is a factor of a row: it is applied behind a product, not to the tile."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6) if NORM else tl.full([x.shape[0]], 1.0, tl.float32)


@jit
def two_halves(x, dt: tl.constexpr):
    """fp32 x -> high, low of the 16-bit dt: high + low has the first 15 bits of x (20 in fp16). tf32 would keep 11."""
    keep: tl.constexpr = -8192 if dt == tl.float16 else -65536           # the bits of an fp32 number that dt holds
    high = (x.to(tl.int32, bitcast=True) & keep).to(tl.float32, bitcast=True)
    return high.to(dt), (x - high).to(dt)


@jit
def product(a, b, c, dt: tl.constexpr):
    """a b + c of fp32 matrices; for a 16-bit dt in its tensor cores, with factors of two halves: where keys are alike the
    merges of N cancel down to digits that tf32 drops."""
    if dt == tl.float32:
        return tl.dot(a, b, c, input_precision="ieee")
    else:
        a_high, a_low = two_halves(a, dt)
        b_high, b_low = two_halves(b, dt)
        return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high, c)))


# ------------------------------------------------------------------------------------------- the kernels (Triton)

@jit
def prepare_kernel(q, k, g, beta, N, P, fq, fk, fr, gamma_C, cu_seqlens, first_chunk, chunk_seq, tokens, scale,
                   H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                   NORM: tl.constexpr):
    """What a chunk knows without the state.

        M = strictLower(D K K^T)    N = -(I + M beta)^-1 M    P = tril(D Q K^T)
        fq = scale gamma / |q|    fk = gamma / |k|    fr = (gamma_C / gamma) / |k|      (so that gamma Q = fq q, gamma K = fk k)

    Grid (chunks, HV). Registers: M, N, P [C, C] fp32. Shared memory: q, k [C, BK] and the operands of the merges.
    Reads q, k, g, beta; writes N, P [chunks, HV, C, C] in the dtype of k, fq, fk, fr [tokens, HV], gamma_C [chunks, HV].
    """
    c, h, hk = tl.program_id(0), tl.program_id(1), tl.program_id(1) // (HV // H)
    token, left = chunk_rows(c, cu_seqlens, first_chunk, chunk_seq, tokens, C)
    chunk = c.to(tl.int64) * HV + h
    if left <= 0:
        return
    # 1. the decay and the norms, as factors of rows
    bq = load_rows(q, token, left, hk, H, DK, 0, C, BK)
    bk = load_rows(k, token, left, hk, H, DK, 0, C, BK)
    dt = k.dtype.element_ty
    rq, rk = inverse_length(bq, NORM) * scale, inverse_length(bk, NORM)
    D, gamma, rest, last = decay(load_gate(g, token, left, h, HV, C), C)
    store_gate(fq, gamma * rq, token, left, h, HV, C)
    store_gate(fk, gamma * rk, token, left, h, HV, C)
    store_gate(fr, rest * rk, token, left, h, HV, C)
    tl.store(gamma_C + chunk, last)
    # 2. P and M
    D *= rk[None, :]
    bP = tl.dot(bq, tl.trans(bk), input_precision="ieee") * D * rq[:, None]
    store_matrix(P, bP, chunk, 0, C, C, C, C)
    r = tl.arange(0, C)
    row, col = r[:, None], r[None, :]
    M = tl.where(row > col, tl.dot(bk, tl.trans(bk), input_precision="ieee") * D * rk[:, None], 0.0)
    # 3. N: the 8 x 8 blocks on the diagonal, all at once, by forward substitution: N_i = -M_i - sum_j M_ij beta_j N_j
    b = load_gate(beta, token, left, h, HV, C)
    blocks: tl.constexpr = C // 8
    n, i8 = tl.arange(0, blocks), tl.arange(0, 8)
    diagonal = (n[:, None] == n[None, :])[:, None, :, None]
    M8 = tl.sum(tl.where(diagonal, tl.reshape(M, (blocks, 8, blocks, 8)), 0.0), 2)              # [blocks, 8, 8]
    row8 = i8[None, :, None]
    N8 = -M8
    M8 *= tl.reshape(b, (blocks, 8))[:, None, :]
    for i in range(1, 8):
        M_i = tl.sum(tl.where(row8 == i, M8, 0.0), 1)
        N8 -= tl.where(row8 == i, tl.sum(M_i[:, :, None] * N8, 1)[:, None, :], 0.0)
    bN = tl.reshape(tl.where(diagonal, N8[:, :, None, :], 0.0), (C, C))
    # 4. merge neighbours, 8 -> 16 -> 32 -> 64: N21 = -(I + N2 beta) M21 (I + beta N1). No series: no power of M is ever formed
    for level in tl.static_range(0, C.bit_length() - 4):
        size = 8 << level
        M21 = tl.where((row // (2 * size) == col // (2 * size)) & (row // size > col // size), M, 0.0)
        M21 = product(M21 * b[None, :], bN, M21, dt)
        bN -= product(bN * b[None, :], M21, M21, dt)
    store_matrix(N, bN, chunk, 0, C, C, C, C)


@jit
def forward_kernel(q, k, v, beta, N, P, fq, fk, fr, gamma_C, S0, o, error, states, S_out, cu_seqlens, first_chunk, tokens,
                   H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                   BK: tl.constexpr, BV: tl.constexpr, SAVE: tl.constexpr):
    """The walk over the chunks of one sequence; nothing but the state is carried.

        V~  = (I + N beta)(V - gamma K S_0),  U~ = beta V~
        O   = gamma Q S_0 + P U~
        S_C = gamma_C S_0 + (gamma_C / gamma K)^T U~

    Grid Dv / BV * sequences * HV: columns of S never meet. Registers: S [BK, BV] fp32, V~ and O [C, BV] fp32.
    Shared memory: tiles of q, k [C, BK], v [C, BV], N, P [C, C] on their way in. Reads those, the factors, beta, S0.
    Writes o and the final state; or, for the backward pass (SAVE, without q and P), V~ and the state at the start of each chunk.
    """
    v0, s, h = place(DV, BV, HV)
    hk = h // (HV // H)
    dt = k.dtype.element_ty
    start, length, first = sequence(cu_seqlens, first_chunk, s, tokens, C)
    row = s.to(tl.int64) * HV + h
    S = load_matrix(S0, row, v0, DK, DV, BK, BV) if S0 is not None else tl.zeros([BK, BV], tl.float32)
    for n in range(tl.cdiv(length, C)):
        token, left, chunk = start + n * C, length - n * C, (first + n) * HV + h
        bk = load_rows(k, token, left, hk, H, DK, 0, C, BK)
        bv = load_rows(v, token, left, h, HV, DV, v0, C, BV)
        bN = load_matrix(N, chunk, 0, C, C, C, C)
        b, k_in = load_gate(beta, token, left, h, HV, C), load_gate(fk, token, left, h, HV, C)
        # 1. V~ = (I + N beta)(V - gamma K S_0),  U~ = beta V~
        Sd = S.to(dt)
        bV = bv - k_in[:, None] * tl.dot(bk, Sd, input_precision="ieee")
        bV = tl.dot(bN, (b[:, None] * bV).to(dt), bV, input_precision="ieee")
        bU = b[:, None] * bV
        if SAVE:
            store_rows(error, bV, token, left, h, HV, DV, v0, C, BV)
            store_matrix(states, S, chunk, v0, DK, DV, BK, BV)
        else:
            # 2. O = gamma Q S_0 + P U~
            bq, bP = load_rows(q, token, left, hk, H, DK, 0, C, BK), load_matrix(P, chunk, 0, C, C, C, C)
            bo = load_gate(fq, token, left, h, HV, C)[:, None] * tl.dot(bq, Sd, input_precision="ieee")
            bo += tl.dot(bP, bU.to(dt), input_precision="ieee")
            store_rows(o, bo, token, left, h, HV, DV, v0, C, BV)
        # 3. S_C = gamma_C S_0 + (gamma_C / gamma K)^T U~
        bU *= load_gate(fr, token, left, h, HV, C)[:, None]
        S = tl.load(gamma_C + chunk) * S + tl.dot(tl.trans(bk), bU.to(dt), input_precision="ieee")
    if not SAVE:
        store_matrix(S_out, S, row, v0, DK, DV, BK, BV)


@jit
def backward_state_kernel(q, k, beta, N, P, fq, fk, fr, gamma_C, do, dS_out, X, dstates, dS0, cu_seqlens, first_chunk, tokens,
                          H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                          BK: tl.constexpr, BV: tl.constexpr):
    """The walk back over the chunks.

        dU~  = P^T dO + gamma_C / gamma K dS_C
        X    = dU~ + N^T beta dU~                                   (so dV = beta X)
        dS_0 = gamma_C dS_C + (gamma Q)^T dO - (beta gamma K)^T X

    Grid Dv / BV * sequences * HV. Registers: dS [BK, BV] fp32, dU~ and X [C, BV] fp32.
    Shared memory: tiles of q, k [C, BK], dO [C, BV], N, P [C, C] on their way in. Reads those, the factors, beta and the
    final state's gradient; writes X, the gradient of the state at the end of each chunk, and that of the initial state.
    """
    v0, s, h = place(DV, BV, HV)
    hk = h // (HV // H)
    dt = k.dtype.element_ty
    start, length, first = sequence(cu_seqlens, first_chunk, s, tokens, C)
    row, chunks = s.to(tl.int64) * HV + h, tl.cdiv(length, C)
    dS = load_matrix(dS_out, row, v0, DK, DV, BK, BV)
    for m in range(chunks):
        n = chunks - 1 - m
        token, left, chunk = start + n * C, length - n * C, (first + n) * HV + h
        bk = load_rows(k, token, left, hk, H, DK, 0, C, BK)
        bq = load_rows(q, token, left, hk, H, DK, 0, C, BK)
        bdo = load_rows(do, token, left, h, HV, DV, v0, C, BV)
        bN, bP = load_matrix(N, chunk, 0, C, C, C, C), load_matrix(P, chunk, 0, C, C, C, C)
        b = load_gate(beta, token, left, h, HV, C)
        store_matrix(dstates, dS, chunk, v0, DK, DV, BK, BV)
        # 1. dU~ = P^T dO + gamma_C / gamma K dS_C
        dU = load_gate(fr, token, left, h, HV, C)[:, None] * tl.dot(bk, dS.to(dt), input_precision="ieee")
        dU += tl.dot(tl.trans(bP), bdo, input_precision="ieee")
        # 2. X = dU~ + N^T beta dU~; for like keys the two nearly cancel, so a 16-bit beta dU~ goes in as two halves
        if dt == tl.float32:
            bX = tl.dot(tl.trans(bN), b[:, None] * dU, dU, input_precision="ieee")
        else:
            high, low = two_halves(b[:, None] * dU, dt)
            bX = tl.dot(tl.trans(bN), high, tl.dot(tl.trans(bN), low, dU))
        store_rows(X, bX, token, left, h, HV, DV, v0, C, BV)
        # 3. dS_0 = gamma_C dS_C + (gamma Q)^T dO - (beta gamma K)^T X
        bdo = (load_gate(fq, token, left, h, HV, C)[:, None] * bdo).to(dt)
        bX *= (b * load_gate(fk, token, left, h, HV, C))[:, None]
        dS = tl.load(gamma_C + chunk) * dS + tl.dot(tl.trans(bq), bdo, input_precision="ieee")
        dS -= tl.dot(tl.trans(bk), bX.to(dt), input_precision="ieee")
    if dS0 is not None:
        store_matrix(dS0, dS, row, v0, DK, DV, BK, BV)


@jit
def backward_scores_kernel(q, k, g, beta, do, error, X, dP, dM, dv, dbeta, sums, cu_seqlens, first_chunk, chunk_seq,
                           tokens, stride, scale,
                           H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                           BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr):
    """The gradients of the two [C, C] matrices of a chunk, with their row and column sums, and of v and beta.

        dP = dO U~^T                 E = dP P      sums[0] = rows(E),  sums[1] = cols(E) + rows(F) + cols(F)
        dM = -beta X U~^T, i > j     F = dM M      sums[2] = rows(E) - cols(E) + rows(F) - cols(F)
        dV = beta X                  dbeta = X.V~

    Grid (chunks, HV). Registers: dP, dM, Q K^T, K K^T [C, C] fp32. Shared memory: q, k [C, BK] and dO, V~, X [C, BV].
    Reads q, k, dO, V~, X, g, beta; writes dv, dbeta, dP D and dM D [chunks, HV, C, C] (times scale / (|q| |k|) and 1 / |k|^2,
    so that they multiply q and k as they stand in memory) and the sums [3, tokens, HV].
    """
    c, h, hk = tl.program_id(0), tl.program_id(1), tl.program_id(1) // (HV // H)
    token, left = chunk_rows(c, cu_seqlens, first_chunk, chunk_seq, tokens, C)
    chunk = c.to(tl.int64) * HV + h
    if left <= 0:
        return
    b = load_gate(beta, token, left, h, HV, C)
    # 1. dO V~^T, X V~^T, X.V~, dV
    bdP, bdM, xv = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for v0 in range(0, DV, BV):
        bdo, bX = load_rows(do, token, left, h, HV, DV, v0, C, BV), load_rows(X, token, left, h, HV, DV, v0, C, BV)
        bV = load_rows(error, token, left, h, HV, DV, v0, C, BV)
        bdP += tl.dot(bdo, tl.trans(bV), input_precision="ieee")
        bdM -= tl.dot(bX, tl.trans(bV), input_precision="ieee")
        xv += tl.sum(bX.to(tl.float32) * bV.to(tl.float32), 1)
        store_rows(dv, b[:, None] * bX, token, left, h, HV, DV, v0, C, BV)
    store_gate(dbeta, xv, token, left, h, HV, C)
    # 2. dP, dM: U~ = beta V~, a factor of columns here
    bq = load_rows(q, token, left, hk, H, DK, 0, C, BK)
    bk = load_rows(k, token, left, hk, H, DK, 0, C, BK)
    rq, rk = inverse_length(bq, NORM) * scale, inverse_length(bk, NORM)
    D, gamma, rest, last = decay(load_gate(g, token, left, h, HV, C), C)
    D *= (b * rk)[None, :]
    r = tl.arange(0, C)
    bdP *= D * rq[:, None]
    bdM = tl.where(r[:, None] > r[None, :], bdM * D * (b * rk)[:, None], 0.0)
    store_matrix(dP, bdP, chunk, 0, C, C, C, C)
    store_matrix(dM, bdM, chunk, 0, C, C, C, C)
    # 3. E, F and their sums
    E = bdP * tl.dot(bq, tl.trans(bk), input_precision="ieee")
    F = bdM * tl.dot(bk, tl.trans(bk), input_precision="ieee")
    E_row, E_col, F_row, F_col = tl.sum(E, 1), tl.sum(E, 0), tl.sum(F, 1), tl.sum(F, 0)
    store_gate(sums, E_row, token, left, h, HV, C)
    store_gate(sums + stride, E_col + F_row + F_col, token, left, h, HV, C)
    store_gate(sums + 2 * stride, E_row - E_col + F_row - F_col, token, left, h, HV, C)


@jit
def backward_chunk_kernel(q, k, beta, fq, fk, fr, gamma_C, do, error, X, states, dstates, dP, dM, sums, dq, dk, dg,
                          cu_seqlens, first_chunk, chunk_seq, tokens, stride,
                          H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                          BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr):
    """The gradients of q, k and g of one chunk.

        Y = gamma dO S_0^T    Z = beta gamma X S_0^T    R = gamma_C / gamma U~ dS_C^T
        dQ = Y + dP D K       dK = R - Z + (dP D)^T Q + (dM D) K + (dM D)^T K
        dlog gamma = rows(E) - cols(E) + rows(F) - cols(F) + Q.Y - K.Z - K.R
        dg_t       = sum over i >= t of dlog gamma_i, + sum(K.R) + gamma_C S_0.dS_C

    With the norm, x^ = x / |x|: dx = (dx^ - x^ (x^.dx^)) / |x|, where Q.dQ = rows(E) + Q.Y and
    K.dK = cols(E) + rows(F) + cols(F) + K.R - K.Z.
    Grid (chunks, HV). Registers: Y, which becomes dq; then Z and R, which becomes dk, [C, BK] fp32. Shared memory: q, k [C, BK], dP, dM [C, C],
    tiles [BK, BV] of the states and [C, BV] of dO, V~, X. Reads all those, the factors, beta, sums; writes dq, dk, dg.
    """
    c, h, hk = tl.program_id(0), tl.program_id(1), tl.program_id(1) // (HV // H)
    token, left = chunk_rows(c, cu_seqlens, first_chunk, chunk_seq, tokens, C)
    chunk = c.to(tl.int64) * HV + h
    if left <= 0:
        return
    bq = load_rows(q, token, left, hk, H, DK, 0, C, BK)
    bk = load_rows(k, token, left, hk, H, DK, 0, C, BK)
    b, bdP = load_gate(beta, token, left, h, HV, C), load_matrix(dP, chunk, 0, C, C, C, C)
    # 1. dQ
    Y = tl.zeros([C, BK], tl.float32)
    for v0 in range(0, DV, BV):
        bdo, S = load_rows(do, token, left, h, HV, DV, v0, C, BV), load_matrix(states, chunk, v0, DK, DV, BK, BV)
        Y += tl.dot(bdo, tl.trans(S), input_precision="ieee")
    Y *= load_gate(fq, token, left, h, HV, C)[:, None]
    qy = tl.sum(bq.to(tl.float32) * Y, 1)
    Y += tl.dot(bdP, bk, input_precision="ieee")
    if NORM:
        rq = inverse_length(bq, NORM)
        Y -= (rq * rq * (load_gate(sums, token, left, h, HV, C) + qy))[:, None] * bq.to(tl.float32)
    store_rows(dq, Y, token, left, h, HV, DK, 0, C, BK)
    # 2. dK
    Z = tl.zeros([C, BK], tl.float32)
    for v0 in range(0, DV, BV):
        bX, S = load_rows(X, token, left, h, HV, DV, v0, C, BV), load_matrix(states, chunk, v0, DK, DV, BK, BV)
        Z += tl.dot(bX, tl.trans(S), input_precision="ieee")
    Z *= (b * load_gate(fk, token, left, h, HV, C))[:, None]
    kz = tl.sum(bk.to(tl.float32) * Z, 1)
    R, sds = tl.zeros([C, BK], tl.float32), 0.0
    for v0 in range(0, DV, BV):
        bV, dS = load_rows(error, token, left, h, HV, DV, v0, C, BV), load_matrix(dstates, chunk, v0, DK, DV, BK, BV)
        R += tl.dot(bV, tl.trans(dS), input_precision="ieee")
        sds += tl.sum(load_matrix(states, chunk, v0, DK, DV, BK, BV).to(tl.float32) * dS.to(tl.float32))
    R *= (b * load_gate(fr, token, left, h, HV, C))[:, None]
    kr = tl.sum(bk.to(tl.float32) * R, 1)
    R -= Z
    R += tl.dot(tl.trans(bdP), bq, input_precision="ieee")
    bdM = load_matrix(dM, chunk, 0, C, C, C, C)
    R += tl.dot(bdM, bk, input_precision="ieee")
    R += tl.dot(tl.trans(bdM), bk, input_precision="ieee")
    if NORM:
        rk = inverse_length(bk, NORM)
        R -= (rk * rk * (load_gate(sums + stride, token, left, h, HV, C) + kr - kz))[:, None] * bk.to(tl.float32)
    store_rows(dk, R, token, left, h, HV, DK, 0, C, BK)
    # 3. dg
    dlog = load_gate(sums + 2 * stride, token, left, h, HV, C) + qy - kz - kr
    after = tl.sum(dlog, 0) - tl.cumsum(dlog, 0) + dlog                  # sum over i >= t
    store_gate(dg, after + tl.sum(kr, 0) + tl.load(gamma_C + chunk) * sds, token, left, h, HV, C)


@jit
def decode_kernel(q, k, v, g, beta, S0, o, S_out, tokens, scale,
                  H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
                  BV: tl.constexpr, NORM: tl.constexpr):
    """The recurrence, as it stands in recurrent_gated_delta_rule, with the state read once and written once.

    Grid Dv / BV * B * HV. Registers: S [BK, BV] fp32. No shared memory but for the sums.
    Reads q, k, v, g, beta of each token and S0; writes o and the state.
    """
    v0, s, h = place(DV, BV, HV)
    s = s.to(tl.int64)
    dk, dv = tl.arange(0, BK), v0 + tl.arange(0, BV)
    S = load_matrix(S0, s * HV + h, v0, DK, DV, BK, BV) if S0 is not None else tl.zeros([BK, BV], tl.float32)
    for t in range(tokens):
        at_k, at_v = ((s * tokens + t) * H + h // (HV // H)) * DK + dk, (s * tokens + t) * HV + h
        bk = tl.load(k + at_k, mask=dk < DK, other=0.0).to(tl.float32)
        bq = tl.load(q + at_k, mask=dk < DK, other=0.0).to(tl.float32)
        bv = tl.load(v + at_v * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
        if NORM:
            bk *= tl.rsqrt(tl.sum(bk * bk, 0) + 1e-6)
            bq *= tl.rsqrt(tl.sum(bq * bq, 0) + 1e-6)
        S *= tl.exp(tl.load(g + at_v))                                                         # decay first
        error = bv - tl.sum(S * bk[:, None], 0)
        S += bk[:, None] * (tl.load(beta + at_v) * error)[None, :]
        tl.store(o + at_v * DV + dv, (tl.sum(S * bq[:, None], 0) * scale).to(o.dtype.element_ty), mask=dv < DV)
    store_matrix(S_out, S, s * HV + h, v0, DK, DV, BK, BV)


# ------------------------------------------------------------------------------------------- launching them

def triton_tiles(Dk, Dv, dtype):
    """-> C and, for the kernels over chunks, over sequences and of the backward chunks, their tile sizes, warps and stages.

    A fixed table by head size instead of autotuning. On Hopper, Triton 3.4 - 3.7.0 miscompiles products whose left factor
    was computed in registers (fla issues 640, 984; triton pull request 9514; with an earlier form of these kernels dq or
    dk was wrong by 60 % at d = 128): here the left factors of all products of q, k, v and the state are loaded tiles, and
    there are 4 warps, never 8.
    """
    narrow, BK, BV = dtype != torch.float32, *(max(16, triton.next_power_of_2(n)) for n in (Dk, Dv))
    C = (64 if BK <= 128 else 32) if narrow else (32 if BK <= 128 else 16)
    return (C, dict(BK=BK, num_warps=4),
            dict(BK=BK, BV=min(BV, 32 if narrow or BK <= 64 else 16), num_warps=4, num_stages=2),
            dict(BK=BK, BV=min(BV, {torch.bfloat16: 128, torch.float16: 64}.get(dtype, 32) if BK <= 128 else 32), num_warps=4, num_stages=1))


@functools.lru_cache(maxsize=None)
def compute_capability(device):
    """The generation of a GPU: 8 Ampere and Ada, 9 Hopper, 10 Blackwell."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def prepare_registers(q):
    """Registers a thread of prepare_kernel may take. With 168, three programs share a multiprocessor, not two; before Hopper it would spill."""
    return 168 if q.dtype != torch.float32 and q.shape[3] <= 128 and compute_capability(q.device) >= 9 else 255


def chunk_table(q, cu_seqlens, C):
    """-> sequences, chunks (at most), first chunk of each sequence, sequence of each chunk or -1. Nothing waits for the GPU."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return B, B * (-(-T // C)), None, None
    sequences = cu_seqlens.numel() - 1
    ends = ((cu_seqlens.diff() + C - 1) // C).cumsum(0)
    chunks = T // C + sequences
    owner = torch.searchsorted(ends, torch.arange(chunks, device=q.device), right=True)
    return sequences, chunks, F.pad(ends, (1, 0))[:-1], torch.where(owner < sequences, owner, -1)


def on_device(x):
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


OPS = "hybrid_distill_" + re.sub(r"\W", "_", __name__)    # a namespace a module: a saved checkpoint brings its own copy


def forward_outputs(q, v, g, cu_seqlens):
    """Empty tensors for what launch_forward returns (and what torch.compile puts in its place)."""
    (B, tokens, _, Dk), (HV, Dv) = q.shape, v.shape[2:]
    C = triton_tiles(Dk, Dv, q.dtype)[0]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = B * (-(-tokens // C)) if cu_seqlens is None else tokens // C + sequences
    return (torch.empty_like(v), g.new_empty(sequences, HV, Dk, Dv), q.new_empty(chunks, HV, C, C), q.new_empty(chunks, HV, C, C),
            g.new_empty(3, B, tokens, HV), g.new_empty(chunks, HV))


def launch_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Optional[Tensor],
                   cu_seqlens: Optional[Tensor], norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> o, final state; and for the backward pass N, P, (fq, fk, fr), gamma_C. Contiguous inputs; q, k, v of one dtype."""
    tokens, H, Dk, HV, Dv = *q.shape[1:], *v.shape[2:]
    C, by_chunk, by_sequence, _ = triton_tiles(Dk, Dv, q.dtype)
    sequences, chunks, first_chunk, chunk_seq = chunk_table(q, cu_seqlens, C)
    o, S_out, N, P, factors, gamma_C = forward_outputs(q, v, g, cu_seqlens)
    common = dict(H=H, HV=HV, DK=Dk, C=C)
    with on_device(q):
        prepare_kernel[(chunks, HV)](q, k, g, beta, N, P, *factors, gamma_C, cu_seqlens, first_chunk, chunk_seq, tokens, scale,
                                     **common, **by_chunk, NORM=norm, maxnreg=prepare_registers(q))
        forward_kernel[lambda m: (triton.cdiv(Dv, m["BV"]) * sequences * HV,)](
            q, k, v, beta, N, P, *factors, gamma_C, initial_state, o, None, None, S_out, cu_seqlens, first_chunk, tokens,
            **common, **by_sequence, DV=Dv, SAVE=False)
    return o, S_out, N, P, factors, gamma_C


def launch_backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Optional[Tensor],
                    cu_seqlens: Optional[Tensor], norm: bool, N: Tensor, P: Tensor, factors: Tensor, gamma_C: Tensor,
                    do: Tensor, dS_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, g, beta and initial_state (empty without one)."""
    B, tokens, H, Dk, HV, Dv = *q.shape, *v.shape[2:]
    C, _, by_sequence, by_block = triton_tiles(Dk, Dv, q.dtype)
    sequences, chunks, first_chunk, chunk_seq = chunk_table(q, cu_seqlens, C)
    states, dstates = q.new_empty(chunks, HV, Dk, Dv), q.new_empty(chunks, HV, Dk, Dv)
    dP, dM, sums = torch.empty_like(P), torch.empty_like(P), g.new_empty(3, *g.shape)
    error, X, dv, dg, dbeta = (torch.empty_like(x) for x in (v, v, v, g, beta))
    dS0 = None if initial_state is None else torch.empty_like(initial_state)
    dq, dk = (q.new_empty(B, tokens, HV, Dk, dtype=q.dtype if H == HV else torch.float32) for _ in range(2))
    common = dict(H=H, HV=HV, DK=Dk, DV=Dv, C=C)
    walks = lambda m: (triton.cdiv(Dv, m["BV"]) * sequences * HV,)
    with on_device(q):
        forward_kernel[walks](q, k, v, beta, N, P, *factors, gamma_C, initial_state, None, error, states, None, cu_seqlens,
                              first_chunk, tokens, **common, **by_sequence, SAVE=True)
        backward_state_kernel[walks](q, k, beta, N, P, *factors, gamma_C, do, dS_out, X, dstates, dS0, cu_seqlens,
                                     first_chunk, tokens, **common, **by_sequence)
        backward_scores_kernel[(chunks, HV)](q, k, g, beta, do, error, X, dP, dM, dv, dbeta, sums, cu_seqlens, first_chunk, chunk_seq,
                                             tokens, g.numel(), scale, **common, **by_block, NORM=norm)
        backward_chunk_kernel[(chunks, HV)](q, k, beta, *factors, gamma_C, do, error, X, states, dstates, dP, dM, sums, dq, dk, dg,
                                            cu_seqlens, first_chunk, chunk_seq, tokens, g.numel(), **common, **by_block, NORM=norm)
    if H != HV:                                                          # value heads that share a key head
        dq, dk = (x.unflatten(2, (H, HV // H)).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, g.new_empty(0) if dS0 is None else dS0


def launch_decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Optional[Tensor],
                  norm: bool) -> tuple[Tensor, Tensor]:
    """-> o, new state. Contiguous inputs."""
    B, tokens, H, Dk, HV, Dv = *q.shape, *v.shape[2:]
    o, S_out = torch.empty_like(v), g.new_empty(B, HV, Dk, Dv)
    with on_device(q):
        decode_kernel[(triton.cdiv(Dv, 16) * B * HV,)](q, k, v, g, beta, initial_state, o, S_out, tokens, scale, H=H, HV=HV, DK=Dk,
                                                     DV=Dv, BK=triton.next_power_of_2(Dk), BV=16, num_warps=4, NORM=norm)
    return o, S_out


# The same as custom ops, for torch.compile. Eager PyTorch calls the functions: an op costs as much host time as a launch.
forward_op, backward_op, decode_op = (torch.library.custom_op(f"{OPS}::{f.__name__}", f, mutates_args=())
                                      for f in (launch_forward, launch_backward, launch_decode))
forward_op.register_fake(lambda q, k, v, g, beta, scale, initial_state, cu_seqlens, norm: forward_outputs(q, v, g, cu_seqlens))
backward_op.register_fake(lambda q, k, v, g, beta, scale, initial_state, *_: (
    *(torch.empty_like(x) for x in (q, k, v, g, beta)), g.new_empty(0) if initial_state is None else torch.empty_like(initial_state)))
decode_op.register_fake(lambda q, k, v, g, *_: (torch.empty_like(v), g.new_empty(q.shape[0], v.shape[2], q.shape[3], v.shape[3])))


def launch(function, op, *inputs):
    return op(*inputs) if torch.compiler.is_compiling() else function(*inputs)


def refuse_double_backward():
    """Both backward passes are written out and leave no graph behind: with create_graph=True a term would be lost in silence."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the chunked gated delta rule has no second derivative: leave out create_graph=True, or use recurrent_gated_delta_rule")


class ChunkedTriton(torch.autograd.Function):
    """The Triton kernels behind autograd: (q, k, v, g, beta, scale, initial_state, cu_seqlens, norm) -> o, final state."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, scale, initial_state, cu_seqlens, norm):
        o, S, *factors = launch(launch_forward, forward_op, q, k, v, g, beta, scale, initial_state, cu_seqlens, norm)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *factors)
        ctx.scale, ctx.norm = scale, norm
        return o, S

    @staticmethod
    def backward(ctx, do, dS_out):
        refuse_double_backward()
        q, k, v, g, beta, initial_state, cu_seqlens, *factors = ctx.saved_tensors
        *grads, dS0 = launch(launch_backward, backward_op, q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens, ctx.norm, *factors,
                             do.contiguous(), dS_out.contiguous())
        return *grads, None, None if initial_state is None else dS0, None, None


# ------------------------------------------------------------------------------------------- the switch

def example(B, T, H, HV, Dk, Dv, kind="random", dtype=torch.float32, device="cpu", seed=0):
    """q, k, v, g, beta, initial state. kind: random; identical (one key, beta -> 1, no decay); underflow (g = -1000 at places)."""
    rng = torch.Generator(device).manual_seed(seed)
    randn, rand = (functools.partial(f, generator=rng, device=device) for f in (torch.randn, torch.rand))
    q, k, v, S0 = randn(B, T, H, Dk), randn(B, T, H, Dk), randn(B, T, HV, Dv), randn(B, HV, Dk, Dv)
    g, beta = -0.3 * rand(B, T, HV), rand(B, T, HV)
    if kind == "identical":
        k, g, beta = k[:, :1].expand_as(k), 0 * g, torch.full_like(beta, 0.9999)
    if kind == "underflow":
        g = torch.where(rand(B, T, HV) < 0.1, -1000.0, g)
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, beta, S0]


def everything(rule, inputs, seed=1, **options):
    """-> [o, final state, gradients of q, k, v, g, beta, initial state] under random output gradients (the same in any dtype)."""
    rng = torch.Generator().manual_seed(seed)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    o, S = rule(*inputs[:5], initial_state=inputs[5], output_final_state=True, use_qk_l2norm_in_kernel=True, **options)
    do, dS = (torch.randn(x.shape, generator=rng).to(x) for x in (o, S))
    return [o.detach(), S.detach(), *torch.autograd.grad((o, S), inputs, (do, dS))]


def errors(rule, inputs, **options):
    """-> relative RMS error of everything(rule) against the fp64 recurrence on the same inputs."""
    truth = everything(recurrent_gated_delta_rule, [x.double() for x in inputs])
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(everything(rule, inputs, **options), truth)]


def trial(device, dtype, H, HV, Dk, Dv):
    """-> errors of the Triton kernels on a few chunks, the last one ragged: o, final state, six gradients, and o of the decoding
    kernel. Whatever surrounds the first call, inference, autocast or a checkpoint that counts saved tensors, is kept out."""
    keep = lambda x: x
    with (torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.split(":")[0], enabled=False),
          torch.autograd.graph.saved_tensors_hooks(keep, keep)):
        inputs = example(1, 130, H, HV, Dk, Dv, "random", dtype, device)
        step, _ = launch_decode(*inputs[:5], Dk ** -0.5, inputs[5], True)
        truth = everything(recurrent_gated_delta_rule, [x.double() for x in inputs])[0]
        return errors(chunk_gated_delta_rule, inputs, backend="unchecked triton") + [((step - truth).norm() / truth.norm()).item()]


@functools.lru_cache(maxsize=None)
def why_not_triton(device, dtype, H, HV, Dk, Dv):
    """None if the Triton kernels give, on this device and for these heads, what the recurrence gives; else the reason.

    An import that succeeds proves nothing, and a compiler can be wrong at one head size only (triton_tiles): so the kernels
    are launched, forward and backward, with the norm and an initial state, and compared. Once a process, device and kind of
    head: some ten seconds of compiling when Triton's cache on disk does not have the kernels yet.
    """
    if triton is None:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take bf16, fp16 and fp32, not {dtype}"
    if max(Dk, Dv) > 256:
        return f"the kernels take heads up to 256, not {max(Dk, Dv)}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None                                                      # for tests, which compare by themselves
    if not device.startswith("cuda"):
        return f"the kernels run on a GPU, not on the device {device}"
    try:
        found = trial(device, dtype, H, HV, Dk, Dv)
    except torch.OutOfMemoryError:                                       # says nothing about the kernels
        raise
    except Exception as error:                                           # whatever a compiler or a driver throws
        return f"a trial launch failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    limit = 1e-3 if dtype == torch.float32 else 3e-2
    if all(e < limit for e in found):                                    # also false for NaN
        return None
    names = ("o", "final state", "dq", "dk", "dv", "dg", "dbeta", "d initial state", "decoding")
    return "a trial launch disagrees with the recurrence: " + ", ".join(f"{n} {e:.0e}" for n, e in zip(names, found) if not e < limit)


@functools.lru_cache(maxsize=None)
def say_once(line):
    print(line, file=sys.stderr)


@torch.compiler.assume_constant_result                                   # decided while compiling, not part of the graph
def pick_backend(backend, device, dtype, H, HV, Dk, Dv):
    """-> "torch" or "triton". "auto" is what HYBRID_DISTILL_BACKEND says, else Triton on a GPU where it works."""
    if backend == "auto":
        backend = os.environ.get("HYBRID_DISTILL_BACKEND", "auto")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend (or HYBRID_DISTILL_BACKEND) must be 'auto', 'torch' or 'triton', not {backend!r}")
    if backend == "torch" or backend == "auto" and not device.startswith("cuda"):
        return "torch"
    reason = why_not_triton(device, dtype, H, HV, Dk, Dv)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend='triton' is not possible: {reason}")
    say_once(f"kernels.py: the slower PyTorch backend runs on {device}: {reason}")
    return "torch"


def head_sizes(q, v):
    """H, HV, Dk, Dv as numbers, also while torch.compile traces with dynamic shapes: the kernels are specialised on them."""
    return [range(n).stop for n in (q.shape[2], v.shape[2], q.shape[3], v.shape[3])]


def check_inputs(q, k, v, g, beta, initial_state, cu_seqlens=None):
    """Raise one sentence that says what is wrong and what would be right. Shapes are those of chunk_gated_delta_rule."""
    for name, x, dims in (("q", q, "H, Dk"), ("v", v, "HV, Dv")):
        if x.ndim != 4 or x.numel() == 0 or x.shape[:2] != q.shape[:2]:
            raise ValueError(f"{name} must be [B, T, {dims}], not empty and of the B and T of q, not {list(x.shape)}")
    (B, T, H, Dk), (HV, Dv) = q.shape, v.shape[2:]
    if HV % H:
        raise ValueError(f"the {HV} heads of v must be a multiple of the {H} heads of q and k")
    sequences = B
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be [N + 1] of int64 (or int32), not {list(cu_seqlens.shape)} of {cu_seqlens.dtype}")
        if B != 1:
            raise ValueError(f"with cu_seqlens the sequences are packed in one row: B must be 1, not {B}")
        sequences = len(cu_seqlens) - 1
        ends = [0, T] if torch.compiler.is_compiling() else cu_seqlens.tolist()        # a compiled graph cannot read values
        if ends[0] != 0 or ends[-1] != T or any(a >= b for a, b in zip(ends, ends[1:])):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T} without an empty sequence, not {str(ends)[:100]}")
    for name, x, shape in (("q", q, q.shape), ("k", k, q.shape), ("v", v, v.shape), ("g", g, v.shape[:3]), ("beta", beta, v.shape[:3]),
                           ("initial_state", initial_state, (sequences, HV, Dk, Dv)), ("cu_seqlens", cu_seqlens, (sequences + 1,))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(x.shape)}")
        if x is not None and name != "cu_seqlens" and not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, not {x.dtype}")
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, not on {x.device}")


# What transformers' own models pass down to the rule beside its arguments. For decoding, cu_seqlens is one of them.
FROM_TRANSFORMERS = ("use_cache", "output_router_logits", "cu_seq_lens_k", "max_length_q", "max_length_k")


def check_options(others):
    """TypeError for a keyword that is not known, ValueError for an option of [3] that is set and not implemented here."""
    for name, value in others.items():
        if name in ("cu_seqlens", "gk", "gv", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first",
                    "head_first", "cp_context", "chunk_size"):
            if value is not None and value is not False:
                raise ValueError(f"{name} is not implemented here: leave it out")
        elif name not in FROM_TRANSFORMERS:
            raise TypeError(f"the gated delta rule has no keyword {name!r}")


def one_dtype(q, k, v):
    """q, k, v in one dtype: that of autocast where it is on, else the widest of the three."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
    else:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, backend="auto", **others):
    """The gated delta rule (recurrent_gated_delta_rule) in chunks: everything but the walk of the state is a matrix product.

    Arguments: q, k [B, T, H, Dk], v [B, T, HV, Dv] (HV a multiple of H), g (log-decay <= 0), beta [B, T, HV]; q, k and v are
    brought to one dtype, gates and state to fp32 (fp64 stays fp64 in PyTorch). scale: Dk^-1/2 unless given.
    initial_state [B, HV, Dk, Dv] or None. cu_seqlens [N + 1]: N sequences packed in one row (B = 1), sequence n from
    cu_seqlens[n] to cu_seqlens[n + 1]; the states are then [N, HV, Dk, Dv]; torch.compile cannot check its values. backend: "auto" (Triton on a GPU), "torch", "triton".
    Other keywords: see check_options.
    Returns o [B, T, HV, Dv] in the dtype of q, k, v, and the final state (fp32 or fp64), or None. In fp16, with the norm, the
    Triton kernels hold values and gradients divided by |q| and |k|, which overflow where the vectors are short (1e-4): prefer bf16.
    Raises ValueError for inputs that do not fit, RuntimeError where backend="triton" is not possible: one sentence each.
    Source: [1] and [2]; keyword names and layout of fla.ops.gated_delta_rule.chunk_gated_delta_rule [3].
    """
    check_inputs(q, k, v, g, beta, initial_state, cu_seqlens)
    check_options(others)
    q, k, v = one_dtype(q, k, v)
    g = g.clamp(min=-1e4)                                                # exp is 0 there; -inf would be inf - inf in a cumulative sum
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend != "unchecked triton":
        backend = pick_backend(backend, str(q.device), q.dtype, *head_sizes(q, v))
    if backend != "torch":
        g, beta, initial_state = (None if x is None else x.float().contiguous() for x in (g, beta, initial_state))
        q, k, v, cu_seqlens = (None if x is None else x.contiguous() for x in (q, k, v, cu_seqlens))
        o, S = ChunkedTriton.apply(q, k, v, g, beta, scale, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)
    elif cu_seqlens is None:
        o, S = chunk_torch(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel)
    else:
        ends, parts = cu_seqlens.tolist(), []
        for n, (i, j) in enumerate(zip(ends, ends[1:])):
            S0 = None if initial_state is None else initial_state[n:n + 1]
            parts.append(chunk_torch(*(x[:, i:j] for x in (q, k, v, g, beta)), scale, S0, use_qk_l2norm_in_kernel))
        o, S = torch.cat([o for o, _ in parts], 1), torch.cat([S for _, S in parts])
    return o.to(v.dtype), S if output_final_state else None


def decode_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                            use_qk_l2norm_in_kernel=False, **others):
    """One token (or a few) from the cached state: the recurrence, on a GPU fused into one kernel that reads the state once.

    Arguments, returns and errors: those of chunk_gated_delta_rule. Where gradients are wanted, and off the GPU, it is the
    recurrence itself.
    """
    check_inputs(q, k, v, g, beta, initial_state)
    check_options(others)
    q, k, v = one_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, initial_state))
    if wants_grad or pick_backend("auto", str(q.device), q.dtype, *head_sizes(q, v)) == "torch":
        return recurrent_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel)
    g, beta, initial_state = (None if x is None else x.float().contiguous() for x in (g, beta, initial_state))
    q, k, v = (x.contiguous() for x in (q, k, v))
    o, S = launch(launch_decode, decode_op, q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel)
    return o, S if output_final_state else None


# ------------------------------------------------------------------------------------------- check and benchmark

def check(device):
    """Print the relative RMS error of every backend this machine has, over inputs that can see bugs."""
    print(f"\nRelative RMS error against the fp64 recurrence on {device}: o, final state, dq, dk, dv, dg, dbeta, d initial state")
    for backend in ["torch"] + ["triton"] * (why_not_triton(device, torch.float32, 2, 4, 64, 64) is None):
        for dtype in (torch.float32, torch.bfloat16)[: 1 + (backend == "triton")]:
            for T, Dk, Dv in ((1, 64, 64), (75, 60, 100), (200, 128, 64)):
                for kind in ("random", "identical", "underflow"):
                    found = errors(chunk_gated_delta_rule, example(2, T, 2, 4, Dk, Dv, kind, dtype, device), backend=backend)
                    print(f"  {backend:6} {str(dtype)[6:]:8} T={T:<3} d={Dk},{Dv:<3} {kind:9} ", *(f"{e:.0e}" for e in found))


def seconds(function, budget=0.3):
    """Median seconds of one call of `function`, its first one (which compiles and tunes) left out; or why it does not run."""
    try:
        function()
        timer = Timer("function()", globals=dict(function=function), num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=budget).median
    except RuntimeError as error:                                            # also torch.OutOfMemoryError
        return " ".join(str(error).split())[:60]


def rates(device, dtype):
    """-> this device's own bytes/s of a copy (read and written) and FLOP/s of a matmul."""
    n = 8192 if device == "cuda" else 2048
    buffer, square = torch.empty(16 * n * n, dtype=torch.uint8, device=device), torch.randn(n, n, device=device).to(dtype)
    return 2 * buffer.numel() / seconds(buffer.clone), 2 * n**3 / seconds(lambda: square @ square)


def benchmark(device):
    """-> rows of case, rule, seconds forward, seconds forward + backward, and for ours FLOPs and least bytes of each."""
    rules = {"ours, torch": functools.partial(chunk_gated_delta_rule, backend="torch", use_qk_l2norm_in_kernel=True)}
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
        fallback = inspect.unwrap(torch_chunk_gated_delta_rule)              # the name itself calls FLA where FLA is installed
        rules["transformers"] = functools.partial(fallback, use_qk_l2norm_in_kernel=True)
    except ImportError:
        print("transformers is not installed: not timed")
    cases, dtype = [(4, 512, 4, 32), (1, 2048, 8, 64), (1, 4096, 4, 128), (16, 256, 4, 32)], torch.float32
    if device == "cuda":
        cases, dtype = [(6, 1024 << i, 16, D) for D in (64, 128) for i in range(7)], torch.bfloat16
        rules["ours, triton"] = functools.partial(chunk_gated_delta_rule, backend="triton", use_qk_l2norm_in_kernel=True)
        rules["SDPA causal"] = lambda q, k, v, g, beta: (
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True),)
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla, fused_recurrent_gated_delta_rule as fla_step
            rules["FLA"] = functools.partial(fla, use_qk_l2norm_in_kernel=True)
        except ImportError:
            print("flash-linear-attention is not installed: not timed")
    rows, slow = [], set()
    for B, T, H, D in cases:
        inputs = [x.requires_grad_() for x in example(B, T, H, H, D, D, dtype=dtype, device=device)[:5]]
        # FLOPs: 2 m n k of each product above. Bytes: at least q, k, v, o; then also do, dq, dk, dv and q, k, v again
        n, C = B * T * H, 64 if D > 32 else 32
        cost = n * (8 * C + 6 * D) * D, n * 4 * D * dtype.itemsize, n * (30 * C + 22 * D) * D, n * 11 * D * dtype.itemsize
        for name, rule in rules.items():
            if (name, D) in slow:
                continue

            def both():
                o = rule(*inputs)[0]
                torch.autograd.grad(o, inputs, torch.ones_like(o), allow_unused=True)
            times = seconds(torch.no_grad()(lambda: rule(*inputs))), seconds(both)
            rows.append([f"B={B} T={T} H={H} d={D}", name, *times, *(cost if name.startswith("ours") else [None] * 4)])
            print(*rows[-1][:4], sep="; ", flush=True)                       # a run that is cut off leaves what it measured
            if device == "cuda" and not all(isinstance(t, float) and t < 0.2 for t in times):
                slow.add((name, D))                                          # a longer T only takes longer
        if device == "cuda":
            q, k, v, g, beta, S = example(B, 1, H, H, D, D, dtype=dtype, device=device)
            cache = torch.randn(2, B, H, T, D, dtype=dtype, device=device)
            steps = {"ours": lambda: decode_gated_delta_rule(q, k, v, g, beta, initial_state=S, output_final_state=True),
                     "SDPA, cache": lambda: F.scaled_dot_product_attention(q.transpose(1, 2), *cache)}
            if "FLA" in rules:
                steps["FLA"] = lambda: fla_step(q, k, v, g, beta, initial_state=S, output_final_state=True)
            rows += [[f"one token after {T}, d={D}", name, seconds(torch.no_grad()(step)), "-", *[None] * 4] for name, step in steps.items()]
    return rows


def main():
    parser = argparse.ArgumentParser(description="Check every backend against the fp64 recurrence, then benchmark.")
    parser.add_argument("--out", type=Path, default="benchmark", help="folder for the table and the figure")
    out, device = parser.parse_args().out, "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}; torch {torch.__version__}, triton {triton.__version__ if triton else 'not installed'}"
    print(title)
    check(device)
    copy, matmul = rates(device, torch.bfloat16 if device == "cuda" else torch.float32)
    limits = f"This device: copy {copy / 1e9:.0f} GB/s, matmul {matmul / 1e12:.3g} TFLOP/s."
    print(f"\n{limits}\ncase; rule; seconds forward; forward + backward")
    rows = benchmark(device)
    ours = {case: both for case, rule, _, both, *_ in rows if rule.startswith("ours")}        # Triton's where it runs
    text = lambda t: f"{1e3 * t:.3g} ms" if isinstance(t, float) else t
    share = lambda t, flops, bytes_: f"{bytes_ / t / copy:.0%}, {flops / t / matmul:.0%}" if flops and isinstance(t, float) else "-"
    lines = [title, limits, "",
             "| case | rule | forward | of copy, of matmul | forward + backward | of copy, of matmul | this / ours |", "|---" * 7 + "|"]
    ratios = []
    for case, rule, forward, both, f1, b1, f2, b2 in rows:
        ratio = both / ours[case] if isinstance(both, float) and isinstance(ours[case], float) else None
        ratios += [ratio] if rule == "transformers" and ratio else []
        lines.append(f"| {case} | {rule} | {text(forward)} | {share(forward, f1, b1)} | {text(both)} | {share(both, f2, b2)} | {f'{ratio:.2f}x' if ratio else '-'} |")
    if ratios:
        lines += ["", f"transformers' time / ours, forward + backward, median over the cases: {statistics.median(ratios):.2f}x"]
    if device == "cpu":
        lines += ["", "GPU rows (Triton, FLA, SDPA, decoding): not measured, this machine has no CUDA device."]
    print("\n" + "\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"kernels_{device}.md").write_text("\n".join(lines) + "\n")
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"\nwritten to {out}: kernels_{device}.md; the figure needs matplotlib")
        return
    figure, axes = plt.subplots(1, 2, figsize=(14, 6), sharey=True, layout="tight")
    figure.suptitle(title)
    for axis, column, what in zip(axes, (2, 3), ("forward, ms", "forward + backward, ms")):
        points = [(row[1], row[0], 1e3 * row[column]) for row in rows if row[3] != "-" and isinstance(row[column], float)]
        for rule in dict.fromkeys(point[0] for point in points):
            axis.semilogy(*zip(*(point[1:] for point in points if point[0] == rule)), "o", label=rule)
        axis.set_title(what)
        axis.tick_params("x", rotation=90)
        axis.legend()
    figure.savefig(out / f"kernels_{device}.png", dpi=120)
    print(f"\nwritten to {out}: kernels_{device}.md, kernels_{device}.png")


def __getattr__(name):
    """What this file lacks, from PyPI's package of the same name, if that is installed.

    transformers probes for a package called kernels and imports names from it; with this folder on sys.path it finds this file
    instead, and gets them all the same. `__path__` is there for that package's own submodules, `import kernels.layer`.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    others = [entry for entry in sys.path if os.path.realpath(entry or ".") != here]
    wanted = __name__ == "kernels" and (name == "__path__" or not name.startswith("__"))
    spec = importlib.machinery.PathFinder.find_spec("kernels", others) if wanted else None
    if spec is None or spec.submodule_search_locations is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__path__":
        return spec.submodule_search_locations
    if "_pypi_kernels" not in sys.modules:
        spec = importlib.util.spec_from_file_location("_pypi_kernels", spec.origin, submodule_search_locations=spec.submodule_search_locations)
        module = sys.modules["_pypi_kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(sys.modules["_pypi_kernels"], name)


if __name__ == "__main__":
    main()
