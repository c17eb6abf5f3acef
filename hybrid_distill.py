"""Turn a pretrained softmax Transformer into a hybrid, and let a little KL training say which layers stay softmax.

    python hybrid_distill.py                     # everything, on an embedded corpus: no download, no GPU needed
    python hybrid_distill.py --teacher meta-llama/Llama-3.2-1B --data HuggingFaceFW/fineweb-edu --softmax-layers 4 --out runs/llama
    python hybrid_distill.py --help              # every option

Reading list
    [1] Distilling to Hybrid Attention Models via KL-Guided Layer Selection, arXiv 2512.20569   the method: stage S
    [2] RADLADS, arXiv 2505.03005                                                               stages 0-3
    [3] Gated Delta Networks, arXiv 2412.06464                                                  the mixer; see kernels.py

Glossary
    code             paper       shape, meaning
    B T D            -           batch, tokens, hidden size
    H Dh             -           query heads, head size (from the config: not always D / H)
    L, K             L, K        layers of the teacher, layers that stay softmax
    q k v            q k v       [B, T, H, Dh]
    g                log alpha   [B, T, H]   log-decay, <= 0
    beta             beta        [B, T, H]   write strength, in (0, 1)
    S                S           [B, H, Dh, Dh]   the recurrent state, fp32
    softmax_layers   -           0-based indices of the K layers that keep softmax attention
    importance       I(l)        -KL of the all-linear student with only layer l restored to softmax, after a little stage-2 training

The first half is the method, in the order of the paper; it knows nothing of files. The second half is the plumbing.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path

import huggingface_hub
import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast,
    Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# transformers 5.24 renamed the keyword of every forward
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: no lock on the run folder, no peak memory of a CPU run
    fcntl = resource = None

try:  # in a saved checkpoint this file is a module of a package, with kernels.py beside it
    from .kernels import chunk_gated_delta_rule, decode_gated_delta_rule
except ImportError:
    from kernels import chunk_gated_delta_rule, decode_gated_delta_rule


# ======================================================================================================================
#                                                     THE METHOD
# ======================================================================================================================

# ------------------------------------------------------------------------------------------------ the mixer

class GatedDeltaNet(nn.Module):
    """Gated DeltaNet [3] in the place of a softmax attention, without RoPE and without short convolution ([1]: gdn_v4).

    Per head, with x_t the input of the layer:

        q_t, k_t, v_t = SiLU(W_q x_t), SiLU(W_k x_t), SiLU(W_v x_t);  Qwen3's q/k norms stand before the SiLU;
                                                                      q and k are then L2-normalised, inside the kernel
        g_t    = -exp(A_log) softplus(W_a x_t + dt_bias)              log-decay, <= 0
        beta_t = sigmoid(W_b x_t)                                     write strength
        S~_t   = exp(g_t) S_{t-1}                                     S decays first,
        S_t    = S~_t + k_t (x) beta_t (v_t - S~_t^T k_t)             then the error of its prediction is corrected
        o_t    = S_t^T q_t Dh^-1/2                                    (these three lines: kernels.py)
        y_t    = W_o (RMSNorm(o_t) * SiLU(W_g x_t))

    It is called as transformers calls `layers[i].self_attn`, and returns (y, None). To try another mixer, write a class
    with the same `from_attention` and `forward`, and name it in `swap_attention` and `mixers`.

    Where it differs from the official code, and why: the heads come from the attention module, so head_dim need not be
    D / H (Qwen3); q/k/v biases (Qwen2) and q/k norms (Qwen3) are carried over instead of dropped.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, layer_idx: int, std: float = 0.02,
                 qkv_bias: bool = False, o_bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.num_heads, self.head_dim, self.layer_idx = num_heads, head_dim, layer_idx
        to = dict(device=device, dtype=dtype)
        width = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=qkv_bias, **to)
        self.k_proj = nn.Linear(hidden_size, width, bias=qkv_bias, **to)
        self.v_proj = nn.Linear(hidden_size, width, bias=qkv_bias, **to)
        self.q_norm = self.k_norm = None                                          # set by from_attention (Qwen3)
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False, **to)         # W_a: decay
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False, **to)         # W_b: write strength
        self.g_proj = nn.Linear(hidden_size, width, bias=False, **to)             # W_g: output gate
        self.o_norm = nn.RMSNorm(head_dim, eps=1e-5, **to)
        self.o_proj = nn.Linear(width, hidden_size, bias=o_bias, **to)
        for linear in (self.a_proj, self.b_proj, self.g_proj):
            nn.init.normal_(linear.weight, std=std)
        # A = exp(A_log) ~ U(0, 16); dt = softplus(dt_bias), log-uniform in [1e-3, 1e-1]. fp32 whatever the model is, and
        # U is kept off 0: a draw of exactly 0 would be log 0, a head that never decays and whose gradient is 0 * inf.
        A = torch.empty(num_heads, device=device, dtype=torch.float32).uniform_(0, 16).clamp(min=1e-4)
        dt = torch.empty(num_heads, device=device, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.A_log = nn.Parameter(A.log())
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))            # softplus^-1(dt)

    @classmethod
    @torch.no_grad()
    def from_attention(cls, attn: nn.Module) -> GatedDeltaNet:
        """Stage 0 for one layer: a mixer that starts from the W_q, W_k, W_v, W_o of a softmax attention.

        attn: an attention module of transformers' Llama, Mistral, Qwen2 or Qwen3. Each of its H_kv key and value heads
        is repeated, as a whole, for the H / H_kv query heads that read it, so that mixer head h holds the projections of
        query head h and of the KV head h // (H / H_kv). (The official code repeats single weight rows instead, which mixes
        channels of different heads.)  The weights are copies: training the mixer leaves `attn` as it was.
        """
        Dh = attn.head_dim
        H = attn.q_proj.out_features // Dh
        groups = H // (attn.k_proj.out_features // Dh)
        weight = attn.q_proj.weight
        mixer = cls(attn.q_proj.in_features, H, Dh, attn.layer_idx, std=attn.config.initializer_range,
                    qkv_bias=attn.q_proj.bias is not None, o_bias=attn.o_proj.bias is not None,
                    device=weight.device, dtype=weight.dtype)

        def per_query_head(p):  # [H_kv * Dh, ...] -> [H * Dh, ...], whole heads
            return p.unflatten(0, (-1, Dh)).repeat_interleave(groups, dim=0).flatten(0, 1)

        for name, expand in (("q_proj", torch.clone), ("k_proj", per_query_head), ("v_proj", per_query_head),
                             ("o_proj", torch.clone)):
            source, target = getattr(attn, name), getattr(mixer, name)
            target.weight = nn.Parameter(expand(source.weight))
            if source.bias is not None:
                target.bias = nn.Parameter(expand(source.bias))
        if hasattr(attn, "q_norm"):
            mixer.q_norm, mixer.k_norm = copy.deepcopy(attn.q_norm), copy.deepcopy(attn.k_norm)
        return mixer

    def forward(self, hidden_states, padding_mask=None, cu_seqlens=None, **others):
        """hidden_states [B, T, D]; padding_mask [B, >= T], 1 on real tokens, or None -> ([B, T, D], None).

        cu_seqlens [N + 1]: the B rows, one behind the other, are N packed sequences, see `_pass_padding_and_packing`.
        others: what transformers hands to every self_attn. The cache among it is found by its type, for its name differs between
        versions; the rest only softmax attention needs: RoPE's cos and sin, the causal mask, position ids.
        """
        cache = next((value for value in others.values() if isinstance(value, Cache)), None)
        B, T, _ = hidden_states.shape
        x, heads = hidden_states, (B, T, self.num_heads, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = F.silu(q), F.silu(k), F.silu(v).to(q.dtype)
        k = k.to(q.dtype)
        # g_t = -exp(A_log) softplus(W_a x_t + dt_bias);  beta_t = sigmoid(W_b x_t)        both fp32
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        beta = self.b_proj(x).float().sigmoid()
        if padding_mask is not None:
            # A padded position must leave S as it is: write nothing (k, v, beta = 0) and decay nothing (g = 0).
            real = padding_mask[:, -T:, None].to(device=x.device, dtype=g.dtype)
            g, beta = g * real, beta * real
            k, v = k * real[..., None].to(k.dtype), v * real[..., None].to(v.dtype)

        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("packed sequences leave no state that a cache could hold: call the model with use_cache=False, "
                                 "or give each sequence its own row")
            packed = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v, g, beta))
            o, _ = chunk_gated_delta_rule(*packed, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)
            o = o.view(heads)
        elif cache is None:
            o, _ = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        else:
            state = recurrent_state(cache, self.layer_idx)
            rule = decode_gated_delta_rule if T == 1 else chunk_gated_delta_rule
            o, S = rule(q, k, v, g, beta, initial_state=state.S, output_final_state=True, use_qk_l2norm_in_kernel=True)
            state.advance(S, T)

        # y_t = W_o (RMSNorm(o_t) * SiLU(W_g x_t)), the norm per head and in fp32
        gate = self.g_proj(x).view(heads)
        o = F.rms_norm(o.float(), (self.head_dim,), self.o_norm.weight.float(), self.o_norm.eps) * F.silu(gate.float())
        return self.o_proj(o.to(gate.dtype).flatten(2)), None


# ------------------------------------------------------------------------------------------------ the hybrid model

class RecurrentState(DynamicLayer):
    """One layer of transformers' cache, holding a constant-size S [B, H, Dh, Dh] in fp32 instead of growing keys and values.

    `generate` and the mask code ask a cache only for its length and to follow the batch (beam search): that is what is here.
    """
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.S, self.seen = None, 0

    def advance(self, S, T):
        self.S, self.seen, self.is_initialized = S, self.seen + T, True

    def get_seq_length(self, *_) -> int:
        return self.seen

    def reset(self):
        self.S, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices):
        if self.S is not None:
            self.S = self.S[indices.to(self.S.device)]

    def batch_repeat_interleave(self, repeats):
        if self.S is not None:
            self.S = self.S.repeat_interleave(repeats, dim=0)

    def offload(self):
        """Stays where it is: it is smaller than the copy it would save."""

    prefetch = offload

    def update(self, *_, **__):
        raise TypeError("a RecurrentState holds no keys and values; this cache was filled by a hybrid model, use it with that model")

    def crop(self, *_):
        raise NotImplementedError("a recurrent state cannot be rolled back, so assisted and prompt-lookup decoding, which crop "
                                  "the cache, do not work on a hybrid; use greedy, sampling or beam search")


