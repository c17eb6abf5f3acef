"""Turn a pretrained softmax Transformer into a hybrid: few softmax layers, the rest linear.

    python hybrid_distill.py             # the whole method on a small teacher, no download
    python hybrid_distill.py --help      # every option; a real Llama: README.md

[1] Distilling to Hybrid Attention Models via KL-Guided Layer Selection, arXiv 2512.20569
[2] RADLADS, arXiv 2505.03005: stages 0 to 3
[3] Gated Delta Networks, arXiv 2412.06464: the mixer, whose recurrence is in kernels.py

code         paper       shape and meaning
B T D V      -           batch, tokens, hidden size, vocabulary
H Dh         -           query heads, head size (from the attention: not always D / H)
L, K         L, K        layers of the teacher, layers that stay softmax
q k v        q k v       [B, T, H, Dh]
g            log alpha   [B, T, H]       log-decay, <= 0; GLA's [B, T, H, Dh]
beta         beta        [B, T, H]       write strength, in (0, 1)
S            S           [B, H, Dh, Dh]  the recurrent state, fp32
importance   I(l)        how much layer l should stay softmax
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import glob
import hashlib
import importlib
import inspect
import itertools
import json
import math
import operator
import os
import re
import shlex
import shutil
import sys
import time
import timeit
import warnings
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

try:  # in a saved student this file is a module of a package, with kernels.py beside it
    from .kernels import chunk_gated_delta_rule, chunk_gla, gated_delta_step
except ImportError:
    from kernels import chunk_gated_delta_rule, chunk_gla, gated_delta_step

class UserError(ValueError):
    """An error the caller can fix: one sentence, what was wrong and what would be right."""

def require(condition, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)

# ---------------------------------------------------------------------------------------- the mixer

class Mixer(nn.Module):
    """Linear attention in the place of a layer's softmax attention: what every kind of it shares.

    Stage 0 for one layer: W_q, W_k, W_v, W_o of `attn` with their biases (Qwen2), its q/k norms
    (Qwen3) and head size are copied. Head h gets query head h and KV head h // (H / H_kv), whole.

    Another mixer is a subclass in this file, named in MIXERS, with
    add_gates(D, std, **to)   its parameters, std: of new matrices; constants as persistent buffers
    gates(x, q, k, v)         x [B, T, D], others [B, T, H, Dh] -> q, k, v, log-decay [B, T, H, ...]
                              and what else is written; then all but q is set to 0 on padding
    chunk(q, k, v, *gates, initial_state=, output_final_state=) -> o [B, T, H, Dh], S; static; it
                              scales q and takes a log-decay of -inf, where a sequence begins
    step                      if one token can be had faster: all up to W_o, as in GatedDeltaNet
    """
    fp32 = ()  # names of parameters and buffers that stay fp32, whatever the model is

    @torch.no_grad()
    def __init__(self, attn):
        super().__init__()
        H, Dh, w = attn.config.num_attention_heads, attn.head_dim, attn.q_proj.weight
        D, std, to = w.shape[1], attn.config.initializer_range, dict(device=w.device, dtype=w.dtype)
        self.layer_idx, self.num_heads, self.head_dim = attn.layer_idx, H, Dh
        self.q_proj, self.o_proj = copy.deepcopy(attn.q_proj), copy.deepcopy(attn.o_proj)
        self.k_proj, self.v_proj = copy.deepcopy(attn.q_proj), copy.deepcopy(attn.q_proj)  # H heads
        for ours, theirs in ((self.k_proj, attn.k_proj), (self.v_proj, attn.v_proj)):
            for part, p in theirs.named_parameters():  # weight, maybe bias: [H_kv * Dh, ...]
                heads = p.unflatten(0, (-1, Dh)).repeat_interleave(attn.num_key_value_groups, dim=0)
                getattr(ours, part).copy_(heads.flatten(0, 1))
        self.q_norm = copy.deepcopy(getattr(attn, "q_norm", nn.Identity()))
        self.k_norm = copy.deepcopy(getattr(attn, "k_norm", nn.Identity()))
        self.add_gates(D, std, **to)
        self.g_proj = linear(D, H * Dh, std, **to)  # W_g: output gate
        self.o_norm = nn.Parameter(torch.ones(Dh, **to))

    def forward(self, hidden_states, padding_mask=None, sequence_starts=None, **others):
        """[B, T, D] -> ([B, T, D], None). padding_mask [B, >= T]: True on real tokens, of which the
        last T columns count behind a cache, else the first; sequence_starts [B or 1, T]: True where
        a packed sequence begins; others: a cache by any name, and what else self_attn is handed."""
        x, T, heads = hidden_states, hidden_states.shape[1], (self.num_heads, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))
        v, gate = self.v_proj(x).unflatten(-1, heads), self.g_proj(x).unflatten(-1, heads)
        cache = next((c for c in others.values() if "Cache" in type(c).__name__), None)
        state = None if cache is None else recurrent_state(cache, self.layer_idx)
        S, columns = state and state.keys, slice(-T, None) if state and state.seen else slice(T)
        real = None if padding_mask is None else padding_mask[:, columns]
        if state and T == 1 and hasattr(self, "step") and not torch.is_grad_enabled():
            o, S = self.step(x, q, k, v, gate, S, None if real is None else real[:, 0])
        else:
            q, k, v, decay, *more = self.gates(x, q, k, v)
            if sequence_starts is not None:  # S decays before it is read: this empties it
                decay = masked(decay, sequence_starts, -torch.inf)
            if real is not None:  # padding writes nothing (k, v, beta = 0), decays nothing (g = 0)
                k, v, decay, *more = (masked(t, ~real, 0) for t in (k, v, decay, *more))
            keep = dict(initial_state=S, output_final_state=state is not None)
            o, S = self.chunk(q, k, v, decay, *more, **keep)
            # RMSNorm(o_t) * SiLU(W_g x_t), the norm per head and in fp32
            o = F.rms_norm(o.float(), (self.head_dim,), self.o_norm.float(), 1e-5)
            o = (o * F.silu(gate.float())).to(gate.dtype)
        if state:
            state.keys, state.values, state.seen = S, S[:, :0], state.seen + T
        return self.o_proj(o.flatten(2)), None

def masked(t, rows, value):
    """t [B, T, ...] with `value` where rows [B or 1, T] is True."""
    return t.masked_fill(rows.to(t.device).view(*rows.shape, *[1] * (t.ndim - 2)), value)

def linear(inputs: int, outputs: int, std: float, **to):
    """nn.Linear without bias, its weight drawn with this standard deviation."""
    layer = nn.Linear(inputs, outputs, bias=False, **to)
    nn.init.normal_(layer.weight, std=std)
    return layer

class GatedDeltaNet(Mixer):
    """Gated DeltaNet [3] ([1]: gdn_v4). Per head:

        q_t, k_t, v_t = SiLU(W_q x_t), SiLU(W_k x_t), SiLU(W_v x_t)   no RoPE, no short convolution;
                        q and k are then L2-normalised, inside the kernel
        g_t    = -exp(A_log) softplus(W_a x_t + dt_bias)              log-decay, <= 0, in fp32
        beta_t = sigmoid(W_b x_t)                                     write strength, in fp32
        S~_t   = exp(g_t) S_{t-1}                                     S decays first,
        S_t    = S~_t + k_t (x) beta_t (v_t - S~_t^T k_t)             then its error is corrected
        o_t    = S_t^T q_t Dh^-1/2                                    (computed in kernels.py)
        y_t    = W_o (RMSNorm(o_t) * SiLU(W_g x_t))
    """
    fp32 = ("A_log", "dt_bias")
    chunk = staticmethod(functools.partial(chunk_gated_delta_rule, use_qk_l2norm_in_kernel=True))

    def add_gates(self, D, std, **to):
        self.a_proj = linear(D, self.num_heads, std, **to)  # W_a: decay
        self.b_proj = linear(D, self.num_heads, std, **to)  # W_b: write strength
        # exp(A_log) ~ U(0, 16), kept off 0: a head of log 0 never decays and never learns to.
        # softplus(dt_bias) is log-uniform in [1e-3, 1e-1].
        A = torch.empty(self.num_heads, device=to["device"], dtype=torch.float32)
        A, dt = A.uniform_(0, 16).clamp(1e-4), torch.empty_like(A)
        dt.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.A_log = nn.Parameter(A.log())
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)

    def gates(self, x, q, k, v):
        q, k, v = (F.silu(t).to(v.dtype) for t in (q, k, v))  # Qwen3's norms may give fp32
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        return q, k, v, g, self.b_proj(x).float().sigmoid()

    def step(self, x, q, k, v, gate, S, real):
        """All between the products of one token (T = 1) -> o [B, 1, H, Dh], normed and gated, S."""
        more = self.a_proj(x), self.b_proj(x), gate, self.A_log, self.dt_bias
        return gated_delta_step(q, k, v, *more, self.o_norm, 1e-5, S, real)

class GatedLinearAttention(Mixer):
    """GLA, the second mixer of [1] (arXiv 2312.06635): decay per key channel, no delta rule.

        q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t           no RoPE, no SiLU, not normalised
        g_t = log sigmoid(W_2 W_1 x_t + b) / 16             log-decay [Dk] of a head, <= 0; rank 16
        S_t = Diag(exp(g_t)) S_{t-1} + k_t (x) v_t
        o_t = S_t^T q_t Dh^-1/2                             then as in GatedDeltaNet
    """
    chunk = staticmethod(chunk_gla)

    def add_gates(self, D, std, **to):
        width = self.num_heads * self.head_dim
        self.a_proj = nn.Sequential(linear(D, 16, std, **to), linear(16, width, std, **to))
        self.a_bias = nn.Parameter(torch.zeros(width, **to))

    def gates(self, x, q, k, v):
        a = self.a_proj(x).float() + self.a_bias.float()
        return q.to(v.dtype), k.to(v.dtype), v, F.logsigmoid(a).view(q.shape) / 16

MIXERS = {"gdn": GatedDeltaNet, "gla": GatedLinearAttention}  # by config.mixer

# ------------------------------------------------------------------- the hybrid model, its cache

class RecurrentState(DynamicLayer):
    """One layer of transformers' cache for a mixer: its keys are the state S [B, H, Dh, Dh], of
    constant size, its values empty, and both follow the batch (beam search) as keys do."""
    is_croppable, seen = False, 0

    def reset(self):
        self.keys, self.values, self.seen = None, None, 0

    def get_seq_length(self, *_) -> int:
        return self.seen

    def crop(self, *_):
        raise NotImplementedError("a recurrent state cannot be rolled back: no assisted decoding")

def recurrent_state(cache, layer_idx: int) -> RecurrentState:
    """The state of one layer, put in the place of its empty KV layer when first asked for, so that
    whoever makes the cache (`generate`, a pipeline, `DynamicCache()`) need not know of hybrids."""
    while isinstance(cache, Cache) and len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx] if isinstance(cache, Cache) else cache
    if not isinstance(layer, RecurrentState):
        empty = isinstance(layer, DynamicLayer) and not layer.get_seq_length()
        require(empty, "a hybrid needs a dynamic cache of its own: not another model's, not a "
                f"{type(layer).__name__} (generate: cache_implementation='dynamic')")  # fmt: skip
        layer = cache.layers[layer_idx] = RecurrentState()
    return layer

def load_checked(load, *args, **options):
    """load(...) -> (model, info); UserError if weights are missing or not of its config."""
    model, info = load(*args, output_loading_info=True, **options)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    require(not wrong, f"{len(wrong)} weights are missing or not of the config: {wrong[:1]}")
    return model, info

class Hybrid:
    """A stock causal LM with a mixer in every layer that `config.softmax_layers` does not name."""
    _keep_in_fp32_modules_strict = [name for mixer in MIXERS.values() for name in mixer.fp32]

    def __init__(self, config):
        super().__init__(config)
        swap_attention(self)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **options):
        model, info = load_checked(super().from_pretrained, *args, **options)
        return (model, info) if output_loading_info else model

    def generate(self, *args, **options):
        paged = options.get("cache_implementation") == "paged"  # it would fail in a thread, unseen
        require(not paged, "a recurrent state is not cut in pages: no paged cache")
        return super().generate(*args, **options)

HYBRIDS = {}  # the stock class -> its hybrid: LlamaForCausalLM -> HybridLlamaForCausalLM, ...
for _name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    _base, _body = getattr(transformers, f"{_name}ForCausalLM"), {"__module__": __name__}
    _type = {"model_type": f"hybrid_{_name.lower()}"}
    _config = type(f"Hybrid{_name}Config", (_base.config_class,), _body | _type)
    _body["config_class"] = globals()[_config.__name__] = _config
    _hybrid = type(f"Hybrid{_base.__name__}", (Hybrid, _base), _body)
    HYBRIDS[_base] = globals()[_hybrid.__name__] = _hybrid
    _config.register_for_auto_class("AutoConfig")  # so that a saved student carries this file
    _hybrid.register_for_auto_class("AutoModelForCausalLM")

class Norm(nn.RMSNorm):
    """The teacher's RMSNorm as one kernel, not seven; under autocast, in its dtype."""
    def __init__(self, norm):
        super().__init__(norm.weight.shape, norm.variance_epsilon, device="meta")
        self.weight = norm.weight

    def forward(self, x):
        y, device = super().forward(x), x.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y

