"""Tests of hybrid_distill.py and kernels.py: `pytest`, no GPU and no network needed."""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, dynamic_module_utils
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.cache_utils import Cache

import hybrid_distill as hd

HERE = Path(__file__).parent
SIZES = dict(vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
             num_attention_heads=4, max_position_embeddings=2048, pad_token_id=0,
             bos_token_id=None, eos_token_id=1)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
        "original_max_position_embeddings": 128}
CONFIGS = {  # what differs: GQA, head_dim, biases, q/k norms, tied embeddings, RoPE, sliding window
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=12, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True,
                         rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=8),
}
GREEDY = dict(do_sample=False, pad_token_id=0)
FILES = ("hybrid_distill.py", "kernels.py")

def make_teacher(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[family].__class__(**{**CONFIGS[family].to_dict(), **changes})
    teacher = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if p.ndim < 2:  # away from the first 0 and 1 of biases and norms: losing one must show
                p.add_(0.3 * torch.randn_like(p))
            elif "self_attn" in name:
                p.mul_(8)
    return teacher

def make_student(teacher, kept=(), seed=1):
    torch.manual_seed(seed)
    return hd.transfer_attention(teacher, kept)

def tokens(*shape, seed=0):
    return torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(seed))

def same(a, b, tolerance=2e-5):
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))

def cache_of(output):
    return next(value for value in output.values() if isinstance(value, Cache))

def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())

# ------------------------------------------------------------------------------ mixer and stage 0

@pytest.mark.parametrize("family", CONFIGS)
def test_every_mixer_head_is_the_teachers_head(family):
    teacher = make_teacher(family)
    attn, x = teacher.model.layers[1].self_attn, torch.randn(2, 5, 32)
    mixer = hd.GatedDeltaNet.from_attention(attn)
    Dh, H = attn.head_dim, mixer.num_heads
    for name in ("q_proj", "k_proj", "v_proj"):
        theirs = getattr(attn, name)(x).unflatten(-1, (-1, Dh))
        theirs = theirs.repeat_interleave(H // theirs.shape[2], dim=2)
        same(getattr(mixer, name)(x).unflatten(-1, (-1, Dh)), theirs, 1e-6)
    y = torch.randn(2, 5, H * Dh)
    same(mixer.o_proj(y), attn.o_proj(y), 1e-6)
    for norm in ("q_norm", "k_norm") if family == "qwen3" else ():
        assert torch.equal(getattr(mixer, norm).weight, getattr(attn, norm).weight)

@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_the_mixer_is_its_equations(family):
    m = make_student(make_teacher(family)).model.layers[0].self_attn.double()
    m.o_norm.weight.uniform_(0.5, 1.5)
    m.a_proj.weight.mul_(50)
    x = torch.randn(2, 9, 32, dtype=torch.double)
    heads = (2, 9, m.num_heads, m.head_dim)
    q, k, v = m.q_proj(x).view(heads), m.k_proj(x).view(heads), F.silu(m.v_proj(x).view(heads))
    if family == "qwen3":
        q, k = m.q_norm(q), m.k_norm(k)
    q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
    alpha = torch.exp(-m.A_log.exp() * F.softplus(x @ m.a_proj.weight.T + m.dt_bias))
    beta = torch.sigmoid(x @ m.b_proj.weight.T)
    S, outputs = torch.zeros(2, m.num_heads, m.head_dim, m.head_dim, dtype=torch.double), []
    for t in range(9):
        S = alpha[:, t, :, None, None] * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * m.head_dim**-0.5)
    o = torch.stack(outputs, 1)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * m.o_norm.weight
    o = o * F.silu((x @ m.g_proj.weight.T).view(heads))
    same(m.float()(x.float())[0].double(), m.double().o_proj(o.flatten(2)), 1e-4)

def test_gates_start_where_the_paper_says():
    torch.manual_seed(0)
    m = hd.GatedDeltaNet(64, 4096, 1, 0)
    A, dt = m.A_log.detach().exp(), F.softplus(m.dt_bias.detach())
    assert 0 < A.min() and A.max() <= 16.001 and abs(float(A.mean()) - 8) < 0.3
    assert 0.99e-3 <= dt.min() and dt.max() <= 1.01e-1
    assert abs(float(dt.log().mean()) - math.log(1e-2)) < 0.1
    bf16 = hd.GatedDeltaNet(64, 4, 8, 0, dtype=torch.bfloat16)
    assert bf16.A_log.dtype == bf16.dt_bias.dtype == torch.float32
    assert bf16.q_proj.weight.dtype == torch.bfloat16

