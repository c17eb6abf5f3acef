"""The gated delta rule: recurrence (ground truth), chunked PyTorch."""
from __future__ import annotations

import torch
import torch.nn.functional as F


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
            torch.sub(log_gamma[n, :, :, None], log_gamma[n, :, None, :], out=D[n]) if k.dtype == torch.float64 else D[n].copy_(log_gamma[n, :, :, None] - log_gamma[n, :, None, :])
            D[n].exp_().tril_()
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


def chunk_torch(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel, chunk=None):
    B, T, H, Dk = q.shape
    HV, Dv = v.shape[2:]
    work = torch.promote_types(q.dtype, torch.float32)
    import os; C = min(int(os.environ.get('CH',64)), T)
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


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, backend="auto"):
    """The gated delta rule, chunk by chunk. See recurrent_gated_delta_rule."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        o, S = chunk_torch(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel)
    else:
        ends, parts = cu_seqlens.tolist(), []
        for n, (a, b) in enumerate(zip(ends, ends[1:])):
            S0 = None if initial_state is None else initial_state[n:n + 1]
            parts.append(chunk_torch(*(x[:, a:b] for x in (q, k, v, g, beta)), scale, S0, use_qk_l2norm_in_kernel))
        o, S = torch.cat([o for o, _ in parts], 1), torch.cat([S for _, S in parts])
    return o.to(v.dtype), S if output_final_state else None
