"""Turn a pretrained softmax Transformer into a hybrid: few softmax layers, the rest linear.

    python hybrid_distill.py                # the whole method, embedded corpus, no download
    python hybrid_distill.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --softmax-layers 8 \\
        --data HuggingFaceFW/fineweb-edu --data-config sample-10BT --out runs/smollm
    python hybrid_distill.py --help         # every option

Reading list
    [1] Distilling to Hybrid Attention Models via KL-Guided Layer Selection, arXiv 2512.20569
    [2] RADLADS, arXiv 2505.03005: stages 0 to 3
    [3] Gated Delta Networks, arXiv 2412.06464: the mixer; its recurrence is in kernels.py

Glossary
    code             paper       shape and meaning
    B T D            -           batch, tokens, hidden size
    H Dh             -           query heads, head size (from the attention: not always D / H)
    L, K             L, K        layers of the teacher, layers that stay softmax
    q k v            q k v       [B, T, H, Dh]
    g                log alpha   [B, T, H]       log-decay, <= 0; GLA's [B, T, H, Dh]
    beta             beta        [B, T, H]       write strength, in (0, 1)
    S                S           [B, H, Dh, Dh]  the recurrent state, fp32
    softmax_layers   -           0-based indices of the K layers that keep softmax attention
    importance       I(l)        how much layer l should stay softmax; by GA-S2 the -KL of the
                                 all-linear student with l alone restored, after a little stage 2
    attention, rest  -           every layer's self_attn, softmax or linear; all other parameters

First the method, in the order of the paper; then the plumbing, which the method never calls.
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
import platform
import re
import shutil
import sys
import time
import types
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
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Partial
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.convert_slow_tokenizer import bytes_to_unicode

try:  # in a saved student this file is a module of a package, with kernels.py beside it
    from .kernels import chunk_gated_delta_rule, chunk_gla, decode_gated_delta_rule, recurrent_gla
except ImportError:
    from kernels import chunk_gated_delta_rule, chunk_gla, decode_gated_delta_rule, recurrent_gla

class UserError(ValueError):
    """Something the caller can mend: one sentence, what was wrong and what would be right."""


# ==================================================================================================
#                                            THE METHOD
# ==================================================================================================

# ---------------------------------------------------------------------------------------- the mixer

class LinearAttention(nn.Module):
    """What the mixers share: q, k, v, the output y, the cache, padding and packing.

    A mixer is a subclass in this file, named in `MIXERS`, with

    init_gates(hidden_size, **to)  its parameters; weights of nn.Linear are redrawn afterwards
    gated(x, q, k, v)   x [B, T, D], others [B, T, H, Dh] -> q, k, v of one dtype and gates, as the
                        rules take them. Padding sets all but q to 0: give decays as logarithms
    rules()             (chunked, one token): (q, k, v, gates, initial_state=, output_final_state=)
                        -> o [B, T, H, Dh], S, one tensor; the chunked one takes cu_seqlens= too

    The head size is the attention's own, and q/k/v biases (Qwen2) and q/k norms (Qwen3) are carried
    over, unlike in the official code.
    """
    fp32 = ()  # parameters that stay fp32 whatever the model is

    def __init__(self, hidden_size, num_heads, head_dim, layer_idx, std=0.02,
                 qkv_bias=False, o_bias=False, device=None, dtype=None):  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim, self.layer_idx = num_heads, head_dim, layer_idx
        to, width = dict(device=device, dtype=dtype), num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=qkv_bias, **to)
        self.k_proj = nn.Linear(hidden_size, width, bias=qkv_bias, **to)
        self.v_proj = nn.Linear(hidden_size, width, bias=qkv_bias, **to)
        self.q_norm = self.k_norm = None  # set by from_attention (Qwen3)
        self.init_gates(hidden_size, **to)
        self.g_proj = nn.Linear(hidden_size, width, bias=False, **to)  # W_g: output gate
        self.o_norm = nn.RMSNorm(head_dim, eps=1e-5, **to)
        self.o_proj = nn.Linear(width, hidden_size, bias=o_bias, **to)
        of_teacher = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        for linear in self.modules():
            if isinstance(linear, nn.Linear) and linear not in of_teacher:
                nn.init.normal_(linear.weight, std=std)

    @classmethod
    @torch.no_grad()
    def from_attention(cls, attn) -> LinearAttention:
        """Stage 0 for one layer: a mixer that starts from copies of attn's W_q, W_k, W_v and W_o.

        attn: the self_attn of a Llama, Mistral, Qwen2 or Qwen3 layer of transformers. Mixer head h
        gets query head h and the KV head h // (H / H_kv) that it reads, as a whole. (The official
        code repeats single weight rows, which mixes channels of different heads.)
        """
        Dh, weight, config = attn.head_dim, attn.q_proj.weight, attn.config
        biases = attn.q_proj.bias is not None, attn.o_proj.bias is not None
        mixer = cls(config.hidden_size, config.num_attention_heads, Dh, attn.layer_idx,
                    config.initializer_range, *biases, weight.device, weight.dtype)  # fmt: skip

        def per_query_head(p):  # [H_kv * Dh, ...] -> [H * Dh, ...], whole heads
            heads = p.unflatten(0, (-1, Dh))
            return heads.repeat_interleave(attn.num_key_value_groups, dim=0).flatten(0, 1)

        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expand = per_query_head if name in ("k_proj", "v_proj") else torch.clone
            for part, p in getattr(attn, name).named_parameters():  # weight, maybe bias
                getattr(getattr(mixer, name), part).copy_(expand(p))
        if hasattr(attn, "q_norm"):
            mixer.q_norm, mixer.k_norm = copy.deepcopy(attn.q_norm), copy.deepcopy(attn.k_norm)
        return mixer

    def forward(self, hidden_states, padding_mask=None, cu_seqlens=None, **others):
        """hidden_states [B, T, D] -> ([B, T, D], None), as transformers calls a layer's self_attn.

        padding_mask: [B, >= T], 1 on real tokens, or None. cu_seqlens: [N + 1], the boundaries of N
        sequences packed in the B rows laid end to end, or None: one a row.
        others: what transformers hands to every self_attn. The cache among it is found by its type,
        for its name changes between versions; RoPE, causal mask and positions are for softmax only.
        """
        cache = next((value for value in others.values() if isinstance(value, Cache)), None)
        x, (B, T, _) = hidden_states, hidden_states.shape
        heads = (B, T, self.num_heads, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, *written = self.gated(x, q, k, v)
        if padding_mask is not None:
            # Padding must leave S as it is: write nothing (k, v, beta = 0), decay nothing (g = 0).
            real = padding_mask[:, -T:].to(device=x.device)
            written = [t * real.view(B, T, *[1] * (t.ndim - 2)).to(t.dtype) for t in written]

        chunk_rule, decode_rule = self.rules()
        if cu_seqlens is not None and cache is not None:
            raise UserError("packed sequences leave no state for a cache: pass use_cache=False")
        if cache is not None:
            state = recurrent_state(cache, self.layer_idx)
            (S,) = state.tensors or (None,)
            rule = decode_rule if T == 1 else chunk_rule
            o, S = rule(q, *written, initial_state=S, output_final_state=True)
            state.tensors, state.seen = (S,), state.seen + T
        elif cu_seqlens is not None:
            packed = [t.reshape(1, B * T, *t.shape[2:]) for t in (q, *written)]
            o = chunk_rule(*packed, cu_seqlens=cu_seqlens)[0].view(heads)
        else:
            o, _ = chunk_rule(q, *written)

        # y_t = W_o (RMSNorm(o_t) * SiLU(W_g x_t)), the norm per head and in fp32
        gate = self.g_proj(x).view(heads)
        weight, eps = self.o_norm.weight.float(), self.o_norm.eps
        o = F.rms_norm(o.float(), (self.head_dim,), weight, eps) * F.silu(gate.float())
        return self.o_proj(o.to(gate.dtype).flatten(2)), None

class GatedDeltaNet(LinearAttention):
    """Gated DeltaNet [3] in the place of a softmax attention ([1]: gdn_v4). Per head:

        q_t, k_t, v_t = SiLU(W_q x_t), SiLU(W_k x_t), SiLU(W_v x_t)   no RoPE, no short convolution;
                        q and k are then L2-normalised, inside the kernel
        g_t    = -exp(A_log) softplus(W_a x_t + dt_bias)              log-decay, <= 0
        beta_t = sigmoid(W_b x_t)                                     write strength
        S~_t   = exp(g_t) S_{t-1}                                     S decays first,
        S_t    = S~_t + k_t (x) beta_t (v_t - S~_t^T k_t)             then its error is corrected
        o_t    = S_t^T q_t Dh^-1/2                                    (three lines: kernels.py)
        y_t    = W_o (RMSNorm(o_t) * SiLU(W_g x_t))
    """
    fp32 = ("A_log", "dt_bias")

    def init_gates(self, hidden_size, **to):
        self.a_proj = nn.Linear(hidden_size, self.num_heads, bias=False, **to)  # W_a: decay
        self.b_proj = nn.Linear(hidden_size, self.num_heads, bias=False, **to)  # W_b: strength
        # exp(A_log) ~ U(0, 16), kept off 0: a head of log 0 never decays and never learns to.
        # softplus(dt_bias) is log-uniform in [1e-3, 1e-1].
        A = torch.empty(self.num_heads, device=to["device"], dtype=torch.float32)
        A, dt = A.uniform_(0, 16).clamp(1e-4), torch.empty_like(A)
        dt.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.A_log = nn.Parameter(A.log())
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)

    def gated(self, x, q, k, v):
        q, k, v = (F.silu(t).to(v.dtype) for t in (q, k, v))  # Qwen3's norms may give fp32
        # both gates in fp32
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        return q, k, v, g, self.b_proj(x).float().sigmoid()

    def rules(self):
        rules = chunk_gated_delta_rule, decode_gated_delta_rule
        return [functools.partial(rule, use_qk_l2norm_in_kernel=True) for rule in rules]

class GatedLinearAttention(LinearAttention):
    """GLA, the second mixer of [1] (arXiv 2312.06635): decay per key channel, no delta rule.

        q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t           no RoPE, no SiLU, not normalised
        g_t = log sigmoid(W_2 W_1 x_t + b) / 16             log-decay [Dk] of a head, <= 0; rank 16
        S_t = Diag(exp(g_t)) S_{t-1} + k_t (x) v_t
        o_t = S_t^T q_t Dh^-1/2                             then as in GatedDeltaNet
    """
    def init_gates(self, hidden_size, **to):
        width = self.num_heads * self.head_dim
        W_1, W_2 = nn.Linear(hidden_size, 16, bias=False, **to), nn.Linear(16, width, **to)
        self.a_proj = nn.Sequential(W_1, W_2)
        nn.init.zeros_(W_2.bias)

    def gated(self, x, q, k, v):
        q, k = q.to(v.dtype), k.to(v.dtype)
        return q, k, v, F.logsigmoid(self.a_proj(x).float()).view(q.shape) / 16

    def rules(self):
        return chunk_gla, recurrent_gla

MIXERS = {"gdn": GatedDeltaNet, "gla": GatedLinearAttention}  # by config.mixer

# ------------------------------------------------------------------- the hybrid model, its cache

class RecurrentState(DynamicLayer):
    """One layer of transformers' cache that holds a mixer's state, of constant size.

    tensors: the state, batch first; Gated DeltaNet's is (S,). `generate` asks a cache for its
    length and to follow the batch (beam search). As it never says `is_initialized`, transformers
    does not offload it, which would save little.
    """
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.tensors, self.seen = (), 0

    def get_seq_length(self, *_) -> int:
        return self.seen

    def batch_select_indices(self, indices):
        self.tensors = tuple(t[indices.to(t.device)] for t in self.tensors)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats):
        self.tensors = tuple(t.repeat_interleave(repeats, dim=0) for t in self.tensors)

    def update(self, *_, **__):
        raise TypeError("a RecurrentState holds no keys and values: use this cache with its hybrid")

    def crop(self, *_):
        raise NotImplementedError("a recurrent state cannot be rolled back: no assisted decoding")

def recurrent_state(cache: Cache, layer_idx: int) -> RecurrentState:
    """The state of one layer, put in the place of its empty KV layer when first asked for.

    So whoever made the cache (`generate`, a pipeline, `DynamicCache()`) need not know of hybrids.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, RecurrentState):
        return layer
    if not isinstance(layer, DynamicLayer):
        kind = type(layer).__name__
        raise UserError(f"a hybrid needs cache_implementation='dynamic', not layers of {kind}")
    if layer.get_seq_length() > 0:
        raise UserError("this cache holds keys and values of another model: use an empty one")
    cache.layers[layer_idx] = RecurrentState()
    return cache.layers[layer_idx]