def swap_attention(model) -> None:
    """In place: mixers, one-kernel norms, and a hook that tells mixers of padding and packing."""
    model.model.norm = Norm(model.model.norm)
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm = Norm(layer.input_layernorm)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm)
        if i not in model.config.softmax_layers:
            layer.self_attn = MIXERS[model.config.mixer](layer.self_attn)
    model.model.register_forward_pre_hook(_tell_mixers, with_kwargs=True)

def _tell_mixers(decoder, args, kwargs):
    """Give every self_attn, as extra keywords, what its mask is built from: padding or packing."""
    call = {**dict(zip(("input_ids", "attention_mask", "position_ids"), args)), **kwargs}
    mask, positions, ends = map(call.get, ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if mask is not None:
        require(getattr(mask, "ndim", 0) == 2 and ends is None, "a hybrid takes attention_mask as "
                "[batch, tokens], cu_seq_lens_q without one, and no static cache")  # fmt: skip
        return args, {**kwargs, "padding_mask": mask != 0}
    if ends is not None:  # attention that is not flash parts the sequences by their positions
        tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        require(len(tokens) == 1, f"cu_seq_lens_q is for one packed row, not {len(tokens)}")
        starts, T = ends[:-1].long().repeat_interleave(ends.diff()), tokens.shape[1]
        positions = torch.arange(T, device=tokens.device)[None] - starts.to(tokens.device)
        args, kwargs = args[:2], {**kwargs, "position_ids": positions}
    if positions is not None and positions.shape[-1] > 1:
        # A sequence begins wherever a position is not the one before plus 1, as in transformers,
        # whose softmax layers part sequences without a cache alone.
        starts = F.pad(positions.diff(dim=-1) != 1, (1, 0))
        kwargs = {**kwargs, "sequence_starts": starts}
        if not torch.compiler.is_compiling() and starts.any():
            require(not call.get("use_cache"), "packed sequences need use_cache=False")
            kwargs["use_cache"] = False
    return args, kwargs

def mixers(model) -> dict[int, nn.Module]:
    """The linear-attention layers of a hybrid, also of a loaded one: {layer index: mixer}."""
    softmax = getattr(model.config, "softmax_layers", range(len(model.model.layers)))
    return {i: x.self_attn for i, x in enumerate(model.model.layers) if i not in softmax}

def product_dtype(model) -> torch.dtype:
    """The teacher's, of matrix products. A student trains in fp32: 16 bits swallow small steps."""
    name = getattr(model.config, "product_dtype", None)
    return getattr(torch, name) if name else model.dtype

def autocast(model):
    dtype = product_dtype(model)
    return torch.autocast(model.device.type, dtype, enabled=dtype != model.dtype)

def last_hidden(model, tokens):
    """tokens [B, T], anywhere -> what goes into the LM head, [B, T, D], in product_dtype(model)."""
    T, most = tokens.shape[1], model.config.max_position_embeddings
    require(T <= most, f"a sequence has {T} tokens, the model takes {most} at most")
    with autocast(model):
        tokens = tokens.to(model.device, non_blocking=True)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden.to(product_dtype(model))

# --------------------------------------------------------------------------------------- the losses

def alignment_loss(y_student, y_teacher):
    """Stage 1: mean over tokens of ||y_teacher - y_student||_2 D^-1/2, of two [B, T, D]."""
    return (y_teacher.float() - y_student.float()).norm(dim=-1).mean() * y_teacher.shape[-1] ** -0.5

def compiled(function):
    """On a GPU by torch.compile: 2 passes over its tensors, not 20. Uncompiled if that fails."""
    fast = functools.cache(lambda: torch.compile(function, dynamic=False))

    @functools.wraps(function)
    def call(*tensors):
        nonlocal fast
        if fast and tensors[0].is_cuda:
            try:
                return fast()(*tensors)
            except torch.OutOfMemoryError:  # says nothing about the compiler
                raise
            except Exception as error:  # whatever a compiler or a driver throws
                fast = None
                warnings.warn(f"{function.__name__} runs uncompiled: {error!r:.200}")
        return function(*tensors)
    return call

@compiled
def kl_rows(student_logits, teacher_logits, weight):
    """[N, V], [N, V], [N] -> weight KL_t of each row, fp32, and d/d student_logits [N, V] of it."""
    # KL_t = sum_v p_t(v) (log p_t(v) - log p_s(v)),   d KL_t / d student_logits = p_s - p_t
    log_p_s = F.log_softmax(student_logits.to(weight.dtype), dim=-1)
    log_p_t = F.log_softmax(teacher_logits.to(weight.dtype), dim=-1)
    p_t, weight = log_p_t.exp(), weight[:, None]
    loss = (p_t * (log_p_t - log_p_s) * weight).sum(-1)
    return loss, ((log_p_s.exp() - p_t) * weight).to(student_logits.dtype)

@compiled
def cross_entropy_rows(logits, labels, weight):
    """-weight log p(label) of each row [N], and weight (p - onehot(label)) [N, V]."""
    log_p, weight = F.log_softmax(logits.to(weight.dtype), dim=-1), weight[:, None]
    onehot = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    loss = (-log_p.gather(1, labels[:, None]) * weight).squeeze(1)
    return loss, ((log_p.exp() - onehot.to(weight.dtype)) * weight).to(logits.dtype)

def kl_loss(student_hidden, student_head, teacher_hidden, teacher_head, mask=None, chunk=1024):
    """KL(teacher || student) of the next-token distributions, mean over tokens, in nats.
    Hidden states [..., D_s], [..., D_t]; heads [V, D_s], [V, D_t]; mask [...], weights, or None.
    Products in the dtype of the hidden states, sums in fp32 or fp64. At most `chunk` rows of logits
    exist at a time; only the student gets gradients. ValueError if tokens or vocabulary differ."""
    if len(student_head) != len(teacher_head):
        raise ValueError("student and teacher must share a vocabulary")
    W = teacher_head.to(teacher_hidden.dtype)
    rows = lambda logits, hidden, weight: kl_rows(logits, F.linear(hidden, W), weight)
    return mean_of_rows(rows, student_hidden, student_head, teacher_hidden, mask, chunk)

def cross_entropy_loss(hidden, head, labels, mask=None, chunk=1024):
    """-log p(label), as `kl_loss` in all else. labels [...], -100 where a token does not count."""
    skip = labels == -100
    mask = ~skip if mask is None else mask.clone().masked_fill_(skip, 0)
    return mean_of_rows(cross_entropy_rows, hidden, head, labels.masked_fill(skip, 0), mask, chunk)

def mean_of_rows(rows, hidden, head, target, mask, chunk):
    """Mean over tokens of the loss that rows(logits [N, V], target [N, .], weights [N]) gives with
    its gradient by the logits: so one visit to a chunk is enough, and no logits are kept."""
    mask = hidden.new_ones(hidden.shape[:-1]) if mask is None else mask
    if not hidden.shape[:-1] == target.shape[: hidden.ndim - 1] == mask.shape:
        raise ValueError("hidden states, targets and mask must be of the same tokens")
    mask = mask.flatten().to(hidden.device, torch.promote_types(hidden.dtype, torch.float32))
    weights = mask / mask.sum().clamp(min=1e-30)
    # 1 / tokens would be lost in an fp16 gradient: a power of two, which rounds nothing, is last
    largest = weights.max().clamp(min=1e-30).log2().ceil().exp2()
    tokens = hidden.flatten(0, -2), target.flatten(0, hidden.ndim - 2), weights / largest
    return largest * ChunkedLoss.apply(rows, head, chunk, torch.is_grad_enabled(), *tokens)

class ChunkedLoss(torch.autograd.Function):
    """The sum of a loss by rows, `chunk` at a time, its gradients made on the way."""
    @staticmethod
    def forward(ctx, rows, head, chunk, wanted, hidden, target, weights):
        total, W = weights.new_zeros(()), head.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(W, dtype=weights.dtype) if wanted and head.requires_grad else None
        count = -(-len(hidden) // chunk)  # of chunks, equal if the tokens allow
        parts = (x.chunk(count) for x in (hidden, target, weights, d_hidden))
        for h, t, w, d_h in zip(*parts):
            loss, d_logits = rows(F.linear(h, W), t, w)
            total += loss.sum()
            if wanted:
                d_h.copy_(d_logits @ W)
            if d_head is not None:
                d_head += d_logits.t() @ h
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_head = (d if d is None else d * d_loss for d in ctx.saved_tensors)
        return None, d_head, None, None, d_hidden, None, None

# ------------------------------------------------------------- stage 0: attention weight transfer

def transfer_attention(teacher, softmax_layers=(), mixer="gdn"):
    """Stage 0: an fp32 copy of a Llama, Mistral, Qwen2 or Qwen3 causal LM, its attention linear (by
    a mixer of MIXERS) in all layers but softmax_layers, within [0, L). UserError for any other."""
    check_teacher(teacher)
    require(mixer in MIXERS, f"the mixer must be one of {', '.join(MIXERS)}, not {mixer!r}")
    student = copy.deepcopy(teacher)
    student.__class__ = HYBRIDS[type(teacher)]  # it differs from the stock class in methods alone
    student.config.__class__ = student.config_class
    student.config.softmax_layers = check_layers(softmax_layers, len(teacher.model.layers))
    student.config.mixer, student.config.product_dtype = mixer, str(teacher.dtype)[6:]
    swap_attention(student)
    return student.float().requires_grad_(True)  # a teacher may be frozen

def restore_attention(student, teacher, softmax_layers):
    """A copy of the all-linear student, on its device, with the teacher's attention in layers."""
    require(not student.config.softmax_layers, "only an all-linear student is restored")
    hybrid = copy.deepcopy(student)
    hybrid.config.softmax_layers = check_layers(softmax_layers, len(teacher.model.layers))
    for i in hybrid.config.softmax_layers:
        attention = copy.deepcopy(teacher.model.layers[i].self_attn).requires_grad_(True)
        attention.config = hybrid.config
        hybrid.model.layers[i].self_attn = attention.to(student.device, torch.float32)
    return hybrid

def to_teachers_dtype(student):
    """In place: the weights in product_dtype, as a student is saved and run, but for fp32 gates."""
    for name, p in student.named_parameters():
        if name.split(".")[-1] not in Hybrid._keep_in_fp32_modules_strict:
            p.data = p.data.to(product_dtype(student))
    return student.eval()

def check_teacher(teacher) -> None:
    """UserError unless it is a supported model with the plain weights of its class, in memory."""
    kind, known = type(teacher), [base.__name__ for base in HYBRIDS]
    require(kind in HYBRIDS, f"the teacher must be one of {', '.join(known)}, not {kind.__name__}")
    with torch.device("meta"):
        stock = kind(copy.deepcopy(teacher.config))
    ours, theirs = ({n: p.shape for n, p in x.state_dict().items()} for x in (teacher, stock))
    kinds = {(type(p), p.is_meta, p.dtype == torch.float16) for p in teacher.parameters()}
    plain = ours == theirs and kinds == {(nn.Parameter, False, False)}
    require(plain, "the teacher must have its plain weights in memory: merge adapters, load it "
            "without quantisation or device_map, in bf16 or fp32")  # fmt: skip

def check_layers(softmax_layers, L: int) -> list[int]:
    """The layers, sorted; UserError if one is outside [0, L) or named twice."""
    layers = sorted(map(operator.index, softmax_layers))  # also of numpy or torch
    right = layers == sorted({*layers} & {*range(L)})
    require(right, f"softmax layers must be distinct and within 0..{L - 1}, not {layers}")
    return layers

# --------------------------------------------------------------- the training loop of every stage

SECONDS_BETWEEN_SAVES = 60.0

def train(model, rates, losses, batches, steps, *, schedule=None, micro_batch=None, folder=None):
    """The loop behind every stage -> its history, a row a step: {"step", name: loss, "loss": their
    mean, ...}. It trains in place, in fp32. rates: AdamW's for attention and the rest, 0: frozen;
    what is frozen stays so. losses(tokens) gives (name, loss, factor), back-propagated one by one.
    batches: tokens [B, T], a list or a function of the step. schedule(step): a factor on the rates.
    micro_batch: sequences at a time, halved when GPU memory runs out. folder: of saves, each minute
    and at the end; the same call (unchecked) resumes. FloatingPointError: a gradient not finite."""
    groups = parameter_groups(model, *rates)
    trained = [p for group in groups for p in group["params"]]
    require(trained, "nothing to train: all is frozen, or no layer is linear")
    wide = all(p.element_size() >= 4 for p in trained)
    require(wide, "a student trains in fp32, for 16 bits swallow small steps: call .float() first")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=any(p.is_cuda for p in trained))
    peaks, name = [group["lr"] for group in groups], Path(folder or "").name
    with contextlib.ExitStack() as at_the_end:
        for p in {p for p in model.parameters() if p.requires_grad} - set(trained):
            p.requires_grad_(False)
            at_the_end.callback(p.requires_grad_, True)
        at_the_end.callback(lambda: model.eval().zero_grad())
        model.train().zero_grad()  # with gradients AdamW's state would not be loaded
        history = load(folder, model, optimizer, steps) if folder else []
        if history:  # as given, or as halved before the stop
            micro_batch = min(micro_batch or math.inf, history[-1]["micro_batch"])
        start, saved = len(history), time.monotonic()
        hide = not folder or start == steps or rank_and_world()[0] > 0
        for step in tqdm(range(start, steps), name, steps, initial=start, disable=hide):
            clock = time.monotonic()
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * (schedule(step) if schedule else 1.0)
            tokens = batches(step) if callable(batches) else batches[step]
            sums, micro_batch = back_propagate(trained, losses, tokens, micro_batch)
            norm = float(whole(nn.utils.clip_grad_norm_(trained, 1.0)))
            if not math.isfinite(norm):
                where = f"{name or 'candidate'}, step {step + 1} of {steps}: the gradient is {norm}"
                raise FloatingPointError(f"{where}, lower the learning rate")
            optimizer.step()
            row = {of: float(loss) for of, loss in sums.items()}
            row |= {"loss": sum(row.values()) / len(row), "gradient_norm": norm}
            row |= {"step": step + 1, "micro_batch": micro_batch, "tokens": tokens.numel()}
            history.append(row | {"seconds": time.monotonic() - clock})
            last, due = step + 1 == steps, time.monotonic() - saved > SECONDS_BETWEEN_SAVES
            if folder and gather(last or due)[0]:  # all at once: the first decides
                save(folder, model, history, None if last else optimizer)
                saved = time.monotonic()
    return history

def back_propagate(trained, losses, tokens, micro_batch):
    """Gradients of a batch, micro_batch sequences at a time, half as many if memory runs out ->
    ({name: loss as a tensor}, micro_batch). Processes that train together take equal parts."""
    some = trained[0]
    shared = isinstance(some, DTensor) or getattr(some, "is_replica", False)
    rank, world = rank_and_world() if shared else (0, 1)
    mine, sums = tokens.unflatten(0, (world, -1))[rank], collections.Counter()
    if some.is_cuda and not mine.is_cuda:
        mine = mine.pin_memory()  # its copies do not wait for what is queued on the GPU
    micro_batch = min(micro_batch or len(mine), len(mine))
    for p in trained:
        p.grad = None
    try:
        for part in mine.split(micro_batch):
            for name, loss, factor in losses(part):
                share = len(part) / len(tokens)
                (loss * factor * share).backward()
                sums[name] += loss.detach() * share
    except torch.OutOfMemoryError:
        if micro_batch == 1 or world > 1:  # the others cannot try it again
            raise
    else:
        totals = (*sums.values(), *(p.grad for p in trained)) if world > 1 else ()
        for total in totals:
            if not isinstance(total, DTensor | None):  # shards sum their own
                dist.all_reduce(total)
        return sums, micro_batch
    loss, half = None, (micro_batch + 1) // 2  # the failed try is freed only after the `except`
    torch.cuda.empty_cache()
    print(f"out of GPU memory: {half} sequences at a time from here on", file=sys.stderr)
    return back_propagate(trained, losses, tokens, half)

def parameter_groups(model, lr: float, rest_lr: float) -> list[dict]:
    """AdamW's groups: attention at lr, the rest at rest_lr (0: left out). Weight decay 0.01 on
    matrices, none on A_log, dt_bias, norms and biases: decay pulls gates to 0."""
    require(lr >= 0 <= rest_lr, f"learning rates are at least 0, not {lr} and {rest_lr}")
    groups = {}
    for name, p in model.named_parameters():
        rate = lr if ".self_attn." in name else rest_lr
        if rate > 0 and p.requires_grad:
            groups.setdefault((rate, 0.01 if p.ndim >= 2 else 0.0), []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": wd} for (rate, wd), ps in groups.items()]

def state_of(model, optimizer=None) -> dict:
    """What a save holds: the CPU's random state, trained weights and, until the end, AdamW's."""
    state = {f"model.{n}": p.data for n, p in model.named_parameters() if p.requires_grad}
    if optimizer:
        how = dict(options=StateDictOptions(ignore_frozen_params=True))
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, **how)["state"]
    return state | {"random": torch.get_rng_state()}

def save(folder, model, history, optimizer=None) -> None:
    """`folder`/metrics.jsonl and step-N: each process writes its part, any number can read it."""
    new, first = Path(folder) / f"step-{len(history)}", rank_and_world()[0] == 0
    if first:
        new.mkdir(parents=True, exist_ok=True)
        write(new.parent / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    dcp.save(state_of(model, optimizer), checkpoint_id=new)
    for old in {*new.parent.glob("step-*")} - {new} if first else ():
        shutil.rmtree(old)

def load(folder, model, optimizer, steps: int) -> list[dict]:
    """Put the newest complete save, whose .metadata came last, in place -> the history up to it."""
    saves = [int(file.parent.name[5:]) for file in Path(folder).glob("step-*/.metadata")]
    step = gather(max(saves, default=0))[0]
    if step == 0:
        return []
    state = state_of(model, optimizer if step < steps else None)
    dcp.load(state, checkpoint_id=Path(folder) / f"step-{step}", no_dist=True)
    torch.set_rng_state(state["random"])
    rows = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows[:step]]

def write(path, content) -> None:
    """Text, or an array as .npy, in a file that is written completely or not at all."""
    with open(f"{path}.new", "wb") as file:
        np.save(file, content) if isinstance(content, np.ndarray) else file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)

