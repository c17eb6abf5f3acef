"""The gated delta rule: recurrence (ground truth), chunked PyTorch."""
from __future__ import annotations

import contextlib
import re
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit(do_not_specialize=["tokens", "stride"])   # T = 1 is no other program
except ImportError:                                  # macOS, Windows: the PyTorch backend alone
    triton, tl, jit = None, None, lambda f: f


# ------------------------------------------------------------------------------------------- the recurrence (ground truth)

def recurrent_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               use_qk_l2norm_in_kernel=False):
    """The gated delta rule, token by token: the definition every other function of this file is held against.

        S~_t = exp(g_t) S_{t-1}                             decay first,
        S_t  = S~_t + k_t (x) beta_t (v_t - S~_t^T k_t)     then correct the error of the prediction
        o_t  = scale S_t^T q_t
    """
    T, groups = q.shape[1], v.shape[2] // q.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out_dtype = v.dtype
    q, k, v, g, beta = (x.to(work) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q, k = (x.repeat_interleave(groups, 2) for x in (q * scale, k))                # [B, T, HV, Dk]
    S = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :]) if initial_state is None else initial_state.to(work)
    outputs = []
    for t in range(T):
        S = S * g[:, t, :, None, None].exp()                                       # decay first
        error = v[:, t] - (k[:, t, :, None, :] @ S).squeeze(-2)                    # v_t - S~^T k_t
        S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
        outputs.append((q[:, t, :, None, :] @ S).squeeze(-2))
    return torch.stack(outputs, 1).to(out_dtype), S if output_final_state else None


def decode_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                            use_qk_l2norm_in_kernel=False):
    """One token (or a few) from the cached state: the same recurrence."""
    return recurrent_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel)


def l2norm(x, eps=1e-6):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


# ------------------------------------------------------------------------------------------- chunked, in PyTorch

def unit_lower_inverse(A):
    """(I + A)^-1 for strictly lower triangular A [..., C, C], by forward substitution."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)


class ChunkedTorch(torch.autograd.Function):
    """The chunkwise form with a hand-written backward. All inputs [N, BH, C, ...], chunks first."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S0):
        N, BH, C, Dk = k.shape
        log_gamma = g.double().cumsum(-1)
        gamma = log_gamma.exp().to(k.dtype)[..., None]                               # [N, BH, C, 1]
        rest = (log_gamma[..., -1:] - log_gamma).exp().to(k.dtype)[..., None]        # gamma_C / gamma_j
        b = beta[..., None]
        D, T = k.new_empty(N, BH, C, C), k.new_empty(N, BH, C, C)
        U, o, S = torch.empty_like(v), torch.empty_like(v), k.new_empty(N + 1, *S0.shape)
        S[0] = S0
        for n in range(N):
            # 1. D_ij = gamma_i / gamma_j for i >= j.
            D[n].copy_(log_gamma[n, :, :, None] - log_gamma[n, :, None, :]).exp_().tril_()
            # 2. A = strictLower(beta_i D_ij k_i.k_j),  T = (I + A)^-1
            A = torch.bmm(k[n] * b[n], k[n].mT).mul_(D[n])
            T[n] = unit_lower_inverse(A)
            # 3. U~ = T beta (V - gamma K S_0),  O = gamma Q S_0 + tril(Q K^T D) U~,  S_C = gamma_C S_0 + (gamma_C/gamma K)^T U~
            torch.bmm(T[n], torch.baddbmm(v[n], k[n] * gamma[n], S[n], alpha=-1).mul_(b[n]), out=U[n])
            torch.bmm(q[n] * gamma[n], S[n], out=o[n])
            o[n].baddbmm_(torch.bmm(q[n], k[n].mT).mul_(D[n]), U[n])
            torch.mul(S[n], gamma[n, :, -1:], out=S[n + 1]).baddbmm_((k[n] * rest[n]).mT, U[n])
        ctx.save_for_backward(q, k, v, beta, gamma, rest, D, T, U, S)
        return o, S[-1].clone()

    @staticmethod
    def backward(ctx, do, dS):
        q, k, v, beta, gamma, rest, D, T, U, S = ctx.saved_tensors
        N, BH, C, Dk = k.shape
        b = beta[..., None]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dbeta, dlog = torch.empty_like(beta), torch.empty_like(beta, dtype=torch.float64)
        for n in reversed(range(N)):
            kn, bn, Dn = k[n], b[n], D[n]
            KK, QK = torch.bmm(kn, kn.mT).mul_(Dn).tril_(-1), torch.bmm(q[n], kn.mT).mul_(Dn)
            R = torch.bmm(U[n], dS.mT).mul_(rest[n])
            # 1. dU~ = P^T dO + (gamma_C/gamma K) dS_C,  X = T^T dU~
            X = torch.bmm(T[n].mT, torch.bmm(QK.mT, do[n]).baddbmm_(kn * rest[n], dS))
            Z, Y = torch.bmm(X, S[n].mT).mul_(gamma[n]), torch.bmm(do[n], S[n].mT).mul_(gamma[n])
            # 2. dP = dO U~^T, dA = -X U~^T
            dP, dA = torch.bmm(do[n], U[n].mT), torch.bmm(X, U[n].mT)
            KK.mul_(dA)
            E = QK.mul_(dP).sub_(KK * bn)
            dP.mul_(Dn)
            dA.mul_(Dn).tril_(-1).mul_(bn)
            torch.baddbmm(Y, dP, kn, out=dq[n])
            dkn = torch.sub(R, Z * bn, out=dk[n])
            dkn.baddbmm_(dP.mT, q[n]).baddbmm_(dA, kn, alpha=-1).baddbmm_(dA.mT, kn, alpha=-1)
            kz, kr = (kn * Z).sum(-1), (kn * R).sum(-1)
            torch.sub((X * v[n]).sum(-1), KK.sum(-1), out=dbeta[n]).sub_(kz)
            torch.mul(X, bn, out=dv[n])
            dlog[n] = E.sum(-1, dtype=torch.float64) - E.sum(-2, dtype=torch.float64) + (q[n] * Y).sum(-1) - beta[n] * kz - kr
            dlog[n, :, -1] += kr.sum(-1) + gamma[n, :, -1, 0] * (S[n] * dS).sum((-1, -2))
            dS = (dS * gamma[n, :, -1:]).baddbmm_((q[n] * gamma[n]).mT, do[n]).baddbmm_((kn * gamma[n]).mT, dv[n], alpha=-1)
        return dq, dk, dv, dlog.flip(-1).cumsum(-1).flip(-1).to(k.dtype), dbeta, dS