class Hybrid:
    """A stock causal LM with a mixer in every layer that `config.softmax_layers` does not name."""
    _keep_in_fp32_modules_strict = [name for mixer in MIXERS.values() for name in mixer.fp32]

    def __init__(self, config):
        super().__init__(config)
        swap_attention(self)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **options):
        model, info = super().from_pretrained(*args, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"this checkpoint lacks {len(missing)} weights, {missing[0]} for one")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args, **options):
        for mixer in map(type, mixers(self).values()):
            if mixer.__module__ != type(self).__module__:
                name = mixer.__name__
                raise UserError(f"{name} is not in the file saved with a student: move it there")
        super().save_pretrained(*args, **options)

HYBRIDS = {}  # the stock class -> its hybrid: LlamaForCausalLM -> HybridLlamaForCausalLM, ...
for _base in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM):
    _names = f"Hybrid{_base.config_class.__name__}", f"Hybrid{_base.__name__}"
    _body = {"__module__": __name__, "model_type": f"hybrid_{_base.config_class.model_type}"}
    _config = type(_names[0], (_base.config_class,), _body)
    _hybrid = type(_names[1], (Hybrid, _base), {"__module__": __name__, "config_class": _config})
    _config.register_for_auto_class("AutoConfig")  # so that a saved student carries this file
    _hybrid.register_for_auto_class("AutoModelForCausalLM")
    HYBRIDS[_base], globals()[_names[0]], globals()[_names[1]] = _hybrid, _config, _hybrid

def swap_attention(model) -> None:
    """Replace, in place, every attention that config.softmax_layers does not name by a mixer."""
    for i, layer in enumerate(model.model.layers):
        if i not in model.config.softmax_layers:
            layer.self_attn = MIXERS[model.config.mixer].from_attention(layer.self_attn)
    model.model.register_forward_pre_hook(_pass_padding_and_packing, with_kwargs=True)
    model.model.register_forward_hook(_check_the_cache)

def _pass_padding_and_packing(decoder, args, kwargs):
    """Give every mixer what transformers builds its mask from: padding and packed sequences.

    Extra keyword arguments of the decoder reach every self_attn.
    """
    call = {**dict(zip(("input_ids", "attention_mask", "position_ids"), args)), **kwargs}
    mask, positions, more = call.get("attention_mask"), call.get("position_ids"), {}
    if mask is not None:
        if getattr(mask, "ndim", None) != 2:
            raise UserError("a hybrid takes attention_mask as [batch, tokens], 1 on real tokens")
        more["padding_mask"] = mask
    elif call.get("cu_seq_lens_q") is not None:
        more["cu_seqlens"] = call["cu_seq_lens_q"]
    elif positions is not None and positions.shape[-1] > 1:
        # A sequence begins with each row, and wherever a position is not the one before plus 1.
        starts = F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
        if starts[:, 1:].any():
            tokens = call.get("input_ids")
            rows = len(call["inputs_embeds"] if tokens is None else tokens)
            starts = starts.expand(rows, -1).flatten()
            more["cu_seqlens"] = F.pad(starts.nonzero().flatten(), (0, 1), value=len(starts))
    return args, {**kwargs, **more}

def _check_the_cache(decoder, args, output):
    """Refuse to return a cache that a mixer never saw: the next call would go on from nothing."""
    values = output.values() if isinstance(output, dict) else output
    for cache in (value for value in values if isinstance(value, Cache)):
        for i in set(range(len(decoder.layers))) - set(decoder.config.softmax_layers):
            if not isinstance(cache.layers[i], RecurrentState):
                version = f"transformers {transformers.__version__} is not supported"
                raise RuntimeError(f"the mixer of layer {i} was not given the cache: {version}")

def mixers(model) -> dict[int, nn.Module]:
    """The linear-attention layers of a hybrid, also of a loaded one: {layer index: mixer}."""
    softmax = getattr(model.config, "softmax_layers", range(len(model.model.layers)))
    return {i: x.self_attn for i, x in enumerate(model.model.layers) if i not in softmax}

def autocast(model):
    """Matrix products in config.dtype, the teacher's; weights in training are fp32, and so are the
    products with the LM head then, which a loss takes in the dtype of its hidden states."""
    half = model.config.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, model.config.dtype if half else None, half)

def last_hidden(model, tokens):
    """tokens [B, T] -> what goes into the LM head, [B, T, D]."""
    with autocast(model):
        return model.model(input_ids=tokens, use_cache=False).last_hidden_state

# --------------------------------------------------------------------------------------- the losses

def alignment_loss(y_student, y_teacher):
    """Stage 1: mean over tokens of ||y_teacher - y_student||_2 D^-1/2, of two [B, T, D]."""
    D = y_student.shape[-1]
    return (y_teacher.float() - y_student.float()).norm(dim=-1).mean() * D**-0.5

def kl_loss(student_hidden, student_head, teacher_hidden, teacher_head, mask=None, chunk=None):
    """KL(teacher || student) of the next-token distributions, mean over tokens, in nats.

        KL_t = sum_v p_t(v) (log p_t(v) - log p_s(v)),   p = softmax(head h),   temperature 1

    student_hidden [..., D_s], teacher_hidden [..., D_t]; heads [V, D_s] and [V, D_t], or the
    nn.Linear without bias that holds one; mask [...], 1 on the tokens that count, default all.
    Gradients reach student_hidden and student_head. At most `chunk` rows of logits (2^25 / V) exist
    at a time, forward and backward. Copy `_ChunkedLoss`, `_token_weights` and `_weight` with it.
    """
    student_head = _weight(student_head)
    teacher_head = _weight(teacher_head).detach()
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(f"student and teacher must share a vocabulary; their heads have "
                         f"{student_head.shape[0]} and {teacher_head.shape[0]} rows")
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError("student_hidden and teacher_hidden must be of the same tokens")
    weights = _token_weights(student_hidden, mask)
    teacher_hidden = teacher_hidden.detach().flatten(0, -2)
    teacher_head = teacher_head.to(teacher_hidden.dtype)

    def kl(student_logits, rows):
        log_p_t = F.log_softmax(F.linear(teacher_hidden[rows], teacher_head).float(), dim=-1)
        log_p_s = F.log_softmax(student_logits, dim=-1)
        p_t = log_p_t.exp()
        loss = p_t.mul(log_p_t.sub_(log_p_s)).sum(-1)  # KL_t
        return loss, log_p_s.exp_().sub_(p_t)  # d KL_t / d student_logits = p_s - p_t

    return _ChunkedLoss.apply(student_hidden.flatten(0, -2), student_head, kl, weights, chunk)

def cross_entropy_loss(hidden, head, labels, mask=None, chunk=None):
    """-log p(label), mean over tokens, in nats. labels [...]; the rest as in `kl_loss`."""
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must be {list(hidden.shape[:-1])}, not {list(labels.shape)}")
    head, labels = _weight(head), labels.flatten()

    def cross_entropy(logits, rows):
        log_p, label = F.log_softmax(logits, dim=-1), labels[rows, None]
        loss = -log_p.gather(1, label).squeeze(1)
        minus_one = -torch.ones_like(label, dtype=log_p.dtype)
        return loss, log_p.exp_().scatter_add_(1, label, minus_one)  # p - onehot(label)

    weights = _token_weights(hidden, mask)
    return _ChunkedLoss.apply(hidden.flatten(0, -2), head, cross_entropy, weights, chunk)

def _weight(head):
    """[V, D] of an nn.Linear or as it is; an evaluation asks for no gradient of it."""
    if getattr(head, "bias", None) is not None:
        raise ValueError("a head with a bias is not supported")
    weight = getattr(head, "weight", head)
    return weight if torch.is_grad_enabled() else weight.detach()

def _token_weights(hidden, mask):
    """Each token's share of the mean, fp32, summing to 1; all zero for a mask without a token."""
    tokens = hidden.shape[:-1].numel()
    if mask is None:
        return torch.full((tokens,), 1 / tokens, device=hidden.device)
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(f"the mask must be {list(hidden.shape[:-1])}, not {list(mask.shape)}")
    mask = mask.flatten().float()
    return mask / mask.sum().clamp(min=torch.finfo(mask.dtype).tiny)

class _ChunkedLoss(torch.autograd.Function):
    """sum_t w_t loss(head h_t), with the logits of `chunk` tokens at a time.

    The gradient of such a loss with respect to its logits is known together with the loss, so one
    visit to each chunk gives both: the forward keeps d/dh [tokens, D] and d/dhead [V, D], not the
    logits, and the backward scales them.
    """
    @staticmethod
    def forward(ctx, hidden, head, loss_and_grad, weights, chunk):
        tokens, V = hidden.shape[0], head.shape[0]
        chunk = chunk or max(16, 2**25 // V)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head) if need_head else None
        W, total = head.to(hidden.dtype), torch.zeros((), device=hidden.device)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows]
            loss, d_logits = loss_and_grad(F.linear(h, W).float(), rows)
            total += (loss * weights[rows]).sum()  # a dot product would be rounded under autocast
            d_logits = d_logits.mul_(weights[rows, None]).to(h.dtype)
            if need_hidden:
                d_hidden[rows] = F.linear(d_logits, W.t())
            if need_head:
                d_head += F.linear(d_logits.t(), h.t())
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total):
        grads = [None if grad is None else grad * d_total for grad in ctx.saved_tensors]
        return *grads, None, None, None

# ------------------------------------------------------------- stage 0: attention weight transfer

def transfer_attention(teacher, softmax_layers=(), mixer="gdn"):
    """Stage 0: a copy of `teacher` with linear attention in all layers but `softmax_layers`.

    teacher: a transformers Llama, Mistral, Qwen2 or Qwen3 causal LM; not changed. softmax_layers:
    indices in [0, L). mixer: a name in MIXERS. UserError for any other architecture, index or name.
    """
    if type(teacher) not in HYBRIDS:
        known = ", ".join(base.__name__ for base in HYBRIDS)
        raise UserError(f"the teacher must be one of {known}, not {type(teacher).__name__}")
    check_mixer(mixer)
    student = copy.deepcopy(teacher)
    student.__class__ = HYBRIDS[type(teacher)]  # it differs from the stock class in methods alone
    student.config.__class__ = student.config_class
    student.config.softmax_layers = check_layers(softmax_layers, len(teacher.model.layers))
    student.config.mixer, student.config.dtype = mixer, teacher.dtype
    swap_attention(student)
    return student

def restore_attention(student, teacher, softmax_layers):
    """A copy of the all-linear `student` with the teacher's attention in `softmax_layers`."""
    if student.config.softmax_layers:
        raise UserError("attention is restored in the all-linear student, not in a hybrid")
    hybrid = copy.deepcopy(student)
    hybrid.config.softmax_layers = check_layers(softmax_layers, len(teacher.model.layers))
    for i in hybrid.config.softmax_layers:
        hybrid.model.layers[i].self_attn = copy.deepcopy(teacher.model.layers[i].self_attn)
        hybrid.model.layers[i].self_attn.config = hybrid.config
    return hybrid

def check_mixer(name: str) -> None:
    """UserError for a name that is not in MIXERS."""
    if name not in MIXERS:
        raise UserError(f"the mixer must be one of {', '.join(MIXERS)}, not {name!r}")

def check_layers(softmax_layers, L: int) -> list[int]:
    """The layers, sorted; UserError if one is outside [0, L) or named twice."""
    layers = sorted(operator.index(i) for i in softmax_layers)  # also of numpy or torch
    if any(not 0 <= i < L for i in layers) or len(set(layers)) < len(layers):
        raise UserError(f"softmax layers must be distinct and within 0..{L - 1}, not {layers}")
    return layers