def recurrent_state(cache: Cache, layer_idx: int) -> RecurrentState:
    """The state of one layer in `cache`, put there in the place of the empty KV layer when it is first asked for.

    Whoever made the cache (`generate`, a pipeline, `DynamicCache()`) need not know that the model is a hybrid.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, RecurrentState):
        if not isinstance(layer, DynamicLayer):
            raise ValueError(f"a hybrid keeps its state in a DynamicCache, not in a cache of {type(layer).__name__}; "
                             "leave out cache_implementation or set it to 'dynamic'")
        if layer.get_seq_length() > 0:
            raise ValueError(f"layer {layer_idx} of this cache holds keys and values of another model; start with an empty cache")
        layer = cache.layers[layer_idx] = RecurrentState()
    return layer


class HybridLlamaConfig(LlamaConfig):
    model_type = "hybrid_llama"


class HybridMistralConfig(MistralConfig):
    model_type = "hybrid_mistral"


class HybridQwen2Config(Qwen2Config):
    model_type = "hybrid_qwen2"


class HybridQwen3Config(Qwen3Config):
    model_type = "hybrid_qwen3"


class Hybrid:
    """A stock causal LM of transformers with GatedDeltaNet in every layer that `config.softmax_layers` does not name."""
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    def __init__(self, config):
        super().__init__(config)
        swap_attention(self, config.softmax_layers)


class HybridLlamaForCausalLM(Hybrid, LlamaForCausalLM):
    config_class = HybridLlamaConfig


class HybridMistralForCausalLM(Hybrid, MistralForCausalLM):
    config_class = HybridMistralConfig


class HybridQwen2ForCausalLM(Hybrid, Qwen2ForCausalLM):
    config_class = HybridQwen2Config


class HybridQwen3ForCausalLM(Hybrid, Qwen3ForCausalLM):
    config_class = HybridQwen3Config


HYBRIDS = {LlamaForCausalLM: HybridLlamaForCausalLM, MistralForCausalLM: HybridMistralForCausalLM,
           Qwen2ForCausalLM: HybridQwen2ForCausalLM, Qwen3ForCausalLM: HybridQwen3ForCausalLM}
for _hybrid in HYBRIDS.values():  # a saved student carries this file, so that AutoModelForCausalLM can load it anywhere
    _hybrid.config_class.register_for_auto_class("AutoConfig")
    _hybrid.register_for_auto_class("AutoModelForCausalLM")


def swap_attention(model, softmax_layers) -> None:
    """Replace, in place, every attention that `softmax_layers` does not name by a mixer that starts from its weights."""
    for i, layer in enumerate(model.model.layers):
        if i not in softmax_layers:
            layer.self_attn = GatedDeltaNet.from_attention(layer.self_attn)
    # A mixer needs the [B, T] padding mask, not the 4-D causal one; extra keyword arguments reach every self_attn.
    model.model.register_forward_pre_hook(_pass_padding_and_packing, with_kwargs=True)
    model.model.register_forward_hook(_cache_was_filled)


def _pass_padding_and_packing(decoder, args, kwargs):
    """Hands every mixer what transformers turns into a causal mask: padding, and where packed sequences start."""
    mask, positions = kwargs.get("attention_mask", args[1] if len(args) > 1 else None), kwargs.get("position_ids")
    more = {}
    if mask is not None:
        if getattr(mask, "ndim", None) != 2:
            raise ValueError("a hybrid takes attention_mask as [batch, tokens], 1 on real tokens; got "
                             f"{list(mask.shape) if hasattr(mask, 'shape') else type(mask).__name__}")
        more["padding_mask"] = mask
    elif kwargs.get("cu_seq_lens_q") is not None:
        more["cu_seqlens"] = kwargs["cu_seq_lens_q"]
    elif positions is not None and positions.shape[-1] > 1:
        # A sequence starts at the head of each row and wherever a position is not the one before plus 1.
        starts = F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
        if starts[:, 1:].any():
            tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds", args[0] if args else None)
            starts = starts.expand(len(tokens), -1).flatten()
            more["cu_seqlens"] = F.pad(starts.nonzero().flatten(), (0, 1), value=len(starts))
    return args, {**kwargs, **more}


def _cache_was_filled(decoder, args, output):
    """A hybrid that returns a cache which a mixer never saw would go on from nothing: refused, not ignored."""
    cache = next((value for value in (output.values() if isinstance(output, dict) else output) if isinstance(value, Cache)), None)
    for i, layer in enumerate(decoder.layers if cache is not None else ()):
        if isinstance(layer.self_attn, GatedDeltaNet) and not isinstance(cache.layers[i], RecurrentState):
            raise RuntimeError(f"the model was asked to use a cache, and the mixer of layer {i} was not given it: transformers "
                               f"{transformers.__version__} hands the cache on in a way this file does not know; call with use_cache=False")


def mixers(model) -> dict[int, GatedDeltaNet]:
    """The linear-attention layers of a hybrid: {layer index: mixer}."""
    return {i: layer.self_attn for i, layer in enumerate(model.model.layers) if isinstance(layer.self_attn, GatedDeltaNet)}


def last_hidden(model, tokens):
    """tokens [B, T] -> what goes into the LM head, [B, T, D]."""
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state


def autocast(model):
    """Compute in the dtype the teacher is stored in (config.dtype), while trained weights and their gradients are fp32."""
    dtype = model.config.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, dtype=dtype) if half else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------ the losses

def alignment_loss(y_student, y_teacher):
    """Stage 1: mean over tokens of ||y_teacher - y_student||_2 D^-1/2, a norm, not squared.  [B, T, D] twice -> scalar."""
    D = y_student.shape[-1]
    return (y_teacher.float() - y_student.float()).norm(dim=-1).mean() * D ** -0.5


def kl_loss(student_hidden, student_head, teacher_hidden, teacher_head, mask=None, chunk=None):
    """KL(teacher || student) of the next-token distributions, mean over tokens, in nats.

        KL_t = sum_v p_t(v) (log p_t(v) - log p_s(v)),   p = softmax(head h),   temperature 1

    student_hidden [..., D_s], teacher_hidden [..., D_t]; heads [V, D_s] and [V, D_t] (or the nn.Linear that holds them, without
    bias); mask [...], 1 on the tokens that count, default all of them. Gradients reach student_hidden and student_head.
    Never more than `chunk` rows of logits exist (default: 2^25 / V), in the forward as in the backward; see `_ChunkedLoss`.
    """
    student_head, teacher_head = getattr(student_head, "weight", student_head), getattr(teacher_head, "weight", teacher_head)
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(f"student and teacher must share a vocabulary; their heads have {student_head.shape[0]} and "
                         f"{teacher_head.shape[0]} rows")
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(f"student_hidden {list(student_hidden.shape)} and teacher_hidden {list(teacher_hidden.shape)} must be of the same tokens")
    teacher_hidden = teacher_hidden.detach().flatten(0, -2)
    teacher_head = teacher_head.detach()

    def kl(student_logits, rows):
        log_p_t = F.log_softmax(F.linear(teacher_hidden[rows], teacher_head).float(), dim=-1)
        log_p_s = F.log_softmax(student_logits, dim=-1)
        p_t = log_p_t.exp()
        loss = p_t.mul(log_p_t.sub_(log_p_s)).sum(-1)                     # KL_t
        return loss, log_p_s.exp_().sub_(p_t)                             # d KL_t / d student_logits = p_s - p_t

    return _ChunkedLoss.apply(student_hidden.flatten(0, -2), student_head, kl, _token_weights(student_hidden, mask), chunk)


def cross_entropy_loss(hidden, head, labels, mask=None, chunk=None):
    """-log p(label), mean over tokens, in nats; shapes, mask and chunking as in `kl_loss`, labels [...] of hidden's tokens."""
    head, labels = getattr(head, "weight", head), labels.flatten()

    def cross_entropy(logits, rows):
        log_p, label = F.log_softmax(logits, dim=-1), labels[rows, None]
        loss = -log_p.gather(1, label).squeeze(1)
        return loss, log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=log_p.dtype))     # p - onehot(label)

    return _ChunkedLoss.apply(hidden.flatten(0, -2), head, cross_entropy, _token_weights(hidden, mask), chunk)


def _token_weights(hidden, mask):
    """[N] fp32, summing to 1: each token's share of the mean (all zero for a mask without a token, whose loss is then 0)."""
    n = hidden.shape[:-1].numel()
    if mask is None:
        return torch.full((n,), 1 / n, device=hidden.device)
    mask = mask.flatten().float()
    return mask / mask.sum().clamp(min=torch.finfo(mask.dtype).tiny)


class _ChunkedLoss(torch.autograd.Function):
    """sum_t w_t loss(head h_t), with the logits of `chunk` tokens at a time.

    The gradient of such a loss by its logits is known together with the loss, so one visit to each chunk gives both:
    the forward stores d/dh [N, D] and d/dhead [V, D] and no logits, the backward scales them.
    """

    @staticmethod
    def forward(ctx, hidden, head, loss_and_grad, weights, chunk):
        N, V = hidden.shape[0], head.shape[0]
        chunk = chunk or max(16, 2 ** 25 // V)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head) if need_head else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows]
            loss, d_logits = loss_and_grad(F.linear(h, head).float(), rows)
            total += (loss * weights[rows]).sum()                         # a matmul would be rounded under autocast
            if need_hidden or need_head:
                d_logits *= weights[rows, None]
            if need_hidden:
                d_hidden[rows] = F.linear(d_logits.to(h.dtype), head.t())
            if need_head:
                d_head += F.linear(d_logits.t().to(h.dtype), h.t())
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_head = ctx.saved_tensors
        return (d_hidden * d_total if d_hidden is not None else None, d_head * d_total if d_head is not None else None,
                None, None, None)


# ------------------------------------------------------------------------------------------------ stage 0: attention weight transfer

def transfer_attention(teacher, softmax_layers, share_rest: bool = False):
    """Stage 0: a copy of `teacher` whose attention is linear in every layer that `softmax_layers` does not name.

    teacher: a transformers Llama, Mistral, Qwen2 or Qwen3 causal LM; it is not changed. softmax_layers: indices in [0, L).
    share_rest: let everything that is not attention be the teacher's own tensors, so that stage 1 needs no second copy of
    it; `distill_logits` makes its own before it trains them.  Raises ValueError for any other architecture or index.
    """
    family = HYBRIDS.get(type(teacher))
    if family is None:
        raise ValueError(f"{type(teacher).__name__} is not supported; the teacher must be one of "
                         + ", ".join(cls.__name__ for cls in HYBRIDS))
    student = _copy(teacher, share_rest)
    student.__class__ = family
    student.config.__class__ = family.config_class           # one config object, shared by all modules of the copy
    student.config.softmax_layers = check_layers(softmax_layers, len(teacher.model.layers))
    swap_attention(student, student.config.softmax_layers)
    return student


def restore_attention(student, teacher, softmax_layers, share_rest: bool = False):
    """A copy of the all-linear `student` with the teacher's softmax attention back in `softmax_layers`.

    share_rest: for a student that shares everything but its attention with the teacher; the copy then does too.
    """
    hybrid = _copy(student, share_rest)
    hybrid.config.softmax_layers = check_layers(softmax_layers, len(teacher.model.layers))
    for i in hybrid.config.softmax_layers:
        hybrid.model.layers[i].self_attn = copy.deepcopy(teacher.model.layers[i].self_attn)
    return hybrid


def check_layers(softmax_layers, L: int) -> list[int]:
    """Sorted, or ValueError if an index is outside [0, L) or named twice."""
    layers = sorted(softmax_layers)
    if any(not 0 <= i < L for i in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"softmax_layers must be distinct and within 0..{L - 1} for a teacher of {L} layers, not {layers}")
    return layers


def _copy(model, share_rest: bool):
    """A deep copy; with share_rest, one whose parameters outside attention are the same tensors as the model's."""
    attention = {id(p) for layer in model.model.layers for p in layer.self_attn.parameters()}
    memo = {id(p): p for p in model.parameters() if id(p) not in attention} if share_rest else {}
    return copy.deepcopy(model, memo)


def unshare(student, teacher) -> None:
    """Give `student`, in place, its own copy of every parameter that it shares with `teacher` (ties within it stay ties)."""
    theirs, own = {id(p) for p in teacher.parameters()}, {}
    for module in student.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in theirs:
                module._parameters[name] = own.setdefault(id(p), nn.Parameter(p.detach().clone()))


# ------------------------------------------------------------------------------------------------ the training loop of every stage

def adamw(groups):
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


class Observer:
    """What `train` tells the outside, and where it is told to go on from. This one does nothing; `RunObserver` below keeps files."""

    def resume(self, models, optimizer) -> list[dict]:
        """Load what was saved into models and optimizer and return the history up to there; [] to start from the beginning."""
        return []

    def step(self, row: dict, models, optimizer) -> None:
        """After every step, with its row of the history: {"step": n, loss name: value, ..., "loss": their mean}."""

    def save(self, models, optimizer, finished: bool) -> None:
        """At the end of the stage, or, not finished, when it stops because a loss is not finite."""


def train(models, groups, losses, batches, steps=None, *, schedule=lambda step, steps: 1.0, clip=1.0, micro_batch=None,
          make_optimizer=adamw, evaluate=None, eval_every=None, stop=None, observer=None) -> list[dict]:
    """The one loop behind every stage. Returns the history, a list of rows {"step": n, loss name: value, ..., "loss": their mean}.

    models: the modules that train, each clipped for itself.  groups: for each, its optimizer parameter groups with their peak "lr".
    losses(tokens): a generator of (name, loss, weight); each loss is back-propagated, times weight, before the next one is
    computed; one without a gradient is only recorded.
    batches: token batches [B, T], as an iterable or as a function of the step (0-based).  steps: how many, default all there are.
    schedule(step, steps): factor on every lr.  micro_batch: sequences per backward; the gradient is that of the whole batch.
    evaluate(): a dict for the row of step 0, of every `eval_every` steps and of the last.  stop(history): end early if true.
    Raises FloatingPointError, with the weights of the last good step, when a loss is not finite; ValueError when batches run out.
    """
    batches, steps = count_steps(batches, steps)
    observer = observer or Observer()
    parameters = [[p for group in of_model for p in group["params"]] for of_model in groups]
    for p in (p for of_model in parameters for p in of_model):
        p.requires_grad_(True)
        p.data = p.data.float()                                   # fp32 while it trains: a bf16 weight swallows small steps
    optimizer = make_optimizer([{**group, "peak_lr": group["lr"]} for of_model in groups for group in of_model])
    for model in models:
        model.train()
    history = observer.resume(models, optimizer)
    if evaluate and not history:
        history.append({"step": 0, **evaluate()})
        observer.step(history[-1], models, optimizer)
    start = history[-1]["step"] if history else 0
    source = map(batches, range(start, steps)) if callable(batches) else islice(batches, start, steps)
    for step in range(start, steps):
        if stop and stop(history):
            break
        tokens = next(source, None)
        if tokens is None:
            raise ValueError(f"the batches ended after {step} of {steps} steps; give more of them or fewer steps")
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step, steps)
        sums = {}
        for part in tokens.to(parameters[0][0].device).split(micro_batch or len(tokens)):
            share = len(part) / len(tokens)
            for name, loss, weight in losses(part):
                if loss.requires_grad:
                    (loss * weight * share).backward()
                sums[name] = sums.get(name, 0.0) + loss.detach() * share
        values = {name: float(total) for name, total in sums.items()}
        norms = {"gradient norm": float(sum(torch.nn.utils.clip_grad_norm_(of_model, clip) for of_model in parameters))}
        for name, value in (values | norms).items():
            if not math.isfinite(value):
                optimizer.zero_grad()
                observer.save(models, optimizer, finished=False)
                raise FloatingPointError(f"{name!r} became {value} at step {step + 1} of {steps}; the weights are those of step {step}, "
                                         "the last good one; a smaller learning rate is the first thing to try")
        row = {"step": step + 1, "tokens": tokens.numel(), **values, "loss": sum(values.values()) / len(values)}
        optimizer.step()
        optimizer.zero_grad()
        if evaluate and ((step + 1) % (eval_every or steps) == 0 or step + 1 == steps):
            row.update(evaluate())
        history.append(row)
        observer.step(row, models, optimizer)
    observer.save(models, optimizer, finished=True)
    for model in models:
        model.eval()
    return history