# ------------------------------------------------------------------ more than one process: torchrun

def rank_and_world() -> tuple[int, int]:
    """Which process of how many this is: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def gather(value) -> list:
    """The value of every process, by rank; nobody goes on before all have called."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values

def whole(tensor):
    """A sharded tensor put together, its gradient summed on the way back; any other as it is."""
    sharded = isinstance(tensor, DTensor)
    return tensor.full_tensor(grad_placements=[Partial()]) if sharded else tensor

def shard(model):
    """In place: the causal LM sharded over all processes. Losses take whole(lm_head.weight)."""
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = [] if model.config.tie_word_embeddings else [model.lm_head]
    for module in (*attentions, *model.model.layers, model.model, *heads):
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)  # summed, not averaged: see back_propagate
        module.set_force_sum_reduction_for_comms(True)
    model.tie_weights()
    return model

def together(stage, student, too_large: bool, *inputs, **options) -> list[dict]:
    """stage(student, ...), by each process with its part of a batch: whole in each, the gradients
    summed, or, if too large for one GPU, on a sharded copy, whose weights come back."""
    if not too_large:
        for p in student.parameters():
            p.is_replica = True  # see back_propagate; copies lose it
        return stage(student, *inputs, **options)
    model = shard(copy.deepcopy(student))
    history = stage(model, *inputs, **options)
    for p, trained in zip(student.parameters(), model.parameters(), strict=True):
        p.data.copy_(whole(trained.data))
    return history