# --------------------------------------------------------------- the training loop of every stage

def train(models, optimizers, losses, batches, steps, *, schedule=None, micro_batch=None,
          evaluation=None, evaluate_every=None, until=None, checkpoint=None, shared=False):
    """The loop behind every stage -> its history, a row a step: {"step", loss: value, ..., "loss"}.

    models: modules, each clipped to gradient norm 1 for itself. What requires a gradient trains, in
    fp32 (a bf16 weight swallows small steps), and is handed back in the dtype that it came in.
    optimizers: over those parameters; schedule(step, steps) is a factor on their learning rates.
    losses(tokens): yields (name, loss, weight), each back-propagated before the next is computed.
    batches: token batches [B, T], a list or a function of the step. micro_batch: sequences of it at
    a time, default all, halved when GPU memory runs out; the gradient is the whole batch's.
    evaluation(): entries for the row of step 0, of every evaluate_every-th step and of the last.
    until: stop there, to go on later. checkpoint: a Checkpoint, or None. shared: the processes of
    torchrun train these models together, a part of every batch each, not models of their own.
    Raises FloatingPointError, with the weights of the last good step, when a loss is not finite.
    """
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    parameters = sum(trained, [])
    dtypes = [p.dtype for p in parameters]
    if torch.float16 in dtypes:
        raise UserError("a float16 model cannot be trained here (no loss scaling): use bfloat16")
    end = min(until or steps, steps)
    if not callable(batches) and len(batches) < end:
        raise UserError(f"{end} steps need {end} batches, not {len(batches)}")
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    everything = nn.ModuleList(models).train()
    name = checkpoint.folder.name if checkpoint else ""
    gpu = next((p.device for p in parameters if p.is_cuda), None)
    if gpu is not None:
        torch.cuda.reset_peak_memory_stats(gpu)  # the peak of this stage, not of those before
    for p in parameters:
        p.data = p.data.float()
    try:
        history = checkpoint.load(everything, optimizers, steps) if checkpoint else []
        if evaluation and not history:
            history.append({"step": 0, **evaluation()})
        start = history[-1]["step"] if history else 0
        if start:  # as given, or as halved before the stop
            micro_batch = min(micro_batch or math.inf, history[-1]["micro_batch"])
        hide, clock = not name or start >= end or rank_and_world()[0] > 0, time.monotonic()
        for step in tqdm(range(start, end), name, initial=start, total=end, disable=hide):
            for group, peak in peaks:
                group["lr"] = peak * (schedule(step, steps) if schedule else 1.0)
            tokens = batches(step) if callable(batches) else batches[step]
            row, micro_batch = back_propagate(losses, tokens, micro_batch, parameters, shared)
            row["loss"] = sum(row.values()) / len(row)
            norms = [torch.nn.utils.clip_grad_norm_(of_model, 1.0) for of_model in trained]
            row["gradient_norm"] = max(float(whole(norm)) for norm in norms)
            if bad := [what for what, value in row.items() if not math.isfinite(value)]:
                if checkpoint and step > 0:
                    checkpoint.save(history, everything, optimizers, shared)
                raise FloatingPointError(
                    f"{name}: {bad[0]} became {row[bad[0]]} at step {step + 1} of {steps}; the "
                    f"weights are those of step {step}, the last good one: lower its learning rate"
                )  # fmt: skip
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            row |= {"step": step + 1, "lr": max(group["lr"] for group, _ in peaks)}
            row |= {"tokens": len(models) * tokens.numel(), "micro_batch": micro_batch}
            row |= {"seconds": time.monotonic() - clock}
            row |= {"peak_bytes": torch.cuda.max_memory_allocated(gpu)}  # 0 without a GPU
            if evaluation and (step + 1 == steps or (step + 1) % (evaluate_every or steps) == 0):
                row |= evaluation()
            history.append(row)
            if checkpoint and step + 1 < steps and (checkpoint.due(shared) or step + 1 == end):
                checkpoint.save(history, everything, optimizers, shared)
            clock = time.monotonic()
    finally:
        for p, dtype in zip(parameters, dtypes):
            p.data, p.grad = p.data.to(dtype), None
        everything.eval()
    if checkpoint and start < end == steps:
        checkpoint.save(history, everything, (), shared)
    return history

def back_propagate(losses, tokens, micro_batch, parameters, shared=False):
    """Gradients of a batch, micro_batch sequences at a time -> ({name: loss}, micro_batch).

    When GPU memory runs out it starts again with half as many at a time, and says so.
    """
    (rank, world), cut = rank_and_world() if shared else (0, 1), isinstance(parameters[0], DTensor)
    if cut and len(tokens) % world:
        raise UserError(f"{world} processes cannot share a batch of {len(tokens)} equally")
    mine = tokens.tensor_split(world)[rank].to(parameters[0].device)
    micro_batch = micro_batch or max(1, len(mine))
    while True:
        sums = collections.Counter()
        try:
            for part in mine.split(micro_batch) if len(mine) else ():
                share = len(part) / len(tokens)
                for name, loss, weight in losses(part):
                    (loss * weight * share).backward()
                    sums[name] += loss.detach() * share
            break
        except torch.OutOfMemoryError:
            if micro_batch == 1 or cut:  # the others are within this batch
                raise
        loss = None  # what the failed try held can be freed only after the `except`
        for p in parameters:
            p.grad = None
        torch.cuda.empty_cache()
        micro_batch = (micro_batch + 1) // 2
        print(f"out of GPU memory: {micro_batch} sequences at a time from here on", file=sys.stderr)
    sums = {name: float(loss) for name, loss in sums.items()}
    if world == 1:
        return sums, micro_batch
    for p in parameters if not cut else ():  # `fully_shard` has summed those
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    total = collections.Counter()  # whose update adds; a process without a sequence has no losses
    for of_process in gather(sums):
        total.update(of_process)
    return dict(total), micro_batch

def adamw(groups) -> list:
    """[AdamW] with the betas of [2], one fused kernel a step on a GPU."""
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=groups[0]["params"][0].is_cuda)]