def chunk_torch(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel, ):
    B, T, H, Dk = q.shape
    HV, Dv = v.shape[2:]
    work = torch.promote_types(q.dtype, torch.float32)
    C = min(64 if max(Dk, Dv) > 32 else 32, T)
    N = -(-T // C)
    q, k, v, g, beta = (x.to(work) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)

    def chunks(x):                                                  # [B, T, H, ...] -> [N, B HV, C, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, N * C - T)) if N * C != T else x
        x = x.unflatten(1, (N, C)).transpose(2, 3).transpose(0, 1)   # [N, B, H, C, ...]
        if x.shape[2] != HV:
            x = x.repeat_interleave(HV // x.shape[2], 2)
        return x.flatten(1, 2).contiguous()

    S0 = k.new_zeros(B * HV, Dk, Dv) if initial_state is None else initial_state.to(work).flatten(0, 1)
    with torch.autocast(q.device.type, enabled=False):
        o, S = ChunkedTorch.apply(*map(chunks, (q * scale, k, v, g, beta)), S0)
    o = o.unflatten(1, (B, HV)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]
    return o, S.unflatten(0, (B, HV))


# ----------------------------------------------------------------------------------------- tiles in and out (Triton)

@jit
def sequence(cu_seqlens, first_chunk, s, tokens, C: tl.constexpr, VARLEN: tl.constexpr):
    """Sequence s: its first token, its length, the number of its first chunk (64-bit: they are multiplied by H D)."""
    if VARLEN:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        return start, tl.load(cu_seqlens + s + 1).to(tl.int64) - start, tl.load(first_chunk + s).to(tl.int64)
    else:
        s = s.to(tl.int64)
        return s * tokens, tokens.to(tl.int64), s * tl.cdiv(tokens, C)


@jit
def load_rows(x, token, left, head, HEADS: tl.constexpr, D: tl.constexpr, d0, C: tl.constexpr, BD: tl.constexpr):
    """Tile [C, BD] of x [tokens, HEADS, D] from row `token` and column d0 on; zero behind the last `left` rows and column D."""
    x += (token * HEADS + head) * D                                      # 64-bit once; 32-bit inside the tile
    r, d = tl.arange(0, C), d0 + tl.arange(0, BD)
    return tl.load(x + r[:, None] * (HEADS * D) + d[None, :], mask=(r < left)[:, None] & (d < D)[None, :], other=0.0)


@jit
def store_rows(x, value, token, left, head, HEADS: tl.constexpr, D: tl.constexpr, d0, C: tl.constexpr, BD: tl.constexpr):
    """The inverse of load_rows, in the dtype of x."""
    x += (token * HEADS + head) * D
    r, d = tl.arange(0, C), d0 + tl.arange(0, BD)
    tl.store(x + r[:, None] * (HEADS * D) + d[None, :], value.to(x.dtype.element_ty),
             mask=(r < left)[:, None] & (d < D)[None, :])


@jit
def load_state(x, row, d0, v0, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Tile [BK, BV] of matrix `row` of x [rows, DK, DV], zero outside."""
    d, v = d0 + tl.arange(0, BK), v0 + tl.arange(0, BV)
    return tl.load(x + row * DK * DV + (d[:, None] * DV + v[None, :]), mask=(d < DK)[:, None] & (v < DV)[None, :], other=0.0)


@jit
def store_state(x, value, row, v0, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The inverse of load_state for d0 = 0, in the dtype of x."""
    d, v = tl.arange(0, BK), v0 + tl.arange(0, BV)
    tl.store(x + row * DK * DV + (d[:, None] * DV + v[None, :]), value.to(x.dtype.element_ty),
             mask=(d < DK)[:, None] & (v < DV)[None, :])


@jit
def gates(g, beta, token, left, head, HEADS: tl.constexpr, C: tl.constexpr):
    """-> log gamma as a sum of two floats (hi + lo), gamma, gamma_C / gamma, gamma_C, beta. Behind the end g = beta = 0.

    log gamma = cumsum(g) is summed in fp64 (64 numbers) and kept as hi + lo: its differences are exponents, and
    -1000.0 - (-1000.1) would lose four digits in fp32.
    """
    r = tl.arange(0, C)
    at, inside = token * HEADS + head + r * HEADS, r < left
    g = tl.load(g + at, mask=inside, other=0.0).to(tl.float64)
    total, log_gamma = tl.sum(g, 0), tl.cumsum(g, 0)
    hi = log_gamma.to(tl.float32)
    lo = (log_gamma - hi.to(tl.float64)).to(tl.float32)
    rest = tl.exp((total - log_gamma).to(tl.float32))
    return hi, lo, tl.exp(hi), rest, tl.exp(total.to(tl.float32)), tl.load(beta + at, mask=inside, other=0.0)


@jit
def decay(hi, lo, C: tl.constexpr):
    """D_ij = gamma_i / gamma_j for i >= j, else 0. Masked before exp (above the diagonal it overflows) and after."""
    i = tl.arange(0, C)
    lower = i[:, None] >= i[None, :]
    log = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
    return tl.where(lower, tl.exp(tl.where(lower, log, 0.0)), 0.0)


@jit
def squares(x):
    """|x_i|^2 of each row."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@jit
def inverse_length(xx, NORM: tl.constexpr):
    """1 / |x_i|, or 1. The L2-norm is a factor of a row: it is applied behind a product, to the row's other factors."""
    return tl.rsqrt(xx + 1e-6) if NORM else tl.full([xx.shape[0]], 1.0, tl.float32)


# ----------------------------------------------------------------------------------------- the kernels (Triton)

@jit
def inverse_kernel(k, g, beta, T, cu_seqlens, first_chunk, chunk_seq, tokens,
                   H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                   VARLEN: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr):
    """T = (I + A)^-1 with A = strictLower(beta_i D_ij k_i.k_j), for every chunk.

    Grid (chunks, HV). Registers: A and T [C, C] fp32. Shared memory: k [C, BK] and the operands of the merges.
    Reads k, g, beta; writes T [chunks, HV, C, C] in the dtype of k.
    """
    c, h = tl.program_id(0), tl.program_id(1)
    s = tl.load(chunk_seq + c) if VARLEN else c // tl.cdiv(tokens, C)
    if s < 0:
        return
    start, length, first = sequence(cu_seqlens, first_chunk, s, tokens, C, VARLEN)
    token, left = start + (c - first) * C, length - (c - first) * C
    # 1. A
    bk = load_rows(k, token, left, h // (HV // H), H, DK, 0, C, BK)
    rk = inverse_length(squares(bk), NORM)
    hi, lo, gamma, rest, gamma_C, b = gates(g, beta, token, left, h, HV, C)
    A = tl.dot(bk, tl.trans(bk), input_precision="ieee") * decay(hi, lo, C) * (b * rk)[:, None] * rk[None, :]
    r = tl.arange(0, C)
    row, col = r[:, None], r[None, :]
    A = tl.where(row > col, A, 0.0)
    # 2. the 16 x 16 blocks on the diagonal, all at once, by forward substitution: T_i = e_i - sum_j A_ij T_j
    blocks: tl.constexpr = C // 16
    n, i16 = tl.arange(0, blocks), tl.arange(0, 16)
    diagonal = (n[:, None] == n[None, :])[:, None, :, None]
    A16 = tl.sum(tl.where(diagonal, tl.reshape(A, (blocks, 16, blocks, 16)), 0.0), 2)          # [blocks, 16, 16]
    row16 = i16[None, :, None]
    T16 = tl.where((row16 == i16[None, None, :]) & (n[:, None, None] >= 0), 1.0, 0.0)
    for i in range(1, 16):
        A_i = tl.sum(tl.where(row16 == i, A16, 0.0), 1)
        T16 -= tl.where(row16 == i, tl.sum(A_i[:, :, None] * T16, 1)[:, None, :], 0.0)
    bT = tl.reshape(tl.where(diagonal, T16[:, :, None, :], 0.0), (C, C))
    # 3. merge neighbours, 16 -> 32 -> 64: [[T1, 0], [-T2 A21 T1, T2]]. Exact: no power of A is ever formed
    for level in tl.static_range(0, C.bit_length() - 5):
        size = 16 << level
        A21 = tl.where((row // (2 * size) == col // (2 * size)) & (row // size > col // size), A, 0.0)
        bT -= tl.dot(bT, tl.dot(A21, bT, input_precision=PREC), input_precision=PREC)
    tl.store(T + (c.to(tl.int64) * HV + h) * C * C + (row * C + col), bT.to(T.dtype.element_ty))


@jit
def forward_kernel(q, k, v, g, beta, T, S0, o, U, states, S_out, cu_seqlens, first_chunk, tokens, scale,
                   H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                   BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, HAS_S0: tl.constexpr,
                   NORM: tl.constexpr, SAVE: tl.constexpr):
    """The walk over the chunks of one sequence; nothing but the state is carried.

        U~  = T beta (V - gamma K S_0)
        O   = gamma Q S_0 + tril(Q K^T D) U~
        S_C = gamma_C S_0 + (gamma_C / gamma K)^T U~

    Grid (Dv / BV, sequences * HV): columns of S never meet. Registers: S [BK, BV] fp32, U~ and O [C, BV], Q K^T [C, C].
    Shared memory: tiles of q, k, v, T on their way in. Reads q, k, v, T, g, beta, S0.
    Writes o and the final state; or, for the backward pass (SAVE), U~ and the state at the start of each chunk.
    """
    v0, s, h = tl.program_id(0) * BV, tl.program_id(1) // HV, tl.program_id(1) % HV
    dt = k.dtype.element_ty
    start, length, first = sequence(cu_seqlens, first_chunk, s, tokens, C, VARLEN)
    row = s.to(tl.int64) * HV + h
    S = load_state(S0, row, 0, v0, DK, DV, BK, BV) if HAS_S0 else tl.zeros([BK, BV], tl.float32)
    for n in range(tl.cdiv(length, C)):
        token, left, chunk = start + n * C, length - n * C, (first + n) * HV + h
        bk = load_rows(k, token, left, h // (HV // H), H, DK, 0, C, BK)
        bv = load_rows(v, token, left, h, HV, DV, v0, C, BV)
        bT = load_state(T, chunk, 0, 0, C, C, C, C)
        rk = inverse_length(squares(bk), NORM)
        hi, lo, gamma, rest, gamma_C, b = gates(g, beta, token, left, h, HV, C)
        # 1. U~ = T beta (V - gamma K S_0)
        Sd = S.to(dt)
        VS = b[:, None] * (bv - (gamma * rk)[:, None] * tl.dot(bk, Sd, input_precision="ieee"))
        bU = tl.dot(bT, VS.to(dt), input_precision="ieee")
        if SAVE:
            store_rows(U, bU, token, left, h, HV, DV, v0, C, BV)
            store_state(states, S, chunk, v0, DK, DV, BK, BV)
        else:
            # 2. O = gamma Q S_0 + tril(Q K^T D) U~
            bq = load_rows(q, token, left, h // (HV // H), H, DK, 0, C, BK)
            rq = inverse_length(squares(bq), NORM) * scale
            P = tl.dot(bq, tl.trans(bk), input_precision="ieee") * decay(hi, lo, C) * rq[:, None] * rk[None, :]
            bo = (gamma * rq)[:, None] * tl.dot(bq, Sd, input_precision="ieee")
            bo += tl.dot(P.to(dt), bU.to(dt), input_precision="ieee")
            store_rows(o, bo, token, left, h, HV, DV, v0, C, BV)
        # 3. S_C = gamma_C S_0 + (gamma_C / gamma K)^T U~
        S = gamma_C * S + tl.dot(tl.trans(bk), ((rest * rk)[:, None] * bU).to(dt), input_precision="ieee")
    if not SAVE:
        store_state(S_out, S, row, v0, DK, DV, BK, BV)


@jit
def backward_state_kernel(q, k, g, beta, T, do, dS_out, X, dstates, dS0, cu_seqlens, first_chunk, tokens, scale,
                          H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                          BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, HAS_S0: tl.constexpr,
                          NORM: tl.constexpr):
    """The walk back over the chunks.

        dU~  = tril(Q K^T D)^T dO + gamma_C / gamma K dS_C
        X    = T^T dU~                                              (so dV = beta X and dA = -X U~^T)
        dS_0 = gamma_C dS_C + (gamma Q)^T dO - (beta gamma K)^T X

    Grid (Dv / BV, sequences * HV). Registers: dS [BK, BV] fp32, dU~ and X [C, BV], K Q^T [C, C].
    Shared memory: tiles of q, k, dO, T on their way in. Reads q, k, dO, T, g, beta and the final state's gradient.
    Writes X, the gradient of the state at the end of each chunk, and the gradient of the initial state.
    """
    v0, s, h = tl.program_id(0) * BV, tl.program_id(1) // HV, tl.program_id(1) % HV
    dt = k.dtype.element_ty
    start, length, first = sequence(cu_seqlens, first_chunk, s, tokens, C, VARLEN)
    row, chunks = s.to(tl.int64) * HV + h, tl.cdiv(length, C)
    dS = load_state(dS_out, row, 0, v0, DK, DV, BK, BV)
    for m in range(chunks):
        n = chunks - 1 - m
        token, left, chunk = start + n * C, length - n * C, (first + n) * HV + h
        bk = load_rows(k, token, left, h // (HV // H), H, DK, 0, C, BK)
        bq = load_rows(q, token, left, h // (HV // H), H, DK, 0, C, BK)
        bdo = load_rows(do, token, left, h, HV, DV, v0, C, BV)
        bT = load_state(T, chunk, 0, 0, C, C, C, C)
        rk, rq = inverse_length(squares(bk), NORM), inverse_length(squares(bq), NORM) * scale
        hi, lo, gamma, rest, gamma_C, b = gates(g, beta, token, left, h, HV, C)
        store_state(dstates, dS, chunk, v0, DK, DV, BK, BV)
        # 1. dU~ = tril(Q K^T D)^T dO + gamma_C / gamma K dS_C
        PT = tl.dot(bk, tl.trans(bq), input_precision="ieee") * tl.trans(decay(hi, lo, C)) * rk[:, None] * rq[None, :]
        dU = (rest * rk)[:, None] * tl.dot(bk, dS.to(dt), input_precision="ieee")
        dU += tl.dot(PT.to(dt), bdo, input_precision="ieee")
        # 2. X = T^T dU~
        bX = tl.dot(tl.trans(bT), dU.to(dt), input_precision="ieee")
        store_rows(X, bX, token, left, h, HV, DV, v0, C, BV)
        # 3. dS_0 = gamma_C dS_C + (gamma Q)^T dO - (beta gamma K)^T X
        dS = gamma_C * dS + tl.dot(tl.trans(bq), ((gamma * rq)[:, None] * bdo).to(dt), input_precision="ieee")
        dS -= tl.dot(tl.trans(bk), ((b * gamma * rk)[:, None] * bX).to(dt), input_precision="ieee")
    if HAS_S0:
        store_state(dS0, dS, row, v0, DK, DV, BK, BV)


@jit
def backward_scores_kernel(q, k, v, g, beta, do, U, X, dPn, dAn, dv, sums, cu_seqlens, first_chunk, chunk_seq, tokens, stride, scale,
                           H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                           BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, NORM: tl.constexpr):
    """The gradients of the two [C, C] matrices of a chunk, and their row and column sums.

        dP = dO U~^T D            E = dP (Q K^T)        sums: rows(E);  cols(E) + rows(beta F) + cols(beta F);
        dA = -X U~^T D (i > j)    F = dA (K K^T)              rows(E) - cols(E) + rows(beta F) - cols(beta F);  rows(F) + X.V
        dV = beta X

    Grid (chunks, HV). Registers: dP, dA, Q K^T, K K^T [C, C] fp32. Shared memory: q, k [C, BK] and dO, U~, X [C, BV].
    Reads q, k, v, dO, U~, X, g, beta; writes dv, dP and beta dA [chunks, HV, C, C] (both divided by the lengths that
    use_qk_l2norm_in_kernel divides by) and the sums [4, tokens, HV].
    """
    c, h = tl.program_id(0), tl.program_id(1)
    s = tl.load(chunk_seq + c) if VARLEN else c // tl.cdiv(tokens, C)
    if s < 0:
        return
    start, length, first = sequence(cu_seqlens, first_chunk, s, tokens, C, VARLEN)
    token, left, chunk = start + (c - first) * C, length - (c - first) * C, c.to(tl.int64) * HV + h
    hi, lo, gamma, rest, gamma_C, b = gates(g, beta, token, left, h, HV, C)
    # 1. dO U~^T, X U~^T, X.V, dV
    dP, dA, xv = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for v0 in range(0, DV, BV):
        bdo, bU = load_rows(do, token, left, h, HV, DV, v0, C, BV), load_rows(U, token, left, h, HV, DV, v0, C, BV)
        bX, bv = load_rows(X, token, left, h, HV, DV, v0, C, BV), load_rows(v, token, left, h, HV, DV, v0, C, BV)
        dP += tl.dot(bdo, tl.trans(bU), input_precision="ieee")
        dA -= tl.dot(bX, tl.trans(bU), input_precision="ieee")
        xv += tl.sum(bX.to(tl.float32) * bv.to(tl.float32), 1)
        store_rows(dv, b[:, None] * bX, token, left, h, HV, DV, v0, C, BV)
    # 2. dP, dA
    bq = load_rows(q, token, left, h // (HV // H), H, DK, 0, C, BK)
    bk = load_rows(k, token, left, h // (HV // H), H, DK, 0, C, BK)
    rq, rk = inverse_length(squares(bq), NORM), inverse_length(squares(bk), NORM)
    r = tl.arange(0, C)
    D = decay(hi, lo, C) * rk[None, :]
    dP *= D * (rq * scale)[:, None]
    dA = tl.where(r[:, None] > r[None, :], dA * D * rk[:, None], 0.0)
    store_state(dPn, dP, chunk, 0, C, C, C, C)
    store_state(dAn, dA * b[:, None], chunk, 0, C, C, C, C)
    # 3. E, F
    E = dP * tl.dot(bq, tl.trans(bk), input_precision="ieee")
    F = dA * tl.dot(bk, tl.trans(bk), input_precision="ieee")
    E_row, E_col, F_row, F_col = tl.sum(E, 1), tl.sum(E, 0), tl.sum(F, 1), tl.sum(F * b[:, None], 0)
    at, inside = (token * HV + h) + r * HV, r < left
    sums += at
    tl.store(sums, E_row, mask=inside)
    tl.store(sums + stride, E_col + b * F_row + F_col, mask=inside)
    tl.store(sums + 2 * stride, E_row - E_col + b * F_row - F_col, mask=inside)
    tl.store(sums + 3 * stride, F_row + xv, mask=inside)


@jit
def backward_chunk_kernel(q, k, g, beta, do, U, X, states, dstates, dPn, dAn, sums, dq, dk, dg, dbeta,
                          cu_seqlens, first_chunk, chunk_seq, tokens, stride, scale,
                          H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
                          BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, NORM: tl.constexpr):
    """The gradients of q, k, g and beta of one chunk.

        Y = gamma dO S_0^T    Z = gamma X S_0^T    R = gamma_C / gamma U~ dS_C^T
        dQ = Y + dP K         dK = R - beta Z + dP^T Q + (beta dA) K + (beta dA)^T K
        dbeta      = rows(F) + X.V - K.Z
        dlog gamma = rows(E) - cols(E) + rows(beta F) - cols(beta F) + Q.Y - beta K.Z - K.R
        dg_t       = sum over i >= t of dlog gamma_i, + sum(K.R) + gamma_C S_0.dS_C

    With the norm, x^ = x / |x|: dx = (dx^ - x^ (x^.dx^)) / |x|, and x^.dx^ is one of the sums.
    Grid (chunks, HV). Registers: dq, then dk with one of Z and R [C, BK] fp32. Shared memory: q, k [C, BK], dP, dA [C, C],
    tiles [BK, BV] of the states and [C, BV] of dO, U~, X. Reads all of those, g, beta, sums; writes dq, dk, dg, dbeta.
    """
    c, h = tl.program_id(0), tl.program_id(1)
    s = tl.load(chunk_seq + c) if VARLEN else c // tl.cdiv(tokens, C)
    if s < 0:
        return
    start, length, first = sequence(cu_seqlens, first_chunk, s, tokens, C, VARLEN)
    token, left, chunk = start + (c - first) * C, length - (c - first) * C, c.to(tl.int64) * HV + h
    hi, lo, gamma, rest, gamma_C, b = gates(g, beta, token, left, h, HV, C)
    bq = load_rows(q, token, left, h // (HV // H), H, DK, 0, C, BK)
    bk = load_rows(k, token, left, h // (HV // H), H, DK, 0, C, BK)
    rq, rk = inverse_length(squares(bq), NORM), inverse_length(squares(bk), NORM)
    r = tl.arange(0, C)
    at, inside = (token * HV + h) + r * HV, r < left
    bP = load_state(dPn, chunk, 0, 0, C, C, C, C)
    # 1. dQ
    Y = tl.zeros([C, BK], tl.float32)
    for v0 in range(0, DV, BV):
        bdo, S = load_rows(do, token, left, h, HV, DV, v0, C, BV), load_state(states, chunk, 0, v0, DK, DV, BK, BV)
        Y += tl.dot(bdo, tl.trans(S), input_precision="ieee")
    Y *= (gamma * rq * scale)[:, None]
    qy = tl.sum(bq.to(tl.float32) * Y, 1)
    Y += tl.dot(bP, bk, input_precision="ieee")
    if NORM:
        sq = tl.load(sums + at, mask=inside, other=0.0) + qy
        Y -= (rq * rq * sq)[:, None] * bq.to(tl.float32)
    store_rows(dq, Y, token, left, h, HV, DK, 0, C, BK)
    # 2. dK
    Z = tl.zeros([C, BK], tl.float32)
    for v0 in range(0, DV, BV):
        bX, S = load_rows(X, token, left, h, HV, DV, v0, C, BV), load_state(states, chunk, 0, v0, DK, DV, BK, BV)
        Z += tl.dot(bX, tl.trans(S), input_precision="ieee")
    Z *= (gamma * rk)[:, None]
    kz = tl.sum(bk.to(tl.float32) * Z, 1)
    R, sds = tl.zeros([C, BK], tl.float32), 0.0
    for v0 in range(0, DV, BV):
        bU, dS = load_rows(U, token, left, h, HV, DV, v0, C, BV), load_state(dstates, chunk, 0, v0, DK, DV, BK, BV)
        S = load_state(states, chunk, 0, v0, DK, DV, BK, BV)
        R += tl.dot(bU, tl.trans(dS), input_precision="ieee")
        sds += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
    R *= (rest * rk)[:, None]
    kr = tl.sum(bk.to(tl.float32) * R, 1)
    R -= b[:, None] * Z
    bA = load_state(dAn, chunk, 0, 0, C, C, C, C)
    R += tl.dot(tl.trans(bP), bq, input_precision="ieee")
    R += tl.dot(bA, bk, input_precision="ieee")
    R += tl.dot(tl.trans(bA), bk, input_precision="ieee")
    if NORM:
        sk = tl.load(sums + stride + at, mask=inside, other=0.0) + kr - b * kz
        R -= (rk * rk * sk)[:, None] * bk.to(tl.float32)
    store_rows(dk, R, token, left, h, HV, DK, 0, C, BK)
    # 3. dbeta, dg
    tl.store(dbeta + at, tl.load(sums + 3 * stride + at, mask=inside, other=0.0) - kz, mask=inside)
    dlog = tl.load(sums + 2 * stride + at, mask=inside, other=0.0) + qy - b * kz - kr
    after = tl.sum(dlog, 0) - tl.cumsum(dlog, 0) + dlog
    tl.store(dg + at, after + tl.sum(kr, 0) + gamma_C * sds, mask=inside)


@jit
def decode_kernel(q, k, v, g, beta, S0, o, S_out, tokens, scale,
                  H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
                  BV: tl.constexpr, HAS_S0: tl.constexpr, NORM: tl.constexpr):
    v0, s, h = tl.program_id(0) * BV, (tl.program_id(1) // HV).to(tl.int64), tl.program_id(1) % HV
    dk, dv = tl.arange(0, BK), v0 + tl.arange(0, BV)
    at_S, in_S = (s * HV + h) * DK * DV + dk[:, None] * DV + dv[None, :], (dk < DK)[:, None] & (dv < DV)[None, :]
    S = tl.load(S0 + at_S, mask=in_S, other=0.0) if HAS_S0 else tl.zeros([BK, BV], tl.float32)
    for t in range(tokens):
        token = s * tokens + t
        at_k = (token * H + h // (HV // H)) * DK + dk
        at_v, at_g = (token * HV + h) * DV + dv, token * HV + h
        bk = tl.load(k + at_k, mask=dk < DK, other=0.0).to(tl.float32)
        bq = tl.load(q + at_k, mask=dk < DK, other=0.0).to(tl.float32)
        bv = tl.load(v + at_v, mask=dv < DV, other=0.0).to(tl.float32)
        if NORM:
            bk *= tl.rsqrt(tl.sum(bk * bk, 0) + 1e-6)
            bq *= tl.rsqrt(tl.sum(bq * bq, 0) + 1e-6)
        S *= tl.exp(tl.load(g + at_g))
        error = bv - tl.sum(S * bk[:, None], 0)
        S += bk[:, None] * (tl.load(beta + at_g) * error)[None, :]
        tl.store(o + at_v, (tl.sum(S * bq[:, None], 0) * scale).to(o.dtype.element_ty), mask=dv < DV)
    tl.store(S_out + at_S, S, mask=in_S)


def triton_tiles(Dk, Dv, dtype):
    """Chunk length, tile sizes, warps and pipeline stages by head size: a fixed table instead of autotuning."""
    pow2 = lambda n: max(16, 1 << (n - 1).bit_length())
    BK, narrow = pow2(Dk), dtype != torch.float32
    C = (64 if BK <= 128 else 32) if narrow else (32 if BK <= 128 else 16)
    BV = min(pow2(Dv), 32 if narrow or BK <= 64 else 16)
    return C, dict(BK=BK, num_warps=4), dict(BK=BK, BV=BV, num_warps=4, num_stages=2), dict(BK=BK, BV=min(pow2(Dv), 64 if narrow else 32), num_warps=4, num_stages=2)


def chunk_table(q, cu_seqlens, C):
    """-> (sequences, chunks at most, first chunk of each sequence, sequence of each chunk or -1). No copy to the host."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return B, B * (-(-T // C)), None, None
    sequences = cu_seqlens.numel() - 1
    ends = ((cu_seqlens.diff() + C - 1) // C).cumsum(0)
    c = torch.arange(T // C + sequences, device=q.device)
    seq = torch.searchsorted(ends, c, right=True)
    return sequences, len(c), F.pad(ends, (1, 0))[:-1], torch.where(seq < sequences, seq, -1)


OPS = re.sub(r"\W", "_", __name__)        # one namespace a module: a saved checkpoint brings its own copy of this file


@torch.library.custom_op(f"{OPS}::gated_delta_rule_forward", mutates_args=())
def triton_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Optional[Tensor],
                   cu_seqlens: Optional[Tensor], norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> o, final state, T [chunks, HV, C, C]."""
    B, tokens, H, Dk = q.shape
    HV, Dv = v.shape[2:]
    C, by_chunk, by_sequence, _ = triton_tiles(Dk, Dv, q.dtype)
    sequences, chunks, first_chunk, chunk_seq = chunk_table(q, cu_seqlens, C)
    T, o = q.new_empty(chunks, HV, C, C), torch.empty_like(v)
    S_out = g.new_empty(sequences, HV, Dk, Dv)
    common = dict(H=H, HV=HV, DK=Dk, C=C, VARLEN=cu_seqlens is not None, NORM=norm)
    with on_device(q):
        inverse_kernel[(chunks, HV)](k, g, beta, T, cu_seqlens, first_chunk, chunk_seq, tokens, **common,
                                     PREC="ieee" if q.dtype == torch.float32 else "tf32", **by_chunk)
        forward_kernel[lambda m: (triton.cdiv(Dv, m["BV"]), sequences * HV)](
            q, k, v, g, beta, T, initial_state, o, None, None, S_out, cu_seqlens, first_chunk, tokens, scale, **common,
            **by_sequence, DV=Dv, HAS_S0=initial_state is not None, SAVE=False)
    return o, S_out, T


@triton_forward.register_fake
def _(q, k, v, g, beta, scale, initial_state, cu_seqlens, norm):
    B, T, _, Dk = q.shape
    HV, Dv = v.shape[2:]
    C = triton_tiles(Dk, Dv, q.dtype)[0]
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    chunks = B * (-(-T // C)) if cu_seqlens is None else T // C + sequences
    return torch.empty_like(v), g.new_empty(sequences, HV, Dk, Dv), q.new_empty(chunks, HV, C, C)


@torch.library.custom_op(f"{OPS}::gated_delta_rule_backward", mutates_args=())
def triton_backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Optional[Tensor],
                    cu_seqlens: Optional[Tensor], norm: bool, T: Tensor, do: Tensor, dS: Tensor,
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, g, beta, initial_state (empty without one)."""
    B, tokens, H, Dk = q.shape
    HV, Dv = v.shape[2:]
    C, _, by_sequence, by_block = triton_tiles(Dk, Dv, q.dtype)
    sequences, chunks, first_chunk, chunk_seq = chunk_table(q, cu_seqlens, C)
    states, dstates = q.new_empty(chunks, HV, Dk, Dv), q.new_empty(chunks, HV, Dk, Dv)
    dP, dA, sums = q.new_empty(chunks, HV, C, C), q.new_empty(chunks, HV, C, C), g.new_empty(4, *g.shape)
    U, X, dv, dg, dbeta = (torch.empty_like(x) for x in (v, v, v, g, beta))
    dS0 = g.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    dq, dk = (q.new_empty(B, tokens, HV, Dk, dtype=q.dtype if H == HV else torch.float32) for _ in range(2))
    common = dict(H=H, HV=HV, DK=Dk, DV=Dv, C=C, VARLEN=cu_seqlens is not None, NORM=norm)
    serial = lambda m: (triton.cdiv(Dv, m["BV"]), sequences * HV)
    with on_device(q):
        forward_kernel[serial](q, k, v, g, beta, T, initial_state, None, U, states, None, cu_seqlens, first_chunk, tokens,
                               scale, **common, **by_sequence, HAS_S0=initial_state is not None, SAVE=True)
        backward_state_kernel[serial](q, k, g, beta, T, do, dS, X, dstates, dS0, cu_seqlens, first_chunk, tokens, scale,
                                      **common, **by_sequence, HAS_S0=initial_state is not None)
        backward_scores_kernel[(chunks, HV)](q, k, v, g, beta, do, U, X, dP, dA, dv, sums, cu_seqlens, first_chunk, chunk_seq,
                                             tokens, g.numel(), scale, **common, **by_block)
        backward_chunk_kernel[(chunks, HV)](q, k, g, beta, do, U, X, states, dstates, dP, dA, sums, dq, dk, dg, dbeta,
                                            cu_seqlens, first_chunk, chunk_seq, tokens, g.numel(), scale, **common, **by_block)
    if H != HV:
        dq, dk = (x.unflatten(2, (H, HV // H)).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dS0


@triton_backward.register_fake
def _(q, k, v, g, beta, scale, initial_state, cu_seqlens, norm, T, do, dS):
    dS0 = g.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return *(torch.empty_like(x) for x in (q, k, v, g, beta)), dS0


def _save(ctx, inputs, output):
    q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens, ctx.norm = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, output[2])


def _backward(ctx, do, dS, dT):
    q, k, v, g, beta, initial_state, cu_seqlens, T = ctx.saved_tensors
    *grads, dS0 = triton_backward(q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens, ctx.norm, T, do.contiguous(), dS.contiguous())
    return *grads, None, None if initial_state is None else dS0, None, None


triton_forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(f"{OPS}::gated_delta_rule_decode", mutates_args=())
def triton_decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Optional[Tensor],
                  norm: bool) -> tuple[Tensor, Tensor]:
    """-> o, new state."""
    B, tokens, H, Dk = q.shape
    HV, Dv = v.shape[2:]
    o, S_out = torch.empty_like(v), g.new_empty(B, HV, Dk, Dv)
    BV = 16
    with on_device(q):
        decode_kernel[(-(-Dv // BV), B * HV)](q, k, v, g, beta, initial_state, o, S_out, tokens, scale, H=H, HV=HV, DK=Dk, DV=Dv,
                                              BK=triton.next_power_of_2(Dk), BV=BV, HAS_S0=initial_state is not None, NORM=norm, num_warps=4)
    return o, S_out


@triton_decode.register_fake
def _(q, k, v, g, beta, scale, initial_state, norm):
    return torch.empty_like(v), g.new_empty(q.shape[0], v.shape[2], q.shape[3], v.shape[3])


def on_device(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, backend="auto"):
    """The gated delta rule, chunk by chunk. See recurrent_gated_delta_rule."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "triton":
        f32 = lambda x: None if x is None else x.float().contiguous()
        dt = q.dtype if q.dtype == k.dtype == v.dtype else torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        o, S, _ = triton_forward(*(x.to(dt).contiguous() for x in (q, k, v)), f32(g), f32(beta), scale, f32(initial_state), cu_seqlens, use_qk_l2norm_in_kernel)
        return o, S if output_final_state else None
    if cu_seqlens is None:
        o, S = chunk_torch(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel)
    else:
        ends, parts = cu_seqlens.tolist(), []
        for n, (a, b) in enumerate(zip(ends, ends[1:])):
            S0 = None if initial_state is None else initial_state[n:n + 1]
            parts.append(chunk_torch(*(x[:, a:b] for x in (q, k, v, g, beta)), scale, S0, use_qk_l2norm_in_kernel))
        o, S = torch.cat([o for o, _ in parts], 1), torch.cat([S for _, S in parts])
    return o.to(v.dtype), S if output_final_state else None
