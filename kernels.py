"""The gated delta rule of Gated DeltaNet: a recurrence, chunked PyTorch, Triton, one switch.

    python kernels.py                    check every backend against the fp64 recurrence, time it
    HYBRID_DISTILL_BACKEND=torch ...     what backend="auto" means for a process: torch or triton
    TRITON_INTERPRET=1 ...               run the Triton kernels in Python, without a GPU (for tests)

Reading list
    [1] Gated Delta Networks, arXiv 2412.06464            the recurrence and its chunkwise form
    [2] DeltaNet over sequence length, arXiv 2406.06484   the chunkwise form without decay
    [3] flash-linear-attention, github.com/fla-org        whose keyword names these functions have

Glossary: a tensor is [B, T, H, D] everywhere, a state [B, HV, Dk, Dv]
    q, k       [B, T, H, Dk]     queries and keys; value head h uses head h // (HV / H) of them
    v, o       [B, T, HV, Dv]    values, outputs
    g          [B, T, HV]        log-decay <= 0, alpha = exp(g)
    beta       [B, T, HV]        write strength
    C          at most 64        chunk length
    Q, K, V    [C, Dk or Dv]     one chunk: Q = scale q, K = k, with the norm of q / |q|, k / |k|
    S          [Dk, Dv]          the state; S_0 and S_C at the start and the end of a chunk
    gamma      [C]               decay since the chunk began, exp(cumsum(g)); gamma_C the last
    D          [C, C]            D_ij = gamma_i / gamma_j for i >= j, else 0
    M, P       [C, C]            M = strictLower(D K K^T), P = tril(D Q K^T)
    N          [C, C]            -(I + M beta)^-1 M
    V~         [C, Dv]           v_t - S~_t^T k_t of every token; `error` in memory
    U~         [C, Dv]           beta V~: what the chunk writes
    X          [C, Dv]           the gradient of what is written, later readers included

From the paper's W, U, T: in [1], T = (I + beta M)^-1 beta = beta (I + M beta)^-1, a chunk writes
U~ = T V - T gamma K S_0. Here, with (I + M beta)^-1 = I + N beta, no T, W or U is formed:
    U~ = beta V~   with   V~ = (I + N beta)(V - gamma K S_0)
    X  = (I + N^T beta) dU~   so   dV = beta X,  dM = -dV U~^T,  dbeta = X.V~
One N serves both directions; as V~ is kept, not U~, dbeta is a product, and beta may be 0.
"""
import functools
import importlib.machinery
import os
import runpy
import sys
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    jit = triton.jit(do_not_specialize=["tokens", "S_rows", "stride", "real"])  # they vary by call
except ImportError:  # no Triton here: the PyTorch backend alone
    triton, constexpr, jit = None, None, lambda function: function

# ------------------------------------------------------------------- the recurrence: ground truth