def test_the_decay_of_a_bf16_model_is_computed_in_fp32():
    m = make_student(make_teacher("llama").bfloat16()).model.layers[0].self_attn
    x, seen = torch.randn(1, 7, 32).bfloat16(), []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyError):
        patch.setattr(hd, "chunk_gated_delta_rule", lambda *args, **how: seen.append(args) or {}[0])
        m(x)
    wanted = -m.A_log.exp() * F.softplus(m.a_proj(x).float() + m.dt_bias)
    assert seen[0][3].dtype == seen[0][4].dtype == torch.float32
    assert torch.equal(seen[0][3], wanted)

@torch.no_grad()
def test_padding_leaves_the_state_alone():
    m, x = make_student(make_teacher()).model.layers[0].self_attn, torch.randn(2, 9, 32)
    mask, caches = torch.ones(2, 9), [DynamicCache(), DynamicCache()]
    mask[:, 6:] = 0
    m(x, padding_mask=mask, past_key_values=caches[0])
    m(x[:, :6], past_key_values=caches[1])
    same(*(hd.recurrent_state(cache, 0).tensors[0] for cache in caches))

@pytest.mark.parametrize("family", CONFIGS)
def test_keeping_every_layer_keeps_the_teacher(family):
    teacher, x = make_teacher(family), tokens(2, 20)
    before = weights(teacher)
    student = hd.transfer_attention(teacher, range(4))
    assert torch.equal(student(x).logits, teacher(x).logits)
    assert hd.evaluate(student, teacher, {"text": [x]})["kl"] == 0.0
    student = hd.transfer_attention(teacher, [1])
    hybrid = hd.restore_attention(student, teacher, [2])
    pointers = [{p.data_ptr() for p in m.parameters()} for m in (teacher, student, hybrid)]
    assert not pointers[0] & pointers[1] | pointers[0] & pointers[2] | pointers[1] & pointers[2]
    assert equal(before, weights(teacher)) and type(teacher.config) is type(CONFIGS[family])
    assert not hasattr(teacher.config, "softmax_layers")

def test_what_transfer_refuses():
    teacher = make_teacher()
    for layers in ([4], [-1], [1, 1]):
        with pytest.raises(hd.UserError, match="within 0..3"):
            hd.transfer_attention(teacher, layers)
    with pytest.raises(hd.UserError, match="mixer must be one of gdn"):
        hd.transfer_attention(teacher, [0], mixer="mamba")
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))
    with pytest.raises(hd.UserError, match="LlamaForCausalLM.*not GPT2LMHeadModel"):
        hd.transfer_attention(other, [0])

# ------------------------------------------------------------------------- hybrid model and cache