# ---------------------------------------------------------------- stage 1: hidden-state alignment

def align_hidden_states(student, teacher, batches, steps, lr=1e-3, final_lr=1e-5, **how):
    """Stage 1: every mixer learns its attention's output, in place, by its own gradient.
        loss = mean over layers and tokens of ||attn_l(x_l) - mixer_l(x_l)||_2 D^-1/2
    with x_l from one pass of the *teacher*: its output, not the mixer's, feeds the next layer. The
    history has a loss a layer ("layer 3"). how: micro_batch, folder, as in `train`."""
    ours, warmup, floor = mixers(student), min(50, steps // 10), final_lr / lr
    teacher.eval()

    def losses(tokens):
        seen = {}  # {layer: (x_l, y_l)}, [B, T, D] each

        def remember(i, inputs, y):
            seen[i] = inputs["hidden_states"], y
            return y

        with torch.no_grad(), replaced(teacher, ours, remember):
            last_hidden(teacher, tokens)
        for i, mixer in ours.items():
            x, y = seen.pop(i)
            with autocast(student):
                y_student, _ = mixer(x)
            yield f"layer {i}", alignment_loss(y_student, y), 1 / len(ours)

    def cosine(step):  # from 1 to final_lr / lr, after a linear warm-up
        fall = 0.5 * (1 + math.cos(math.pi * ((step - warmup) / (steps - warmup))))
        return (step + 1) / warmup if step < warmup else floor + (1 - floor) * fall

    model = nn.ModuleList(ours.values())
    return train(model, (lr, lr), losses, batches, steps, schedule=cosine, **how)

@contextlib.contextmanager
def replaced(model, layers, output=lambda i, inputs, y: torch.zeros_like(y)):
    """Within it, attention l of layers gives output(l, its keyword arguments, its own output):
    without it, zeros."""
    hook = lambda attention, _, inputs, y: (output(attention.layer_idx, inputs, y[0]), *y[1:])
    with contextlib.ExitStack() as hooks:
        for i in layers:
            attention = model.model.layers[i].self_attn
            hooks.enter_context(attention.register_forward_hook(hook, with_kwargs=True))
        yield

# ------------------------------------------------------------- stages 2 and 3: matching, finetuning

class TeacherPass:
    """tokens [B, T] -> the teacher's last hidden states [B, T, D], in eval mode, remembered in host
    memory (an eighth, `room` bytes at most), as all candidates and rows see the same batches."""
    def __init__(self, teacher, room=2**34):
        check_teacher(teacher)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.room = min(memory // 8, room) // rank_and_world()[1]
        self.teacher, self.head, self.made = teacher.eval(), teacher.lm_head.weight, {}

    @torch.no_grad()
    def __call__(self, tokens):
        name = tokens.shape, hashlib.sha1(tokens.cpu().numpy().tobytes()).digest()
        if name in self.made:
            return self.made[name].to(self.teacher.device, non_blocking=True)
        hidden = last_hidden(self.teacher, tokens)
        if hidden.nbytes <= self.room:
            self.room -= hidden.nbytes
            kept = torch.empty_like(hidden, device="cpu", pin_memory=hidden.is_cuda)
            self.made[name] = kept.copy_(hidden, non_blocking=True)
        return hidden

def kl_to_teacher(student, teach, tokens):
    """KL(teacher || student), mean over the tokens [B, T]; teach: a TeacherPass."""
    target, hidden = teach(tokens), last_hidden(student, tokens)
    return kl_loss(hidden, whole(student.lm_head.weight), target, teach.head)

def distill_logits(student, teach, batches, steps, lr=1e-4, rest_lr=7e-6, **how) -> list[dict]:
    """Stage 2, in place: KL(teacher || student), mean over tokens ("kl"), attention at `lr`, the
    rest at `rest_lr` (0: frozen). teach: a TeacherPass or the teacher. how: as in `train`."""
    teach = teach if isinstance(teach, TeacherPass) else TeacherPass(teach)
    losses = lambda tokens: [("kl", kl_to_teacher(student, teach, tokens), 1.0)]
    return train(student, (lr, rest_lr), losses, batches, steps, **how)

def finetune(student, batches, steps, lr=1e-5, **how) -> list[dict]:
    """Stage 3: cross-entropy on longer sequences, all parameters at `lr`, no teacher ("ce")."""
    ce = lambda ids: next_token_loss(last_hidden(student, ids), whole(student.lm_head.weight), ids)
    return train(student, (lr, lr), lambda ids: [("ce", ce(ids), 1.0)], batches, steps, **how)

def next_token_loss(hidden, head, tokens):
    """-log p of the next token, mean over [B, T - 1], given hidden [B, T, D] of tokens [B, T]."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)  # the chunks of kl_loss: compiled once
    return cross_entropy_loss(hidden, head, labels.to(hidden.device))

@torch.no_grad()
def evaluate(model, teach, held_out) -> dict[str, float]:
    """{"kl", "kl_<kind>", "perplexity" of "text"}: means over held_out {kind: [tokens [B, T]]}."""
    sums, counts, mode = collections.Counter(), collections.Counter(), model.training
    model.eval()
    for kind, tokens in [(kind, tokens) for kind in held_out for tokens in held_out[kind]]:
        hidden, head = last_hidden(model, tokens), whole(model.lm_head.weight)
        kl = kl_loss(hidden, head, teach(tokens), teach.head)
        found = {"kl": kl, f"kl_{kind}": kl}
        if kind == "text":
            found["ce"] = next_token_loss(hidden, head, tokens)
        sums.update({name: float(loss) * tokens.numel() for name, loss in found.items()})
        counts.update(dict.fromkeys(found, tokens.numel()))
    model.train(mode)
    means = {name: sums[name] / counts[name] for name in sums}
    if not math.isfinite(means["kl"]):
        raise FloatingPointError(f"the held-out KL is {means['kl']}: lower the learning rate")
    return means | ({"perplexity": math.exp(means.pop("ce"))} if "ce" in means else {})

# ---------------------------------------------------------------- stage S: KL-guided selection

@dataclasses.dataclass
class Selection:
    """What selectors work with. Layers are 0-based; KL in nats a token, held out."""
    student: nn.Module  # all-linear, after stage 1
    teach: TeacherPass
    batches: object  # that candidates train on: [B, T] each, a list or a function of the step
    validation: dict  # {kind: [tokens [B, T], ...]} that scores them; never trained on
    k: int  # layers to keep
    budget: Budget  # of a candidate
    history: list = ()  # of stage 1, for ga-s1
    recall: object = None  # model -> its accuracy, for ar
    file: Path | None = None  # remembers scores in files of this name, for all else the same
    micro_batch: int | None = None
    too_large: bool = False  # a candidate is too large for one of several processes

    def __post_init__(self):
        self.teacher, self.layers = self.teach.teacher, range(len(self.student.model.layers))
        self.steps, self.spent, L = self.budget.steps, {}, len(self.layers)
        right = 1 <= self.k <= L == len(mixers(self.student))
        require(right, f"give 1 <= k <= {L} and a student that is all-linear, not k = {self.k}")
        files = self.file.parent.glob(f"{self.file.name}.*.json") if self.file else ()
        found = gather([json.loads(file.read_text()) for file in files])[0]
        self.scores = dict(collections.ChainMap(*found))

    def kl(self, sets, steps=None) -> dict:
        """{name: KL of the all-linear student with the layers sets[name] restored, after a little
        stage 2}; steps=0: without it. Several processes deal the sets out among them."""
        steps = self.steps if steps is None else steps
        keys = {name: f"{sorted(layers)} after {steps}" for name, layers in sets.items()}
        rank, world = (0, 1) if self.too_large else rank_and_world()
        new = [name for name in sets if keys[name] not in self.scores][rank::world]
        for name in tqdm(new, "candidates", leave=False, disable=rank_and_world()[0] > 0):
            torch.manual_seed(0)  # of dropout: it does not depend on the candidates before
            hybrid = restore_attention(self.student, self.teacher, sets[name])
            hybrid = shard(hybrid) if self.too_large else hybrid.to(self.teacher.device)
            if steps:
                args = self.batches, steps, self.budget.lr, self.budget.rest_lr
                history = distill_logits(hybrid, self.teach, *args, micro_batch=self.micro_batch)
                self.micro_batch = history[-1]["micro_batch"]  # as memory allowed
            self.remember(keys[name], evaluate(hybrid, self.teach, self.validation))
        self.scores = dict(collections.ChainMap(*gather(self.scores)))
        cost = steps * self.budget.batch * self.budget.length
        self.spent |= {keys[name]: cost for name in sets if steps}
        return {name: self.scores[keys[name]]["kl"] for name in sets}

    def remember(self, name, score):
        self.scores[name] = score
        if self.file:
            write(f"{self.file}.{rank_and_world()[0]}.json", json.dumps(self.scores))

# Each selector: a Selection -> {layer: importance}, larger = keep.

def ga_s1(x):
    """The stage-1 loss of each mixer, over the last tenth: the layer that aligns worst stays."""
    require(x.history, "ga-s1 needs the history of stage 1 in Selection(history=...)")
    last = x.history[-max(1, len(x.history) // 10) :]
    return {i: sum(row[f"layer {i}"] for row in last) / len(last) for i in x.layers}

def ga_s2(x, steps=None, among=None):
    """I(l) = -KL(teacher || all-linear with only l restored, after a little stage 2): GA-S2."""
    return {i: -kl for i, kl in x.kl({i: [i] for i in among or x.layers}, steps).items()}

def gr_s2(x):
    """Greedy removal, the complement: I(l) = KL of all softmax but l, after a little stage 2."""
    return x.kl({i: [j for j in x.layers if j != i] for i in x.layers})

def avg_s2(x):
    """The mean of the ranks of GA-S2 and GR-S2."""
    ranks = [best_first(importance) for importance in (ga_s2(x), gr_s2(x))]
    return {i: -sum(rank.index(i) for rank in ranks) / 2 for i in x.layers}

def ar(x):
    """The drop of the teacher's recall accuracy when the attention output of l is zeroed."""
    require(x.recall, "ar needs a function of the model in Selection(recall=...)")
    before, drop = x.recall(x.teacher), {}
    for i in x.layers:
        with replaced(x.teacher, [i]):
            drop[i] = before - x.recall(x.teacher)
    drop = gather(drop)[0]  # another GPU may round otherwise
    require(max(drop.values()) > 0, f"ar needs a teacher that recalls: it finds {before:.0%} of "
            "the needles, in held-out text longer than 512 tokens")
    return drop

@torch.no_grad()
def ablate(x, error):
    """{l: sum over validation tokens of error(what goes into the head when the attention output of
    l is zeroed, the same unzeroed, tokens)}. The paper does not say what its MSE is taken of."""
    sums = dict.fromkeys(x.layers, 0.0)
    for tokens in itertools.chain(*x.validation.values()):
        before = x.teach(tokens)
        for i in x.layers:
            with replaced(x.teacher, [i]):
                hidden = last_hidden(x.teacher, tokens)
            sums[i] += float(error(hidden, before, tokens)) * tokens.numel()
    return sums

def smart(x):
    """Spread-out sensitivity: of all sets with the first and last layer, and with gaps between
    floor(G) - 1 and ceil(G) + 1, G = (L-1)/(K-1), that with the largest sum of zero-shot scores."""
    importance, end, gaps = ga_s2(x, steps=0), x.layers[-1], max(1, x.k - 1)
    low, high = max(1, end // gaps - 1), -(-end // gaps) + 1
    paths = {0: [0]}  # {layer: the best path that ends there}
    for _ in range(x.k - 1):
        longer = [[*p, i] for p in paths.values() for i in x.layers if low <= i - p[-1] <= high]
        longer.sort(key=lambda path: sum(importance[i] for i in path))  # the best comes last
        paths = {path[-1]: path for path in longer}
    return {i: (i in paths.get(end, []), importance[i]) for i in x.layers}

def greedy(x):
    """GA-S2 iterated: keep the best, score the others beside it, and so on, at K times the cost."""
    kept = []
    while len(kept) < x.k:
        kl = x.kl({i: [*kept, i] for i in x.layers if i not in kept})
        kept.append(min(kl, key=kl.get))
    return {i: -rank for rank, i in enumerate(kept)}

def gates(x, lr=0.1, pull=0.5):
    """FlashMorph, arXiv 2606.30562 (lr, pull: ours): gates a_l trained jointly, all else frozen.
        y_l  = a_l attn_l(x) + (1 - a_l) mixer_l(x),   a_l = sigmoid(theta_l), 1/2 at first
        loss = KL(teacher || student) + pull mean_l(a_l)"""
    student = restore_attention(x.student, x.teacher, x.layers)
    student.linear = copy.deepcopy(nn.ModuleList(mixers(x.student).values()))
    student.to(x.teacher.device).requires_grad_(False).train()
    theta = nn.Parameter(torch.zeros(len(x.layers), device=student.device, dtype=torch.float32))

    def mixed(i, inputs, y):
        a = theta[i].sigmoid()
        return (a * y + (1 - a) * student.linear[i](**inputs)[0]).to(y.dtype)

    def losses(tokens):
        yield "kl", kl_to_teacher(student, x.teach, tokens), 1.0
        yield "gates", theta.sigmoid().mean(), pull

    steps = max(100, x.steps)  # Adam's first steps are as long for every gate: they part late
    if (name := f"gates {lr} {pull} after {steps}") not in x.scores:
        model = nn.ParameterList([theta])
        with replaced(student, x.layers, mixed):
            train(model, (lr, lr), losses, x.batches, steps, micro_batch=x.micro_batch)
        x.remember(name, gather(theta.sigmoid().tolist())[0])  # processes must go on alike
    x.spent[name] = steps * x.budget.batch * x.budget.length
    return dict(enumerate(x.scores[name]))

def best_first(importance) -> list[int]:
    return sorted(importance, key=importance.get, reverse=True)

SELECTORS = {
    "ga-s1": ga_s1, "ga-s2": ga_s2, "gr-s2": gr_s2, "avg-s2": avg_s2, "smart": smart, "ar": ar,
    "zero-shot": functools.partial(ga_s2, steps=0), "greedy": greedy,
    "mse": lambda x: ablate(x, lambda new, old, _: (new - old).float().square().mean()),
    "ppl": lambda x: ablate(x, lambda new, _, ids: next_token_loss(new, x.teach.head, ids)),
    "gates": gates,
    "gates+ga-s2": lambda x: ga_s2(x, among=sorted(best_first(gates(x))[: 2 * x.k])),
}  # fmt: skip

def select_layers(x: Selection, strategy="ga-s2", first_steps=None) -> list[int]:
    """Layers ranked by a score in SELECTORS, best first: the first x.k stay softmax.
    first_steps: candidates train for so many steps, then anew for 2, 4, ... times as many, until
    the K best are the same twice or x.budget.steps are reached: at up to three times its cost."""
    best, x.steps = None, min(first_steps or x.budget.steps, x.budget.steps)
    while True:
        known, ranking = len(x.spent), best_first(SELECTORS[strategy](x))
        agree = set(ranking[: x.k]) == best and len(x.spent) > known  # by a new training
        if agree or x.steps == x.budget.steps or not x.spent:
            return gather(ranking)[0]  # ties may break differently on another GPU
        best, x.steps = set(ranking[: x.k]), min(2 * x.steps, x.budget.steps)

RULES = {  # (L, k, seed) -> k of L layers without a look at any data
    "uniform": lambda L, k, seed: [(i + 1) * L // k - 1 for i in range(k)],  # official, for Llama
    "centred": lambda L, k, seed: [int((i + 0.5) * L / k) for i in range(k)],  # in the middle
    "first": lambda L, k, seed: list(range(k)),
    "last": lambda L, k, seed: list(range(L - k, L)),
    "random": lambda L, k, seed: torch.randperm(L, generator=seeded(seed)).tolist()[:k],
}

def published_layers(score: str, k: int, teacher_name: str) -> list[int]:
    """The k layers published with [1]'s code for `teacher_name` (its last path component) by
    published, which is GA-S2, or by published:SCORE: prefixes of assets/published.json."""
    file = Path(__file__).parent / "assets" / "published.json"
    name, score = Path(teacher_name).name, score.partition(":")[2] or "ga_s2"
    layers = json.loads(file.read_text()).get(name, {}).get(score, [])
    only_sets = score == "ga_s2" and len(layers) == 9 and k not in (7, 9)
    known = k <= len(layers) and not only_sets
    require(known, f"K = {k} is not published for {name!r} by {score}: see {file}")
    return layers[:k]

# ------------------------------------------------------------------------------------------- data

def seeded(*name) -> torch.Generator:
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

class Corpus:
    """A stream of token ids [N]: first the validation part, then the test part, then train."""
    def __init__(self, ids, held_out: int, seed: int, tokenizer=None):
        parts = np.split(np.asarray(ids), (held_out, 2 * held_out))
        self.parts = dict(zip(("validation", "test", "train"), parts))
        self.seed, self.tokenizer = seed, tokenizer

    def sample(self, part: str, count: int, length: int, draw) -> dict[str, torch.Tensor]:
        """{"text": tokens [count, length]}, `count` different pieces of a part."""
        ids = self.parts[part]
        right = len(ids) >= count * length > 0
        require(right, f"the {part} part has {len(ids)} tokens, not {count} x {length}: give more")
        starts = torch.randperm(len(ids) // length, generator=draw)[:count, None].numpy() * length
        return {"text": torch.from_numpy(ids[starts + np.arange(length)].astype(np.int64))}

    def batches(self, stage: str, b: Budget):
        """A function of the step -> tokens [batch, length] of the train part."""
        size = "train", b.batch, b.length
        kinds = lambda step: self.sample(*size, seeded(self.seed, stage, step))
        kinds(0)  # too little data is told before anything trains
        return lambda step: torch.cat([*kinds(step).values()])

    def held_out(self, part: str, count: int, length: int) -> dict[str, list]:
        """{kind: [tokens [<= 16, length], ...]}, `count` sequences in all."""
        kinds = self.sample(part, count, length, seeded(self.seed, part, length))
        return {kind: [*tokens.split(16)] for kind, tokens in kinds.items()}

    def recall(self, model, part="test", lengths=(512, 1024, 2048, 4096), count=32) -> dict:
        """The share of needles found, one or one of four hidden, by the length of the prompt."""
        found, filler = {}, self.parts[part]
        most = min(len(filler), model.config.max_position_embeddings) if self.tokenizer else 0
        fitting = [n for n in lengths if n < most]
        for length, needles in itertools.product(fitting, (1, 4)):
            draw = seeded(self.seed, part, length, needles)
            prompts = needle_prompts(self.tokenizer, filler, needles, count, length, draw)
            found[f"{needles} in {length}"] = recall_accuracy(model, *prompts)
        return {"recall": sum(found.values()) / len(found) if found else None, "needles": found}

def EmbeddedCorpus(seed: int) -> Corpus:
    """What the embedded teacher was trained on, text as bytes and recall: assets/embedded.py."""
    return importlib.import_module("assets.embedded").EmbeddedCorpus(seed)

def load_tokens(s, tokenizer):
    """--data as ids [N]: a .npy as it is; text is tokenised once, as much as the stages take."""
    file = path = Path(s.data)
    with one_sentence(f"cannot use --data {s.data}"):
        if path.suffix != ".npy":
            count = max(b.tokens for b in s.budgets.values()) + 2 * s.held_out_tokens
            files = [f for f in (path, *sorted(path.rglob("*"))) if f.is_file()]
            stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
            rules = repr(tokenizer), tokenizer.is_fast and tokenizer.backend_tokenizer.to_str()
            read = key(s.data, s.data_config, s.text_column, s.seed, count, stats, rules)
            file = Path(s.out) / f"tokens-{read}.npy"
            if not file.exists() and rank_and_world()[0] == 0:
                ids = itertools.islice(tokenised(s, files, tokenizer), count)
                ids = np.fromiter(tqdm(ids, "tokenise", count, unit_scale=True), np.uint32)
                require(len(ids), "it holds no text")
                write(file, ids)
            gather("tokenised")
        ids = np.load(file, mmap_mode="r")
        right = ids.ndim == 1 and len(ids) and ids.dtype.kind in "iu"
        right = right and 0 <= ids.min() <= ids.max() < s.vocab
        require(right, f"ids must be a row of integers below {s.vocab}, the teacher's embeddings")
    return ids

def tokenised(s, files, tokenizer):
    """Yields the ids of text: documents in a seeded order, each closed with EOS."""
    kinds = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    local = {glob.escape(str(f)): kind for f in files if (kind := kinds.get(f.suffix.lower()))}
    require(not (files and s.data_config), "--data-config is for a dataset of the hub")
    found = {*local.values()} or {s.data}
    require(len(found) == 1 and (local or not files), "local data are all .txt, .jsonl or .parquet")
    kind, how = found.pop(), {"data_files": [*local]} if local else {}
    if kind == "text" and local:
        how["sample_by"] = "document"
    datasets = importlib.import_module("datasets")  # as an import, a student would need it
    rows = datasets.load_dataset(kind, s.data_config, split="train", streaming=True, **how)
    for some in rows.shuffle(seed=s.seed, buffer_size=10_000).iter(256):
        require(s.text_column in some, f"--text-column must be one of {[*some]}")
        texts, eos = [text for text in some[s.text_column] if text], tokenizer.eos_token_id
        right = all(isinstance(text, str) for text in texts)
        require(right, f"{s.text_column!r} must hold text: render messages first")
        for ids in tokenizer(texts)["input_ids"] if texts else ():
            yield from ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

# ------------------------------------------------------------------------------------- evaluation

NEEDLE = "\nThe special magic number for {} is {}.\n"
QUESTION = "\nWhat is the special magic number for {0}? The special magic number for {0} is"
WORDS = "able bold calm eager fancy gentle happy jolly kind lucky merry noble proud quiet wise zany"

def needle_prompts(tokenizer, filler, needles: int, count: int, length: int, draw):
    """Recall as language: prompts [count, length] of filler [N] with `needles` sentences at random
    places, each a number of five digits for a name, and a question for one; answers [count, A]."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    bos = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]
    words, found = WORDS.split(), []
    while len(found) < count:
        drawn = torch.randperm(256, generator=draw)[:needles].tolist()
        names = [f"{words[i // 16]}-{words[i % 16]}" for i in drawn]
        numbers = torch.randint(10_000, 100_000, (needles,), generator=draw).tolist()
        inserted = [encode(NEEDLE.format(*pair)) for pair in zip(names, numbers)]
        asked = QUESTION.format(names[0])
        question, both = encode(asked), encode(f"{asked} {numbers[0]}")
        answer = both[len(question) :]  # on its own it may be other tokens
        if found and len(answer) != len(found[0][1]):
            continue  # another number: with some tokenizers their lengths differ
        room = length - len(bos) - len(question) - sum(map(len, inserted))
        start = int(torch.randint(len(filler) - room, (1,), generator=draw))
        text = filler[start : start + room].tolist()
        places = torch.randint(room + 1, (needles,), generator=draw).tolist()
        for place, sentence in sorted(zip(places, inserted), reverse=True):
            text[place:place] = sentence
        found.append((bos + text + question, answer))
    return tuple(map(torch.tensor, zip(*found)))

@torch.no_grad()
def recall_accuracy(model, prompts, answers) -> float:
    """The share of prompts [N, P] that plain greedy decoding continues with the answer [N, A]."""
    A, parts, own = answers.shape[1], prompts.to(model.device).split(32), model.generation_config
    model.generation_config = transformers.GenerationConfig(max_new_tokens=A, pad_token_id=0)
    try:
        texts = [model.generate(x, attention_mask=torch.ones_like(x)) for x in parts]
    finally:
        model.generation_config = own
    return (torch.cat(texts)[:, -A:].cpu() == answers).all(1).double().mean().item()

@torch.no_grad()
def running_cost(model, length: int) -> dict:
    """Of one sequence of so many tokens: bytes of its cache and, on a GPU, tokens/s after it."""
    tokens = torch.ones(1, length, dtype=torch.long)
    cache = model.model(input_ids=tokens.to(model.device), use_cache=True).past_key_values
    cost = {"cache_bytes": sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)}
    if model.device.type == "cuda":
        written = lambda n: recall_accuracy(model, tokens, torch.ones(1, n))
        seconds = lambda n: min(timeit.repeat(lambda: written(n), number=1, repeat=3))
        cost["decoded/s"] = 16 / (seconds(17) - seconds(1))
    return cost

# ------------------------------------------------------------------------- the plumbing: settings

@dataclasses.dataclass
class Budget:
    """What a stage uses: tokens in all, tokens a sequence, sequences a step, learning rates."""
    tokens: int
    length: int  # at least 8: two pairs of recall, asked once
    batch: int
    lr: float
    rest_lr: float = 0.0

    def __post_init__(self):
        right = min(self.lr, self.tokens, self.batch, self.length - 7) > 0 <= self.rest_lr
        require(right, f"a stage needs tokens, a batch, length > 7, lr > 0, rest_lr >= 0: {self}")
        self.tokens = max(self.tokens, self.batch * self.length)  # a step at least
        self.steps = self.tokens // (self.batch * self.length)

STAGES = {"align": align_hidden_states, "select": distill_logits, "distill": distill_logits,
          "finetune": finetune}  # fmt: skip
BUDGETS = {  # of these stages: minutes on a CPU, minutes on a GPU, a day on one, and [1]'s
    "embedded": (Budget(614_400, 128, 32, 3e-3), Budget(81_920, 128, 32, 1e-3, 1e-4),
                 Budget(245_760, 128, 32, 1e-3, 1e-4), Budget(81_920, 256, 16, 1e-4)),
    "small": (Budget(10_000_000, 512, 96, 2e-3), Budget(196_608, 1024, 16, 3e-4, 3e-5),
              Budget(2_457_600, 1024, 16, 3e-4, 3e-5), Budget(400_000, 4096, 4, 2e-5)),
    "day": (Budget(10**8, 512, 96, 1e-3), Budget(2 * 10**8, 4096, 32, 1e-4, 7e-6),
            Budget(2 * 10**8, 4096, 32, 1e-4, 7e-6), Budget(2 * 10**7, 16384, 8, 1e-5)),
    "paper": (Budget(10**8, 512, 96, 1e-3), Budget(2 * 10**8, 4096, 32, 1e-4, 7e-6),
              Budget(6 * 10**8, 4096, 32, 1e-4, 7e-6), Budget(10**8, 16384, 8, 1e-5)),
}  # fmt: skip
PLACES = ", ".join(["3,7,11", *SELECTORS, *RULES, "published[:SCORE]", "all-linear"])

def parse(argv=None) -> argparse.Namespace:
    """The command line; what depends on the teacher is filled in by `resolve`."""
    more = f"Each STAGE of {', '.join(STAGES)} takes --STAGE-tokens, -length, -batch, -lr; select "
    more += f"and distill -rest-lr, of what is not attention (0: frozen). Defaults: {BUDGETS}"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=more)
    add, none = parser.add_argument, argparse.SUPPRESS
    add("--teacher", help="hub id or folder: Llama, Mistral, Qwen2, Qwen3 [one in assets/]")
    add("--data", help="hub id, .txt, .jsonl, .parquet or a folder of them, .npy of token ids")
    add("--data-config", help="the configuration of a hub dataset, e.g. sample-10BT")
    add("--text-column", default="text", help="of a dataset, .jsonl or .parquet [text]")
    add("--softmax-layers", type=int, metavar="K", help="how many stay softmax [a quarter]")
    add("--select", default="ga-s2", help=f"which stay: {PLACES} [ga-s2]")
    add("--baselines", help="further rows, as --select but no list, or none [four; from 1B none]")
    add("--mixer", default="gdn", choices=MIXERS, help="the linear attention [gdn]")
    add("--budget", choices=BUDGETS, help="defaults of the stages [small; from 1B parameters day]")
    add("--select-from", type=int, default=0, help="tokens, doubled until the K best agree twice")
    add("--out", default="runs/default", help="the run folder; the same command resumes")
    add("--seed", type=int, default=0, help="of data order, new weights, the random rule [0]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of the teacher [on a GPU bfloat16]")
    add("--micro-batch", type=int, default=0, help="sequences at a time [2^15 or 2^16 tokens]")
    add("--held-out", type=int, default=64, help="sequences of validation and test part [64]")
    add("--dry-run", action="store_true", help="hours and memory of every stage")
    for stage, budget in zip(STAGES, BUDGETS["paper"]):
        for name, value in dataclasses.asdict(budget).items():
            if value:  # stages 1 and 3 have no rest_lr
                option = f"--{stage}-{name}".replace("_", "-")
                add(option, type=type(value), help=none, default=none)
    s = parser.parse_args(argv)
    s.dtype = s.dtype or ("bfloat16" if s.device.startswith("cuda") else "float32")
    return s

def resolve(s, teacher) -> None:
    """Fill in what depends on the teacher and its size, and refuse what cannot work."""
    L, s.vocab = teacher.config.num_hidden_layers, teacher.config.vocab_size
    world, parameters = rank_and_world()[1], teacher.num_parameters()
    positions = teacher.config.max_position_embeddings
    s.large = parameters >= 10**9
    if s.large:  # for its copies, which train; it recomputes nothing itself
        teacher.gradient_checkpointing_enable()
    least = min(s.held_out - 1, s.seed, s.micro_batch, s.select_from)
    require(least >= 0, "--held-out must be at least 1, --seed, --micro-batch, --select-from 0")
    s.budget, s.budgets = s.budget or ("embedded", "small", "day")[bool(s.teacher) + s.large], {}
    for stage, default in zip(STAGES, BUDGETS[s.budget]):
        values = dataclasses.asdict(default) | {"length": min(default.length, positions)}
        b = Budget(*(getattr(s, f"{stage}_{name}", value) for name, value in values.items()))
        require(b.length <= positions, f"--{stage}-length: at most the teacher's {positions}")
        require(b.batch % world == 0, f"--{stage}-batch: a multiple of {world} processes")
        s.budgets[stage] = b
    s.held_out_tokens = s.held_out * max(s.budgets[of].length for of in ("select", "distill"))
    tokens = s.select_from or (2**20 if s.budget == "day" else s.budgets["select"].tokens)
    s.select_first = dataclasses.replace(s.budgets["select"], tokens=tokens)
    most = 2**15 if s.large else 2**16  # tokens at a time, before memory tells
    s.at_a_time = {n: s.micro_batch or max(1, most // b.length) for n, b in s.budgets.items()}
    # is a candidate, of 16 bytes a weight, too large for one GPU with teacher and activations?
    memory = torch.cuda.mem_get_info()[1] if s.device.startswith("cuda") else math.inf
    s.too_large = world > 1 and any(gather(18 * parameters > 0.6 * memory))
    s.select = s.select.replace(" ", "")
    given = [int(i) for i in s.select.split(",")] if re.fullmatch(r"\d+(,\d+)*", s.select) else []
    default = len(given) or max(1, L // 4)
    k = s.softmax_layers = default if s.softmax_layers is None else s.softmax_layers
    require(1 <= k <= L, f"--softmax-layers must be within 1..{L}, not {k}")
    require(len(given) in (0, k), f"--select lists {len(given)} layers, not {k}")
    rows = s.baselines or ("none" if s.large else "all-linear,uniform,centred,random")
    rows = rows.replace(" ", "").split(",")
    known = dict.fromkeys(SELECTORS) | {name: rule(L, k, s.seed) for name, rule in RULES.items()}
    known |= {"all-linear": []} | ({s.select: check_layers(given, L)} if given else {})
    s.placed = {}  # the rows: {name: layers, or None for a selector to find}
    for name in [s.select, *(name for name in rows if name != "none")]:
        if name.partition(":")[0] == "published":
            known[name] = published_layers(name, k, s.teacher or "the embedded teacher")
        require(name in known, f"--select takes {PLACES}, --baselines all but a list, not {name!r}")
        s.placed[name] = known[name]

@contextlib.contextmanager
def one_sentence(beginning: str):
    """What a library's loader raises, whatever it is, as one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{beginning}: {' '.join(str(error).split()):.300}") from error

# ---------------------------------------------------------------------------------------- the run

EMBEDDED_TEACHER = Path(__file__).parent / "assets" / "teacher"
byte_tokenizer = functools.partial(AutoTokenizer.from_pretrained, EMBEDDED_TEACHER)  # byte b: b + 3

def load_teacher(s):
    """(teacher, tokenizer) in --dtype on --device; UserError says what is wrong."""
    right = bool(s.teacher) == bool(s.data) and (s.data or not s.data_config)
    require(right, "--teacher and --data go together, --data-config with them")
    for option, place in ("--teacher", s.teacher or "."), ("--data", s.data or "."):
        path, hub_id = Path(place), place.count("/") == 1
        right = path.exists() or hub_id and not path.parent.is_dir()
        require(right, f"{option} {place}: no such file or folder")
    place = s.teacher or EMBEDDED_TEACHER
    with one_sentence(f"cannot use --teacher {place} on --device {s.device}"):
        config = transformers.AutoConfig.from_pretrained(place)
        kind, known = config.model_type, [base.config_class.model_type for base in HYBRIDS]
        require(kind in known, f"it is a {kind!r} model; supported are {', '.join(known)}")
        if s.dry_run:  # with random weights
            with torch.device(s.device):
                return AutoModelForCausalLM.from_config(config, dtype=s.dtype).eval(), None
        with one_sentence("it has no tokenizer that transformers can load"):
            tokenizer = AutoTokenizer.from_pretrained(place)
        teacher, _ = load_checked(AutoModelForCausalLM.from_pretrained, place, dtype=s.dtype)
        return teacher.to(s.device).eval(), tokenizer

def key(*parts) -> str:
    """Eight hex digits for all that a result depends on."""
    return hashlib.sha1(repr(parts).encode()).hexdigest()[:8]

def run(s, teacher, tokenizer, corpus) -> dict:
    """All stages, in the run folder -> the report. A stage is keyed by all that it depends on:
    another K, baseline or later learning rate trains for itself alone."""
    out, b, k, teach = Path(s.out), s.budgets, s.softmax_layers, TeacherPass(teacher)
    rank, stages, rows, report = rank_and_world()[0], {}, [], {}
    batches = {name: corpus.batches(name, budget) for name, budget in b.items()}
    validation = corpus.held_out("validation", s.held_out, b["select"].length)
    test = corpus.held_out("test", s.held_out, b["distill"].length)

    def train_stage(stage, after, model, *inputs, **how):
        folder = f"{stage}-{key(after, b[stage])}"
        how |= dict(folder=out / folder, micro_batch=s.at_a_time[stage])
        inputs = *inputs, batches[stage], b[stage].steps, b[stage].lr
        torch.manual_seed(s.seed)
        model.to("cpu" if s.too_large else s.device)  # its sharded copy is moved
        stages[folder] = together(STAGES[stage], model, s.too_large, *inputs, **how)
        return folder

    weights = (p.data.cpu().flatten().view(torch.uint8) for p in teacher.parameters())
    read = itertools.chain(weights, corpus.parts.values())
    data = [hashlib.sha1(np.ascontiguousarray(x)).digest() for x in read]
    files = [sys.modules[of.__module__] for of in (Mixer, chunk_gla, type(corpus))]
    code = [inspect.getsource(file).split("-- the plumbing")[0] for file in files]
    after = s.seed, s.mixer, s.held_out, teacher.config.to_json_string(), data, code
    torch.manual_seed(s.seed)
    student = transfer_attention(teacher, mixer=s.mixer)
    aligned = train_stage("align", after, student, teacher, final_lr=b["align"].lr / 100)
    if s.large:
        student.cpu()  # it is copied for every candidate, and the GPU is theirs
    x = Selection(
        student, teach, batches["select"], validation, k, b["select"], stages[aligned],
        lambda model: corpus.recall(model, "validation")["recall"] or 0.0,
        out / f"select-{key(aligned, dataclasses.astuple(b['select'])[1:])}",
        s.at_a_time["select"], s.too_large)  # fmt: skip
    for name, layers in {"teacher": x.layers, **s.placed}.items():
        torch.manual_seed(s.seed)
        x.spent, model = {}, teacher
        if layers is None:
            layers = select_layers(x, name, s.select_first.steps)[:k]
        if name != "teacher":
            model, after = restore_attention(student, teacher, layers), (aligned, sorted(layers))
            after = train_stage("distill", after, model, teach, rest_lr=b["distill"].rest_lr)
            train_stage("finetune", after, model)
            to_teachers_dtype(model).to(s.device)
        if rank == 0:
            row = {"name": name, "softmax_layers": sorted(layers), **evaluate(model, teach, test)}
            row |= corpus.recall(model) | running_cost(model, b["finetune"].length)
            rows.append(row | {"cost": sum(x.spent.values())})
        if rank == 0 and name == s.select:
            place = out / f"student-{'-'.join(map(str, sorted(layers))) or 'all-linear'}"
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            report = {"student": str(place), "chosen": layers}
    return report | {"rows": rows, "scores": x.scores, "stages": stages}

def write_report(s, report) -> str:
    """report.json, and report.md, which is the card of the student, too -> what to say of it."""
    chip = torch.cuda.get_device_name(s.device) if s.device.startswith("cuda") else "CPU"
    about = {
        "command": shlex.join(["python", *sys.argv]), "teacher": s.teacher or "embedded",
        "data": s.data or "embedded", "seed": s.seed, "K": s.softmax_layers, "mixer": s.mixer,
        "machine": f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}",
        **s.budgets}  # fmt: skip
    rows, place = table(report["rows"]), report["student"]
    base = f"base_model: {s.teacher}\n" if s.teacher and not Path(s.teacher).exists() else ""
    text = f"""---\nlibrary_name: transformers\n{base}---\n{rows}
KL (nats), perplexity: test part; cost: tokens that candidates trained on. Every student had the
same stages 2 and 3, and has its teacher's licence. path is this folder, for AutoTokenizer, too.\n
- load: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"""
    text += "".join(f"- {name}: {value}\n" for name, value in about.items())
    write(Path(s.out) / "report.md", text)
    write(Path(place) / "README.md", text)
    write(Path(s.out) / "report.json", json.dumps(about | report, default=vars, indent=1))
    return f"{rows}\nThe student is in {place}: see its README.md."

def table(rows: list[dict]) -> str:
    """A Markdown table of rows with the same keys, but for what is a dict."""
    kinds = {int: ",", float: ",.4g"}
    rows = [{n: x for n, x in row.items() if not isinstance(x, dict)} for row in rows]
    lines = [[f"{x:{kinds.get(type(x), '')}}" for x in row.values()] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *lines))

def main(argv=None) -> int:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "torch.distributed is disabled|.*checkpointing_enable")
    torch._inductor.config.compile_threads = 1  # a pool would start later than two functions end
    s = parse(argv)
    if "WORLD_SIZE" in os.environ:  # by torchrun: a GPU for each process, or all on the CPU
        if cuda := s.device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(None if cuda else "gloo", timeout=datetime.timedelta(days=1))
    code, rank = 0, rank_and_world()[0]
    try:
        teacher, tokenizer = load_teacher(s)
        resolve(s, teacher)
        if s.dry_run:
            said = importlib.import_module("assets.dry_run").dry_run(s, teacher)
        else:
            lock = filelock.FileLock(Path(s.out) / f".lock-{rank}", timeout=0)
            with one_sentence(f"cannot write in --out {s.out}, or it is in use by another process"):
                lock.acquire()
            corpus = EmbeddedCorpus(s.seed) if not s.data else Corpus(
                load_tokens(s, tokenizer), s.held_out_tokens, s.seed, tokenizer)  # fmt: skip
            report = run(s, teacher, tokenizer, corpus)
            said = gather(write_report(s, report) if rank == 0 else None)[0]
    except KeyboardInterrupt:
        code, said = 130, "\nstopped: the same command goes on from the last save"
    except (UserError, FloatingPointError) as error:
        code, said = 1, f"error: {error}"
        rank *= isinstance(error, UserError)  # the other may be in one process alone
    if rank == 0:
        print(said, file=sys.stderr if code else sys.stdout)
    return code

if __name__ == "__main__":
    code = importlib.import_module("hybrid_distill").main()  # a saved student names this module
    sys.stdout.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)  # the threads behind torch.distributed may abort an orderly end
    sys.exit(code)