def recurrent_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None,
                               output_final_state=False,
                               use_qk_l2norm_in_kernel=False):  # fmt: skip
    """The gated delta rule token by token: the definition that everything here is held against.

        S~_t = alpha_t S_{t-1}                              decay first,
        S_t  = S~_t + k_t (x) beta_t (v_t - S~_t^T k_t)     then correct the error (delta rule)
        o_t  = scale S_t^T q_t                              scale = Dk^-1/2 unless given

    q, k [B, T, H, Dk]; v [B, T, HV, Dv]; g (log-decay <= 0), beta [B, T, HV]; initial_state
    [B, HV, Dk, Dv] or None (zero); use_qk_l2norm_in_kernel divides q and k by their length first.
    It works in fp32, or in fp64 if q is, also under autocast. Raises ValueError: see check_inputs.
    Returns o [B, T, HV, Dv] in the dtype of v, and the final state or None. Source: [1]."""
    check_inputs(q, k, v, g, beta, initial_state)
    (_, T, H, Dk), (B, _, HV, Dv) = q.shape, v.shape
    dtype, work = v.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = Dk**-0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = (x.to(work) for x in (q, k, v, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = l2norm(q), l2norm(k)
        q, k = (x.repeat_interleave(HV // H, 2) for x in (q * scale, k))
        S = q.new_zeros(B, HV, Dk, Dv) if initial_state is None else initial_state.to(work)
        outputs = []
        for t in range(T):
            S = S * g[:, t, :, None, None].exp()  # decay first
            error = v[:, t] - (k[:, t, :, None, :] @ S).squeeze(-2)  # v_t - S~^T k_t
            S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
            outputs.append((q[:, t, :, None, :] @ S).squeeze(-2))
    return torch.stack(outputs, 1).to(dtype), S if output_final_state else None

def l2norm(x):
    """x / |x| over the last dimension, |x|^2 = sum of squares + 1e-6."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)

# ------------------------------------------------------------------- chunked, in PyTorch

class ChunkedTorch(torch.autograd.Function):
    """The chunkwise form, its backward written out: q (with the scale), k, v, g, beta
    [chunks, B HV, C, ...] -> o [chunks, B HV, C, Dv], final state [B HV, Dk, Dv]. It walks chunk
    by chunk, so that what a chunk needs stays in the cache of a CPU."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S0):
        chunks, BH, C, _ = k.shape
        # cumsum in fp64: exponents are differences, and -1000.0 - (-1000.1) loses 4 digits in fp32
        log_gamma = g.double().cumsum(-1)
        gamma = log_gamma.exp().to(k.dtype)[..., None]
        rest = (log_gamma[..., -1:] - log_gamma).exp().to(k.dtype)[..., None]  # gamma_C / gamma
        D, N = k.new_empty(chunks, BH, C, C), k.new_empty(chunks, BH, C, C)
        error, o, S = torch.empty_like(v), torch.empty_like(v), k.new_empty(chunks + 1, *S0.shape)
        S[0] = S0
        for n in range(chunks):
            b = beta[n, ..., None]
            # 1. D_ij = gamma_i / gamma_j for i >= j (above, exp may overflow; tril_ writes zeros)
            D[n].copy_(log_gamma[n, :, :, None] - log_gamma[n, :, None, :]).exp_().tril_()
            # 2. M = strictLower(D K K^T),  N = -(I + M beta)^-1 M by substitution
            M = torch.bmm(k[n], k[n].mT).mul_(D[n]).tril_(-1)
            N[n] = torch.linalg.solve_triangular(M * b.mT, -M, upper=False, unitriangular=True)
            # 3. V~ = (I + N beta)(V - gamma K S_0),  U~ = beta V~
            raw = torch.baddbmm(v[n], k[n] * gamma[n], S[n], alpha=-1)
            U = torch.baddbmm(raw, N[n], raw * b, out=error[n]) * b
            # 4. O = gamma Q S_0 + P U~,  P = tril(D Q K^T)
            torch.bmm(q[n] * gamma[n], S[n], out=o[n])
            o[n].baddbmm_(torch.bmm(q[n], k[n].mT).mul_(D[n]), U)
            # 5. S_C = gamma_C S_0 + (gamma_C / gamma K)^T U~
            torch.mul(S[n], gamma[n, :, -1:], out=S[n + 1]).baddbmm_((k[n] * rest[n]).mT, U)
        ctx.save_for_backward(q, k, beta, gamma, rest, D, N, error, S)
        return o, S[-1].clone()

    @staticmethod
    def backward(ctx, do, dS):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError("the chunked gated delta rule has no second derivative")
        q, k, beta, gamma, rest, D, N, error, S = ctx.saved_tensors
        dq, dk, dv, dbeta = (torch.empty_like(x) for x in (q, k, error, beta))
        dlog = torch.empty_like(beta, dtype=torch.float64)  # gradient of log gamma
        with torch.autocast(q.device.type, enabled=False):
            for n in reversed(range(len(q))):
                Q, K, G, b = q[n], k[n], gamma[n], beta[n, ..., None]
                U = error[n] * b
                P, M = torch.bmm(Q, K.mT).mul_(D[n]), torch.bmm(K, K.mT).mul_(D[n]).tril_(-1)
                # 1. dU~ = P^T dO + gamma_C / gamma K dS_C
                dU = torch.bmm(P.mT, do[n]).baddbmm_(K * rest[n], dS)
                # 2. X = dU~ + N^T beta dU~,  dV = beta X,  dbeta = X.V~
                X = torch.baddbmm(dU, N[n].mT, dU * b)
                dV = torch.mul(X, b, out=dv[n])
                torch.sum(X.mul_(error[n]), -1, out=dbeta[n])
                # 3. Y = gamma dO S_0^T,  Z = gamma dV S_0^T,  R = gamma_C / gamma U~ dS_C^T
                Y, Z = torch.bmm(do[n], S[n].mT).mul_(G), torch.bmm(dV, S[n].mT).mul_(G)
                R = torch.bmm(U, dS.mT).mul_(rest[n])
                # 4. dP = dO U~^T,  dM = -dV U~^T;  E = dP * P + dM * M belongs to log gamma
                dP, dM = torch.bmm(do[n], U.mT), torch.bmm(dV, U.mT).neg_().tril_(-1)
                E = P.mul_(dP).add_(M.mul_(dM))
                dP.mul_(D[n])
                dM.mul_(D[n])
                # 5. dQ = Y + (dP D) K,  dK = R - Z + (dP D)^T Q + (dM D) K + (dM D)^T K
                torch.baddbmm(Y, dP, K, out=dq[n])
                torch.sub(R, Z, out=dk[n]).baddbmm_(dP.mT, Q).baddbmm_(dM, K).baddbmm_(dM.mT, K)
                # 6. dlog gamma = rows(E) - cols(E) + Q.Y - K.Z - K.R,
                #    its last one also + sum(K.R) + gamma_C S_0.dS_C
                KR, rows, cols = (K * R).sum(-1), E.sum(-1).double(), E.sum(-2).double()
                dlog[n] = rows - cols + (Q * Y).sum(-1) - (K * Z).sum(-1) - KR
                dlog[n, :, -1] += KR.sum(-1) + G[:, -1, 0] * (S[n] * dS).sum((-1, -2))
                # 7. dS_0 = gamma_C dS_C + (gamma Q)^T dO - (gamma K)^T dV
                dS = (dS * G[:, -1:]).baddbmm_((Q * G).mT, do[n]).baddbmm_((K * G).mT, dV, alpha=-1)
        dg = dlog.flip(-1).cumsum(-1).flip(-1).to(k.dtype)  # dg_t = sum over i >= t of dlog gamma_i
        return dq, dk, dv, dg, dbeta, dS

def torch_chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None,
                                 output_final_state=False,
                                 use_qk_l2norm_in_kernel=False):  # fmt: skip
    """recurrent_gated_delta_rule in chunks, with the same arguments and returns: any device,
    differentiable once."""
    check_inputs(q, k, v, g, beta, initial_state)
    (B, T, _, Dk), (HV, Dv) = q.shape, v.shape[2:]
    dtype, work = v.dtype, torch.promote_types(q.dtype, torch.float32)
    C = min(64 if max(Dk, Dv) > 32 else 32, T)  # measured: small heads like small chunks

    def chunks(x):  # [B, T, H or HV, ...] -> [chunks, B HV, C, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -T % C))  # k = v = beta = g = 0 changes nothing
        x = x.unflatten(1, (-1, C)).transpose(2, 3).transpose(0, 1)
        return x.repeat_interleave(HV // x.shape[2], 2).flatten(1, 2).contiguous()

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = (x.to(work) for x in (q, k, v, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = l2norm(q), l2norm(k)
        q = q * (Dk**-0.5 if scale is None else scale)
        g = g.clamp(min=-1e4)  # exp is 0 there; -inf would be inf - inf in the differences
        S = k.new_zeros(B, HV, Dk, Dv) if initial_state is None else initial_state.to(work)
        o, S = ChunkedTorch.apply(*map(chunks, (q, k, v, g, beta)), S.flatten(0, 1))
    o = o.unflatten(1, (B, HV)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(dtype)
    return o, S.unflatten(0, (B, HV)) if output_final_state else None

# ------------------------------------------------------------------- Triton: tiles, decay, product
# In the kernels bx is the tile of x, b that of beta, r the rows of a chunk, v0 the first column.
# |q| and |k| are factors of rows: applied behind a product, never to q and k themselves.

@jit
def walk(S0, S_rows, tokens, HV: constexpr, DK: constexpr, DV: constexpr, BK: constexpr,
         BV: constexpr, C: constexpr):  # fmt: skip
    """This program's state S0 (zero if S_rows is 0, not Dk), its first column, number, head; first
    token, length and first chunk of its sequence. One axis of the grid: a second ends at 65,535."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    state = (tl.program_id(0) // tiles).to(tl.int64)
    v0, s, h = tl.program_id(0) % tiles * BV, state // HV, state % HV
    start, length, first = s * tokens, tokens.to(tl.int64), s * tl.cdiv(tokens, C)
    S = load_tile(S0 + state * DK * DV, S_rows, v0, DV, DV, BK, BV)
    return S, v0, state, h, start, length, first

@jit
def load_tile(x, left, v0, STRIDE: constexpr, WIDTH: constexpr, R: constexpr, W: constexpr):
    """Tile [R, W] of the matrix at x, rows STRIDE apart, from column v0 on; zero beyond
    `left` rows and WIDTH columns. 64-bit offsets are in x; inside, 32 bits do."""
    r, d = tl.arange(0, R)[:, None], v0 + tl.arange(0, W)[None, :]
    return tl.load(x + r * STRIDE + d, mask=(r < left) & (d < WIDTH), other=0.0)

@jit
def store_tile(x, tile, left, v0, STRIDE: constexpr, WIDTH: constexpr):
    """The inverse of load_tile, in the dtype of x."""
    r, d = tl.arange(0, tile.shape[0])[:, None], v0 + tl.arange(0, tile.shape[1])[None, :]
    tl.store(x + r * STRIDE + d, tile.to(x.dtype.element_ty), mask=(r < left) & (d < WIDTH))

@jit
def prepared(NP, factors, chunk, C: constexpr):
    """What prepare_kernel wrote of a chunk: N, P, fq, fk, fr, beta, gamma_C."""
    bN = load_tile(NP + 2 * chunk * C * C, C, 0, C, C, C, C)
    bP = load_tile(NP + (2 * chunk + 1) * C * C, C, 0, C, C, C, C)
    x, r = chunk * 5, tl.arange(0, C)
    fq, fk = tl.load(factors + x * C + r), tl.load(factors + (x + 1) * C + r)
    fr, b = tl.load(factors + (x + 2) * C + r), tl.load(factors + (x + 3) * C + r)
    return bN, bP, fq, fk, fr, b, tl.load(factors + (x + 4) * C)

@jit
def decay(g, C: constexpr):
    """log-decays [C], at least -1e4 -> D [C, C], gamma [C], gamma_C / gamma [C], gamma_C.

    log gamma = cumsum(g) is summed in fp64 (C numbers) and split into high + low: its differences
    are exponents, and -1000.0 - (-1000.1) loses four digits in fp32. D is masked before exp (above
    the diagonal it overflows) and after. -inf would be inf - inf: exp is 0 at -1e4 already."""
    g = g.to(tl.float64)
    total, log_gamma = tl.sum(g, 0), tl.cumsum(g, 0)
    high = log_gamma.to(tl.float32)
    low = (log_gamma - high.to(tl.float64)).to(tl.float32)
    lower = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    log_D = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    D = tl.where(lower, tl.exp(tl.where(lower, log_D, 0.0)), 0.0)
    return D, tl.exp(high), tl.exp((total - log_gamma).to(tl.float32)), tl.exp(total.to(tl.float32))

@jit
def inverse_length(x, NORM: constexpr):
    """1 / |x_i| of each row; 1 without the norm."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6) if NORM else tl.full([x.shape[0]], 1.0, tl.float32)

@jit
def two_halves(x, dt: constexpr):
    """fp32 x -> high, low of the 16-bit dt: 16 bits of x together (22 in fp16). tf32 keeps 11."""
    keep: tl.constexpr = -8192 if dt == tl.float16 else -65536  # the bits that dt holds
    high = (x.to(tl.int32, bitcast=True) & keep).to(tl.float32, bitcast=True)
    return high.to(dt), (x - high).to(dt)

@jit
def dot(a, b, acc=None):
    """a b + acc, summed in fp32; fp32 factors stay fp32, not tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")

@jit
def product(a, b, acc, dt: constexpr):
    """a b + acc; for a 16-bit dt an fp32 factor is split in two halves, for the tensor cores:
    where keys are alike, the merges of N cancel down to digits that tf32 drops."""
    if dt == tl.float32:
        return dot(a, b, acc)
    else:
        b_high, b_low = two_halves(b, dt)
        if a.dtype == dt:
            return dot(a, b_high, dot(a, b_low, acc))
        else:
            a_high, a_low = two_halves(a, dt)
            return dot(a_high, b_high, dot(a_high, b_low, dot(a_low, b_high, acc)))

# ------------------------------------------------------------------- Triton: the kernels

@jit
def prepare_kernel(q, k, g, beta, NP, factors, tokens, scale, H: constexpr, HV: constexpr,
                   DK: constexpr, C: constexpr, BK: constexpr, NORM: constexpr):  # fmt: skip
    """What a chunk knows without the state. Grid (chunks, HV). Writes NP [chunks, HV, 2, C, C]
    (N, P) and factors [chunks, HV, 5, C] (fq, fk, fr, beta, gamma_C)."""
    c, h, r = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
    s, n = c // tl.cdiv(tokens, C), c % tl.cdiv(tokens, C)  # chunk n of sequence s
    token, left = s.to(tl.int64) * tokens + n * C, (tokens - n * C).to(tl.int64)
    chunk, at, at_k = c.to(tl.int64) * HV + h, token * HV + h, (token * H + h // (HV // H)) * DK
    dt = k.dtype.element_ty
    # 1. factors of rows: fq = scale gamma / |q|, fk = gamma / |k|, fr = gamma_C / gamma / |k|,
    #    so that gamma Q = fq q, gamma K = fk k, gamma_C / gamma K = fr k
    bq = load_tile(q + at_k, left, 0, H * DK, DK, C, BK)
    bk = load_tile(k + at_k, left, 0, H * DK, DK, C, BK)
    b = tl.load(beta + at + r * HV, mask=r < left, other=0.0)
    rq, rk = inverse_length(bq, NORM) * scale, inverse_length(bk, NORM)
    bg = tl.load(g + at + r * HV, mask=r < left, other=0.0)
    D, gamma, rest, gamma_C = decay(tl.maximum(bg, -1e4, tl.PropagateNan.ALL), C)
    x = factors + chunk * 5 * C + r
    tl.store(x, gamma * rq)
    tl.store(x + C, gamma * rk)
    tl.store(x + 2 * C, rest * rk)
    tl.store(x + 3 * C, b)
    tl.store(x + 4 * C, tl.zeros([C], tl.float32) + gamma_C)
    # 2. P = tril(D Q K^T),  M = strictLower(D K K^T)
    D *= rk[None, :]
    bP = dot(bq, tl.trans(bk)) * D * rq[:, None]
    store_tile(NP + (2 * chunk + 1) * C * C, bP, C, 0, C, C)
    row, col = r[:, None], r[None, :]
    M = tl.where(row > col, dot(bk, tl.trans(bk)) * D * rk[:, None], 0.0)
    # 3. N = -(I + M beta)^-1 M: its diagonal 8 x 8 blocks, all at once, by substitution,
    #    N_i = -M_i - (M beta)_i N
    blocks: tl.constexpr = C // 8
    n, i8 = tl.arange(0, blocks), tl.arange(0, 8)[None, :, None]
    diagonal = (n[:, None] == n[None, :])[:, None, :, None]
    M8 = tl.sum(tl.where(diagonal, tl.reshape(M, (blocks, 8, blocks, 8)), 0.0), 2)
    N8 = -M8
    M8 *= tl.reshape(b, (blocks, 8))[:, None, :]
    for i in range(1, 8):
        M_i = tl.sum(tl.where(i8 == i, M8, 0.0), 1)
        N8 -= tl.where(i8 == i, tl.sum(M_i[:, :, None] * N8, 1)[:, None, :], 0.0)
    bN = tl.reshape(tl.where(diagonal, N8[:, :, None, :], 0.0), (C, C))
    # 4. merge neighbours, 8 -> 16 -> 32 -> 64: N21 = -(I + N2 beta) M21 (I + beta N1).
    #    No series: no power of M is ever formed
    for level in tl.static_range(0, C.bit_length() - 4):
        size = 8 << level
        pair = (row // (2 * size) == col // (2 * size)) & (row // size > col // size)
        M21 = tl.where(pair, M, 0.0)
        M21 = product(M21 * b[None, :], bN, M21, dt)
        bN -= product(bN * b[None, :], M21, M21, dt)
    store_tile(NP + 2 * chunk * C * C, bN, C, 0, C, C)

@jit
def forward_kernel(q, k, v, NP, factors, S0, S_rows, o, S_out, error, states, tokens,
                   H: constexpr, HV: constexpr, DK: constexpr, DV: constexpr, C: constexpr,
                   BK: constexpr, BV: constexpr):  # fmt: skip
    """The walk over the chunks of one sequence; nothing but the state is carried.
    Grid (ceil(Dv / BV) * sequences * HV): columns of S never meet. Writes o and the final state;
    for a backward pass also the error V~ and states [chunks, HV, Dk, Dv], S_0 of each chunk."""
    S, v0, state, h, start, length, first = walk(S0, S_rows, tokens, HV, DK, DV, BK, BV, C)
    dt = k.dtype.element_ty
    for n in range(tl.cdiv(length, C)):
        token, left, chunk = start + n * C, length - n * C, (first + n) * HV + h
        at_k, at_v = (token * H + h // (HV // H)) * DK, (token * HV + h) * DV
        bk = load_tile(k + at_k, left, 0, H * DK, DK, C, BK)
        bq = load_tile(q + at_k, left, 0, H * DK, DK, C, BK)
        bv = load_tile(v + at_v, left, v0, HV * DV, DV, C, BV)
        bN, bP, fq, fk, fr, b, gamma_C = prepared(NP, factors, chunk, C)
        # 1. V~ = (I + N beta)(V - gamma K S_0),  U~ = beta V~
        Sd = S.to(dt)
        bV = bv - fk[:, None] * dot(bk, Sd)
        bV = dot(bN, (b[:, None] * bV).to(dt), bV)
        bU = b[:, None] * bV
        if error is not None:
            store_tile(error + at_v, bV, left, v0, HV * DV, DV)
            store_tile(states + chunk * DK * DV, Sd, DK, v0, DV, DV)
        # 2. O = gamma Q S_0 + P U~
        bo = dot(bP, bU.to(dt), fq[:, None] * dot(bq, Sd))
        store_tile(o + at_v, bo, left, v0, HV * DV, DV)
        # 3. S_C = gamma_C S_0 + (gamma_C / gamma K)^T U~
        S *= gamma_C
        S = dot(tl.trans(bk), (fr[:, None] * bU).to(dt), S)
    store_tile(S_out + state * DK * DV, S, DK, v0, DV, DV)

@jit
def backward_state_kernel(q, k, NP, factors, do, dS_out, X, dstates, dS0, S_rows, tokens,
                          H: constexpr, HV: constexpr, DK: constexpr, DV: constexpr, C: constexpr,
                          BK: constexpr, BV: constexpr):  # fmt: skip
    """The walk back over the chunks, with the same grid. Writes X, the gradient dstates of the
    state at the end of each chunk, and, if S_rows is Dk and not 0, that of the initial state."""
    dS, v0, state, h, start, length, first = walk(dS_out, DK, tokens, HV, DK, DV, BK, BV, C)
    dt = k.dtype.element_ty
    for m in range(tl.cdiv(length, C)):
        n = tl.cdiv(length, C) - 1 - m
        token, left, chunk = start + n * C, length - n * C, (first + n) * HV + h
        at_k, at_v = (token * H + h // (HV // H)) * DK, (token * HV + h) * DV
        bk = load_tile(k + at_k, left, 0, H * DK, DK, C, BK)
        bq = load_tile(q + at_k, left, 0, H * DK, DK, C, BK)
        bdo = load_tile(do + at_v, left, v0, HV * DV, DV, C, BV)
        bN, bP, fq, fk, fr, b, gamma_C = prepared(NP, factors, chunk, C)
        # 1. dU~ = P^T dO + gamma_C / gamma K dS_C
        dSd = dS.to(dt)
        store_tile(dstates + chunk * DK * DV, dSd, DK, v0, DV, DV)
        dU = dot(tl.trans(bP), bdo, fr[:, None] * dot(bk, dSd))
        # 2. X = dU~ + N^T beta dU~ (dV = beta X); where keys are alike the two nearly cancel
        bX = product(tl.trans(bN), b[:, None] * dU, dU, dt)
        store_tile(X + at_v, bX, left, v0, HV * DV, DV)
        # 3. dS_0 = gamma_C dS_C + (gamma Q)^T dO - (gamma K)^T beta X
        dS *= gamma_C
        dS = dot(tl.trans(bq), (fq[:, None] * bdo).to(dt), dS)
        dS = dot(tl.trans(bk), (-(b * fk)[:, None] * bX).to(dt), dS)
    store_tile(dS0 + state * DK * DV, dS, S_rows, v0, DV, DV)

@jit
def backward_chunk_kernel(q, k, g, factors, do, error, X, states, dstates, dq, dk, dv, dg, dbeta,
                          tokens, scale, H: constexpr, HV: constexpr, DK: constexpr, DV: constexpr,
                          C: constexpr, BK: constexpr, BV: constexpr, NORM: constexpr):  # fmt: skip
    """The gradients of one chunk (dq and dk of each value head), given its state, the gradient of
    its last state, V~ and X.

    With the norm, x^ = x / |x|: dx = (dx^ - x^ (x^.dx^)) / |x|, where Q.dQ = rows(E) + Q.Y and
    K.dK = cols(E) + rows(F) + cols(F) + K.R - K.Z. Grid (chunks, HV).
    Y, Z, R are held as [Dk, C]: so the left factor of every product is a tile that was loaded; one
    computed in registers is what Triton 3.4 - 3.7.0 gets wrong on Hopper."""
    c, h, r = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
    s, n = c // tl.cdiv(tokens, C), c % tl.cdiv(tokens, C)  # chunk n of sequence s
    token, left = s.to(tl.int64) * tokens + n * C, (tokens - n * C).to(tl.int64)
    chunk, at, at_k = c.to(tl.int64) * HV + h, token * HV + h, (token * H + h // (HV // H)) * DK
    dt = k.dtype.element_ty
    bq = load_tile(q + at_k, left, 0, H * DK, DK, C, BK)
    bk = load_tile(k + at_k, left, 0, H * DK, DK, C, BK)
    b = tl.load(factors + (chunk * 5 + 3) * C + r)
    # 1. dO V~^T, X V~^T,  dV = beta X,  dbeta = X.V~
    bdP, bdM = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    xv = tl.zeros([C], tl.float32)
    for v0 in range(0, DV, BV):
        bdo = load_tile(do + at * DV, left, v0, HV * DV, DV, C, BV)
        bX = load_tile(X + at * DV, left, v0, HV * DV, DV, C, BV)
        bV = load_tile(error + at * DV, left, v0, HV * DV, DV, C, BV)
        bdP, bdM = dot(bdo, tl.trans(bV), bdP), dot(bX, tl.trans(bV), bdM)
        xv += tl.sum(bX.to(tl.float32) * bV.to(tl.float32), 1)
        store_tile(dv + at * DV, b[:, None] * bX, left, v0, HV * DV, DV)
    tl.store(dbeta + at + r * HV, xv, mask=r < left)
    # 2. dP = dO U~^T,  dM = -beta X U~^T for i > j,  E = dP * P,  F = dM * M; dP D and dM D
    #    also times scale / |q| / |k| and 1 / |k|^2: they meet q and k as in memory
    rq, rk = inverse_length(bq, NORM), inverse_length(bk, NORM)
    bg = tl.load(g + at + r * HV, mask=r < left, other=0.0)
    D, _, _, gamma_C = decay(tl.maximum(bg, -1e4), C)  # a NaN is in P already
    D *= (b * rk)[None, :]
    bdP *= D * (scale * rq)[:, None]
    bdM = tl.where(r[:, None] > r[None, :], -bdM * D * (b * rk)[:, None], 0.0)
    E, F = bdP * dot(bq, tl.trans(bk)), bdM * dot(bk, tl.trans(bk))
    E_row, E_col, F_row, F_col = tl.sum(E, 1), tl.sum(E, 0), tl.sum(F, 1), tl.sum(F, 0)
    dPd, dMd = bdP.to(dt), bdM.to(dt)
    # 3. dQ = Y + (dP D) K,  Y = gamma dO S_0^T
    Y = tl.zeros([BK, C], tl.float32)
    for v0 in range(0, DV, BV):
        bdo = load_tile(do + at * DV, left, v0, HV * DV, DV, C, BV)
        S = load_tile(states + chunk * DK * DV, DK, v0, DV, DV, BK, BV)
        Y = dot(S, tl.trans(bdo), Y)
    Y *= tl.load(factors + chunk * 5 * C + r)[None, :]  # fq
    q_t, k_t = tl.trans(bq), tl.trans(bk)
    qy = tl.sum(q_t.to(tl.float32) * Y, 0)
    Y = dot(k_t, tl.trans(dPd), Y)
    if NORM:
        Y -= (rq * rq * (E_row + qy))[None, :] * q_t.to(tl.float32)
    store_tile(dq + at * DK, tl.trans(Y), left, 0, HV * DK, DK)
    # 4. dK = R - Z + (dP D)^T Q + (dM D) K + (dM D)^T K,
    #    Z = gamma beta X S_0^T,  R = gamma_C / gamma U~ dS_C^T
    Z, R, sds = tl.zeros([BK, C], tl.float32), tl.zeros([BK, C], tl.float32), 0.0
    for v0 in range(0, DV, BV):
        bX = load_tile(X + at * DV, left, v0, HV * DV, DV, C, BV)
        bV = load_tile(error + at * DV, left, v0, HV * DV, DV, C, BV)
        S = load_tile(states + chunk * DK * DV, DK, v0, DV, DV, BK, BV)
        dS = load_tile(dstates + chunk * DK * DV, DK, v0, DV, DV, BK, BV)
        Z, R = dot(S, tl.trans(bX), Z), dot(dS, tl.trans(bV), R)
        sds += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
    Z *= (b * tl.load(factors + (chunk * 5 + 1) * C + r))[None, :]  # beta fk
    R *= (b * tl.load(factors + (chunk * 5 + 2) * C + r))[None, :]  # beta fr
    kz, kr = tl.sum(k_t.to(tl.float32) * Z, 0), tl.sum(k_t.to(tl.float32) * R, 0)
    R = dot(k_t, tl.trans(dMd), dot(k_t, dMd, dot(q_t, dPd, R - Z)))
    if NORM:
        R -= (rk * rk * (E_col + F_row + F_col + kr - kz))[None, :] * k_t.to(tl.float32)
    store_tile(dk + at * DK, tl.trans(R), left, 0, HV * DK, DK)
    # 5. dlog gamma = rows(E + F) - cols(E + F) + Q.Y - K.Z - K.R,
    #    dg_t = sum over i >= t of dlog gamma_i, + sum(K.R) + gamma_C S_0.dS_C
    dlog = E_row - E_col + F_row - F_col + qy - kz - kr
    after = tl.sum(dlog, 0) - tl.cumsum(dlog, 0) + dlog  # sum over i >= t
    tl.store(dg + at + r * HV, after + tl.sum(kr, 0) + gamma_C * sds, mask=r < left)

@jit
def step_kernel(q, k, v, a, b, gate, A_log, dt_bias, weight, S0, real, o, S_out, stride, eps, scale,
                H: constexpr, D: constexpr, BD: constexpr, BV: constexpr):  # fmt: skip
    """gated_delta_step of one head, BV columns of the state at a time, each read once and written
    once. Grid (B H). stride: of `real`; all else is contiguous."""
    head = tl.program_id(0).to(tl.int64)
    h, d, j, n = head % H, tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BD // BV)
    # 1. g = -exp(A_log) softplus(x), softplus to 6e-8: 1 + y drops the end of a small y
    x = tl.load(a + head).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
    softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    g = -tl.exp(tl.load(A_log + h).to(tl.float32)) * softplus
    beta = tl.sigmoid(tl.load(b + head).to(tl.float32))
    if real is not None:  # padding decays nothing and writes nothing
        token = tl.load(real + head // H * stride) != 0
        g, beta = tl.where(token, g, 0.0), tl.where(token, beta, 0.0)
    # 2. q = SiLU(q) / |SiLU(q)| D^-1/2,  k = SiLU(k) / |SiLU(k)|
    bq, bk = silu(q + head * D, d, D), silu(k + head * D, d, D)
    bq *= tl.rsqrt(tl.sum(bq * bq, 0) + 1e-6) * scale
    bk *= tl.rsqrt(tl.sum(bk * bk, 0) + 1e-6)
    # 3. S~ = exp(g) S,  S = S~ + k (x) beta (v - S~^T k),  o = S^T q
    bo = tl.zeros([BD // BV, BV], tl.float32)
    for m in tl.static_range(BD // BV):
        S = load_tile(S0 + head * D * D, D, m * BV, D, D, BD, BV) * tl.exp(g)
        error = silu(v + head * D, m * BV + j, D) - tl.sum(S * bk[:, None], 0)
        S += bk[:, None] * (beta * error)[None, :]
        store_tile(S_out + head * D * D, S, D, m * BV, D, D)
        bo += tl.where(n[:, None] == m, tl.sum(S * bq[:, None], 0)[None, :], 0.0)
    # 4. RMSNorm(o) * weight * SiLU(gate)
    column = n[:, None] * BV + j[None, :]
    bo *= tl.rsqrt(tl.sum(bo * bo) / D + eps) * silu(gate + head * D, column, D)
    bo *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(o + head * D + column, bo.to(o.dtype.element_ty), mask=column < D)

@jit
def silu(x, at, D: constexpr):
    """SiLU of the numbers of x `at` these places, fp32; 0 from D on."""
    x = tl.load(x + at, mask=at < D, other=0.0).to(tl.float32)
    return x * tl.sigmoid(x)

# ------------------------------------------------------------------- Triton: launching them

@functools.lru_cache(maxsize=None)
def tiles(H, HV, Dk, Dv, C, dtype, device):
    """-> options of the kernels over chunks, over sequences, and of the backward over chunks: a
    fixed table by head size instead of autotuning."""
    BK, BV = (max(16, triton.next_power_of_2(n)) for n in (Dk, Dv))
    narrow = dtype != torch.float32
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    by_chunk = dict(H=H, HV=HV, DK=Dk, C=C, BK=BK, num_warps=4)
    by_sequence = {**by_chunk, "DV": Dv, "BV": min(BV, 32 if narrow or BK <= 64 else 16)}
    by_block = {**by_chunk, "DV": Dv, "BV": BV if narrow and BK <= 128 else min(BV, 32)}
    by_block |= dict(num_stages=1, num_warps=8 if narrow and (BK == 128 or not hopper) else 4)
    if narrow and BK <= 128 and hopper:
        by_chunk["maxnreg"] = 168  # three programs share a multiprocessor, not two
    return by_chunk, {**by_sequence, "num_stages": 2}, by_block

def launch_forward(inputs, S0, scale, norm, keep, launch=True):
    """q, k, v, g, beta; S0 or None -> o, final state, N and P, factors; V~ and the states too if a
    backward is to come (keep). Contiguous inputs; q, k, v of one dtype, the rest fp32.
    launch=False: all of it empty, for torch.compile."""
    q, k, v, g, beta = inputs
    B, T, H, Dk, HV, Dv = *q.shape, *v.shape[2:]
    C = (64 if Dk <= 128 else 32) // (2 if q.dtype == torch.float32 else 1)
    o, S, count = torch.empty_like(v), g.new_empty(B, HV, Dk, Dv), B * (-(-T // C))
    NP, factors = q.new_empty(count, HV, 2, C, C), g.new_empty(count, HV, 5, C)
    kept = [torch.empty_like(v), q.new_empty(count, HV, Dk, Dv)] if keep else []
    if launch:
        how, walks, _ = tiles(H, HV, Dk, Dv, C, q.dtype, q.device)
        grid = (-(-Dv // walks["BV"]) * B * HV,)
        begins = (S, 0) if S0 is None else (S0, Dk)  # 0 rows: not read
        writes = o, S, *(kept or (None, None))
        with torch.cuda.device_of(q):
            prepare_kernel[count, HV](q, k, g, beta, NP, factors, T, scale, NORM=norm, **how)
            forward_kernel[grid](q, k, v, NP, factors, *begins, *writes, T, **walks)
    return [o, S, NP, factors, *kept]

def launch_backward(inputs, dS, scale, norm, count, launch=True):
    """-> gradients of q, k, v, g, beta and of `count` initial states (0: there were none)."""
    q, k, g, NP, factors, error, states, do = inputs
    B, T, H, Dk, HV, Dv = *q.shape, *error.shape[2:]
    dtype = q.dtype if H == HV else torch.float32
    X, dv, dg, dbeta = (torch.empty_like(x) for x in (error, error, g, g))
    dstates, dS0 = torch.empty_like(states), g.new_empty(count, HV, Dk, Dv)
    dq, dk = outputs = [q.new_empty(B, T, HV, Dk, dtype=dtype) for _ in range(2)]
    if launch:
        _, walks, how = tiles(H, HV, Dk, Dv, NP.shape[-1], q.dtype, q.device)
        grid = (-(-Dv // walks["BV"]) * B * HV,)
        last = dS0, Dk if count else 0, T
        reads, writes = (q, k, g, factors, do, error, X, states, dstates), (dq, dk, dv, dg, dbeta)
        with torch.cuda.device_of(q):
            backward_state_kernel[grid](q, k, NP, factors, do, dS, X, dstates, *last, **walks)
            backward_chunk_kernel[len(NP), HV](*reads, *writes, T, scale, NORM=norm, **how)
    if H != HV:  # value heads that share a key head
        outputs = [x.unflatten(2, (H, HV // H)).sum(3).to(q.dtype) for x in outputs]
    return [*outputs, dv, dg, dbeta, dS0]

# The same as custom ops for torch.compile; eager PyTorch calls the functions, which is quicker. One
# namespace per module: a saved checkpoint brings its own copy of this file.
OPS = "hybrid_distill_" + "".join(c if c.isalnum() else "_" for c in __name__)
SCHEMA = "(Tensor[] inputs, Tensor? S, float scale, bool norm, SymInt n) -> Tensor[]"
op = functools.partial(torch.library.custom_op, mutates_args=(), schema=SCHEMA)
forward_op = op(OPS + "::forward", launch_forward)
backward_op = op(OPS + "::backward", launch_backward)
forward_op.register_fake(functools.partial(launch_forward, launch=False))
backward_op.register_fake(functools.partial(launch_backward, launch=False))

class ChunkedTriton(torch.autograd.Function):
    """The Triton kernels behind autograd: arguments of launch_forward -> o, final state."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S0, scale, norm, keep):
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        o, S, *kept = launch([q, k, v, g, beta], S0, scale, norm, keep)
        ctx.save_for_backward(q, k, g, *kept)
        ctx.options = scale, norm, 0 if S0 is None else len(S0)
        return o, S

    @staticmethod
    def backward(ctx, do, dS):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError("the chunked gated delta rule has no second derivative")
        launch = backward_op if torch.compiler.is_compiling() else launch_backward
        inputs = [*ctx.saved_tensors, do.contiguous()]
        *grads, dS0 = launch(inputs, dS.contiguous(), *ctx.options)
        return *grads, dS0 if ctx.options[-1] else None, None, None, None

def triton_chunk_gated_delta_rule(q, k, v, g, beta, scale, S0, keep_state, norm):
    """The rule on the Triton kernels, without its checks."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    inputs = q, k, v, g.float(), beta.float(), None if S0 is None else S0.float()
    inputs = [None if x is None else x.contiguous() for x in inputs]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, S = ChunkedTriton.apply(*inputs, scale, norm, keep)
    return o, S if keep_state else None

# ------------------------------------------------------------------- the switch and its trial

NAMES = "o", "final state", "dq", "dk", "dv", "dg", "dbeta", "d initial state", "step o", "step S"
LIMITS = {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}  # of their errors

def example(B, T, H, HV, Dk, Dv, kind="random", dtype=torch.float32, device="cpu"):
    """q, k, v, g, beta, initial state. kind: random; identical (one key, beta -> 1, no decay);
    underflow (g = -1000 at places)."""
    how = dict(generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float32)
    shapes = (B, T, H, Dk), (B, T, H, Dk), (B, T, HV, Dv), (B, HV, Dk, Dv)
    q, k, v, S = (torch.randn(shape, **how) for shape in shapes)
    g, beta, u = torch.rand(3, B, T, HV, **how)
    g = torch.where(u < 0.1, -1000.0, -0.3 * g) if kind == "underflow" else -0.3 * g
    if kind == "identical":
        k, g, beta = k[:, :1].repeat(1, T, 1, 1), 0 * g, torch.full_like(beta, 0.9999)
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, beta, S]

def everything(rule, inputs, **options):
    """-> o, final state, gradients of q, k, v, g, beta, initial state for random do and dS."""
    rng = torch.Generator().manual_seed(1)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = rule(*inputs[:5], None, inputs[5], True, True, **options)
    gradients = [torch.randn(x.shape, generator=rng, device="cpu").to(x) for x in outputs]
    return [x.detach() for x in outputs] + [*torch.autograd.grad(outputs, inputs, gradients)]

def one_token(q, k, v, g, beta, S):
    """Arguments of gated_delta_step, made of an example; its S^T S is square, and not in tf32."""
    v, a, b, S = v[:, :1], g[:, :1], beta[:, :1], (S.double().mT @ S.double()).to(S.dtype)
    x = v.roll(1, -1), v.flip(-1), v, v[..., 0], v[..., -1], v.roll(2, -1)
    return *x, b[0, 0], a[0, 0], v[0, 0, 0], 1e-6, S, v.new_ones(len(v), dtype=torch.bool)

def errors(rule, inputs, **options):
    """-> relative RMS errors (NAMES) of everything(rule) and Triton's step against fp64. What may
    surround a trial is kept out: inference, autocast, a checkpoint that counts saved tensors."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    autocast = torch.autocast(inputs[0].device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast, hooks:
        exact = [x.double() for x in inputs]
        truth = everything(recurrent_gated_delta_rule, exact)
        found = everything(rule, inputs, **options)
        if rule is triton_chunk_gated_delta_rule or options.get("backend") == "triton":
            truth += torch_gated_delta_step(*one_token(*exact))
            found += triton_gated_delta_step(*one_token(*inputs))
    return [((x - y).norm() / y.norm()).item() for x, y in zip(found, truth)]

@functools.lru_cache(maxsize=None)
def why_not_triton(device, dtype, H, HV, Dk, Dv):
    """None if the Triton kernels give what the recurrence gives on this device, else the reason. An
    import that succeeds proves nothing, and a compiler can be wrong at one head size only: so they
    are launched on three chunks and compared, once per process, device, dtype and head shape."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # by tests, which compare by themselves
    there = triton is not None and (interpreted or device.startswith("cuda"))
    if not there or dtype not in LIMITS or max(Dk, Dv) > 256:
        need = "a GPU, the package triton, bf16, fp16 or fp32, and heads up to 256"
        return f"the kernels need {need}; not {device}, {dtype}, {Dk}, {Dv}"
    try:
        inputs = example(1, 130, H, HV, Dk, Dv, "random", dtype, device)
        found = [] if interpreted else errors(triton_chunk_gated_delta_rule, inputs)
    except torch.OutOfMemoryError:  # says nothing about the kernels
        raise
    except Exception as error:  # whatever a compiler or a driver throws
        return f"a trial launch failed: {type(error).__name__}: {str(error)[:200]}"
    bad = [f"{n} {e:.0e}" for n, e in zip(NAMES, found) if not e < 5 * LIMITS[dtype]]  # NaN too
    return f"a trial launch disagrees with the recurrence: {', '.join(bad)}" if bad else None

@torch.compiler.assume_constant_result  # decided while compiling, not part of the graph
def pick_backend(backend, device, dtype, H, HV, Dk, Dv):
    """-> "torch" or "triton"; "auto" is HYBRID_DISTILL_BACKEND, else Triton where it works."""
    if backend == "auto":
        backend = os.environ.get("HYBRID_DISTILL_BACKEND", "auto")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
    if backend == "torch" or backend == "auto" and not device.startswith("cuda"):
        return "torch"
    reason = why_not_triton(device, dtype, H, HV, Dk, Dv)
    if reason and backend == "triton":
        raise RuntimeError(f"backend='triton' is not possible: {reason}")
    if reason:
        warnings.warn(f"kernels.py: the slower PyTorch backend runs on {device}: {reason}")  # once
    return "torch" if reason else "triton"

def check_inputs(q, k, v, g, beta=None, initial_state=None):
    """Raise ValueError, in one sentence, where shapes do not fit (many would broadcast to a wrong
    answer) or g is above 0 (not read on a GPU, which would have to be waited for). No beta: GLA."""
    if q.ndim != 4 or v.ndim != 4 or 0 in (*q.shape, *v.shape):
        raise ValueError(f"q and v must be [B, T, H, D], not empty: {[*q.shape]}, {[*v.shape]}")
    (B, T, H, Dk), (HV, Dv) = q.shape, v.shape[2:]
    if HV % H or beta is None and HV != H:
        raise ValueError(f"the {HV} heads of v must be a multiple of the {H} of q (in GLA as many)")
    gate, S = [B, T, HV], [B, HV, Dk, Dv]
    g_shape = gate if beta is not None else [*gate, Dk]
    wanted = dict(k=[B, T, H, Dk], v=[*gate, Dv], g=g_shape, beta=gate, initial_state=S)
    for (name, shape), x in zip(wanted.items(), (k, v, g, beta, initial_state)):
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"{name} must be {shape} for q {list(q.shape)}, not {list(x.shape)}")
    if g.device.type == "cpu" and not torch.compiler.is_compiling() and (g > 0).any():
        raise ValueError("g must be <= 0: it is the log of a decay")

def decay_between(g, cu_seqlens, *state):
    """g [1, T, ...], -inf where a sequence begins: S decays before it is read, this empties it."""
    if len(g) != 1 or cu_seqlens.ndim != 1 or any(state):
        raise ValueError("cu_seqlens must be [N + 1], B = 1, and no state is given or kept with it")
    g = F.pad(g, (0, 0) * (g.ndim - 2) + (0, 1))  # where an empty sequence at the end begins
    return g.index_fill(1, cu_seqlens[1:-1].long(), -torch.inf)[:, :-1]

def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None,
                           output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None,
                           backend="auto", use_cache=None, output_router_logits=None):  # fmt: skip
    """recurrent_gated_delta_rule in chunks, with its arguments and returns.

    q, k and v are brought to one dtype, gates and state to fp32; in PyTorch all to fp64 if one of
    q, k, v is. cu_seqlens [N + 1]: N sequences packed in one row (B = 1), sequence n from
    cu_seqlens[n] to cu_seqlens[n + 1], whose states are neither given nor kept. backend: "auto",
    "torch", "triton". use_cache and output_router_logits, of transformers' Qwen3-Next, do nothing.
    For a backward Triton keeps N, P, V~ and each chunk's state: 2 C + Dv + Dk Dv / C numbers a
    token and head. In fp16, with the norm, zero or very short q and k (1e-4) overflow: prefer bf16.
    ValueError for inputs that do not fit, RuntimeError if backend="triton" is not possible.
    Source: [1], [2]; names and layout of fla.ops.gated_delta_rule.chunk_gated_delta_rule [3]."""
    check_inputs(q, k, v, g, beta, initial_state)
    if cu_seqlens is not None:
        g = decay_between(g, cu_seqlens, initial_state is not None, output_final_state)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if torch.is_autocast_enabled(q.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
    # head sizes as plain numbers, also in torch.compile: the kernels are specialised on them
    heads = (range(n).stop for n in (q.shape[2], v.shape[2], q.shape[3], v.shape[3]))
    backend = pick_backend(backend, str(q.device), dtype, *heads)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    rule = triton_chunk_gated_delta_rule if backend == "triton" else torch_chunk_gated_delta_rule
    options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
    return rule(q, k, v, g, beta, *options)

# ------------------------------------------------------------------- one token of a Gated DeltaNet

def torch_gated_delta_step(q, k, v, a, b, gate, A_log, dt_bias, weight, eps, S, real=None):
    """gated_delta_step in PyTorch: any device, differentiable, in torch.compile too."""
    dtype, work = gate.dtype, torch.promote_types(v.dtype, torch.float32)
    a, b, A_log, dt_bias, weight = (x.to(work) for x in (a, b, A_log, dt_bias, weight))
    q, k, v, gate = (F.silu(x.to(work)) for x in (q, k, v, gate))
    g, beta = -A_log.exp() * F.softplus(a + dt_bias), b.sigmoid()
    if real is not None:  # padding decays nothing and writes nothing
        g, beta = (x.where((real != 0)[:, None, None], 0) for x in (g, beta))
    o, S = recurrent_gated_delta_rule(q, k, v, g, beta, None, S, True, True)
    return (F.rms_norm(o, weight.shape, weight, eps) * gate).to(dtype), S

def triton_gated_delta_step(q, k, v, a, b, gate, A_log, dt_bias, weight, eps, S, real=None):
    """gated_delta_step in one kernel, without gradients."""
    (B, _, H, D), BD = v.shape, 1 << (v.shape[-1] - 1).bit_length()  # a power of two
    S = v.new_zeros(B, H, D, D, dtype=torch.float32) if S is None else S
    inputs = [x.contiguous() for x in (q, k, v, a, b, gate, A_log, dt_bias, weight, S)]
    o, S_out = torch.empty_like(inputs[5]), torch.empty_like(inputs[9])
    stride = 0 if real is None else real.stride(0)
    how = dict(H=H, D=D, BD=BD, BV=min(BD, 8192 // BD), num_warps=8 if BD > 64 else 4)
    with torch.cuda.device_of(v):
        step_kernel[B * H,](*inputs, real, o, S_out, stride, eps, D**-0.5, **how)
    return o, S_out

@functools.lru_cache(maxsize=None)  # asked for every layer and token
def step_backend(device, dtype, H, D):
    return pick_backend("auto", str(device), dtype, H, H, D, D)

def gated_delta_step(q, k, v, a, b, gate, A_log, dt_bias, weight, eps, S, real=None):
    """What a Gated DeltaNet mixer does to one token between its input products and W_o.

        q, k, v = SiLU(q), SiLU(k), SiLU(v);   q, k = q / |q|, k / |k|
        g = -exp(A_log) softplus(a + dt_bias),   beta = sigmoid(b)
        S~ = exp(g) S,   S = S~ + k (x) beta (v - S~^T k),   o = S^T q D^-1/2
        o = RMSNorm(o) * weight * SiLU(gate)

    q, k, v, gate [B, 1, H, D], a, b [B, 1, H]: products of x; A_log, dt_bias [H]; weight [D]; S
    [B, H, D, D] fp32 or None (zero); real [B] or None: 0 where the token is padding, which leaves S
    as it is. Shapes are not checked. Returns o in the dtype of gate, and S, the old one left alone.
    One kernel on a GPU, but not where gradients are enabled nor in torch.compile."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    plain = plain or step_backend(v.device, v.dtype, *v.shape[2:]) == "torch"
    step = torch_gated_delta_step if plain else triton_gated_delta_step
    return step(q, k, v, a, b, gate, A_log, dt_bias, weight, eps, S, real)

# ------------------------------------------------------------------- gated linear attention (GLA)

def recurrent_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    """Gated linear attention token by token: decay per key channel, no correction of the error.

        S_t = Diag(exp(g_t)) S_{t-1} + k_t (x) v_t,   o_t = scale S_t^T q_t,   scale = Dk^-1/2

    q, k, g (log-decay <= 0) [B, T, H, Dk]; v [B, T, H, Dv]; state [B, H, Dk, Dv]. It works in fp32,
    or in fp64 if q is. Returns o in the dtype of v, state or None. Source: arXiv 2312.06635."""
    check_inputs(q, k, v, g, None, initial_state)
    (B, T, H, Dk), Dv, dtype = q.shape, v.shape[-1], v.dtype
    work = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = (x.to(work) for x in (q, k, v, g))
        S = q.new_zeros(B, H, Dk, Dv) if initial_state is None else initial_state.to(work)
        outputs = []
        for t in range(T):
            S = g[:, t, :, :, None].exp() * S + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append((q[:, t, :, None, :] @ S).squeeze(-2))
        o = torch.stack(outputs, 1) * (Dk**-0.5 if scale is None else scale)
    return o.to(dtype), S if output_final_state else None

def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False,
              cu_seqlens=None):  # fmt: skip
    """recurrent_gla in chunks of C = 64, in PyTorch, with the same arguments and returns.

    A decay per channel stands inside the product q_i.k_j, as exp(sum of g over j < t <= i): too
    many numbers, and as exp(b_i) exp(-b_j), b = cumsum(g), it overflows. But where a token m is
    between, it is exp(sum over m < t <= i) exp(sum over j < t <= m), a factor <= 1 for each side.
    So blocks of 1, 2, 4, ... C/2 tokens are read by the block behind them, m the end of the first.
    Sums start at m: no difference is taken, no digit lost; g may be -inf. cu_seqlens: as above."""
    check_inputs(q, k, v, g, None, initial_state)
    if cu_seqlens is not None:
        g = decay_between(g, cu_seqlens, initial_state is not None, output_final_state)
    (B, T, H, Dk), Dv, dtype = q.shape, v.shape[-1], v.dtype
    C = min(64, 1 << (T - 1).bit_length())  # a power of two
    work = torch.promote_types(q.dtype, torch.float32)

    def chunks(x):  # [B, T, H, D] -> [chunks, B, H, C, D]; k = v = g = 0 changes nothing
        x = F.pad(x.to(work), (0, 0, 0, 0, 0, -T % C))
        return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)

    def to_end(g):  # [..., C, D] -> decay from token j, without g_j, to the end
        return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2).exp()

    with torch.autocast(q.device.type, enabled=False):
        q = q.to(work) * (Dk**-0.5 if scale is None else scale)
        q, k, v, g = map(chunks, (q, k, v, g))
        S = q.new_zeros(B, H, Dk, Dv) if initial_state is None else initial_state.to(work)
        # 1. every token reads itself
        o, size = (q * k).sum(-1, keepdim=True) * v, 1
        # 2. the second of two blocks reads the first, across the decay from m to token i, g_i too
        while size < C:
            halves = (x.unflatten(-2, (-1, 2, size)).unbind(-3) for x in (q, k, v, g))
            (_, q2), (k1, _), (v1, _), (g1, g2) = halves
            o2 = (q2 * g2.cumsum(-2).exp()) @ (k1 * to_end(g1)).mT @ v1
            o = o + torch.stack([torch.zeros_like(o2), o2], -3).flatten(-4, -2)
            size *= 2
        # 3. every chunk reads the state that the chunks before it left
        Q, K, read = q * g.cumsum(-2).exp(), k * to_end(g), []
        gamma_C = g.sum(-2).exp()[..., None]
        for n in range(len(q)):
            read.append(Q[n] @ S)
            S = gamma_C[n] * S + K[n].mT @ v[n]
        o = o + torch.stack(read)
    o = o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(dtype)
    return o, S if output_final_state else None

# ------------------------------------------------------------------- as a module, as a command

def __getattr__(name):
    """What this file lacks, from PyPI's package `kernels` if installed: transformers, which wants
    that one, finds this file where its folder is on sys.path. __path__ serves the submodules."""
    here = os.path.dirname(os.path.realpath(__file__))
    others = [entry for entry in sys.path if os.path.realpath(entry or ".") != here]
    wanted = __name__ == "kernels" and (name == "__path__" or not name.startswith("__"))
    spec = importlib.machinery.PathFinder.find_spec("kernels", others) if wanted else None
    if spec is None or spec.submodule_search_locations is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__path__":
        return spec.submodule_search_locations
    return getattr(importlib.import_module("kernels.__init__"), name)  # its __init__.py

if __name__ == "__main__":
    benchmark = os.path.join(os.path.dirname(os.path.realpath(__file__)), "assets", "benchmark.py")
    if not os.path.exists(benchmark):
        sys.exit(f"the checks and the benchmark are not here: they need {benchmark}")
    runpy.run_path(benchmark, run_name="__main__")