@pytest.mark.parametrize("kept", [[], [2], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_cache_padding_and_generation_agree_with_the_full_forward(family, kept):
    student, x = make_student(make_teacher(family), kept), tokens(2, 23)
    full, out = student(x).logits, student(x[:, :10], use_cache=True)
    cache, pieces = cache_of(out), [out.logits]
    for t in [*range(10, 15), 15]:  # token by token, then a second prefill
        part = x[:, t:] if len(pieces) == 6 else x[:, t : t + 1]
        pieces.append(student(part, past_key_values=cache).logits)
    same(torch.cat(pieces, 1), full)
    assert cache.get_seq_length() == 23

    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :7] = 0  # row 0 is shorter, left-padded
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = student(x, attention_mask=mask, position_ids=positions).logits
    same(padded[:1, 7:], student(x[:1, 7:]).logits)

    how = dict(max_new_tokens=8, **GREEDY)
    alone = student.generate(x[:1, 7:], **how)[0, 16:]
    together = student.generate(x, attention_mask=mask, **how)[0, 23:]
    uncached = student.generate(x[:1, 7:], use_cache=False, **how)[0, 16:]
    assert alone.tolist() == uncached.tolist() == together.tolist()
    if len(kept) == 1:
        how |= dict(num_beams=3, num_return_sequences=2)
        beams = [student.generate(x, use_cache=use, **how).tolist() for use in (True, False)]
        assert beams[0] == beams[1]

def test_caches_that_cannot_work_say_so(monkeypatch):
    student, x = hd.transfer_attention(make_teacher(), [0]), tokens(1, 6)
    with pytest.raises(hd.UserError, match="cache_implementation"):
        student.generate(x, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        cache_of(student(x, use_cache=True)).crop(-2)
    with pytest.raises(hd.UserError, match="another model"):
        student(x, past_key_values=cache_of(make_teacher()(x, use_cache=True)))
    with pytest.raises(hd.UserError, match=r"\[batch, tokens\]"):
        student(x, attention_mask=torch.ones(1, 1, 6, 6))
    forward = hd.GatedDeltaNet.forward
    blind = lambda self, hidden_states, **others: forward(self, hidden_states)
    monkeypatch.setattr(hd.GatedDeltaNet, "forward", blind)
    with pytest.raises(RuntimeError, match="mixer of layer 1 did not see"):
        student.generate(x, max_new_tokens=2)
    student.generate(x, max_new_tokens=2, use_cache=False, **GREEDY)

@torch.no_grad()
def test_packed_sequences_are_each_alone():
    student, x = make_student(make_teacher("qwen3"), [2]), tokens(2, 23)
    positions = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, -1)
    apart = torch.cat([student(x[:, :9]).logits, student(x[:, 9:]).logits], 1)
    same(student(x, position_ids=positions, use_cache=False).logits, apart)
    same(student(x, position_ids=positions[:1], use_cache=False).logits, apart)  # one row for all
    ends = torch.tensor([0, 9, 23], dtype=torch.int32)
    flash = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=14, max_length_k=14)
    flash |= dict(position_ids=positions[:1], use_cache=False)
    same(student(x[:1], **flash).logits, apart[:1])
    assert torch.equal(student(x, position_ids=torch.arange(23)[None]).logits, student(x).logits)
    with pytest.raises(hd.UserError, match="use_cache=False"):
        student(x, position_ids=positions, use_cache=True)

def test_sampling_continues_a_cache_beyond_the_training_length():
    student = make_student(make_teacher(max_position_embeddings=64), [1])
    x, cache, how = tokens(1, 30), DynamicCache(), dict(pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    first = student.generate(x, past_key_values=cache, max_new_tokens=5, do_sample=True, **how)
    x, how = torch.cat([first, tokens(1, 3)], 1), dict(max_new_tokens=90, do_sample=False, **how)
    more = student.generate(x, past_key_values=cache, **how)
    assert more.shape[1] == 128 and more.tolist() == student.generate(x, **how).tolist()

# ----------------------------------------------------------------------------------------- losses

@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_chunked_losses_match_the_plain_formulas(chunk):
    torch.manual_seed(0)
    h_s, w_s = torch.randn(3, 11, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    h_t, w_t = torch.randn(3, 11, 24), torch.randn(50, 24)
    mask, labels = torch.rand(3, 11) < 0.5, tokens(3, 11) % 50
    log_p_s, log_p_t = (h_s @ w_s.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1)
    kl = (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1)
    ce = -log_p_s.gather(-1, labels[..., None])[..., 0]

    def gradients(loss):
        return [loss, *torch.autograd.grad(3 * loss, [h_s, w_s], retain_graph=True)]

    for ours, plain in (
        (hd.kl_loss(h_s, w_s, h_t, w_t, chunk=chunk), kl.mean()),
        (hd.kl_loss(h_s, w_s, h_t, w_t, mask, chunk=chunk), kl[mask].mean()),
        (hd.cross_entropy_loss(h_s, w_s, labels, chunk=chunk), ce.mean()),
        (hd.cross_entropy_loss(h_s, w_s, labels, mask, chunk=chunk), ce[mask].mean()),
    ):
        for a, b in zip(gradients(ours), gradients(plain)):
            same(a, b, 2e-6)
    empty = gradients(hd.kl_loss(h_s, w_s, h_t, w_t, torch.zeros(3, 11), chunk=chunk))
    assert all(x.abs().max() == 0 for x in empty)
    (first,) = torch.autograd.grad(hd.kl_loss(h_s, w_s, h_t, w_t) ** 2, h_s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with pytest.raises(ValueError, match="share a vocabulary"):
        hd.kl_loss(h_s, w_s, h_t, w_t[:40])

def test_alignment_loss_is_a_norm_not_its_square():
    y = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert float(hd.alignment_loss(torch.zeros(1, 2, 4), y)) == pytest.approx((5 + 0) / 2 / 2)