def count_steps(batches, steps):
    """(batches, steps), with steps counted when it is None."""
    if steps is None:
        if callable(batches):
            raise ValueError("batches given as a function of the step have no end: say how many steps")
        batches = list(batches)
        steps = len(batches)
    return batches, steps


def cosine(floor: float, warmup: int = 0):
    """A schedule: linear warm-up over `warmup` steps, then a cosine from 1 to `floor`."""
    def factor(step, steps):
        if step < warmup:
            return (step + 1) / warmup
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return factor


def parameter_groups(model, lr: float, rest_lr: float, weight_decay: float = 0.01) -> list[dict]:
    """Optimizer groups: attention, softmax and linear, at `lr`, everything else at `rest_lr`; rest_lr = 0 freezes the rest.

    Only matrices take weight decay: A_log, dt_bias, norms and biases are vectors, and decay would pull the gates to 0.
    """
    groups = {}
    for name, p in model.named_parameters():
        attention = ".self_attn." in name
        p.requires_grad_(attention or rest_lr > 0)
        if p.requires_grad:
            key = (lr if attention else rest_lr, weight_decay if p.ndim >= 2 else 0.0)
            groups.setdefault(key, []).append(p)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


# ------------------------------------------------------------------------------------------------ stage 1: hidden-state alignment

def align_hidden_states(student, teacher, batches, steps=None, lr=1e-3, final_lr=1e-5, warmup=50, micro_batch=None, observer=None):
    """Stage 1: every mixer learns, all at once and each for itself, to give what the teacher's attention gives for the same input.

        loss = mean over layers of alignment_loss(mixer_l(x_l), attn_l(x_l)),   x_l from the *teacher's* own forward pass

    The teacher's output feeds the next layer, so one teacher pass serves all layers and nothing of the student but its mixers is
    run or trained. Trains `student` in place; returns the history, one loss per layer ("layer 3") a step, and their mean ("loss").
    """
    training = nn.ModuleDict({str(i): mixer for i, mixer in mixers(student).items()})
    if not training:
        raise ValueError("this student has no linear layer to align")

    def losses(tokens):
        with autocast(teacher):
            seen = attention_io(teacher, tokens, [int(i) for i in training])
        for i, mixer in training.items():
            x, y = seen.pop(int(i))
            with autocast(teacher):
                loss = alignment_loss(mixer(x)[0], y)
            yield f"layer {i}", loss, 1 / len(training)

    groups = [{"params": [p for p in training.parameters() if p.ndim >= 2], "lr": lr, "weight_decay": 0.01},
              {"params": [p for p in training.parameters() if p.ndim < 2], "lr": lr, "weight_decay": 0.0}]
    return train([training], [groups], losses, batches, steps, schedule=cosine(final_lr / lr, warmup),
                 micro_batch=micro_batch, observer=observer)