def parameter_groups(model, lr: float, rest_lr: float) -> list[dict]:
    """Optimizer groups: attention, softmax and linear, at `lr`, the rest at `rest_lr` (0: frozen).

    Matrices take weight decay 0.01; A_log, dt_bias, norms and biases none: it pulls gates to 0.
    """
    groups = {}
    for name, p in model.named_parameters():
        rate = lr if ".self_attn." in f".{name}" else rest_lr
        p.requires_grad_(rate > 0)
        if rate > 0:
            groups.setdefault((rate, 0.01 if p.ndim >= 2 else 0.0), []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": wd} for (rate, wd), ps in groups.items()]

def cosine(floor: float, warmup: int):
    """A schedule: linear warm-up over `warmup` steps, then a cosine from 1 to `floor`."""
    def factor(step, steps):
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / (steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return factor

class Checkpoint:
    """A stage on disk: it goes on where it stopped, on a CPU with the same numbers.

    `folder`/metrics.jsonl  the history, up to the newest save
    `folder`/step-N         by torch.distributed.checkpoint: trained weights, optimizers, random
                            state; of the last step weights alone or, without `keep`, nothing
    seconds: between two saves, raised so that saving takes at most a tenth of the time. What any
    number of processes wrote, any other number reads.
    """
    def __init__(self, folder, keep=True, seconds=30.0):
        self.folder, self.keep = Path(folder), keep
        self.metrics = self.folder / "metrics.jsonl"
        self.seconds, self.saved_at, self.step = seconds, 0.0, -1  # step: of the newest save

    def history(self) -> list[dict]:
        text = self.metrics.read_text() if self.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def load(self, module, optimizers, steps: int) -> list[dict]:
        """Put the newest complete save into module and optimizers; returns the history up to it."""
        history = self.history()
        if not self.keep and history and history[-1]["step"] == steps:
            return history
        # A first guess at what a save takes: 12 bytes a parameter, 1 GB a second.
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.seconds, self.saved_at = max(self.seconds, 10 * 12e-9 * count), time.monotonic()
        # A save is complete when .metadata is there: it is written, fsynced and renamed last.
        saves = {int(f.parent.name[5:]): f.parent for f in self.folder.glob("step-*/.metadata")}
        step = self.step = max(saves, default=-1)
        if step >= 0:
            state = self._state(module, optimizers if step < steps else ())
            dcp.load(state, checkpoint_id=saves[step], no_dist=True)  # into the tensors themselves
            if "random" in state:
                torch.set_rng_state(state["random"])
            if "random_cuda" in state:
                torch.cuda.set_rng_state(state["random_cuda"])
        return [row for row in history if row["step"] <= step]

    def _state(self, module, optimizers) -> dict:
        state = {f"model.{n}": p.data for n, p in module.named_parameters() if p.requires_grad}
        if optimizers:
            options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
            slots = get_optimizer_state_dict(module, optimizers, options=options)
            state |= {n: slot for n, slot in slots.items() if isinstance(slot, torch.Tensor)}
            state["random"] = torch.get_rng_state()
            if torch.cuda.is_available():
                state["random_cuda"] = torch.cuda.get_rng_state()
        return state

    def due(self, shared=False) -> bool:
        """Is it time to save? Of processes that train together the first one decides."""
        due = time.monotonic() - self.saved_at > self.seconds
        return gather(due)[0] if shared else due

    def save(self, history, module, optimizers=(), shared=False) -> None:
        """Of processes that train together the first one writes; of a model cut over them, all."""
        start, new = time.monotonic(), self.folder / f"step-{history[-1]['step']}"
        if history[-1]["step"] == self.step:  # nothing happened since
            return
        cut = any(isinstance(p, DTensor) for p in module.parameters())
        first = not shared or rank_and_world()[0] == 0
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.metrics, "".join(json.dumps(row) + "\n" for row in history))
            shutil.rmtree(new, ignore_errors=True)
        if cut:
            dist.barrier()
        if (first or cut) and (self.keep or optimizers):
            dcp.save(self._state(module, optimizers), checkpoint_id=new, no_dist=not cut)
        for old in set(self.folder.glob("step-*")) - {new} if first else ():
            shutil.rmtree(old)
        if shared:
            gather("whoever loads this stage finds it saved")
        self.saved_at, self.step = time.monotonic(), history[-1]["step"]
        self.seconds = max(self.seconds, 10 * (self.saved_at - start))

def write(path: Path, content) -> None:
    """Text, or an array as .npy, in a file that is there whole or not at all, whatever happens."""
    with open(f"{path}.new", "wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            np.save(file, content)
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
    """A cut tensor put together, its gradient summed on the way back; any other as it is."""
    cut = isinstance(tensor, DTensor)
    return tensor.full_tensor(grad_placements=[Partial()]) if cut else tensor

def cut_over_processes(model):
    """The causal LM in fp32 with its weights, gradients and optimizer state cut over all processes.

    So a trained parameter takes 16 / world bytes and not 16. In place: `fully_shard` puts a layer
    together when its turn comes. Losses take the head from `whole(model.lm_head.weight)`.
    """
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    layers = [*model.model.layers]
    heads = [] if tied else [model.lm_head]
    for module in (*(layer.self_attn for layer in layers), *layers, model.model, *heads):
        fully_shard(module.float())
        module.set_gradient_divide_factor(1.0)  # summed, not averaged: see back_propagate
        module.set_force_sum_reduction_for_comms(True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model

def sharded(stage, student, *inputs, **options) -> list[dict]:
    """stage(student, ...) on a copy of student that is cut over the processes; then copied back."""
    model = cut_over_processes(copy.deepcopy(student))
    history = stage(model, *inputs, **options)
    for p, trained in zip(student.parameters(), model.parameters(), strict=True):
        p.data.copy_(whole(trained.data))
    return history

# ---------------------------------------------------------------- stage 1: hidden-state alignment

def align_hidden_states(student, teacher, batches, steps, lr=1e-3, final_lr=1e-5, warmup=None,
                        micro_batch=None, checkpoint=None) -> list[dict]:  # fmt: skip
    """Stage 1: every mixer learns its attention's output, all at once, their gradients apart.

        loss = mean over layers of alignment_loss(mixer_l(x_l), attn_l(x_l))
        x_l from the *teacher's* forward pass: its output, not the mixer's, feeds the next layer

    So one teacher pass serves all layers, and nothing of the student but its mixers runs or trains.
    Trains in place; returns the history, a loss a layer ("layer 3"). Cosine from lr to final_lr,
    after a warm-up of 50 steps (at most a tenth of all).
    """
    training = nn.ModuleDict({str(i): mixer for i, mixer in mixers(student).items()})
    if not training:
        raise UserError("this student has no linear layer to align")

    def losses(tokens):
        seen = {}  # {layer: (x_l, y_l)}, [B, T, D] each, of one teacher pass

        def remember(i, how, y):
            seen[i] = how["hidden_states"], y
            return y

        with torch.no_grad(), replaced(teacher, mixers(student), remember):
            last_hidden(teacher, tokens)
        for i, mixer in training.items():
            x, y = seen.pop(int(i))
            with autocast(student):
                y_student, _ = mixer(x)
            yield f"layer {i}", alignment_loss(y_student, y), 1 / len(training)

    schedule = cosine(final_lr / lr, min(50, steps // 10) if warmup is None else warmup)
    optimizers = adamw(parameter_groups(nn.ModuleDict({"self_attn": training}), lr, 0))
    return train([training], optimizers, losses, batches, steps, schedule=schedule,
                 micro_batch=micro_batch, checkpoint=checkpoint, shared=True)  # fmt: skip

@contextlib.contextmanager
def replaced(model, layers, output=lambda i, how, y: torch.zeros_like(y)):
    """Within it, attention l of layers gives output(l, its keyword arguments, its own output)."""
    def hook(attention, args, how, y):
        return output(attention.layer_idx, how, y[0]), *y[1:]
    with contextlib.ExitStack() as hooks:
        for i in layers:
            attention = model.model.layers[i].self_attn
            hooks.enter_context(attention.register_forward_hook(hook, with_kwargs=True))
        yield

# ---------------------------------------------------------------- stage S: KL-guided selection

@dataclasses.dataclass
class Selection:
    """Which layers stay softmax, and why. Layers are 0-based, best first; KL in nats a token."""
    chosen: list[int]  # the K layers that stay softmax
    ranking: list[int] = ()  # every layer
    importance: dict[int, float] = dataclasses.field(default_factory=dict)  # when last scored
    rounds: list[dict] = ()  # one a scoring round: {"kept", "curves": see score_layers}
    tokens: int = 0  # of all candidates' training, as if no other selector had shared it
    evaluations: int = 0  # without training: of all validation batches, or of recall

def select_layers(student, teacher, batches, held_out, k, steps, strategy="ga-s2", history=(),
                  recall=None, made=None, **scoring) -> Selection:  # fmt: skip
    """Which k of the L layers should stay softmax, by a score in SELECTORS?

    student: the *all-linear* student after stage 1, with its `history` (for GA-S1). recall(model):
    an accuracy (for AR). made: a dict that keeps scores for other calls with the same arguments.
    The rest as in `score_layers`, but `checkpoint` also gets `early`: what an early stop looks at.
    """
    L = len(mixers(student))
    if student.config.softmax_layers:
        raise UserError("selection starts from the all-linear student, without softmax layers")
    if not 1 <= k <= L:
        raise UserError(f"k, the number of layers to select, must be within 1..{L}, not {k}")
    if strategy not in SELECTORS:
        raise UserError(f"strategy must be one of {', '.join(SELECTORS)}, not {strategy!r}")
    x = Scoring(student=student, teacher=teacher, batches=batches, held_out=held_out, k=k,
                steps=steps, history=history, recall=recall, how=scoring, layers=range(L),
                made={} if made is None else made,
                ranking=[], rounds=[], trained=0, evaluations=0)  # fmt: skip
    importance = SELECTORS[strategy](x)
    ranking, tokens = x.ranking or best_first(importance), 0
    if x.trained:  # steps; without any there need be no batch
        tokens = x.trained * (batches(0) if callable(batches) else batches[0]).numel()
    return Selection(ranking[:k], ranking, importance, x.rounds, tokens, x.evaluations)

def best_first(importance) -> list[int]:
    return sorted(importance, key=importance.get, reverse=True)

class Scoring(types.SimpleNamespace):
    """What a selector scores with, the arguments of `select_layers`, and what it spent so far."""

    def kl(self, sets, kept=(), k=None, trained=True) -> dict[int, float]:
        """Held-out KL of each hybrid of `sets` by `score_layers`, or without training.

        kept: what the sets share, for the record; k: how many of the lowest an early stop watches.
        """
        k, stop, save = k or self.k, self.how.get("early_stop"), self.how.get("checkpoint")
        early = [stop, k, *sets.values()] if stop else []
        how = self.how | {"checkpoint": save and functools.partial(save, early=early)}
        steps, points = self.steps, 2
        if not trained:  # step 0 alone, which a training has scored too
            how |= {"checkpoint": None, "early_stop": 0}
            steps, points = 0, 1
        curves = {i: self.made.get(str([sets[i], early]), []) for i in sets}
        if new := {i: sets[i] for i in sets if len(curves[i]) < points}:
            curves |= score_layers(self.student, self.teacher, self.batches, self.held_out, new,
                                   steps, k=k, **how)  # fmt: skip
            self.made |= {str([sets[i], early]): curves[i] for i in new}
        if trained:
            self.trained += sum(curve[-1]["step"] for curve in curves.values())
        else:
            curves = {i: curve[:1] for i, curve in curves.items()}
            self.evaluations += len(sets)
        self.rounds.append({"kept": kept or [], "curves": curves})
        return {i: curve[-1]["kl"] for i, curve in curves.items()}

# Each selector: a Scoring -> {layer: importance}, larger = keep.

def ga_s1(x):
    """The stage-1 loss of each mixer, over the last tenth: the layer that aligns worst stays."""
    if not x.history:
        raise UserError("ga-s1 reads the history of stage 1: give history=")
    last = x.history[-max(1, len(x.history) // 10) :]
    return {i: sum(row[f"layer {i}"] for row in last) / len(last) for i in x.layers}

def ga_s2(x):
    """I(l) = -KL(teacher || all-linear with only l restored, after a little stage 2): GA-S2."""
    return {i: -kl for i, kl in x.kl({i: [i] for i in x.layers}).items()}

def gr_s2(x):
    """Greedy removal, the complement: I(l) = KL of all softmax but l, after a little stage 2."""
    sets = {i: [j for j in x.layers if j != i] for i in x.layers}
    return x.kl(sets, "every other layer", k=max(1, len(x.layers) - x.k))

def avg_s2(x):
    """The mean of the ranks of GA-S2 and GR-S2."""
    ranks = [best_first(importance) for importance in (ga_s2(x), gr_s2(x))]
    return {i: -sum(rank.index(i) for rank in ranks) / 2 for i in x.layers}

def ar(x):
    """The drop of the teacher's recall accuracy when the attention output of l is zeroed."""
    if x.recall is None:
        raise UserError("ar needs a measure of recall: give recall=")
    before, drop, x.evaluations = x.recall(x.teacher), {}, len(x.layers) + 1
    for i in x.layers:
        with replaced(x.teacher, [i]):
            drop[i] = before - x.recall(x.teacher)
    if max(drop.values()) <= 0:
        raise UserError(f"ar needs a teacher that recalls: it finds {before:.1%}, and not less "
                        "without any of its layers")  # fmt: skip
    return drop

def mse(x):
    """The same zeroing: mean squared error of what goes into the LM head. (The paper's layer and
    normalisation are not known: its scripts hold the task scores alone.)"""
    return ablate(x, lambda hidden, before, tokens: (hidden - before).float().square().mean())

def ppl(x):
    """The same zeroing: the log of the teacher's perplexity, which ranks as perplexity does."""
    return ablate(x, lambda hidden, before, tokens: cross_entropy_loss(
        hidden[:, :-1], x.teacher.lm_head, tokens[:, 1:]))  # fmt: skip

@torch.no_grad()
def ablate(x, error):
    """{l: mean over the tokens of held_out of error(hidden states without l, with l, tokens)}."""
    batches = [tokens.to(x.teacher.device) for kind in x.held_out.values() for tokens in kind]
    sums, every = dict.fromkeys(x.layers, 0.0), sum(map(torch.numel, batches))
    x.evaluations = len(x.layers) + 1
    for tokens in batches:
        before = last_hidden(x.teacher, tokens)
        for i in x.layers:
            with replaced(x.teacher, [i]):
                wrong = error(last_hidden(x.teacher, tokens), before, tokens)
            sums[i] += float(wrong) * tokens.numel() / every
    return sums

def zero_shot(x):
    """-KL of the all-linear student with only l restored, without training: step 0 of GA-S2."""
    return {i: -kl for i, kl in x.kl({i: [i] for i in x.layers}, trained=False).items()}

def smart(x):
    """Spread-out sensitivity: of all sets with the first and last layer, and with gaps between
    floor(G) - 1 and ceil(G) + 1, G = (L-1)/(K-1), the one with the largest sum of zero-shot
    scores."""
    importance, end = zero_shot(x), x.layers[-1]
    if x.k > 1:
        low, high = max(1, end // (x.k - 1) - 1), -(-end // (x.k - 1)) + 1
        paths = {0: [0]}  # {layer: the best path that ends there}
        for _ in range(x.k - 1):
            longer = [[*path, i] for path in paths.values() for i in x.layers
                      if low <= i - path[-1] <= high]  # fmt: skip
            longer.sort(key=lambda path: sum(importance[i] for i in path))  # the best comes last
            paths = {path[-1]: path for path in longer}
        x.ranking = sorted(best_first(importance), key=lambda i: i not in paths[end])
    return importance

def greedy(x):
    """GA-S2 iterated: keep the best, score the others with it kept, and so on. It does not pick two
    layers that do the same job, and costs about K times as much."""
    kept, importance = [], {}
    while len(kept) < x.k:
        kl = x.kl({i: [*kept, i] for i in x.layers if i not in kept}, kept, k=1)
        importance |= {i: -kl[i] for i in kl}
        order = sorted(kl, key=kl.get)
        kept, x.ranking = [*kept, order[0]], kept + order
    return importance

def gates(x, lr=0.1, pull=0.5):
    """FlashMorph, arXiv 2606.30562: gates a_l in [0, 1], trained jointly, all else frozen.

        y_l  = a_l attn_l(x) + (1 - a_l) mixer_l(x),   a_l = sigmoid(theta_l), 1/2 at first
        loss = KL(teacher || student) + pull mean_l(a_l)
    """
    student = restore_attention(x.student, x.teacher, x.layers).requires_grad_(False).train()
    linear = copy.deepcopy(nn.ModuleList(mixers(x.student).values())).requires_grad_(False)
    theta = nn.ParameterList([torch.zeros(len(linear), device=student.device)])

    def mixed(i, how, y):
        a = theta[0][i].sigmoid()
        return (a * y + (1 - a) * linear[i](**how)[0]).to(y.dtype)

    def losses(tokens):
        yield from kl_to_teacher({"kl": student}, x.teacher, tokens)
        yield "gates", theta[0].sigmoid().mean(), pull

    # Adam's first steps are as long for every gate: they need many to part.
    steps = max(100, x.steps) if callable(x.batches) else x.steps
    how = {name: x.how.get(name) for name in ("micro_batch", "evaluate_every")}
    if save := x.how.get("checkpoint"):
        how["checkpoint"] = save({"gates": ["gates", lr, pull]}, early=[])
    with replaced(student, x.layers, mixed):
        history = train([theta], adamw(parameter_groups(theta, 0, lr)), losses, x.batches, steps,
                        evaluation=lambda: {"a": theta[0].sigmoid().tolist()}, shared=True,
                        **how)  # fmt: skip
    x.trained += steps
    return dict(enumerate(history[-1]["a"]))

def gates_ga_s2(x):
    """Gates, then GA-S2 among the best 2 K of them."""
    order = best_first(gates(x))
    kl = x.kl({i: [i] for i in sorted(order[: 2 * x.k])})
    x.ranking = sorted(kl, key=kl.get) + order[2 * x.k :]
    return {i: -kl[i] for i in kl}

SELECTORS = {"ga-s1": ga_s1, "ga-s2": ga_s2, "gr-s2": gr_s2, "avg-s2": avg_s2, "ar": ar, "mse": mse,
             "ppl": ppl, "zero-shot": zero_shot, "smart": smart, "greedy": greedy, "gates": gates,
             "gates+ga-s2": gates_ga_s2}  # fmt: skip

def score_layers(student, teacher, batches, held_out, sets, steps, *, lr=1e-4, rest_lr=7e-6,
                 evaluate_every=None, early_stop=0, k=1, at_once=None, micro_batch=None,
                 checkpoint=None, shard=False):  # fmt: skip
    """One round of scores, held-out KL: {layer: [{"step", "kl", "kl_<kind>"}, ...]}.

    sets: {layer: the softmax layers of the hybrid that is trained, like stage 2, to score it}.
    batches: what each candidate trains on; held_out: {kind: [tokens [B, T], ...]}, never trained.
    lr, rest_lr: of attention, of the rest. evaluate_every: steps, default half of all.
    early_stop: end when the k best were the same at that many evaluations in a row; 0: never.
    at_once: candidates in memory at a time, which share each teacher pass; default: an eighth of
    all, or fewer that fit. The processes of torchrun take such groups in turn, each with models of
    its own; with `shard` all of them train every group, cut over them.
    checkpoint(some of sets): a Checkpoint for this group; early stopping needs one, for groups then
    train in turn, an interval each. Unlike the official code: held-out KL on fixed batches, not a
    logged training loss.
    """
    every = evaluate_every or max(1, steps // (10 if early_stop else 2))
    layers = list(sets)
    at_once = at_once or min(*gather(candidates_that_fit(student)), -(-len(layers) // 8))
    groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
    rank, world = (0, 1) if shard else rank_and_world()
    if early_stop and checkpoint is None:
        raise UserError("early stopping trains candidates an interval at a time: give a checkpoint")
    if early_stop == 1:
        raise UserError("early stopping needs 2 evaluations or more that agree, or 0 for never")
    checkpoints = [checkpoint and checkpoint({i: sets[i] for i in group}) for group in groups]
    for end in [*range(every, steps, every), steps] if early_stop else [steps]:
        mine = {}
        for group, saved in [*zip(groups, checkpoints)][rank::world]:
            models = parameters = None  # the last group's make room
            models = {f"layer {i}": restore_attention(student, teacher, sets[i]) for i in group}
            for model in models.values() if shard else ():
                cut_over_processes(model)
            parameters = [parameter_groups(model, lr, rest_lr) for model in models.values()]
            history = train(
                list(models.values()), adamw(sum(parameters, [])),
                lambda tokens: kl_to_teacher(models, teacher, tokens), batches, steps,
                evaluation=lambda: {"held_out": held_out_kl(models, teacher, held_out)},
                evaluate_every=every, until=end, micro_batch=micro_batch, checkpoint=saved,
                shared=shard)  # fmt: skip
            # one group may have been stopped an interval later than another
            seen = [row for row in history if "held_out" in row and row["step"] <= end]
            for i in group:
                mine[i] = [{"step": row["step"], **row["held_out"][f"layer {i}"]} for row in seen]
        curves = dict(sorted(pair for of_process in gather(mine) for pair in of_process.items()))
        if early_stop and settled(curves, early_stop, k):
            break
    return curves

def candidates_that_fit(student) -> int:
    """As many as half of the GPU's memory, or of a CPU's, holds beside activations.

    Of all memory, not of what is free now: a run that goes on must find the same groups saved.
    """
    if student.device.type == "cuda":
        memory = torch.cuda.get_device_properties(student.device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = 18 * student.num_parameters()  # bytes: fp32 weight, gradient, two moments; a bf16 copy
    return max(1, int(memory / 2 / size))

def best_layers(curves, evaluation=-1, kind="kl") -> list[int]:
    """The layers by held-out KL at an evaluation, lowest first."""
    return sorted(curves, key=lambda i: curves[i][evaluation][kind])

def settled(curves, evaluations: int, k: int) -> bool:
    """Were the k best the same at each of the last `evaluations`? Step 0 does not count."""
    if len(next(iter(curves.values()))) <= evaluations:
        return False
    sets = {frozenset(best_layers(curves, -n)[:k]) for n in range(1, evaluations + 1)}
    return len(sets) == 1

def kl_to_teacher(models: dict, teacher, tokens):
    """Yields (name, KL(teacher || model), 1.0) for each model; they share one teacher pass."""
    with torch.no_grad():
        teacher_hidden = last_hidden(teacher, tokens)
    for name, model in models.items():
        hidden = last_hidden(model, tokens)
        head = whole(model.lm_head.weight)
        yield name, kl_loss(hidden, head, teacher_hidden, teacher.lm_head), 1.0

@torch.no_grad()
def held_out_kl(models: dict, teacher, held_out) -> dict[str, dict]:
    """{name: {"kl", "kl_<kind>" of each kind}}, means over the tokens of {kind: [tokens, ...]}.

    Without dropout, also between two steps of training.
    """
    modes = {name: model.training for name, model in models.items()}
    sums = {name: {"kl": 0.0, **{f"kl_{kind}": 0.0 for kind in held_out}} for name in models}
    every = sum(tokens.numel() for batches in held_out.values() for tokens in batches)
    for model in models.values():
        model.eval()
    for kind, batches in held_out.items():
        of_kind = sum(tokens.numel() for tokens in batches)
        for tokens in batches:
            for name, kl, _ in kl_to_teacher(models, teacher, tokens.to(teacher.device)):
                sums[name]["kl"] += float(kl) * tokens.numel() / every
                sums[name][f"kl_{kind}"] += float(kl) * tokens.numel() / of_kind
    for name, model in models.items():
        model.train(modes[name])
    return sums

# What was published with [1]'s code, 0-based, best first. Of a ga_s2 of nine layers only the first
# seven and all nine are known, as sets.
PUBLISHED_TEXT = """
Llama-3.2-3B | ar 0 16 11 14 7 5 9 13 2 12 1 8 27 26 \
| ar_multihop 0 13 12 16 11 7 23 14 10 5 21 25 9 8 | ga_s2 14 8 5 12 15 13 2 26 24 16 17 18 21 10 \
| mse 0 1 27 24 25 2 26 4 15 23 19 21 3 18 | ppl 0 1 27 2 24 3 26 25 4 14 15 19 16 5 \
| gla 14 8 12 5 16 15 13 2 24 17 18 26 21 10
Qwen2.5-1.5B | ar 0 16 13 22 1 14 18 15 27 | ar_multihop 0 16 20 11 13 22 12 27 15 \
| ga_s2 14 19 20 23 24 26 27 8 12 | mse 0 27 1 2 3 26 4 21 24 | ppl 0 1 27 25 26 21 2 22 24
Qwen2.5-3B | ar 0 1 27 18 20 25 24 26 21 8 12 19 23 7 35 17 33 22 \
| ar_multihop 0 1 27 21 26 16 20 5 23 24 18 6 13 3 9 22 8 17 \
| ga_s2 20 32 33 21 22 25 17 19 5 31 4 3 10 30 26 29 27 13 \
| mse 0 1 35 34 31 33 32 30 8 12 27 3 4 2 6 5 28 10 \
| ppl 0 1 35 34 32 31 33 30 27 12 6 5 9 8 29 2 4 7 \
| gla 33 32 20 25 31 21 22 30 27 17 5 19 26 7 29 28 3 15
Qwen2.5-7B | ar 0 6 27 15 16 22 1 13 14 | ar_multihop 0 27 10 6 14 16 13 22 5 \
| ga_s2 14 22 16 17 5 23 26 8 15 | mse 0 27 3 26 4 9 24 23 25 | ppl 0 27 3 26 23 25 24 9 6
"""
PUBLISHED = {
    (f"{teacher.strip()}-Instruct", score): [int(i) for i in layers]
    for teacher, *by in (line.split("|") for line in PUBLISHED_TEXT.strip().splitlines())
    for score, *layers in map(str.split, by)
}
RULES = ("uniform", "centred", "random", "random-1", "random-2", "first", "last", "published")
RULES += tuple(f"published:{score}" for score in ("ar", "ar_multihop", "mse", "ppl", "gla"))

def place_layers(how: str, L: int, k: int, seed=0, teacher_name="") -> list[int]:
    """k of L layers by a rule that looks at no data, one of RULES.

    published: the GA-S2 selection published for `teacher_name` (its last path component), and
    published:ar, ... those by other scores; published:gla is GA-S2's of GLA students.
    """
    name, score = teacher_name.rstrip("/").split("/")[-1], how.partition(":")[2] or "ga_s2"
    published = PUBLISHED.get((name, score), [])
    if how not in RULES:
        raise UserError(f"layers are placed by {', '.join(RULES)}, not by {how!r}")
    if not 0 <= k <= L:
        raise UserError(f"the number of softmax layers must be within 0..{L}, not {k}")
    known = [f"{other} ({len(layers)})" for (other, by), layers in PUBLISHED.items() if by == score]
    unordered = score == "ga_s2" and len(published) == 9 and k not in (7, 9)
    if how.startswith("published") and (k > len(published) or unordered):
        raise UserError(f"no selection of {k} layers is published for {name!r} by {score}, but for "
                        f"{', '.join(known)}")  # fmt: skip
    draw = torch.Generator().manual_seed(1000 * int(how[7:] or 0) + seed if "random" in how else 0)
    return {
        "uniform": [(i + 1) * L // k - 1 for i in range(k)],  # official, for Llama: the last is in
        "centred": [int((i + 0.5) * L / k) for i in range(k)],  # the same, moved to the middle
        "random": sorted(torch.randperm(L, generator=draw)[:k].tolist()),
        "first": list(range(k)),
        "last": list(range(L - k, L)),
        "published": published[:k],
    }[re.split("[-:]", how)[0]]

# ------------------------------------------------------------- stages 2 and 3: matching, finetuning

def distill_logits(student, teacher, batches, steps, lr=1e-4, rest_lr=7e-6, **how) -> list[dict]:
    """Stage 2, distribution matching: KL(teacher || student), mean over tokens, all parameters.

    Starts from the stage-1 student with the chosen layers restored. Constant learning rates, `lr`
    of attention and `rest_lr` of the rest (0 freezes it). how: micro_batch, checkpoint, as in
    `train`. Trains in place; returns the history ("kl").
    """
    losses = functools.partial(kl_to_teacher, {"kl": student}, teacher)
    optimizers = adamw(parameter_groups(student, lr, rest_lr))
    return train([student], optimizers, losses, batches, steps, shared=True, **how)

def finetune(student, batches, steps, lr=1e-5, **how) -> list[dict]:
    """Stage 3: cross-entropy on longer sequences, all parameters at `lr`, no teacher ("ce")."""
    def losses(tokens):
        hidden = last_hidden(student, tokens)[:, :-1]
        yield "ce", cross_entropy_loss(hidden, whole(student.lm_head.weight), tokens[:, 1:]), 1.0

    optimizers = adamw(parameter_groups(student, lr, lr))
    return train([student], optimizers, losses, batches, steps, shared=True, **how)

# ==================================================================================================
#                                           THE PLUMBING
# ==================================================================================================

# --------------------------------------------------------------------------------------- settings

def require(condition, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)

@dataclasses.dataclass
class Budget:
    """What a stage uses: tokens in all, tokens a sequence, sequences a step, learning rates."""
    tokens: int
    length: int
    batch: int
    lr: float
    rest_lr: float = 0.0

    def __post_init__(self):
        if min(self.tokens, self.batch, self.length - 7) < 1:
            raise UserError(f"a stage needs tokens, a batch and a length of at least 8, not {self}")
        if not (0 < self.lr < math.inf and 0 <= self.rest_lr < math.inf):
            raise UserError(f"a stage needs lr > 0 and rest_lr >= 0, not {self}")
        self.steps = max(1, self.tokens // (self.batch * self.length))

EMBEDDED = dict(  # the small teacher made here
    align=Budget(614_400, 128, 32, 3e-3), select=Budget(81_920, 128, 32, 1e-3, 1e-4),
    distill=Budget(245_760, 128, 32, 1e-3, 1e-4), finetune=Budget(81_920, 256, 16, 1e-4),
)  # fmt: skip
SMALL = dict(  # below 1B parameters: minutes on one GPU
    align=Budget(10_000_000, 512, 96, 2e-3), select=Budget(196_608, 1024, 16, 5e-4, 5e-5),
    distill=Budget(2_457_600, 1024, 16, 5e-4, 5e-5), finetune=Budget(400_000, 4096, 4, 2e-5),
)  # fmt: skip
PAPER = dict(  # larger ones: [1], stage 3 [2]
    align=Budget(10**8, 512, 96, 1e-3), select=Budget(2 * 10**8, 4096, 32, 1e-4, 7e-6),
    distill=Budget(6 * 10**8, 4096, 32, 1e-4, 7e-6), finetune=Budget(10**8, 16384, 8, 1e-5),
)  # fmt: skip

def parse(argv=None) -> argparse.Namespace:
    """The command line; what depends on the teacher stays None until `resolve`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.epilog = (
        "Each stage S of align, select, distill, finetune takes --S-tokens, --S-length, --S-batch, "
        "--S-lr; select and distill take --S-rest-lr (of what is not attention; 0 freezes it)."
    )
    add = parser.add_argument
    add("--teacher", default="", help="hub id or folder: Llama, Mistral, Qwen2, Qwen3 [made here]")
    add("--data", default="", help="hub id, .txt, .jsonl, .parquet or a folder, .npy of ids")
    add("--data-config", help="the configuration of a hub dataset, e.g. sample-10BT")
    add("--text-column", default="text", help="the column of text or, with --chat, messages")
    add("--chat", action="store_true", help="render the column with the tokenizer's chat template")
    add("--softmax-layers", type=int, metavar="K", help="softmax layers [embedded 1, else L/4]")
    add("--select", default="ga-s2", help=f"3,7,11 or {', '.join((*SELECTORS, *RULES))}")
    add("--early-stop", type=int, default=0, help="evaluations with the same K best that end it")
    add("--evaluate-every", type=int, help="steps between evaluations [half; to stop early: tenth]")
    add("--candidates-at-once", type=int, help="candidates in memory at a time [L/8]")
    add("--baselines", help="further rows: all-linear, any of --select, or none")
    add("--mixer", default="gdn", help=f"the linear attention: {', '.join(MIXERS)}")
    add("--out", default="runs/default", help="the run folder; the same command goes on in it")
    add("--seed", type=int, default=0, help="of teacher, data order, gates and random baselines")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of the teacher [on a GPU bfloat16]")
    add("--micro-batch", type=int, help="sequences at a time [the batch, halved until it fits]")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute [from 1B]")
    add("--trust-remote-code", action="store_true", help="run code of the teacher or tokenizer")
    add("--shard", action="store_true", help="with torchrun: cut each student over the processes")
    add("--held-out", type=int, default=64, help="sequences in each of validation and test part")
    add("--dry-run", action="store_true", help="print the plan and stop")
    hidden = dict(help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    for stage, budget in PAPER.items():
        for name, value in dataclasses.asdict(budget).items():
            if value:  # stages 1 and 3 have no rest_lr
                add(f"--{stage}-{name.replace('_', '-')}", type=type(value), **hidden)
    return parser.parse_args(argv)

def resolve(s, teacher):
    """Fill in what depends on the teacher, its weights apart, and refuse what cannot work."""
    require(bool(s.teacher) == bool(s.data), "--teacher and --data go together or not at all")
    text, world = s.chat or s.text_column != "text", rank_and_world()[1]
    if not s.teacher and (text or s.data_config or s.dtype):
        raise UserError("--chat, --data-config, --text-column and --dtype are for a --teacher")
    if s.data_config and Path(s.data).exists():
        raise UserError(f"--data-config is for a hub dataset, and {s.data} is a local path")
    if s.data.endswith(".npy") and text:
        raise UserError("--chat and --text-column are for text: a .npy holds token ids")
    for name in ("candidates_at_once", "evaluate_every", "micro_batch", "early_stop", "seed"):
        if not 0 <= (getattr(s, name) or 0) < 2**32:
            raise UserError(f"--{name.replace('_', '-')} must be within 0..2^32-1")
    require(s.held_out > 0, f"--held-out must be at least 1 sequence, not {s.held_out}")
    require(s.early_stop != 1, "--early-stop must be 0 or at least 2: one evaluation agrees alone")
    with one_sentence(f"cannot use --device {s.device}"):
        torch.empty(1, device=s.device).item()
    if s.device not in ("cpu", "cuda") and world > 1:
        raise UserError(f"torchrun gives each process its GPU: --device cuda, not {s.device}")
    require(world > 1 or not s.shard, "--shard is for several processes: start them with torchrun")
    check_mixer(s.mixer)
    L, large, s.budgets = len(teacher.model.layers), teacher.num_parameters() >= 10**9, {}
    for stage, default in (PAPER if large else SMALL if s.teacher else EMBEDDED).items():
        values = dataclasses.asdict(default).items()
        s.budgets[stage] = Budget(*(getattr(s, f"{stage}_{n}", value) for n, value in values))
    # of each of the two parts
    s.held_out_tokens = s.held_out * max(s.budgets[of].length for of in ("select", "distill"))
    s.checkpointing = large if s.checkpointing is None else s.checkpointing
    rows = "none" if large else "all-linear,uniform,centred,random"
    rows += ",first,last,random-1,random-2" if s.teacher and not large else ""
    s.select, s.baselines = s.select.replace(" ", ""), (s.baselines or rows).replace(" ", "")
    s.baselines = [name for name in s.baselines.split(",") if name != "none"]
    names, k = (*SELECTORS, *RULES), max(1, L // 4) if s.teacher else 1
    known, s.vocab, s.placed = ", ".join(names), teacher.config.vocab_size, {"all-linear": []}
    if unknown := set(s.baselines) - {"all-linear", *names}:
        raise UserError(f"--baselines knows all-linear, {known}, not {unknown.pop()!r}")
    if re.fullmatch(r"\d+(,\d+)*", s.select):
        s.placed["given"] = check_layers(map(int, s.select.split(",")), L)
        s.select, k = "given", len(s.placed["given"])
    elif s.select not in names:
        raise UserError(f"--select must be {known} or layers such as 3,7,11, not {s.select!r}")
    k = s.softmax_layers = k if s.softmax_layers is None else s.softmax_layers
    fits = 1 <= k <= L and k == len(s.placed.get("given", range(k)))
    require(fits, f"--softmax-layers must be within 1..{L}, as many as --select lists, not {k}")
    for name in {s.select, *s.baselines} & set(RULES):
        s.placed[name] = place_layers(name, L, k, s.seed, s.teacher)

# what loaders raise for files that are missing, broken, too new or of another kind
UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, AssertionError,
              ImportError, SafetensorError, StrictDataclassError)  # fmt: skip

@contextlib.contextmanager
def one_sentence(beginning: str):
    """What a library's loader raises, as one sentence."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{beginning}: " + str(error).strip().split("\n")[0]) from error

# ------------------------------------------------------------------------------------------- data

def seeded(*name) -> torch.Generator:
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

def byte_tokenizer():
    """<pad> 0, <eos> 1, <unk> 2, and every byte b as token b + 3; it needs no files."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary |= {character: b + 3 for b, character in bytes_to_unicode().items()}
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None)
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=[], **special)

class EmbeddedCorpus:
    """Text that is on every machine, as bytes, and in-context recall: half of every batch each.

    Text: CPython's standard library and the English of pydoc_data.topics, split by file. Recall: as
    many pairs `k v k v ...` of distinct keys and random values as fit, then the keys in another
    order, each with its value. The selection depends on its data: on text alone another layer wins.
    """
    def __init__(self, seed: int):
        import pydoc_data.topics
        self.seed, library = seed, Path(os.__file__).parent
        skip = ("site-packages", "dist-packages", "test", "pydoc_data", "idlelib", "lib2to3")
        files = sorted([*library.glob("*.py"), *library.glob("*/*.py")])
        texts = [file.read_bytes() for file in files if file.parts[len(library.parts)] not in skip]
        texts += [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
        self.text = {"train": range(8), "validation": (8,), "test": (9,)}  # file number modulo 10
        for part, numbers in self.text.items():
            joined = b"".join(text for i, text in enumerate(texts) if i % 10 in numbers)
            self.text[part] = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
        self.identity = [sum(map(len, texts)), hashlib.sha1(b"".join(texts)).hexdigest()]

    def batches(self, stage: str, b: Budget):
        """A function of the step -> tokens [batch, length] of the train part."""
        require(b.batch > 1, f"each half of a batch is of a kind: --{stage}-batch of 2 or more")
        draw = functools.partial(seeded, self.seed, stage)
        return lambda step: torch.cat(self.sample("train", b.batch, b.length, draw(step)))

    def held_out(self, part: str, count: int, length: int) -> dict[str, list]:
        """{"text": [tokens, ...], "recall": [...]}, `count` sequences in all."""
        halves = self.sample(part, max(2, count), length, seeded(self.seed, part, length))
        return {kind: list(half.split(32)) for kind, half in zip(("text", "recall"), halves)}

    def sample(self, part, count, length, draw, pairs=None):
        """(text, recall), [count / 2, length] each, `pairs` of keys and values in a row."""
        n, pairs = count // 2, pairs or min(length // 4, 32)
        starts = torch.randint(len(self.text[part]) - length, (count - n, 1), generator=draw)
        text = self.text[part][starts + torch.arange(length)].long() + 3  # see byte_tokenizer
        known = recall_prompts(*self.words(), pairs, n, draw)[0][:, :-1].view(n, pairs, 2)
        rounds = -(-length // (2 * pairs))
        order = torch.rand(n, rounds, pairs, generator=draw).argsort(2).flatten(1)
        asked = known.gather(1, order[..., None].expand(-1, -1, 2))
        return text, torch.cat([known, asked], 1).flatten(1)[:, :length]

    def words(self):
        """32 keys and 16 values, single bytes: chance is 6 %."""
        return torch.arange(68, 100), torch.arange(100, 116)

    def recall(self, model, count=256) -> dict:
        """The share of right answers to prompts of 32 pairs."""
        prompts = recall_prompts(*self.words(), 32, count, seeded(self.seed, "recall"))
        return {"recall": recall_accuracy(model, *prompts)}

class TokenCorpus:
    """A stream of token ids [N]: first the validation part, then the test part, then train."""

    def __init__(self, ids, held_out: int, seed: int, tokenizer=None):
        self.seed, self.tokenizer = seed, tokenizer
        parts = np.split(ids, (held_out, 2 * held_out))
        self.parts = dict(zip(("validation", "test", "train"), parts))
        some = ids[:: max(1, len(ids) // 10**6)]
        self.identity = [len(ids), held_out, hashlib.sha1(some.tobytes()).hexdigest()]

    def batches(self, stage: str, b: Budget):
        """A function of the step -> tokens [batch, length] of the train part, shuffled."""
        rows = self._rows("train", b.length)
        order = torch.randperm(len(rows), generator=seeded(self.seed, stage)).numpy()
        passes = b.steps * b.batch / len(rows)
        if passes > 1 and rank_and_world()[0] == 0:
            print(f"{stage} makes {passes:.1f} passes over the data", file=sys.stderr)

        def at(step):
            mine = order[np.arange(step * b.batch, (step + 1) * b.batch) % len(rows)]
            return torch.from_numpy(rows[mine].astype(np.int64))
        return at

    def held_out(self, part: str, count: int, length: int) -> dict[str, list]:
        rows = self._rows(part, length)[:count].astype(np.int64)
        return {"text": list(torch.from_numpy(rows).split(16))}

    def _rows(self, part, length):
        ids = self.parts[part]
        if len(ids) < length:
            raise UserError(
                f"the {part} part has {len(ids)} tokens, too few for a sequence of {length}: "
                "give more data, shorter sequences or a smaller --held-out")  # fmt: skip
        return ids[: len(ids) // length * length].reshape(-1, length)

    def words(self):
        """Keys and values for associative recall: the most frequent words of one token."""
        known = self.tokenizer.get_vocab() if self.tokenizer else {}
        ids = sorted(i for word, i in known.items() if re.fullmatch("[Ġ▁][a-z]{3,}", word))
        sentence = "ar needs a tokenizer with words of one token to ask for: this one has"
        require(len(ids) >= 128, f"{sentence} {len(ids)}, and 128 are needed")
        return torch.tensor(ids[:128:2]), torch.tensor(ids[1:128:2])

    def recall(self, model, lengths=(512, 1024, 2048, 4096), count=32) -> dict:
        """The share of needles found, one or one of four, in so many tokens of the test part."""
        found, filler = {}, self.parts["test"]
        for length, needles in itertools.product(lengths, (1, 4)):
            if length < len(filler):
                draw = seeded(self.seed, length, needles)
                prompts = needle_prompts(self.tokenizer, filler, needles, count, length, draw)
                found[f"{needles} in {length}"] = recall_accuracy(model, *prompts)
        mean = sum(found.values()) / len(found) if found else None  # too little text to hide in
        return {"recall": mean, "needles": found}

def load_tokens(s, tokenizer):
    """--data as ids [N]: a .npy as it is; text tokenised once and packed, in `out`/tokens-KEY.npy.

    Documents in a seeded order, with the tokenizer's own special tokens, each closed with EOS; as
    many as the largest stage and the held-out parts take.
    """
    file = path = Path(s.data)
    if path.suffix != ".npy":
        count = max(b.tokens for b in s.budgets.values()) + 2 * s.held_out_tokens
        files = [f for f in (path, *sorted(path.rglob("*"))) if f.is_file()]
        stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        name = key([s.data, s.data_config, s.text_column, s.chat, s.teacher, s.seed, count, stats])
        file = Path(s.out) / f"tokens-{name}.npy"
        if not file.exists() and rank_and_world()[0] == 0:
            documents = load_documents(s, files)
            with one_sentence(f"cannot read --data {s.data}"):
                ids = itertools.islice(tokenised(documents, s, tokenizer), count)
                ids = np.fromiter(tqdm(ids, "tokenise", count, unit_scale=True), np.uint32)
                require(len(ids), "it holds no text")
            write(file, ids)
        gather("tokenised")
    with one_sentence(f"cannot load --data {s.data}"):
        require(file.exists(), "there is no such file")
        ids = np.load(file, mmap_mode="r")
        row = ids.ndim == 1 and len(ids) and ids.dtype.kind in "iu"
        right = row and 0 <= ids.min() <= ids.max() < s.vocab
        require(right, f"it must hold a row of token ids, integers below {s.vocab}")
    return ids

def load_documents(s, files):
    """The rows of --data, whose local files are `files`, as a streamed, shuffled dataset."""
    kinds = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    path, streamed = Path(s.data), dict(split="train", streaming=True)
    with one_sentence(f"cannot load --data {s.data}, a path or hub id"):
        # not by `import`, which the hub would demand of whoever loads a student
        datasets = importlib.import_module("datasets")
        if not path.exists():
            rows = datasets.load_dataset(s.data, s.data_config, **streamed)
        elif any((path / f"dataset_{what}.json").exists() for what in ("info", "dict")):
            rows = datasets.load_from_disk(s.data)
            rows = (rows["train"] if isinstance(rows, dict) else rows).to_iterable_dataset()
        else:
            found = {kinds[file.suffix] for file in files if file.suffix in kinds}
            require(any(file.stat().st_size for file in files), "it is empty")
            some = ", ".join(sorted(found)) or "none"
            require(len(found) == 1, f"it must hold text, json or parquet files alone, not {some}")
            names = [glob.escape(str(file)) for file in files if file.suffix in kinds]
            how = {"sample_by": "document"} if found == {"text"} else {}
            rows = datasets.load_dataset(*found, data_files=names, **how, **streamed)
    return rows.shuffle(seed=s.seed, buffer_size=10_000)

def tokenised(documents, s, tokenizer):
    """Yields the ids of all documents, each closed with EOS."""
    eos, column = tokenizer.eos_token_id, s.text_column
    encode = tokenizer.apply_chat_template if s.chat else tokenizer
    for rows in documents.iter(256):
        columns = ", ".join(rows)
        require(column in rows, f"it has no column {column!r}: --text-column is one of {columns}")
        texts = [text for text in rows[column] if text]
        right = all(isinstance(text, list if s.chat else str) for text in texts)
        require(right, f"{column!r} must hold text or, for --chat, lists of messages")
        for ids in encode(texts)["input_ids"] if texts else ():
            yield from ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

# ------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, teacher, held_out: dict[str, list]) -> dict:
    """{"kl", "kl_<kind>" of each kind, "perplexity" of "text"} over {kind: [tokens, ...]}."""
    loss, count = 0.0, sum(tokens[:, 1:].numel() for tokens in held_out["text"])
    for tokens in held_out["text"]:
        labels = tokens[:, 1:].to(model.device)
        hidden = last_hidden(model, tokens.to(model.device))[:, :-1]
        loss += float(cross_entropy_loss(hidden, model.lm_head, labels)) * labels.numel() / count
    return {**held_out_kl({"": model}, teacher, held_out)[""], "perplexity": math.exp(loss)}

def recall_prompts(keys, values, pairs: int, count: int, draw):
    """Prompts `k v k v ... q` [count, 2 pairs + 1], of distinct keys; answers [count, 1]."""
    k = keys[torch.rand(count, len(keys), generator=draw).argsort(1)[:, :pairs]]
    v = values[torch.randint(len(values), (count, pairs), generator=draw)]
    asked = torch.randint(pairs, (count, 1), generator=draw)
    prompts = torch.cat([torch.stack([k, v], -1).flatten(1), k.gather(1, asked)], 1)
    return prompts, v.gather(1, asked)

NEEDLE = "\nThe special magic number for {} is {}.\n"
QUESTION = "\nWhat is the special magic number for {0}? The special magic number for {0} is"
WORDS = "able bold calm eager fancy gentle happy jolly kind lucky merry noble proud quiet wise zany"

def needle_prompts(tokenizer, filler, needles: int, count: int, length: int, draw):
    """Recall as language: prompts [count, length] of filler [N] with `needles` sentences at random
    places, each a number of five digits for a name, and a question for one; answers [count, A]."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    bos = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]
    words, prompts, answers = WORDS.split(), [], []
    while len(prompts) < count:
        drawn = torch.randperm(256, generator=draw)[:needles].tolist()
        names = [f"{words[i // 16]}-{words[i % 16]}" for i in drawn]
        numbers = torch.randint(10_000, 100_000, (needles,), generator=draw).tolist()
        hidden = [encode(NEEDLE.format(*pair)) for pair in zip(names, numbers)]
        asked = QUESTION.format(names[0])
        question = encode(asked)
        # as it is written behind the question, which may be other tokens than on its own
        answer = encode(f"{asked} {numbers[0]}")[len(question) :]
        if answers and len(answer) != len(answers[0]):
            continue  # another number: with some tokenizers their lengths differ
        room = length - len(bos) - len(question) - sum(map(len, hidden))
        start = int(torch.randint(len(filler) - room, (1,), generator=draw))
        text = filler[start : start + room].tolist()
        places = torch.randint(room + 1, (needles,), generator=draw).tolist()
        for place, sentence in sorted(zip(places, hidden), reverse=True):
            text[place:place] = sentence
        prompts.append(bos + text + question)
        answers.append(answer)
    return torch.tensor(prompts), torch.tensor(answers)

@torch.no_grad()
def recall_accuracy(model, prompts, answers, batch: int = 32) -> float:
    """The share of prompts [N, P] that the model, written greedily, goes on with answer [N, A]."""
    right, A = 0, answers.shape[1]
    greedy = dict(max_new_tokens=A, min_new_tokens=A, do_sample=False, num_beams=1)
    greedy |= dict(repetition_penalty=1.0, pad_token_id=0)
    for tokens, answer in zip(prompts.split(batch), answers.split(batch)):
        tokens = tokens.to(model.device)
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), **greedy)
        right += int((written[:, -A:].cpu() == answer).all(1).sum())
    return right / len(prompts)

@torch.no_grad()
def cache_bytes(model, length: int) -> int:
    """Bytes of the cache of one sequence: keys and values grow with its length, states do not."""
    tokens = torch.ones(1, length, dtype=torch.long, device=model.device)
    output = model.model(input_ids=tokens, use_cache=True)
    cache = next(value for value in output.values() if isinstance(value, Cache))
    states = [x.tensors if hasattr(x, "tensors") else (x.keys, x.values) for x in cache.layers]
    return sum(t.nbytes for state in states for t in state)

# ------------------------------------------------------------------------------------ the teacher

EMBEDDED_TEACHER = transformers.LlamaConfig(
    vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=6, head_dim=32,
    num_attention_heads=2, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True,
    max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0})  # fmt: skip

def embedded_teacher(corpus: EmbeddedCorpus, out, seed: int, device="cpu", steps=220):
    """A small Llama that recalls 32 pairs, trained in about a minute; in `out`/teacher-KEY/model.

    What makes recall appear so fast: Muon on the matrices, 4, 8, 16, then 32 pairs, and in every
    layer alike a planted head that starts out looking at the token before.
    """
    folder = Path(out) / f"teacher-{key([seed, steps, corpus.identity])}"
    if (folder / "model").exists():
        return LlamaForCausalLM.from_pretrained(folder / "model").to(device).eval()
    torch.manual_seed(seed)
    teacher = LlamaForCausalLM(copy.deepcopy(EMBEDDED_TEACHER)).to(device)
    with torch.no_grad():
        for layer in teacher.model.layers:
            look_back(layer.self_attn, teacher.model.rotary_emb.inv_freq)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

    def batches(step):
        pairs = 4 << min(3, step // 35)
        length, draw = max(16, 4 * pairs), seeded(seed, "teacher", step)
        return torch.cat(corpus.sample("train", 32 * max(1, 64 // length), length, draw, pairs))

    def losses(tokens):
        text, recall = tokens.chunk(2)
        weights = torch.full_like(recall[:, 1:], 0.1, dtype=torch.float)
        weights[:, recall.shape[1] // 2 :: 2] = 1.0  # the next token is the value of a queried key
        for name, part, mask in (("text", text, None), ("recall", recall, weights)):
            hidden = last_hidden(teacher, part)[:, :-1]
            yield name, cross_entropy_loss(hidden, teacher.lm_head, part[:, 1:], mask), 1.0

    matrices = [p for p in teacher.model.layers.parameters() if p.ndim == 2]
    others = [p for p in teacher.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    train([teacher], [muon, adam], losses, batches, steps, checkpoint=Checkpoint(folder),
          schedule=lambda step, n: min(1, (step + 1) / 20, (n - step) / (0.4 * n)))  # fmt: skip
    teacher.save_pretrained(folder / "new")
    byte_tokenizer().save_pretrained(folder / "new")
    os.replace(folder / "new", folder / "model")
    return teacher

def look_back(attn, inv_freq, sharpness: float = 20.0) -> None:
    """Biases that let the first head of `attn` start out attending to the token before.

    RoPE turns a constant query and key into a score of their distance alone; it is largest at
    distance 1, sum_f c cos((distance - 1) f), if the query's bias is the key's turned back by one.
    """
    Dh = attn.head_dim
    w = torch.full_like(inv_freq, math.sqrt(sharpness * math.sqrt(Dh) / (Dh // 2)))
    attn.k_proj.bias[:Dh] = torch.cat([w, 0 * w])
    attn.q_proj.bias[:Dh] = torch.cat([w * inv_freq.cos(), -w * inv_freq.sin()])

def skeleton(s):
    """The teacher without weights, on the meta device; UserError says what --teacher is instead."""
    config, known = EMBEDDED_TEACHER, [base.config_class.model_type for base in HYBRIDS]
    with one_sentence(f"cannot use --teacher {s.teacher}, a folder or hub id"):
        if s.teacher:
            code = dict(trust_remote_code=s.trust_remote_code)
            config = transformers.AutoConfig.from_pretrained(s.teacher, **code)
        kind = config.model_type
        require(kind in known, f"it is a {kind!r} model; supported are {', '.join(known)}")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

def load_teacher(s):
    """(teacher, tokenizer) of --teacher, in --dtype on --device; UserError says what is wrong."""
    dtype = s.dtype or ("bfloat16" if s.device.startswith("cuda") else "float32")
    code = dict(trust_remote_code=s.trust_remote_code)
    how = dict(dtype=getattr(torch, dtype), output_loading_info=True)
    with one_sentence(f"cannot use --teacher {s.teacher}, a folder or hub id with a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(s.teacher, **code)
        teacher, info = AutoModelForCausalLM.from_pretrained(s.teacher, **how, **code)
        wrong = [*info["missing_keys"], *info["mismatched_keys"]]
        require(not wrong, f"it lacks {len(wrong)} of its weights, such as {wrong[:1]}")
    return teacher.to(s.device).eval(), tokenizer

# ---------------------------------------------------------------------------------------- the run

def key(parts) -> str:
    """Eight letters for all that a result depends on."""
    text = json.dumps(parts, default=dataclasses.asdict)
    return hashlib.sha1(text.encode()).hexdigest()[:8]

def run(s, teacher, tokenizer, corpus) -> dict:
    """All stages, then report.json, report.md and student/ in the run folder; returns the report.

    A stage is keyed by data, losses, mixer and the settings up to it: another K, baseline or later
    learning rate pays for itself alone. Of the processes of torchrun the first one evaluates and
    writes.
    """
    out, b, first = Path(s.out), s.budgets, rank_and_world()[0] == 0
    names = list(dict.fromkeys([s.select, *s.baselines]))
    asked = recall_prompts(*corpus.words(), 32, 256, seeded(s.seed, "ar")) if "ar" in names else ()
    code = [of for of in MIXERS[s.mixer].__mro__ if issubclass(of, LinearAttention)]
    code += [alignment_loss, kl_loss, cross_entropy_loss, adamw, parameter_groups]
    weights = [int(p.detach().view(torch.uint8).sum()) for p in teacher.parameters()]
    base = [s.teacher, teacher.num_parameters(), str(teacher.dtype), s.seed, s.mixer]
    base += [*map(inspect.getsource, code), corpus.identity, weights]
    batches = {stage: corpus.batches(stage, budget) for stage, budget in b.items()}
    validation = corpus.held_out("validation", s.held_out, b["select"].length)
    test = corpus.held_out("test", s.held_out, b["distill"].length)
    stages = {}  # the folder's name -> its Checkpoint

    def checkpoint(name, *after, keep=True):
        folder = out / f"{name}-{key([base, *after])}"
        return stages.setdefault(folder.name, Checkpoint(folder, keep))

    def of_group(sets, early):
        after = [b["align"], b["select"], s.evaluate_every, s.held_out, early, [*sets.values()]]
        return checkpoint(f"select-{'-'.join(map(str, sets))}", *after, keep=False)

    def train_stage(name, stage, saved, student, *teacher, **rates):
        torch.manual_seed(s.seed)
        stage = functools.partial(sharded, stage) if s.shard else stage
        return stage(student, *teacher, batches[name], b[name].steps, b[name].lr, **rates,
                     micro_batch=s.micro_batch, checkpoint=saved)  # fmt: skip

    torch.manual_seed(s.seed)
    student = transfer_attention(teacher, mixer=s.mixer)
    if s.checkpointing:
        recompute_activations(student)
    aligned = train_stage("align", align_hidden_states, checkpoint("align", b["align"]),
                          student, teacher, final_lr=b["align"].lr / 100)  # fmt: skip
    title = "kl-guided" if s.select in ("ga-s2", "greedy") else s.select
    found, made = {"teacher": {"chosen": [*range(len(teacher.model.layers))]}}, {}
    for name in names:
        if name in s.placed:
            one = Selection(s.placed[name])
        else:
            torch.manual_seed(s.seed)
            one = select_layers(
                student, teacher, batches["select"], validation, s.softmax_layers,
                b["select"].steps, name, aligned, lambda model: recall_accuracy(model, *asked),
                made, lr=b["select"].lr, rest_lr=b["select"].rest_lr, shard=s.shard,
                at_once=s.candidates_at_once, early_stop=s.early_stop, checkpoint=of_group,
                micro_batch=s.micro_batch, evaluate_every=s.evaluate_every)  # fmt: skip
            one = gather(one)[0]  # ties may break differently on another GPU
        found[title if name == s.select else name] = dataclasses.asdict(one)
    selection = found[title] = {"name": title, **found[title]}
    if title == "kl-guided":
        curves = selection["rounds"][0]["curves"]
        selection["ranking_of_kind"] = {k: best_layers(curves, kind=f"kl_{k}") for k in validation}
    if first:
        write(out / "selection.json", json.dumps(selection, indent=1))

    rows = []
    for name, one in found.items():
        model, layers, rest_lr = teacher, sorted(one["chosen"]), b["distill"].rest_lr
        trained = [b["align"], layers, b["distill"]]
        saves = checkpoint("distill", *trained), checkpoint("finetune", *trained, b["finetune"])
        evaluated = [base, *trained, b["finetune"], s.held_out, name == "teacher"]
        file = out / f"row-{key(evaluated)}.json"
        done = gather(file.exists())[0]
        if name != "teacher" and (name == title or not done):
            model = restore_attention(student, teacher, layers)
            train_stage("distill", distill_logits, saves[0], model, teacher, rest_lr=rest_lr)
            train_stage("finetune", finetune, saves[1], model)
        if not first:
            continue
        if name == title:
            model.save_pretrained(out / "student")
            tokenizer.save_pretrained(out / "student")
        if not done:
            row = {"softmax_layers": layers, **evaluate(model, teacher, test)}
            row |= {**corpus.recall(model), "cache_bytes": cache_bytes(model, b["finetune"].length)}
            write(file, json.dumps(row))
        cost = {f"selection_{what}": one.get(what, 0) for what in ("tokens", "evaluations")}
        rows.append({"name": name, **json.loads(file.read_text()), **cost})
    if not first:
        return {}
    report = {"teacher": s.teacher or "embedded", "machine": machine(s.device), "rows": rows}
    report |= {"selection": selection, "selections": found, "stages": stage_rows(stages.values())}
    write(out / "report.json", json.dumps(report, indent=1))
    write(out / "report.md", markdown(report))
    return report

def recompute_activations(model) -> None:
    """Gradient checkpointing of every decoder layer in training (renamed within transformers 5)."""
    new = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()

def machine(device: str) -> str:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"

def stage_rows(checkpoints) -> list[dict]:
    """What every stage of the run used, and its first and last loss."""
    found = []
    for checkpoint in checkpoints:
        rows = [row for row in checkpoint.history() if "loss" in row]
        if rows:
            total = {what: sum(row[what] for row in rows) for what in ("tokens", "seconds")}
            last = {what: rows[-1][what] for what in ("step", "micro_batch")}
            found.append({
                "stage": checkpoint.folder.name, **last, **total,
                "tokens_per_second": round(total["tokens"] / total["seconds"]),
                "peak_bytes": max(row["peak_bytes"] for row in rows),
                "losses": [rows[0]["loss"], rows[-1]["loss"]],
            })  # fmt: skip
    return found

def cell(value) -> str:
    """A value in a table: every kind in its own form."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {cell(v)}" for name, v in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(map(cell, value)) or "-"
    if isinstance(value, float) and value < 1000:
        return f"{value:,.4g}"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}"
    return value or "-"

def table(rows: list[dict]) -> str:
    """A Markdown table of rows with the same keys."""
    lines = [rows[0], ["---"] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

def markdown(report) -> str:
    """report.md: the rows, the stages, the curves of the selection."""
    parts = [f"# {report['teacher']}\n", table(report["rows"]),
             "KL (nats) and perplexity: test part. Every row but the teacher had the same stages 2 "
             f"and 3. {report['machine']}.\n", table(report["stages"])]  # fmt: skip
    for scored in report["selection"].get("rounds", []):
        curves = scored["curves"]
        parts.append(f"Validation KL of the candidates by step, {scored['kept']} kept:\n")
        by_step = {i: {str(point["step"]): point["kl"] for point in curves[i]} for i in curves}
        parts.append(table([{"layer": i, **by_step[i]} for i in best_layers(curves)]))
    for kind, ranking in report["selection"].get("ranking_of_kind", {}).items():
        parts.append(f"Ranked on {kind} alone, best first: {ranking}\n")
    ranked = {name: x["ranking"] for name, x in report["selections"].items() if x.get("ranking")}
    if len(ranked) > 1:  # Spearman: the correlation of the places that each gives to the layers
        places = torch.tensor([*ranked.values()]).argsort().double()
        rows = zip(ranked, torch.corrcoef(places).tolist())
        parts.append("Rank correlation (Spearman) of the selectors:\n")
        parts.append(table([{"selector": name, **dict(zip(ranked, row))} for name, row in rows]))
    return "\n".join(parts)

def plan(s, teacher) -> str:
    """What a run will train, by arithmetic."""
    L, K, names = len(teacher.model.layers), s.softmax_layers, {s.select, *s.baselines}
    gates = -(-100 // s.budgets["select"].steps)  # at least 100 steps
    runs = {"ga-s2": L, "gr-s2": L, "avg-s2": 2 * L, "greedy": sum(range(L - K + 1, L + 1))}
    runs |= {"gates": gates, "gates+ga-s2": gates + min(L, 2 * K)}  # what is shared is done once
    times = dict.fromkeys(s.budgets, len(names))
    times |= {"align": 1, "select": sum(runs.get(name, 0) for name in names)}
    rows = [{"stage": stage, "times": times[stage], **vars(b)} for stage, b in s.budgets.items()]
    memory = 18 * teacher.num_parameters() / 2**30
    return (f"{s.teacher or 'embedded teacher'}: {L} layers, {K} stay softmax; a student with "
            f"optimizer takes {memory:.1f} GiB beside activations\n{table(rows)}")

def join_torchrun(s):
    """Join the other processes, if torchrun started this one; returns the store they share."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    gpus = torch.cuda.device_count() if s.device.startswith("cuda") else 0
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    # NCCL wants a GPU for each process; gloo takes several on one, and CPUs.
    backend = "gloo" if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus else None
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                            timeout=datetime.timedelta(days=1))  # fmt: skip
    return store

def main(argv=None) -> int:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # dcp in one process
    s = parse(argv)
    store = join_torchrun(s)
    first = rank_and_world()[0] == 0
    try:
        resolve(s, bones := skeleton(s))
        if first:
            print(plan(s, bones))
        if s.dry_run:
            return 0
        with one_sentence(f"cannot write in --out {s.out}"):
            Path(s.out).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(Path(s.out) / ".lock", timeout=0)
        with lock if first else contextlib.nullcontext():
            if s.teacher:
                teacher, tokenizer = load_teacher(s)
                ids = load_tokens(s, tokenizer)
                corpus = TokenCorpus(ids, s.held_out_tokens, s.seed, tokenizer)
            else:
                corpus, tokenizer = EmbeddedCorpus(s.seed), byte_tokenizer()
                if first:
                    embedded_teacher(corpus, s.out, s.seed, s.device)
                gather("the first process has made the teacher, the others load it")
                teacher = embedded_teacher(corpus, s.out, s.seed, s.device)
            report = run(s, teacher, tokenizer, corpus)
            gather("the report is written")
        if first:
            print(table(report["rows"]))
            chosen = report["selection"]["chosen"]
            print(f"Softmax layers, best first: {chosen}; see {s.out}/report.md")
        return 0
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from the last save in {s.out}", file=sys.stderr)
        return 130
    except filelock.Timeout:
        error = f"{s.out} is in use by another process: give another --out"
    except (UserError, FloatingPointError) as what:
        error = what
    if store is None or store.add("errors", 1) == 1:  # one process says it for all
        print(f"error: {error}", file=sys.stderr)
    return 1

if __name__ == "__main__":
    # Not as __main__: a saved student must be able to say which file its class is in.
    code = importlib.import_module("hybrid_distill").main()
    sys.stdout.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)  # the threads behind torch.distributed may abort an orderly end
    sys.exit(code)