@torch.no_grad()
def attention_io(model, tokens, layers) -> dict[int, tuple]:
    """{l: (x_l, y_l)}, the input and the output [B, T, D] of the attention of each of `layers` in one forward pass of `model`."""
    seen, handles = {}, []
    for i in layers:
        def remember(module, args, kwargs, output, i=i):
            seen[i] = kwargs["hidden_states"], output[0]
        handles.append(model.model.layers[i].self_attn.register_forward_hook(remember, with_kwargs=True))
    try:
        last_hidden(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ------------------------------------------------------------------------------------------------ stage S: KL-guided selection

@dataclass
class Selection:
    """What `select_layers` found. Layers are 0-based indices; KL is in nats per token on the held-out batches."""
    chosen: list[int]                  # the K layers that stay softmax, best first
    ranking: list[int]                 # every layer, best first
    importance: dict[int, float]       # I(l) = -KL when l was last scored (greedy: with the layers picked before it kept)
    rounds: list[dict]                 # one a scoring round (ga-s2: one): {"kept", "k", "curves": {layer: [[step, KL], ...]}}


def select_layers(student, teacher, batches, held_out, k, steps=None, strategy="ga-s2", lr=1e-4, rest_lr=7e-6, eval_every=None,
                  early_stop=0, at_once=None, micro_batch=None, observe=None) -> Selection:
    """KL-guided selection: which k of the L layers should stay softmax?

        I(l) = -KL(teacher || student with only layer l restored to softmax, after a little of stage 2)

    student: the *all-linear* student after stage 1 (not changed). batches: token batches [B, T] to train the candidates on, taken
    from the start in every round; held_out: a list of batches, never trained on, that the KL is measured on.
    strategy: "ga-s2", the paper's: score every layer once, keep the k best. "greedy": keep the best, then score the rest again
    with it kept, and so on: it does not pick two layers that do the same job, and costs about k times as much.
    eval_every: steps between held-out evaluations (default: a fifth of steps); early_stop: end a round when its top-k set (greedy:
    its best layer) was the same at that many evaluations in a row, 0 for never.
    at_once: candidates in memory at a time, which share each teacher pass; default all L.  observe(name): the Observer of one group.
    Where it differs from the official code: ranked by held-out KL on fixed batches, not by training loss at a logged step.
    """
    L = len(mixers(student))
    if student.config.softmax_layers:
        raise ValueError(f"selection starts from the all-linear student; this one keeps {student.config.softmax_layers}")
    if not 1 <= k <= L:
        raise ValueError(f"k, the number of softmax layers to select, must be within 1..{L}, not {k}")
    if strategy not in ("ga-s2", "greedy"):
        raise ValueError(f"strategy must be 'ga-s2' or 'greedy', not {strategy!r}")
    batches, steps = count_steps(batches, steps)
    if not callable(batches) and iter(batches) is batches:        # a one-shot iterator: every round needs it from the start
        batches = list(islice(batches, steps))

    kept, rounds, importance = [], [], {}
    while len(kept) < k:
        new = k if strategy == "ga-s2" else 1
        curves = score_layers(student, teacher, batches, held_out, kept, steps, lr, rest_lr, eval_every, early_stop and (early_stop, new),
                              at_once, micro_batch, observe and (lambda group, r=len(rounds): observe(f"select-{r}-{group}")))
        rounds.append({"kept": list(kept), "k": new, "curves": curves})
        importance.update({i: -curve[-1][1] for i, curve in curves.items()})
        order = sorted(curves, key=lambda i: -importance[i])
        kept = kept + order[:new]
    return Selection(kept, kept + order[new:], importance, rounds)


def score_layers(student, teacher, batches, held_out, kept=(), steps=None, lr=1e-4, rest_lr=7e-6, eval_every=None, early_stop=None,
                 at_once=None, micro_batch=None, observe=None) -> dict[int, list]:
    """One round of selection: {layer: [[step, held-out KL], ...]} for every layer not in `kept`, trained with `kept` + that layer softmax.

    early_stop: None or (evaluations, k), see `settled`. The other arguments are those of `select_layers`.
    """
    batches, steps = count_steps(batches, steps)
    candidates = [i for i in mixers(student) if i not in kept]
    at_once = min(at_once or len(candidates), len(candidates))
    if early_stop and at_once < len(candidates):
        raise ValueError(f"early stopping compares all {len(candidates)} candidates at the same step, so they must train together: "
                         f"at_once must be {len(candidates)}, not {at_once}")
    curves = {}
    for start in range(0, len(candidates), at_once):
        group = candidates[start:start + at_once]
        models = {i: restore_attention(student, teacher, [*kept, i], share_rest=rest_lr == 0) for i in group}

        def losses(tokens):
            teacher_hidden = teacher_last_hidden(teacher, tokens)                 # one teacher pass for all of the group
            for i, model in models.items():
                with autocast(model):
                    loss = kl_loss(last_hidden(model, tokens), model.lm_head, teacher_hidden, teacher.lm_head)
                yield f"layer {i}", loss, 1.0

        def evaluate():
            return {"held_out": {str(i): kl for i, kl in held_out_kl(models, teacher, held_out).items()}}

        def to_curves(history):
            return {i: [[row["step"], row["held_out"][str(i)]] for row in history if "held_out" in row] for i in group}

        history = train(list(models.values()), [parameter_groups(model, lr, rest_lr) for model in models.values()], losses, batches,
                        steps, micro_batch=micro_batch, evaluate=evaluate, eval_every=eval_every or max(1, steps // 5),
                        stop=early_stop and (lambda history: settled(to_curves(history), *early_stop)),
                        observer=observe and observe(start // at_once))
        curves.update(to_curves(history))
    return curves


def top_sets(curves, k: int) -> list[tuple[int, frozenset]]:
    """[(step, the k layers of lowest held-out KL at that step), ...]"""
    evaluations = zip(*curves.values())
    return [(row[0][0], frozenset(sorted(curves, key=lambda i, row=dict(zip(curves, row)): row[i][1])[:k])) for row in evaluations]


def settled(curves, evaluations: int, k: int) -> bool:
    """Was the top-k set the same at the last `evaluations` evaluations? The untrained step 0 does not count."""
    sets = [layers for step, layers in top_sets(curves, k) if step > 0]
    return len(sets) >= evaluations and len(set(sets[-evaluations:])) == 1


@torch.no_grad()
def held_out_kl(models: dict, teacher, held_out) -> dict:
    """{name: mean KL(teacher || model) over the tokens of the held-out batches}; the models share each teacher pass."""
    total, count = dict.fromkeys(models, 0.0), sum(tokens.numel() for tokens in held_out)
    training = {name: model.training for name, model in models.items()}
    for model in models.values():                                     # without dropout, also between two steps of training
        model.eval()
    for tokens in held_out:
        tokens = tokens.to(teacher.device)
        teacher_hidden = teacher_last_hidden(teacher, tokens)
        for name, model in models.items():
            with autocast(model):
                total[name] += float(kl_loss(last_hidden(model, tokens), model.lm_head, teacher_hidden, teacher.lm_head)) * tokens.numel() / count
    for name, model in models.items():
        model.train(training[name])
    return total


@torch.no_grad()
def teacher_last_hidden(teacher, tokens):
    with autocast(teacher):
        return last_hidden(teacher, tokens)


# Published selections (the official code's, 0-based), best first; an inner list of several layers is one step from a budget to the next.
PUBLISHED = {
    "Qwen2.5-3B-Instruct": [[20], [32], [33], [21], [22], [25], [17], [19], [5], [31], [4], [3], [10], [30], [26], [29], [27], [13]],
    "Llama-3.2-3B-Instruct": [[14], [8], [5], [12], [15], [13], [2], [26], [24], [16], [17], [18], [21], [10]],
    "Qwen2.5-1.5B-Instruct": [[14, 19, 20, 23, 24, 26, 27], [8, 12]],             # published as sets: only whole ones
    "Qwen2.5-7B-Instruct": [[14, 22, 16, 17, 5, 23, 26], [8, 15]],
}


def place_layers(how: str, L: int, k: int, seed: int = 0, teacher_name: str = "") -> list[int]:
    """The baselines: k of L layers by a rule that looks at no data. how: one of

        uniform    (i+1) L // k - 1, the official code's for Llama-3.2-3B; its last pick is the last layer
        centred    int((i + 1/2) L / k), the same spacing, moved to the middle
        random     drawn with `seed`;  first, last: the k first, the k last
        published  the selection published for `teacher_name` (its last path component)
    """
    if not 0 <= k <= L:
        raise ValueError(f"the number of softmax layers must be within 0..{L}, not {k}")
    if how == "uniform":
        return [(i + 1) * L // k - 1 for i in range(k)]
    if how == "centred":
        return [int((i + 0.5) * L / k) for i in range(k)]
    if how == "random":
        return sorted(torch.randperm(L, generator=torch.Generator().manual_seed(seed))[:k].tolist())
    if how == "first":
        return list(range(k))
    if how == "last":
        return list(range(L - k, L))
    if how == "published":
        name = teacher_name.rstrip("/").split("/")[-1]
        if name not in PUBLISHED:
            raise ValueError(f"no published selection for {name!r}; there is one for " + ", ".join(PUBLISHED))
        layers, sizes = [], []
        for more in PUBLISHED[name]:
            layers = layers + more
            sizes.append(len(layers))
            if len(layers) == k:
                return layers
        raise ValueError(f"the published selections for {name} have {', '.join(map(str, sizes))} layers, not {k}")
    raise ValueError(f"layers are placed by uniform, centred, random, first, last or published, not by {how!r}")


# ------------------------------------------------------------------------------------------------ stage 2: distribution matching

def distill_logits(student, teacher, batches, steps=None, lr=1e-4, rest_lr=7e-6, micro_batch=None, observer=None):
    """Stage 2: all parameters learn to give the teacher's next-token distribution, KL(teacher || student), mean over tokens.

    Starts from the stage-1 weights with the chosen layers restored (`restore_attention`). Constant lr, `lr` for attention and
    `rest_lr` for the rest (0 freezes it), clip 1.0. Trains `student` in place and never the teacher: what they share is copied
    first. Returns the history, "kl" a step.
    """
    if rest_lr > 0:
        unshare(student, teacher)

    def losses(tokens):
        teacher_hidden = teacher_last_hidden(teacher, tokens)
        with autocast(student):
            loss = kl_loss(last_hidden(student, tokens), student.lm_head, teacher_hidden, teacher.lm_head)
        yield "kl", loss, 1.0

    return train([student], [parameter_groups(student, lr, rest_lr)], losses, batches, steps, micro_batch=micro_batch, observer=observer)


# ------------------------------------------------------------------------------------------------ stage 3: long-context finetuning

def finetune(student, batches, steps=None, lr=1e-5, micro_batch=None, observer=None):
    """Stage 3: cross-entropy on longer sequences, all parameters at `lr`, no teacher. Trains in place; returns the history, "ce" a step.

    A student that still shares tensors with its teacher (share_rest, and rest_lr = 0 in stage 2) must be given its own first: `unshare`.
    """

    def losses(tokens):
        with autocast(student):
            loss = cross_entropy_loss(last_hidden(student, tokens)[:, :-1], student.lm_head, tokens[:, 1:])
        yield "ce", loss, 1.0

    return train([student], [parameter_groups(student, lr, lr)], losses, batches, steps, micro_batch=micro_batch, observer=observer)


# ======================================================================================================================
#                                                     THE PLUMBING
# ======================================================================================================================

class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what was wrong and what would be right."""


# ------------------------------------------------------------------------------------------------ settings

def setting(default, doc: str):
    return field(default=default, metadata={"doc": doc})


@dataclass
class Settings:
    """Every option of the command line; None is filled in from EMBEDDED or PAPER (see `resolve`)."""
    teacher: str = setting("", "hub id or folder of a Llama, Mistral, Qwen2 or Qwen3; default: a small Llama, trained here first")
    data: str = setting("", "hub id, .txt/.jsonl/.parquet file, a folder of them or a saved dataset; default: the embedded corpus")
    text_column: str = setting("text", "the column of --data that holds the text (with --chat: the messages)")
    data_config: str = setting("", "the configuration of a hub dataset, e.g. sample-10BT")
    chat: bool = setting(False, "the column holds chat messages: render them with the tokenizer's chat template")
    softmax_layers: int = setting(None, "K, how many layers stay softmax [embedded: 1; teacher: a quarter of them]")
    select: str = setting("ga-s2", "ga-s2, greedy, published, uniform, centred, random, first, last, or a list such as 3,7,11")
    early_stop: int = setting(0, "end selection when the top-K set was the same at this many evaluations in a row (one every fifth of the steps); 0: never")
    candidates_at_once: int = setting(None, "selection candidates in memory at a time [all of them; with --teacher: 1, or all with --early-stop]")
    baselines: str = setting(None, "further rows of the report, comma-separated: all-linear, uniform, centred, random, first, last "
                                   "[embedded: all-linear,uniform,centred,random; teacher: none]")
    out: str = setting("runs/default", "the run folder; the same command goes on where a stopped run was")
    seed: int = setting(0, "of the teacher, the data order, the gates' initial values and the random baseline")
    device: str = setting("", "cuda, cpu, ... [cuda if there is one]")
    dtype: str = setting("", "bfloat16 or float32, of --teacher and of all matrix products [cuda: bfloat16; cpu: float32]")
    micro_batch: int = setting(None, "sequences per backward pass [the whole batch; with --teacher: 1]")
    checkpointing: bool = setting(None, "recompute activations in the backward pass [embedded: no; with --teacher: yes]")
    compile: bool = setting(False, "torch.compile the decoder layers while they train")
    trust_remote_code: bool = setting(False, "let code that comes with the tokenizer of --teacher run")
    save_seconds: float = setting(30.0, "save the state of the running stage this often")
    dry_run: bool = setting(False, "print the plan, the memory it needs and an estimate of its time, and stop")
    align_tokens: int = setting(None, "stage 1: tokens [embedded: 0.6M; 100M]")
    align_length: int = setting(None, "stage 1: tokens per sequence [128; 512]")
    align_batch: int = setting(None, "stage 1: sequences per step [32; 96]")
    align_lr: float = setting(None, "stage 1: peak learning rate [3e-3; 1e-3]")
    select_tokens: int = setting(None, "selection: tokens per candidate [0.08M; 200M]")
    select_length: int = setting(None, "selection: tokens per sequence [128; 4096]")
    select_batch: int = setting(None, "selection: sequences per step [32; 32]")
    select_lr: float = setting(None, "selection: learning rate of attention [1e-3; 1e-4]")
    select_rest_lr: float = setting(None, "selection: of the rest; 0 freezes it and shares it with the teacher [1e-4; 7e-6]")
    distill_tokens: int = setting(None, "stage 2: tokens [0.25M; 600M]")
    distill_length: int = setting(None, "stage 2: tokens per sequence [128; 4096]")
    distill_batch: int = setting(None, "stage 2: sequences per step [32; 32]")
    distill_lr: float = setting(None, "stage 2: learning rate of attention [1e-3; 1e-4]")
    distill_rest_lr: float = setting(None, "stage 2: of the rest; 0 freezes it (stage 3 trains it all the same) [1e-4; 7e-6]")
    finetune_tokens: int = setting(None, "stage 3: tokens [0.08M; 100M]")
    finetune_length: int = setting(None, "stage 3: tokens per sequence [256; 16384]")
    finetune_batch: int = setting(None, "stage 3: sequences per step [16; 8]")
    finetune_lr: float = setting(None, "stage 3: learning rate [1e-4; 1e-5]")
    held_out: int = setting(None, "sequences in each held-out part: validation (ranking) and test (report) [64; 64]")

    def steps(self, stage: str) -> int:
        return max(1, getattr(self, f"{stage}_tokens") // (getattr(self, f"{stage}_batch") * getattr(self, f"{stage}_length")))


EMBEDDED = dict(softmax_layers=1, baselines="all-linear,uniform,centred,random", checkpointing=False, held_out=64,
                align_tokens=150 * 32 * 128, align_length=128, align_batch=32, align_lr=3e-3,
                select_tokens=20 * 32 * 128, select_length=128, select_batch=32, select_lr=1e-3, select_rest_lr=1e-4,
                distill_tokens=60 * 32 * 128, distill_length=128, distill_batch=32, distill_lr=1e-3, distill_rest_lr=1e-4,
                finetune_tokens=20 * 16 * 256, finetune_length=256, finetune_batch=16, finetune_lr=1e-4)
PAPER = dict(baselines="", checkpointing=True, micro_batch=1, candidates_at_once=1, held_out=64,
             align_tokens=100_000_000, align_length=512, align_batch=96, align_lr=1e-3,
             select_tokens=200_000_000, select_length=4096, select_batch=32, select_lr=1e-4, select_rest_lr=7e-6,
             distill_tokens=600_000_000, distill_length=4096, distill_batch=32, distill_lr=1e-4, distill_rest_lr=7e-6,
             finetune_tokens=100_000_000, finetune_length=16384, finetune_batch=8, finetune_lr=1e-5)
BASELINES = ("all-linear", "uniform", "centred", "random", "first", "last")


# ------------------------------------------------------------------------------------------------ the run folder

@contextlib.contextmanager
def replacing(target: Path):
    """A path beside `target` to write to, renamed at the end: whoever reads finds the old file or the new one, never a half."""
    beside = target.with_name(target.name + ".new")
    yield beside
    os.replace(beside, target)


class Run:
    """A run folder: settings.json, metrics.jsonl, state/*.safetensors, and files that are written beside and renamed.

    A second process in the same folder, or the same folder with other settings, is refused.
    """
    # may differ when a run goes on; the last three change its numbers by rounding alone
    ONLY_THIS_TIME = ("out", "device", "save_seconds", "dry_run", "micro_batch", "checkpointing", "compile")

    def __init__(self, settings: Settings):
        self.path, self.settings, self.interrupted = Path(settings.out), settings, False
        (self.path / "state").mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "w")
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by another process; wait for it or give another --out") from None
        mine = {name: value for name, value in asdict(settings).items() if name not in self.ONLY_THIS_TIME}
        file = self.path / "settings.json"
        if file.exists():
            for name, theirs in json.loads(file.read_text()).items():
                if name not in self.ONLY_THIS_TIME and mine.get(name) != theirs:
                    raise UserError(f"{self.path} holds a run with --{name.replace('_', '-')} {theirs}, not {mine.get(name)}; "
                                    "give the same settings to go on with it, or another --out")
        else:
            self.write("settings.json", mine)
        self.rows = self._read_metrics()
        self.metrics = open(self.path / "metrics.jsonl", "a")

    def write(self, name: str, content) -> None:
        with replacing(self.path / name) as beside:
            beside.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")

    def read(self, name: str):
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    def _read_metrics(self) -> dict[str, list[dict]]:
        """The rows of metrics.jsonl by stage, up to the step that the stage's weights were saved at; the rest will be made again."""
        file, rows = self.path / "metrics.jsonl", {}
        for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
            if line.endswith("\n"):                                        # a kill can leave half a line at the end
                row = json.loads(line)
                if row["step"] <= self.saved_step(row["stage"]):
                    rows.setdefault(row["stage"], []).append(row)
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for of_stage in rows.values() for row in of_stage))
        return rows

    def state_file(self, stage: str) -> Path:
        return self.path / "state" / f"{stage}.safetensors"

    def saved_step(self, stage: str) -> int:
        file = self.state_file(stage)
        if not file.exists():
            return -1
        with safe_open(file, "pt") as state:
            return int(state.metadata()["step"])

    def close(self) -> None:
        """A run that ends before its first step leaves no claim behind: the next command may have other settings."""
        self.metrics.close()
        if not any(self.rows.values()) and not (self.path / "report.json").exists():
            for name in ("settings.json", "metrics.jsonl", "tokens.bin", "tokens.json"):
                (self.path / name).unlink(missing_ok=True)
        self.lock.close()

    def interrupt(self, *_) -> None:
        """Ctrl-C: stop after this step, saved. A second one stops at once."""
        if self.interrupted:
            raise KeyboardInterrupt("at once")
        self.interrupted = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def log(self, row: dict) -> None:
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()


class RunObserver(Observer):
    """Keeps one stage of a run: a row of metrics.jsonl and of the progress bar a step, its weights and optimizer every so often.

    keep_weights: whether the weights are still wanted when the stage is finished (a scored candidate's are not).
    """

    def __init__(self, run: Run, stage: str, steps: int, keep_weights: bool = True):
        self.run, self.stage, self.steps, self.keep_weights = run, stage, steps, keep_weights

    def resume(self, models, optimizer):
        if self.run.settings.compile:
            for block in (block for model in models for block in (model.model.layers if hasattr(model, "model") else model.children())):
                block.compile()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        history = self.run.rows.setdefault(self.stage, [])
        if history:
            self._load(models, optimizer)
        self.bar = tqdm(total=self.steps, initial=history[-1]["step"] if history else 0, desc=self.stage, unit="step",
                        disable=bool(history) and history[-1]["step"] >= self.steps)
        self.saved_at = self.last = time.monotonic()
        self.pause = self.run.settings.save_seconds
        return list(history)

    def step(self, row, models, optimizer):
        now = time.monotonic()
        row["stage"], row["seconds"], row["peak_bytes"] = self.stage, round(now - self.last, 4), peak_bytes(self.run.settings.device)
        self.last = now
        self.run.rows[self.stage].append(row)
        self.run.log(row)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}" if "loss" in row else "", refresh=False)
        self.bar.update(row["step"] - self.bar.n)
        if self.run.interrupted or now - self.saved_at > self.pause:
            self.save(models, optimizer, finished=False)
        if self.run.interrupted:
            raise KeyboardInterrupt

    def save(self, models, optimizer, finished):
        """One safetensors file: trained weights, optimizer and random state; its metadata names the step. Saving takes a tenth of the time at most."""
        start = time.monotonic()
        if finished:
            self.bar.close()
        rows = self.run.rows[self.stage]
        if not rows:
            return
        tensors = {}
        if not finished or self.keep_weights:
            tensors.update((f"model.{i}.{name}", p.detach()) for i, model in enumerate(models) for name, p in trained(model))
        if not finished:
            tensors.update((f"optimizer.{i}.{key}", torch.as_tensor(value)) for i, slots in optimizer.state_dict()["state"].items()
                           for key, value in slots.items())
            tensors["random"] = torch.get_rng_state()
        tensors = {name: t.contiguous().clone() if t._is_view() else t.contiguous() for name, t in tensors.items()}
        self.run.metrics.flush()
        os.fsync(self.run.metrics.fileno())
        with replacing(self.run.state_file(self.stage)) as beside:
            save_file(tensors, beside, metadata={"step": str(rows[-1]["step"])})
        self.saved_at = time.monotonic()
        self.pause = max(self.run.settings.save_seconds, 10 * (self.saved_at - start))

    def _load(self, models, optimizer):
        with safe_open(self.run.state_file(self.stage), "pt") as state:
            names = set(state.keys())
            if not any(name.startswith("model.") for name in names):       # finished, and its weights were not wanted
                return
            for i, model in enumerate(models):
                for name, p in trained(model):
                    p.data.copy_(state.get_tensor(f"model.{i}.{name}"))
            slots = {}
            for name in names:
                if name.startswith("optimizer."):
                    _, i, key = name.split(".", 2)
                    slots.setdefault(int(i), {})[key] = state.get_tensor(name)
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
            if "random" in names:
                torch.set_rng_state(state.get_tensor("random"))


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def peak_bytes(device: str) -> int:
    """The most memory held so far: of the GPU in this stage, or of this process since it started on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) if resource else 0


# ------------------------------------------------------------------------------------------------ data

def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no files: <pad> 0, <eos> 1, <unk> 2, and every byte b as token b + 3."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]      # the byte-level alphabet: these bytes stand for themselves,
    others = [b for b in range(256) if b not in printable]                 # the others for the characters from 256 on
    characters = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {character: b + 3 for b, character in characters.items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class EmbeddedCorpus:
    """Text that is on every machine, as bytes, and in-context recall. Every batch is a function of (seed, stage, step) alone.

    Text: the source of CPython's standard library and the English of pydoc_data.topics, split by file into train, validation, test.
    Recall: n distinct keys with random values, `k v k v ...`, then the keys again in random order, each followed by its value;
    only those answers can be known. Half of every batch is text, half is recall with as many pairs as the length holds.
    """
    KEYS, VALUES = range(68, 100), range(100, 116)               # token ids: 32 keys, 16 values, so chance is 6 %
    PARTS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}     # file number modulo 10

    def __init__(self, seed: int):
        self.seed, self.tokenizer = seed, byte_tokenizer()
        import pydoc_data.topics
        library = Path(os.__file__).parent
        documents = [file.read_bytes() for file in sorted([*library.glob("*.py"), *library.glob("*/*.py")])
                     if file.parts[len(library.parts)] not in ("site-packages", "dist-packages", "test", "pydoc_data", "idlelib", "lib2to3")]
        documents += [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
        self.text = {part: torch.frombuffer(bytearray(b"".join(d for i, d in enumerate(documents) if i % 10 in numbers)), dtype=torch.uint8)
                     for part, numbers in self.PARTS.items()}
        self.report = {"documents": len(documents), "tokens": sum(map(len, self.text.values())), "skipped": {}}

    def generator(self, *name) -> torch.Generator:
        digest = hashlib.sha256(json.dumps([self.seed, *name]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))          # the CPU generator reads 32 bits of a seed

    def batches(self, stage: str, batch: int, length: int):
        """A function step -> tokens [batch, length] of the train part."""
        def at(step):
            random = self.generator(stage, step)
            return torch.cat([self.sample_text("train", batch - batch // 2, length, random), self.sample_recall(batch // 2, length, random)])
        return at

    def held_out(self, part: str, count: int, length: int) -> dict[str, list]:
        """Fixed batches by kind: {"text": [[b, length], ...], "recall": [...]}, `count` sequences in all."""
        random, sizes = self.generator(part, length), [min(32, count // 2 - i) for i in range(0, count // 2, 32)]
        return {"text": [self.sample_text(part, n, length, random) for n in sizes],
                "recall": [self.sample_recall(n, length, random) for n in sizes]}

    def sample_text(self, part, n, length, random):
        text = self.text[part]
        starts = torch.randint(len(text) - length, (n, 1), generator=random)
        return text[starts + torch.arange(length)].long() + 3                         # token = byte + 3, see byte_tokenizer

    def sample_recall(self, n, length, random, pairs=None):
        """[n, length]; as many pairs as fit (at most one per key), and queries of them up to the length."""
        pairs = pairs or min(length // 4, len(self.KEYS))
        keys = torch.rand(n, len(self.KEYS), generator=random).argsort(1)[:, :pairs]
        values = torch.randint(len(self.VALUES), (n, pairs), generator=random)
        queries = (length + 1) // 2 - pairs
        asked = torch.cat([torch.rand(n, pairs, generator=random).argsort(1) for _ in range(-(-queries // pairs))], 1)[:, :queries]
        known = torch.stack([keys + self.KEYS[0], values + self.VALUES[0]], -1).flatten(1)
        return torch.cat([known, known.view(n, pairs, 2).gather(1, asked[..., None].expand(-1, -1, 2)).flatten(1)], 1)[:, :length]

    def recall_vocabulary(self):
        return torch.tensor(self.KEYS), torch.tensor(self.VALUES)

    def filler(self, part, n, length, random):
        return self.sample_text(part, n, length, random)


class Corpus:
    """`--data` as one stream of tokens, packed: documents in a shuffled, seeded order, each closed with EOS, cut into blocks.

    Of every 20 blocks the first is validation, the second is test, the rest train: no stage trains on what is held out. Tokens are
    made when they are first needed and kept in the run folder (tokens.bin, uint32), so that a run that goes on reads the same ones.
    Each stage reads on where the one before it ends; a corpus that ends is read again from its start.
    """

    def __init__(self, settings: Settings, tokenizer, folder: Path):
        self.settings, self.tokenizer, self.folder = settings, tokenizer, folder
        self.block = max(settings.align_length, settings.select_length, settings.distill_length, settings.finetune_length)
        self.file, self.meta_file = folder / "tokens.bin", folder / "tokens.json"
        self.meta = json.loads(self.meta_file.read_text()) if self.meta_file.exists() else {
            "tokens": 0, "documents": 0, "skipped": {"empty": 0, "not text": 0}, "ended": False}
        self.file.touch()
        os.truncate(self.file, 4 * self.meta["tokens"])                   # what a kill left behind the last saved count
        self.documents = None
        self.first = {"align": 0}                                          # where in the train part each stage starts to read
        for stage, following in (("align", "select"), ("select", "distill"), ("distill", "finetune")):
            self.first[following] = self.first[stage] + settings.steps(stage) * getattr(settings, f"{stage}_batch") * getattr(settings, f"{stage}_length")
        if settings.chat and not tokenizer.chat_template:
            raise UserError(f"--chat needs a tokenizer with a chat template, and that of {settings.teacher} has none")
        self._fill(3)
        if self._blocks() < 3:
            raise UserError(f"{settings.data} holds {self.meta['tokens']} tokens in {self.meta['documents']} documents; at least {3 * self.block} are "
                            f"needed, three blocks of the longest stage ({self.block}): give more text or shorter --*-length")

    @property
    def report(self):
        return self.meta

    def batches(self, stage: str, batch: int, length: int):
        """A function step -> tokens [batch, length] of the train part."""
        return lambda step: self._read("train", self.first[stage] + torch.arange(step * batch * length, (step + 1) * batch * length)).view(batch, length)

    def held_out(self, part: str, count: int, length: int) -> dict[str, list]:
        """{"text": [[1, length], ...]}: at most `count` sequences, fewer when the corpus is small."""
        self._fill(20 * -(-count * length // self.block))
        count = min(count, self._blocks(part) * self.block // length)
        if count == 0:
            raise UserError(f"the {part} part of {self.settings.data} is shorter than one sequence of {length} tokens; give more text or a shorter length")
        return {"text": list(self._read(part, torch.arange(count * length)).view(count, 1, length))}

    def filler(self, part, n, length, random):
        """[n, length] of the part, each row from a random place on, whose range does not depend on how much has been read."""
        starts = torch.randint(self.settings.held_out * self.settings.distill_length, (n, 1), generator=random)
        return self._read(part, starts + torch.arange(length))

    def _read(self, part, positions):
        """The tokens at `positions` of the part's own stream, which is its blocks one behind the other."""
        number = {"train": lambda j: j // 18 * 20 + 2 + j % 18, "validation": lambda j: 20 * j, "test": lambda j: 20 * j + 1}[part]
        block = positions // self.block
        self._fill(int(number(block.max())) + 1)
        block = block % self._blocks(part) if self.meta["ended"] else block          # the corpus has ended: again from its start
        stream = np.memmap(self.file, np.uint32, "r")
        return torch.from_numpy(stream[(number(block) * self.block + positions % self.block).numpy()].astype(np.int64))

    def _blocks(self, part: str = "") -> int:
        n = self.meta["tokens"] // self.block
        held = {"validation": -(-n // 20), "test": -(-(n - 1) // 20)}
        return {**held, "train": n - sum(held.values()), "": n}[part]

    def _fill(self, blocks: int) -> None:
        """Tokenise further documents until there are `blocks` blocks, or no more documents."""
        if self._blocks() >= blocks or self.meta["ended"]:
            return
        if self.documents is None:
            self.documents = iter(load_documents(self.settings).skip(self.meta["documents"]))
        eos = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        with tqdm(total=blocks * self.block, initial=self.meta["tokens"], desc="tokenise", unit="token", unit_scale=True) as bar:
            while self._blocks() < blocks and not self.meta["ended"]:
                rows = list(islice(self.documents, 256))
                texts = [text for text in (self._text(row) for row in rows) if text]
                tokens = [t for ids in (self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []) for t in ids + eos]
                with open(self.file, "ab") as file:
                    np.array(tokens, np.uint32).tofile(file)
                self.meta.update(tokens=self.meta["tokens"] + len(tokens), documents=self.meta["documents"] + len(rows), ended=not rows)
                with replacing(self.meta_file) as beside:
                    beside.write_text(json.dumps(self.meta))
                bar.update(len(tokens))

    def _text(self, row):
        column = self.settings.text_column
        if column not in row:
            raise UserError(f"{self.settings.data} has no column {column!r}; its columns are {', '.join(row)}: name one with --text-column")
        value = row[column]
        if not value or isinstance(value, str) and not value.strip():
            self.meta["skipped"]["empty"] += 1
        elif self.settings.chat and isinstance(value, list):
            return self.tokenizer.apply_chat_template(value, tokenize=False)
        elif isinstance(value, str):
            return value
        else:
            self.meta["skipped"]["not text"] += 1

    def recall_vocabulary(self):
        """Two disjoint sets of common lower-case words that are one token each, as ids: keys and values."""
        words = [i for i in range(len(self.tokenizer)) if re.fullmatch(r" ?[a-z]{3,}", self.tokenizer.decode([i]))][:2048]
        if len(words) < 128:
            words = sorted(set(range(len(self.tokenizer))) - set(self.tokenizer.all_special_ids))[:2048]
        return torch.tensor(words[0::2]), torch.tensor(words[1::2])


def load_documents(settings: Settings):
    """A streamed, shuffled (seeded) dataset of the rows of --data, through `datasets`."""
    try:
        import datasets
    except ImportError:
        raise UserError("--data needs the package datasets: pip install datasets") from None
    path, kinds = Path(settings.data), {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    try:
        if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, datasets.DatasetDict):
                if "train" not in rows:
                    raise UserError(f"{path} holds the splits {', '.join(rows)}; one called train is needed")
                rows = rows["train"]
            rows = rows.to_iterable_dataset()
        elif path.exists():
            files = sorted(file for file in path.rglob("*") if file.suffix in kinds) if path.is_dir() else [path]
            found = {kinds.get(file.suffix) for file in files}
            if len(found) != 1 or None in found:
                raise UserError(f"{path} must be or hold .txt, .jsonl or .parquet files, all of one kind; found "
                                f"{', '.join(sorted({file.suffix or file.name for file in files})) or 'none of them'}")
            kind = found.pop()
            rows = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True,
                                         **({"sample_by": "paragraph"} if kind == "text" else {}))
        else:
            rows = datasets.load_dataset(settings.data, settings.data_config or None, split="train", streaming=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load --data {settings.data}, which must be a local file or folder or the id of a dataset on the hub "
                        f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})") from error
    return rows.shuffle(seed=settings.seed, buffer_size=10_000)


# ------------------------------------------------------------------------------------------------ evaluation

@torch.no_grad()
def evaluate(model, held_out: dict[str, list], teacher=None) -> dict:
    """KL(teacher || model) and perplexity on held-out batches {kind: [tokens [B, T], ...]}; perplexity is of the kind "text".

    Returns {"kl", "kl_<kind>" of each kind, "perplexity"}; without a teacher, the perplexity alone.
    """
    model.eval()
    result, every = {}, [tokens for of_kind in held_out.values() for tokens in of_kind]
    if teacher is not None:
        result["kl"] = held_out_kl({"": model}, teacher, every)[""]
        result.update({f"kl_{kind}": held_out_kl({"": model}, teacher, of_kind)[""] for kind, of_kind in held_out.items()})
    loss, predicted = 0.0, 0
    for tokens in held_out["text"]:
        tokens = tokens.to(model.device)
        labels = tokens[:, 1:]
        with autocast(model):
            loss += float(cross_entropy_loss(last_hidden(model, tokens)[:, :-1], model.lm_head, labels)) * labels.numel()
        predicted += labels.numel()
    return {**result, "perplexity": math.exp(loss / predicted)}


def recall_prompts(keys, values, pairs: int, count: int, random, filler=None):
    """Prompts `k v k v ... q` whose answer is the value of q: (tokens [count, P], answers [count]).

    keys, values: token ids to draw from; in one prompt the keys are distinct. P = 2 pairs + 1, or, with filler [count, F], F + that:
    then the pairs stand at random places between the filler's tokens, in order, and q at the end. pairs = 1 is the needle. Keys that
    the filler holds too, where another token may follow them, are taken only when there are not enough others.
    """
    order = torch.rand(count, len(keys), generator=random)
    if filler is not None:
        order += torch.stack([torch.isin(keys, row) for row in filler])
    k = keys[order.argsort(1)[:, :pairs]]
    v = values[torch.randint(len(values), (count, pairs), generator=random)]
    asked = torch.randint(pairs, (count, 1), generator=random)
    tokens = torch.stack([k, v], -1).flatten(1)
    if filler is not None:
        places = torch.randint(filler.shape[1] + 1, (count, pairs), generator=random).sort(1).values
        order = torch.cat([torch.arange(filler.shape[1]).expand_as(filler) + 0.5, places.repeat_interleave(2, 1).double()], 1).argsort(dim=1, stable=True)
        tokens = torch.cat([filler, tokens], 1).gather(1, order)
    return torch.cat([tokens, k.gather(1, asked)], 1), v.gather(1, asked).squeeze(1)


@torch.no_grad()
def recall_accuracy(model, prompts, answers, batch: int = 64) -> float:
    """The share of prompts that the model, generating greedily, goes on with the right value."""
    right = 0
    for tokens, answer in zip(prompts.split(batch), answers.split(batch)):
        tokens = tokens.to(model.device)
        with autocast(model):
            written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, do_sample=False, num_beams=1,
                                     repetition_penalty=1.0, pad_token_id=0)       # whatever the teacher's generation_config says
        right += int((written[:, -1].cpu() == answer).sum())
    return right / len(prompts)


@torch.no_grad()
def cache_bytes(model, length: int) -> int:
    """Bytes of the cache of one sequence of `length` tokens, measured: keys and values grow with it, recurrent states do not."""
    return sum(t.numel() * t.element_size() for layer in prefill(model, length).layers
               for t in ([layer.S] if isinstance(layer, RecurrentState) else [layer.keys, layer.values]))


def prefill(model, length: int, piece: int = 4096):
    """A cache that holds `length` tokens, fed in pieces."""
    cache = DynamicCache(config=model.config)
    for start in range(0, length, piece):
        tokens = torch.ones(1, min(piece, length - start), dtype=torch.long, device=model.device)
        with autocast(model):
            model.model(input_ids=tokens, use_cache=True, **{CACHE: cache})
    return cache


@torch.no_grad()
def decode_seconds(model, length: int, tokens: int = 8) -> float:
    """Median seconds for one token, batch 1, behind a context of `length` tokens."""
    cache, times = prefill(model, length), []
    for _ in range(tokens + 2):
        start = time.perf_counter()
        with autocast(model):
            model(torch.ones(1, 1, dtype=torch.long, device=model.device), use_cache=True, **{CACHE: cache})
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


# ------------------------------------------------------------------------------------------------ the teacher

EMBEDDED_LAYERS = 6


def embedded_teacher(corpus: EmbeddedCorpus, run: Run):
    """A small Llama, trained on the embedded corpus until it recalls 32 pairs; `teacher/` in the run folder, about a minute.

    What makes recall appear so fast: Muon on the layers' matrices; a curriculum of 4, 8, 16, 32 pairs, each in a sequence as short as
    its pairs allow and left when its loss is low; and query and key biases with which the first head of *every* layer starts out
    looking at the token before (all layers alike, so none is marked as the one that recall will need).
    """
    folder = run.path / "teacher"
    if folder.exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(run.settings.device).eval()
    torch.manual_seed(run.settings.seed)
    teacher = LlamaForCausalLM(LlamaConfig(
        vocab_size=384, hidden_size=64,                                    # 259 bytes and marks, rounded up
        intermediate_size=128, num_hidden_layers=EMBEDDED_LAYERS, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, attention_bias=True, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0})).to(run.settings.device)
    with torch.no_grad():
        for layer in teacher.model.layers:
            look_back(layer.self_attn, teacher.model.rotary_emb.inv_freq)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

    lesson = Lesson()
    matrices = [p for name, p in teacher.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in teacher.named_parameters() if not (p.ndim == 2 and ".layers." in name)]

    def batches(step):
        length, random = max(16, 4 * lesson.pairs), corpus.generator("teacher", step)
        n = 16 * max(1, 64 // length)
        return torch.cat([corpus.sample_text("train", n, length, random), corpus.sample_recall(n, length, random, lesson.pairs)])

    def losses(tokens):
        text, recall = tokens.chunk(2)
        answers = torch.zeros_like(recall[:, 1:])
        answers[:, 2 * lesson.pairs::2] = 1                                # where the next token is the value of a queried key
        yield "text", cross_entropy_loss(last_hidden(teacher, text)[:, :-1], teacher.lm_head, text[:, 1:]), 1.0
        hidden = last_hidden(teacher, recall)[:, :-1]
        yield "recall", cross_entropy_loss(hidden.detach(), teacher.lm_head.weight.detach(), recall[:, 1:], answers), 1.0
        yield "recall rows", cross_entropy_loss(hidden, teacher.lm_head, recall[:, 1:], 0.1 + 0.9 * answers), 1.0

    class Teaching(RunObserver):
        def resume(self, models, optimizer):
            history = super().resume(models, optimizer)
            for row in history:
                lesson.learn(row["recall"])
            return history

        def step(self, row, models, optimizer):
            lesson.learn(row["recall"])
            super().step(row, models, optimizer)

    train([teacher], [[{"params": matrices, "lr": 0.02, "weight_decay": 0.01, "muon": True},
                       {"params": others, "lr": 0.01, "weight_decay": 0.0, "muon": False}]],
          losses, batches, TEACHER_STEPS, schedule=lambda step, steps: min(1, (step + 1) / 20, (steps - step) / (0.4 * steps)),
          make_optimizer=MuonAdamW, observer=Teaching(run, "teacher", TEACHER_STEPS))
    with replacing(folder) as beside:
        teacher.save_pretrained(beside)
        corpus.tokenizer.save_pretrained(beside)
    drop_weights(run, "teacher")
    return teacher


TEACHER_STEPS = 220


class Lesson:
    """How many pairs the teacher is taught now: twice as many each time the running mean of the recall loss falls below 0.5 nats."""

    def __init__(self):
        self.pairs, self.loss = 4, 5.0

    def learn(self, loss: float) -> None:
        self.loss = 0.8 * self.loss + 0.2 * loss
        if self.loss < 0.5 and self.pairs < 32:
            self.pairs, self.loss = 2 * self.pairs, 2.0


def look_back(attn, inv_freq, sharpness: float = 20.0) -> None:
    """Biases that let the first head of `attn` start out attending to the token before.

    RoPE turns a constant query and key into a score that depends on the distance alone, sum_f c cos((distance - 1) f), when the
    query's bias is the key's turned back by one position: its maximum is at distance 1.
    """
    Dh = attn.head_dim
    w = torch.full((Dh // 2,), math.sqrt(sharpness * math.sqrt(Dh) / (Dh // 2)), device=inv_freq.device)
    attn.k_proj.bias[:Dh] = torch.cat([w, 0 * w])
    attn.q_proj.bias[:Dh] = torch.cat([w * inv_freq.cos(), -w * inv_freq.sin()])


class MuonAdamW:
    """Muon for the groups marked "muon", AdamW for the others, behind the face of one optimizer."""

    def __init__(self, groups):
        split = {kind: [{k: v for k, v in group.items() if k != "muon"} for group in groups if group["muon"] is kind] for kind in (True, False)}
        self.parts = [torch.optim.Muon(split[True], momentum=0.95), torch.optim.AdamW(split[False], betas=(0.9, 0.95))]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        first, second = (part.state_dict()["state"] for part in self.parts)
        offset = sum(len(group["params"]) for group in self.parts[0].param_groups)
        return {"state": {**first, **{i + offset: slots for i, slots in second.items()}}, "param_groups": self.param_groups}

    def load_state_dict(self, state):
        offset = sum(len(group["params"]) for group in self.parts[0].param_groups)
        for part, mine in zip(self.parts, ({i: s for i, s in state["state"].items() if i < offset},
                                           {i - offset: s for i, s in state["state"].items() if i >= offset})):
            part.load_state_dict({"state": mine, "param_groups": part.state_dict()["param_groups"]})


def load_teacher(settings: Settings):
    """(teacher, tokenizer) from a hub id or a folder, in settings.dtype on settings.device; UserError says what is wrong."""
    name, code = settings.teacher, settings.trust_remote_code
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=code)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load --teacher {name}, which must be a model folder or the id of a model on the hub: "
                        f"{str(error).strip().splitlines()[0]}") from error
    supported = {cls.config_class.model_type: cls.__name__ for cls in HYBRIDS}
    if config.model_type not in supported:
        raise UserError(f"--teacher {name} is a {config.model_type!r} model; supported are {', '.join(supported.values())}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--teacher {name} has no tokenizer that transformers can load; its folder must hold the tokenizer's files too") from error
    try:
        teacher, info = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, settings.dtype), trust_remote_code=code,
                                                             output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the weights of --teacher {name} do not load: {str(error).strip().splitlines()[0]}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UserError(f"--teacher {name} lacks {len(wrong)} of its weights or has them in another shape, {wrong[0]} for one; "
                        "a complete checkpoint is needed")
    return teacher.to(settings.device).eval(), tokenizer


# ------------------------------------------------------------------------------------------------ the pipeline

def run_pipeline(settings: Settings, run: Run, teacher, tokenizer, corpus) -> dict:
    """All stages and the rows of the report; whatever the run folder already holds is not done again. Returns the report."""
    L = len(teacher.model.layers)
    report = run.read("report.json") or {"complete": False, "teacher": settings.teacher or "embedded", "layers": L,
                                         "machine": machine(settings.device), "rows": [], "stages": []}
    if report["complete"]:
        return report

    torch.manual_seed(settings.seed)
    student = transfer_attention(teacher, [], share_rest=True)
    if settings.checkpointing:
        recompute_activations(student)

    def observer(stage, steps, **how):
        return RunObserver(run, stage, steps, **how)

    def batches(stage):
        return corpus.batches(stage, getattr(settings, f"{stage}_batch"), getattr(settings, f"{stage}_length"))

    steps, micro = settings.steps, settings.micro_batch
    align_hidden_states(student, teacher, batches("align"), steps("align"), settings.align_lr, settings.align_lr / 100,
                        min(50, steps("align") // 10), micro, observer("align", steps("align")))

    selection = choose_layers(settings, run, corpus, student, teacher, batches, observer)
    chosen = sorted(selection["chosen"])
    plan = {"all-linear": [], selection["name"]: chosen}
    for name in filter(None, settings.baselines.split(",")):
        plan[name] = [] if name == "all-linear" else place_layers(name, L, len(chosen), settings.seed)
    if "all-linear" not in settings.baselines:
        del plan["all-linear"]

    done = {row["name"]: row for row in report["rows"]}
    test = corpus.held_out("test", settings.held_out, settings.distill_length)

    def add(row):
        report["rows"] = [*report["rows"], row]
        report["stages"] = stage_summaries(run)
        run.write("report.json", report)

    if "teacher" not in done:
        add({"name": "teacher", "softmax_layers": list(range(L)), **measure(teacher, teacher, corpus, test, settings)})
    for name, layers in plan.items():
        if name in done:
            continue
        same = next((row for row in report["rows"][1:] if sorted(row["softmax_layers"]) == sorted(layers)), None)
        if same:
            add({**same, "name": name, "same_as": same["name"]})
            continue
        hybrid = restore_attention(student, teacher, layers, share_rest=True)
        label = "-".join(map(str, sorted(layers))) or "none"
        distill_logits(hybrid, teacher, batches("distill"), steps("distill"), settings.distill_lr, settings.distill_rest_lr, micro,
                       observer(f"distill-{label}", steps("distill")))
        kl_distill = evaluate(hybrid, test, teacher)["kl"]
        unshare(hybrid, teacher)                                         # stage 3 trains everything, also what stage 2 left frozen and shared
        finetune(hybrid, batches("finetune"), steps("finetune"), settings.finetune_lr, micro,
                 observer(f"finetune-{label}", steps("finetune")))
        row = {"name": name, "softmax_layers": sorted(layers), "kl_before_finetune": kl_distill, **measure(hybrid, teacher, corpus, test, settings)}
        if sorted(layers) == chosen:
            save_student(hybrid, tokenizer, run.path / "student", teacher)
        add(row)
        for stage in (f"distill-{label}", f"finetune-{label}"):
            drop_weights(run, stage)

    report["selection"] = selection
    report["data"] = corpus.report
    report["complete"] = True
    report["stages"] = stage_summaries(run)
    run.write("report.md", report_markdown(report))
    (run.path / "student" / "README.md").write_text(model_card(report, settings))
    run.write("report.json", report)
    return report


def recompute_activations(model) -> None:
    """Gradient checkpointing of every decoder layer while it trains (renamed within transformers 5)."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def choose_layers(settings, run, corpus, student, teacher, batches, observer) -> dict:
    """What goes into selection.json: {"name", "chosen", "ranking", ...}; scored by KL, or placed by a rule, as --select says."""
    L, k = len(teacher.model.layers), settings.softmax_layers
    if settings.select not in ("ga-s2", "greedy"):
        given = re.fullmatch(r"\d+(,\d+)*", settings.select)
        layers = [int(i) for i in settings.select.split(",")] if given else place_layers(settings.select, L, k, settings.seed, settings.teacher)
        selection = {"name": "given" if given else settings.select, "chosen": layers}
    else:
        validation = corpus.held_out("validation", settings.held_out, settings.select_length)
        steps = settings.steps("select")
        found = select_layers(student, teacher, batches("select"), [tokens for of_kind in validation.values() for tokens in of_kind], k, steps,
                              settings.select, settings.select_lr, settings.select_rest_lr, early_stop=settings.early_stop,
                              at_once=settings.candidates_at_once, micro_batch=settings.micro_batch,
                              observe=lambda name: observer(name, steps, keep_weights=False))
        selection = {"name": "kl-guided", "strategy": settings.select, "chosen": found.chosen, "ranking": found.ranking,
                     "importance": found.importance, "steps": steps, "rounds": [round_summary(r, steps) for r in found.rounds]}
    run.write("selection.json", selection)
    return selection


def round_summary(scored: dict, steps: int) -> dict:
    """One scoring round, and when its top-k set settled: the step since which it never changed, and what early stopping saved or would have."""
    curves, k = scored["curves"], scored["k"]
    sets = [(step, layers) for step, layers in top_sets(curves, k) if step > 0]
    last_step, final = sets[-1]
    changed = [step for step, layers in sets if layers != final]
    summary = {**scored, "settled_at_step": min(step for step, _ in sets if step > max(changed, default=0)), "stopped_at_step": last_step,
               "saved": round(1 - last_step / steps, 4)}
    if last_step == steps:                       # ran to the end, so what an early stop would have picked can be compared
        for evaluations in (2, 3):
            for n in range(evaluations, len(sets)):
                if len({layers for _, layers in sets[n - evaluations:n]}) == 1:
                    step, layers = sets[n - 1]
                    summary[f"early_stop_{evaluations}"] = {"step": step, "saved": round(1 - step / steps, 4), "same_set": layers == final}
                    break
    return summary


def measure(model, teacher, corpus, test, settings) -> dict:
    """One row of the report; the teacher goes through the same code as its students."""
    keys, values = corpus.recall_vocabulary()
    pairs = min(32, settings.distill_length // 4, len(keys))
    random = torch.Generator().manual_seed(settings.seed)
    row = evaluate(model, test, teacher)
    row["recall"] = recall_accuracy(model, *recall_prompts(keys, values, pairs, 256, random))
    row["recall_by_length"] = []
    for length in (settings.distill_length, 2 * settings.distill_length, 4 * settings.distill_length):
        filler = corpus.filler("test", 32, length, random)
        row["recall_by_length"].append({"length": length, **{
            kind: recall_accuracy(model, *recall_prompts(keys, values, n, 32, random, filler), batch=8) for kind, n in (("needle", 1), ("multi_key", 8))}})
    row["cache_length"], saved = settings.finetune_length, as_saved(model, teacher)
    row["cache_bytes"] = cache_bytes(saved, settings.finetune_length)
    row["decode_ms"] = {str(n): round(1000 * decode_seconds(saved, n), 3) for n in (settings.distill_length, 4 * settings.finetune_length)}
    return row


def as_saved(model, teacher):
    """A copy in the teacher's dtype, gates in fp32: what a user of the checkpoint will run, and so what is timed."""
    model = copy.deepcopy(model).eval()
    for name, p in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            p.data = p.data.to(teacher.dtype)
    return model


def save_student(model, tokenizer, folder: Path, teacher) -> None:
    """A Hugging Face checkpoint that carries its own code: weights in the teacher's dtype, gates in fp32, tokenizer, kernels.py."""
    model = as_saved(model, teacher)
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def drop_weights(run: Run, stage: str) -> None:
    """A finished stage whose weights nobody needs any more keeps its rows and its step."""
    file = run.state_file(stage)
    with safe_open(file, "pt") as state:
        metadata = state.metadata()
    with replacing(file) as beside:
        save_file({}, beside, metadata=metadata)


def stage_summaries(run: Run) -> list[dict]:
    """Tokens, seconds, speed, memory and the first and the last loss of every stage, from its rows."""
    summaries = []
    for stage, rows in run.rows.items():
        rows = [row for row in rows if "loss" in row]
        if rows:
            tokens = sum(row["tokens"] for row in rows)
            seconds = sum(row["seconds"] for row in rows)
            summaries.append({"stage": stage, "steps": rows[-1]["step"], "tokens": tokens, "seconds": round(seconds, 1),
                              "tokens_per_second": round(tokens / seconds), "peak_bytes": max(row["peak_bytes"] for row in rows),
                              "loss_start": rows[0]["loss"], "loss_end": rows[-1]["loss"]})
    return summaries


def machine(device: str) -> str:
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    return f"{gpu}; torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def rows_table(report: dict) -> str:
    decode = list(report["rows"][0]["decode_ms"])
    return table(["model", "softmax layers", "KL (nats)", "perplexity", "recall", f"cache bytes at {report['rows'][0]['cache_length']} tokens",
                  *(f"ms/token at {n}" for n in decode)],
                 [[row["name"], f"{len(row['softmax_layers'])}: {' '.join(map(str, row['softmax_layers'])) or '-'}", f"{row['kl']:.4f}",
                   f"{row['perplexity']:.2f}", f"{100 * row['recall']:.1f} %", f"{row['cache_bytes']:,}", *(f"{row['decode_ms'][n]:.2f}" for n in decode)]
                  for row in report["rows"]])


def report_markdown(report: dict) -> str:
    selection = report["selection"]
    parts = [f"# {report['teacher']}: {len(selection['chosen'])} of {report['layers']} layers stay softmax\n", rows_table(report),
             "KL and perplexity: held-out test part, after all stages. Recall: the model writes the value of a key, greedily. "
             f"Every row but the teacher had the same stages 2 and 3. {report['machine']}.\n", "## Stages\n",
             table(["stage", "steps", "tokens", "seconds", "tokens/s", "peak memory", "first loss", "last loss"],
                   [[s["stage"], s["steps"], f"{s['tokens']:,}", s["seconds"], f"{s['tokens_per_second']:,}", f"{s['peak_bytes'] / 2 ** 20:,.0f} MiB",
                     f"{s['loss_start']:.4f}", f"{s['loss_end']:.4f}"] for s in report["stages"]])]
    if "rounds" in selection:
        parts += ["## Selection\n", f"Strategy {selection['strategy']}; best first: {selection['ranking']}; kept: {selection['chosen']}.\n"]
        for r in selection["rounds"]:
            parts.append(table(["layer", *(f"step {step}" for step, _ in next(iter(r["curves"].values())))],
                               [[i, *(f"{kl:.4f}" for _, kl in curve)] for i, curve in sorted(r["curves"].items(), key=lambda item: item[1][-1][1])]))
            parts.append(f"Held-out KL of each candidate with {r['kept'] or 'no other layer'} kept. The top-{r['k']} set has been the final one since step "
                         f"{r['settled_at_step']}. " + (f"Stopped early at step {r['stopped_at_step']}, which saved {100 * r['saved']:.0f} % of the tokens; whether a "
                         "full run would have ended with this set is not known." if r["saved"] > 0 else " ".join(
                             f"With --early-stop {n} it would have stopped at step {r[f'early_stop_{n}']['step']}, saving {100 * r[f'early_stop_{n}']['saved']:.0f} %, with "
                             f"{'the same' if r[f'early_stop_{n}']['same_set'] else 'another'} set." for n in (2, 3) if f"early_stop_{n}" in r)) + "\n")
    lengths = [entry["length"] for entry in report["rows"][0]["recall_by_length"]]
    parts += ["## Recall against length\n", "A needle (one pair) or 8 pairs, hidden in held-out text.\n",
              table(["model", *(f"{kind} at {n}" for kind in ("needle", "multi-key") for n in lengths)],
                    [[row["name"], *(f"{100 * entry[kind]:.0f} %" for kind in ("needle", "multi_key") for entry in row["recall_by_length"])] for row in report["rows"]]),
              f"Data: {report['data']['documents']:,} documents, {report['data']['tokens']:,} tokens read; skipped: {report['data']['skipped'] or 'none'}.\n"]
    return "\n".join(parts)


def model_card(report: dict, settings: Settings) -> str:
    name = settings.teacher.rstrip("/") or "a small Llama trained on the embedded corpus"
    base = f"base_model: {name}\n" if settings.teacher and not Path(name).exists() else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {teacher_licence(settings)}
{base}tags: [hybrid, linear-attention, gated-deltanet, distillation]
---
# Hybrid of {Path(name).name if settings.teacher else name}

Softmax attention in layers {report['selection']['chosen']}, Gated DeltaNet in the other {report['layers'] - len(report['selection']['chosen'])}, distilled with
KL-guided layer selection (arXiv 2512.20569). Licence: the teacher's.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)     # the code is hybrid_distill.py and kernels.py, beside the weights

{rows_table(report)}
{report['machine']}
"""


def teacher_licence(settings: Settings) -> str:
    """The licence in the teacher's model card; "unknown" when it names none."""
    if not settings.teacher:
        return "mit"
    try:
        file = Path(settings.teacher) / "README.md"
        card = huggingface_hub.ModelCard.load(str(file) if Path(settings.teacher).exists() else settings.teacher)
        return card.data.license or "unknown"
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
        return "unknown"


def dry_run(settings: Settings, teacher, corpus) -> str:
    """The plan of a run: layers, trained parameters, tokens, steps, memory for weights and optimizer, and time from a probe of each stage."""
    student = transfer_attention(teacher, [], share_rest=True)
    if settings.checkpointing:
        recompute_activations(student)
    count = lambda model: sum(p.numel() for p in model.parameters())
    L, all_parameters, mixer_parameters = len(teacher.model.layers), count(student), sum(count(mixer) for mixer in mixers(student).values())
    teacher_bytes = sum(p.numel() * p.element_size() for p in teacher.parameters())
    rows = 1 + len([name for name in settings.baselines.split(",") if name])
    rounds = {"ga-s2": 1, "greedy": settings.softmax_layers}.get(settings.select, 0)
    candidates = sum(L - r for r in range(rounds))
    trains = {"align": mixer_parameters, "select": all_parameters if settings.select_rest_lr else mixer_parameters,
              "distill": all_parameters if settings.distill_rest_lr else mixer_parameters, "finetune": all_parameters}
    lines = []
    for stage, times in (("align", 1), ("select", candidates), ("distill", rows), ("finetune", rows)):
        if times == 0:
            continue
        length, batch, steps = getattr(settings, f"{stage}_length"), getattr(settings, f"{stage}_batch"), settings.steps(stage)
        micro, lr = min(settings.micro_batch or batch, batch), getattr(settings, f"{stage}_lr")
        probed = length if settings.device.startswith("cuda") else min(length, 256)       # a CPU would take minutes over a long sequence
        tokens, clock = corpus.batches(stage, micro, length)(0)[:, :probed], []

        class Stopwatch(Observer):
            def step(self, row, models, optimizer):
                clock.append(time.monotonic())

        probe = student if stage == "align" else restore_attention(student, teacher, [], share_rest=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if stage == "align":
            align_hidden_states(probe, teacher, [tokens] * 3, 3, lr, observer=Stopwatch())
        elif stage == "finetune":
            unshare(probe, teacher)
            finetune(probe, [tokens] * 3, 3, lr, observer=Stopwatch())
        else:
            distill_logits(probe, teacher, [tokens] * 3, 3, lr, getattr(settings, f"{stage}_rest_lr"), observer=Stopwatch())
        hours = (clock[2] - clock[1]) * length / probed * batch / micro * steps * times / 3600
        at_once = min(settings.candidates_at_once or L, L) if stage == "select" else 1
        memory = teacher_bytes + 16 * trains[stage] * at_once              # fp32 weight, gradient and two Adam moments: 16 bytes a parameter
        peak = f", peak of the probe {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if torch.cuda.is_available() else ""
        lines.append([stage, times, f"{trains[stage] / 1e6:,.1f} M", f"{length} x {batch} ({micro} at once)", f"{steps:,}", f"{steps * batch * length * times:,}",
                      f"{memory / 2 ** 30:.2f} GiB{peak}", f"{hours:.2f} h" if hours > 0.1 else f"{3600 * hours:.0f} s"])
    return (f"{settings.teacher or 'embedded teacher'}: {L} layers, {count(teacher) / 1e6:,.1f} M parameters; {settings.softmax_layers} layers stay softmax "
            f"({settings.select}); {rows} trained rows in the report; {machine(settings.device)}\n\n"
            + table(["stage", "times", "trains", "length x batch", "steps", "tokens in all", "memory for weights and optimizer", "time"], lines)
            + "\nTime is that of one probed step of each stage, on a CPU of 256 tokens a sequence, scaled up; activations come on top of the memory unless a peak is shown.")


# ------------------------------------------------------------------------------------------------ the command line

def parse(argv=None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Settings):
        kind = {"str": str, "int": int, "float": float, "bool": argparse.BooleanOptionalAction}[f.type]
        name = "--" + f.name.replace("_", "-")
        if kind is argparse.BooleanOptionalAction:
            parser.add_argument(name, action=kind, default=f.default, help=f.metadata["doc"])
        else:
            parser.add_argument(name, type=kind, default=f.default, help=f.metadata["doc"])
    return Settings(**vars(parser.parse_args(argv)))


def resolve(settings: Settings, L: int | None = None) -> Settings:
    """Fill in what was left open, and refuse what cannot work. L: layers of the teacher, once it is known."""
    s = copy.copy(settings)
    if bool(s.teacher) != bool(s.data):
        raise UserError("--teacher and --data go together: a teacher's tokenizer needs text, and the embedded teacher reads only its own corpus")
    defaults = Settings()
    for name in () if s.teacher else ("text_column", "data_config", "chat", "trust_remote_code"):
        if getattr(s, name) != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} is for --teacher and --data; leave it out for the embedded teacher and corpus")
    if s.data_config and Path(s.data).exists():
        raise UserError(f"--data-config names a configuration of a hub dataset, and --data {s.data} is a local path: leave it out")
    for name, value in (PAPER if s.teacher else EMBEDDED).items():
        if getattr(s, name) is None and not (name == "candidates_at_once" and s.early_stop):      # early stopping compares all of them
            setattr(s, name, value)
    s.device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    s.dtype = s.dtype or ("bfloat16" if s.device.startswith("cuda") and s.teacher else "float32")
    if s.dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype must be bfloat16 or float32, not {s.dtype}")
    if s.dtype == "bfloat16" and not s.teacher:
        raise UserError("--dtype bfloat16 is for --teacher; the embedded teacher is trained in float32")
    unknown = [name for name in filter(None, s.baselines.split(",")) if name not in BASELINES]
    if unknown:
        raise UserError(f"--baselines knows {', '.join(BASELINES)}, not {unknown[0]!r}")
    if re.fullmatch(r"\d+(,\d+)*", s.select):
        s.softmax_layers = len(s.select.split(","))
        if settings.softmax_layers not in (None, s.softmax_layers):
            raise UserError(f"--select {s.select} names {s.softmax_layers} layers: leave out --softmax-layers {settings.softmax_layers}, or name as many")
    elif s.select not in ("ga-s2", "greedy", "published", *BASELINES[1:]):
        raise UserError(f"--select must be ga-s2, greedy, published, {', '.join(BASELINES[1:])} or a list of layers such as 3,7,11, not {s.select!r}")
    for name in ("tokens", "length", "batch"):
        for stage in ("align", "select", "distill", "finetune"):
            if getattr(s, f"{stage}_{name}") < 1:
                raise UserError(f"--{stage}-{name} must be at least 1, not {getattr(s, f'{stage}_{name}')}")
            if name == "length" and not s.teacher and getattr(s, f"{stage}_length") < 8:
                raise UserError(f"--{stage}-length must be at least 8, two pairs and their queries in the embedded corpus, not {getattr(s, f'{stage}_length')}")
    if s.held_out < 2:
        raise UserError(f"--held-out must be at least 2, not {s.held_out}")
    if L is not None:
        if s.softmax_layers is None:
            s.softmax_layers = max(1, round(L / 4))
        if not 1 <= s.softmax_layers <= L:
            raise UserError(f"--softmax-layers must be within 1..{L} for a teacher of {L} layers, not {s.softmax_layers}")
        if re.fullmatch(r"\d+(,\d+)*", s.select):
            check_layers([int(i) for i in s.select.split(",")], L)
        if s.early_stop and s.candidates_at_once and s.candidates_at_once < L:
            raise UserError(f"--early-stop compares all candidates at the same step: --candidates-at-once must be {L} or be left out, not {s.candidates_at_once}")
        if not re.match(r"\d", s.select) and s.select not in ("ga-s2", "greedy"):
            place_layers(s.select, L, s.softmax_layers, s.seed, s.teacher)
    return s


def main(argv=None) -> int:
    transformers.logging.set_verbosity_error()
    settings, run = parse(argv), None
    try:
        settings = resolve(settings)
        if settings.teacher:
            teacher, tokenizer = load_teacher(settings)
            settings = resolve(settings, len(teacher.model.layers))
        else:
            settings = resolve(settings, EMBEDDED_LAYERS)
        if settings.dry_run:                                             # a plan must not claim the run folder
            settings.out = tempfile.mkdtemp(prefix="hybrid-distill-")
        run = Run(settings)
        signal.signal(signal.SIGINT, run.interrupt)
        if settings.teacher:
            corpus = Corpus(settings, tokenizer, run.path)
        else:
            corpus = EmbeddedCorpus(settings.seed)
            teacher, tokenizer = embedded_teacher(corpus, run), corpus.tokenizer
        if settings.dry_run:
            print(dry_run(settings, teacher, corpus))
            return 0
        report = run_pipeline(settings, run, teacher, tokenizer, corpus)
        print(rows_table(report) + f"\nKept as softmax: {report['selection']['chosen']}. The full report: {run.path / 'report.md'}; the student: {run.path / 'student'}")
        return 0
    except KeyboardInterrupt as interrupt:
        print("\nstopped" if settings.dry_run or run is None else f"\nstopped; everything up to the last {'checkpoint' if interrupt.args else 'step'} "
              f"is saved in {settings.out}: the same command goes on from there", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: no space left on the disk of {settings.out}; what was saved before is whole: make room and give the same command again", file=sys.stderr)
    except (UserError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        if run is not None:
            run.close()
        if settings.dry_run and run is not None:
            shutil.rmtree(run.path)
    return 1


if __name__ == "__main__":
    # As a module of its own name, not as __main__: a saved student must be able to say which file its class is in.
    sys.exit(importlib.import_module("hybrid_distill").main())
