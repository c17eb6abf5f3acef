"""Tests of hybrid_distill.py and kernels.py: `pytest`, no GPU and no network needed."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from transformers import (
    AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, MistralConfig,
    Qwen2Config, Qwen3Config, dynamic_module_utils,
)

import hybrid_distill as hd
import kernels

HERE = Path(__file__).parent
SIZES = dict(vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256,
             pad_token_id=0, bos_token_id=None, eos_token_id=1)
CONFIGS = {   # what differs between teachers: GQA ratio, head_dim, biases, q/k norms, tied embeddings, RoPE scaling, sliding window
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=12, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=8),
}


def make_teacher(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[family].__class__(**{**CONFIGS[family].to_dict(), **changes})
    teacher = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in teacher.named_parameters():       # away from the initial 0 and 1 of biases and norms, so that losing one shows
            if p.ndim < 2:
                p.add_(0.3 * torch.randn_like(p))
            elif "self_attn" in name:
                p.mul_(8)
    return teacher


def tokens(*shape, seed=0):
    return torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(seed))


def same(a, b, tolerance=2e-5):
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ------------------------------------------------------------------------------------------------ kernels.py, against the fp64 recurrence

NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "dbeta", "d initial state")


# Triton reads TRITON_INTERPRET when it is imported: what runs in its interpreter runs in a process of its own, started below.
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_the_kernels_in_tritons_interpreter, in another process")


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_hybrid_distill.py"), "-k", "interpreted"],
                          env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize("kind", ["random", "identical", "underflow"])
@pytest.mark.parametrize("T,Dk,Dv", [(1, 16, 16), (63, 60, 100), (64, 32, 32), (75, 100, 60), (130, 16, 24), (200, 64, 128)])
def test_chunked_pytorch_is_the_recurrence(T, Dk, Dv, kind):
    found = kernels.errors(kernels.chunk_gated_delta_rule, kernels.example(2, T, 2, 4, Dk, Dv, kind), backend="torch")
    assert all(error < 1e-5 for error in found), dict(zip(NAMES, found))


def test_chunked_pytorch_passes_gradcheck():
    inputs = [x.double().requires_grad_() for x in kernels.example(1, 37, 1, 2, 3, 4)]
    rule = lambda q, k, v, g, beta, S: kernels.chunk_gated_delta_rule(q, k, v, g, beta, None, S, True, True)
    assert torch.autograd.gradcheck(rule, inputs)


def forget_everything(shape):
    """An example with a log-decay of -inf at some places."""
    q, k, v, g, beta, S = kernels.example(*shape)
    g[torch.rand(g.shape, generator=torch.Generator().manual_seed(2)) < 0.1] = -torch.inf
    return [q, k, v, g, beta, S]


def test_a_log_decay_may_be_minus_infinity():
    assert all(error < 1e-5 for error in kernels.errors(kernels.chunk_gated_delta_rule, forget_everything((2, 75, 2, 4, 16, 24)), backend="torch"))


def test_the_recurrence_ignores_autocast():
    inputs = kernels.example(1, 9, 1, 2, 16, 24)
    run = lambda rule: rule(*inputs[:5], initial_state=inputs[5], output_final_state=True)
    plain = run(kernels.recurrent_gated_delta_rule)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(kernels.recurrent_gated_delta_rule)
    assert all(torch.equal(a, b) for a, b in zip(plain, found))


def test_second_derivatives_are_refused():
    q, k, v, g, beta, _ = (x.requires_grad_() for x in kernels.example(1, 9, 1, 1, 16, 16))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kernels.chunk_gated_delta_rule(q, k, v, g, beta)[0].sum(), q, create_graph=True)


def test_padding_leaves_the_state_alone():
    q, k, v, g, beta, S = kernels.example(2, 90, 2, 2, 16, 16)
    k[:, 70:], v[:, 70:], g[:, 70:], beta[:, 70:] = 0, 0, 0, 0
    how = dict(initial_state=S, output_final_state=True, use_qk_l2norm_in_kernel=True)
    same(kernels.chunk_gated_delta_rule(q, k, v, g, beta, **how)[1], kernels.chunk_gated_delta_rule(*(x[:, :70] for x in (q, k, v, g, beta)), **how)[1])


def packed(rule, inputs, ends, **options):
    q, k, v, g, beta, _ = inputs
    S = torch.randn(len(ends) - 1, v.shape[2], q.shape[3], v.shape[3], generator=torch.Generator().manual_seed(3))
    return rule, [q, k, v, g, beta, S], dict(cu_seqlens=torch.tensor(ends).repeat_interleave(2)[::2], **options)     # strided on purpose


@pytest.mark.parametrize("T,H,HV,Dk,Dv,kind", [(1, 1, 1, 16, 16, "random"), (63, 1, 2, 16, 24, "identical"), (75, 1, 1, 60, 100, "random"),
                                               (130, 1, 2, 32, 16, "underflow"), (130, 1, 1, 100, 60, "identical"), (70, 1, 1, 130, 20, "random")])
@interpreted
def test_interpreted_triton_is_the_recurrence(T, H, HV, Dk, Dv, kind):
    found = kernels.errors(kernels.chunk_gated_delta_rule, kernels.example(1, T, H, HV, Dk, Dv, kind), backend="triton")
    assert all(error < 2e-4 for error in found), dict(zip(NAMES, found))


@interpreted
def test_interpreted_triton_takes_minus_infinity():
    assert all(error < 2e-4 for error in kernels.errors(kernels.chunk_gated_delta_rule, forget_everything((1, 75, 1, 2, 16, 24)), backend="triton"))


@interpreted
@pytest.mark.parametrize("reentrant", [False, True])
def test_interpreted_trial_inside_a_checkpoint(reentrant):
    """The first call of a model may be a checkpointed one: the trial launch must not end up in its bookkeeping."""
    inputs, first = kernels.example(1, 20, 1, 1, 16, 16)[:5], []

    def rule(*x):
        if not first:
            first.append(kernels.trial("cpu", torch.float32, 1, 1, 16, 16))
        return kernels.chunk_gated_delta_rule(*x, backend="triton")[0]

    wanted = [x.clone().requires_grad_() for x in inputs]
    found = torch.autograd.grad(rule(*wanted).sum(), wanted)
    first.clear()
    wanted = [x.clone().requires_grad_() for x in inputs]
    torch.utils.checkpoint.checkpoint(rule, *wanted, use_reentrant=reentrant).sum().backward()
    assert all(error < 1e-3 for error in first[0]) and all(torch.equal(x.grad, y) for x, y in zip(wanted, found))


def check_packed(backend, limit):
    ends = [0, 1, 66, 130]
    rule, inputs, options = packed(kernels.chunk_gated_delta_rule, kernels.example(1, 130, 1, 2, 16, 16), ends, backend=backend)
    together = kernels.everything(rule, inputs, **options)
    rng = torch.Generator().manual_seed(1)
    do, dS = torch.randn(together[0].shape, generator=rng), torch.randn(together[1].shape, generator=rng)
    for n, (a, b) in enumerate(zip(ends, ends[1:])):
        alone = [x[:, a:b].double().requires_grad_() for x in inputs[:5]] + [inputs[5][n:n + 1].double().requires_grad_()]
        o, S = kernels.recurrent_gated_delta_rule(*alone[:5], None, alone[5], True, True)
        truth = [o, S, *torch.autograd.grad((o, S), alone, (do[:, a:b].double(), dS[n:n + 1].double()))]
        for name, x, y in zip(NAMES, together, truth):
            x = x[n:n + 1] if "state" in name else x[:, a:b]
            assert (x - y).norm() <= limit * y.norm() + 1e-6, (n, name)


def test_packed_sequences_do_not_leak():
    check_packed("torch", 1e-5)


@interpreted
def test_interpreted_packed_sequences_do_not_leak():
    check_packed("triton", 2e-4)


@interpreted
def test_interpreted_decoding_kernel_is_the_recurrence():
    q, k, v, g, beta, S = kernels.example(2, 3, 1, 2, 60, 100)
    o, S1 = kernels.launch_decode(q, k, v, g, beta, 60 ** -0.5, S, True)
    truth = kernels.recurrent_gated_delta_rule(*(x.double() for x in (q, k, v, g, beta)), None, S.double(), True, True)
    same(o.double(), truth[0], 1e-5), same(S1.double(), truth[1], 1e-5)


@interpreted
def test_interpreted_triton_under_autocast_checkpointing_and_compile():
    inputs = kernels.example(1, 40, 1, 1, 16, 16)
    rule = lambda *x: kernels.chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True, use_qk_l2norm_in_kernel=True, backend="triton")
    o, S = rule(*inputs)
    same(torch.compile(rule, backend="aot_eager", fullgraph=True)(*inputs)[0], o)
    with torch.autocast("cpu", torch.float16):                                        # the interpreter has no bf16 products
        half, S_half = rule(*inputs)
    assert half.dtype == torch.float16 and S_half.dtype == torch.float32 and float((half - o).norm() / o.norm()) < 2e-2
    gradients = []
    for run in (rule, lambda *x: torch.utils.checkpoint.checkpoint(rule, *x, use_reentrant=False), torch.compile(rule, backend="aot_eager", fullgraph=True)):
        wanted = [x.clone().requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad(run(*wanted)[0].sum(), wanted))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients))


@pytest.mark.parametrize("change,sentence", [
    (dict(k=(1, 8, 2, 8)), "k must be"), (dict(v=(1, 8, 3, 16)), "must be a multiple of the 2 heads"), (dict(g=(1, 8, 3)), "g must be"),
    (dict(initial_state=(1, 2, 16, 8)), "initial_state must be"), (dict(cu_seqlens=torch.tensor([0, 5])), "must rise from 0 to T = 8"), (dict(backend="cuda"), "backend"),
    (dict(backend="triton"), "the kernels run on a GPU"), (dict(state_v_first=True), "state_v_first is not implemented")])
def test_wrong_kernel_inputs_get_one_sentence(change, sentence):
    shapes = dict(q=(1, 8, 2, 16), k=(1, 8, 2, 16), v=(1, 8, 2, 16), g=(1, 8, 2), beta=(1, 8, 2))
    arguments = {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in {**shapes, **change}.items()}
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        kernels.chunk_gated_delta_rule(**arguments)


@pytest.mark.parametrize("rule", [kernels.chunk_gated_delta_rule, kernels.decode_gated_delta_rule])
@pytest.mark.parametrize("name", ["inital_state", "use_qk_l2norm", "output_final_states"])
def test_misspelt_keywords_are_refused(rule, name):
    with pytest.raises(TypeError, match=name):
        rule(*kernels.example(1, 5, 1, 1, 8, 8, "random", torch.float32, "cpu")[:5], **{name: True})


def test_qwen3_next_of_transformers_runs_on_these_kernels(monkeypatch):
    qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(0)
    model = qwen3_next.Qwen3NextForCausalLM(qwen3_next.Qwen3NextConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16)).eval()
    x = torch.randint(0, 97, (2, 75))
    run = lambda: (model(x).logits, model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0))
    theirs = run()
    monkeypatch.setattr(qwen3_next, "torch_chunk_gated_delta_rule", kernels.chunk_gated_delta_rule)
    monkeypatch.setattr(qwen3_next, "torch_recurrent_gated_delta_rule", kernels.decode_gated_delta_rule)
    ours = run()
    assert not torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    same(ours[0], theirs[0], 1e-4)


def test_one_compiled_function_serves_heads_of_any_size():
    rule = torch.compile(lambda *x: kernels.chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True)[0], backend="aot_eager", fullgraph=True)
    for shape in ((2, 75, 2, 4, 20, 24), (1, 80, 2, 2, 16, 16), (1, 33, 1, 3, 8, 40)):
        inputs = kernels.example(*shape)[:5]
        same(rule(*inputs), kernels.chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[0], 1e-6)


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, grid(options) if callable(grid) else grid, args, options))


def launches(monkeypatch, Dk, Dv, dtype, B=1, device="cpu"):
    """Every launch of a forward, a backward and a decoding step: (kernel, grid, arguments, options)."""
    found = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), found))
    q, k, v = (torch.zeros(B, 70, H, D, dtype=dtype, device=device) for H, D in ((2, Dk), (2, Dk), (4, Dv)))
    gate, S = torch.zeros(B, 70, 4, device=device), torch.zeros(B, 4, Dk, Dv, device=device)
    o, S_out, *rest = kernels.launch_forward(q, k, v, gate, gate.clone(), 1.0, S, None, True)
    kernels.launch_backward(q, k, v, gate, gate.clone(), 1.0, S, None, True, *rest, v, S)
    kernels.launch_decode(q, k, v, gate, gate.clone(), 1.0, S, True)
    monkeypatch.undo()
    return found


POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}                                      # bytes a block may have, by compute capability
HEADS, DTYPES = [(64, 64), (128, 128), (60, 100), (256, 256)], [torch.bfloat16, torch.float16, torch.float32]
EVERYTHING = [(heads, capability, dtype) for heads in HEADS for capability in SHARED for dtype in DTYPES]
DIAGONAL = [(HEADS[0], 80, DTYPES[0]), (HEADS[1], 90, DTYPES[0]), (HEADS[2], 100, DTYPES[1]), (HEADS[0], 90, DTYPES[2])]


def spilled_bytes(cubin):
    """Bytes of stack a thread uses, that is: spilled registers. None without Triton's own cuobjdump."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin), file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def most_spills(heads, dtype):
    """Bytes a thread may spill, at the tile sizes of triton_tiles. fp32 products do not go through tensor cores and fill the registers."""
    return 7000 if dtype == torch.float32 else {64: 128, 100: 400, 128: 1600, 256: 800}[max(heads)]


@pytest.mark.parametrize("heads,capability,dtype", EVERYTHING if os.environ.get("HYBRID_DISTILL_FULL") == "1" else DIAGONAL, ids=str)
def test_every_kernel_compiles_for_real_chips(monkeypatch, heads, capability, dtype):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kinds = set()
    monkeypatch.setattr(kernels, "compute_capability", lambda device: capability // 10)
    for kernel, _, args, options in launches(monkeypatch, *heads, dtype):
        how = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
        values = {**dict(zip(kernel.arg_names, args)), **options}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            x = values[name]
            if isinstance(x, torch.Tensor):
                signature[name], attributes[(i,)] = POINTERS[x.dtype], [["tt.divisibility", 16]]
            elif kernel.params[i].is_constexpr or x is None:
                signature[name], constants[name] = "constexpr", x
            else:
                signature[name] = "fp32" if isinstance(x, float) else "i32"
        binary = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
                                target=GPUTarget("cuda", capability, 32), options=how)
        assert binary.asm["cubin"] and binary.metadata.shared <= SHARED[capability], (kernel.__name__, binary.metadata.shared)
        spilled = spilled_bytes(binary.asm["cubin"])
        assert spilled is None or spilled <= most_spills(heads, dtype), (kernel.__name__, spilled)
        kinds.add(kernel.__name__)
    assert kinds == {name for name in vars(kernels) if name.endswith("_kernel")}


def test_a_large_batch_fits_the_grid(monkeypatch):
    """40,000 sequences of 4 heads: more programs than the second axis of a CUDA grid can hold."""
    pytest.importorskip("triton")
    for kernel, grid, *_ in launches(monkeypatch, 64, 64, torch.bfloat16, B=40_000, device="meta"):
        assert all(n <= limit for n, limit in zip(grid, (2**31 - 1, 65_535))), (kernel.__name__, grid)


# ------------------------------------------------------------------------------------------------ mixer and stage 0

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
    if family == "qwen3":
        assert torch.equal(mixer.q_norm.weight, attn.q_norm.weight) and torch.equal(mixer.k_norm.weight, attn.k_norm.weight)
    assert not {p.data_ptr() for p in mixer.parameters()} & {p.data_ptr() for p in attn.parameters()}


def test_the_mixer_is_its_equations():
    torch.manual_seed(0)
    m = hd.GatedDeltaNet.from_attention(make_teacher("qwen3").model.layers[0].self_attn)
    with torch.no_grad():
        m.o_norm.weight.uniform_(0.5, 1.5)
        m.a_proj.weight.mul_(50)
        x = torch.randn(2, 9, 32)
        heads = (2, 9, m.num_heads, m.head_dim)
        q, k, v = F.silu(m.q_norm(m.q_proj(x).view(heads))), F.silu(m.k_norm(m.k_proj(x).view(heads))), F.silu(m.v_proj(x).view(heads))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        alpha = torch.exp(-m.A_log.exp() * F.softplus(x @ m.a_proj.weight.T + m.dt_bias))
        beta = torch.sigmoid(x @ m.b_proj.weight.T)
        S, outputs = torch.zeros(2, m.num_heads, m.head_dim, m.head_dim), []
        for t in range(9):
            S = alpha[:, t, :, None, None] * S
            S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])))[:, :, None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * m.head_dim ** -0.5)
        o = torch.stack(outputs, 1)
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * m.o_norm.weight * F.silu((x @ m.g_proj.weight.T).view(heads))
        same(m(x)[0], o.flatten(2) @ m.o_proj.weight.T, 1e-4)


def test_gates_start_where_the_paper_says():
    torch.manual_seed(0)
    m = hd.GatedDeltaNet(64, 4096, 1, 0)
    A, dt = m.A_log.detach().exp(), F.softplus(m.dt_bias.detach())
    assert 0 < A.min() and A.max() <= 16 and abs(float(A.mean()) - 8) < 0.3
    assert 0.99e-3 <= dt.min() and dt.max() <= 1.01e-1 and abs(float(dt.log().mean()) - math.log(1e-2)) < 0.1
    bf16 = hd.GatedDeltaNet(64, 4, 8, 0, dtype=torch.bfloat16)
    assert bf16.A_log.dtype == bf16.dt_bias.dtype == torch.float32 and bf16.q_proj.weight.dtype == torch.bfloat16


def test_keeping_every_layer_keeps_the_teacher():
    for family in CONFIGS:
        teacher = make_teacher(family)
        student, x = hd.transfer_attention(teacher, range(4)), tokens(2, 20)
        assert torch.equal(student(x).logits, teacher(x).logits)
        assert hd.evaluate(student, {"text": [x]}, teacher)["kl"] == 0.0


def test_transfer_copies_or_shares():
    teacher = make_teacher()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    own = hd.transfer_attention(teacher, [1])
    assert not {p.data_ptr() for p in own.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    shared = hd.transfer_attention(teacher, [1], share_rest=True)
    assert shared.model.embed_tokens.weight is teacher.model.embed_tokens.weight
    assert shared.model.layers[1].self_attn.q_proj.weight is not teacher.model.layers[1].self_attn.q_proj.weight
    hd.distill_logits(shared, teacher, [tokens(2, 12)] * 2, lr=1e-2, rest_lr=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert type(teacher.config) is LlamaConfig and not hasattr(teacher.config, "softmax_layers")
    assert not torch.equal(shared.model.embed_tokens.weight, teacher.model.embed_tokens.weight)


@pytest.mark.parametrize("layers", [[4], [-1], [1, 1]])
def test_impossible_layers_are_refused(layers):
    with pytest.raises(ValueError, match="within 0..3"):
        hd.transfer_attention(make_teacher(), layers)


def test_other_architectures_are_refused_by_name():
    with pytest.raises(ValueError, match="GPT2LMHeadModel.*LlamaForCausalLM"):
        hd.transfer_attention(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)), [0])


# ------------------------------------------------------------------------------------------------ the hybrid model

@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kept", [[], [2], [0, 3], [0, 1, 2, 3]])
@torch.no_grad()
def test_cache_padding_and_generation_agree_with_the_full_forward(family, kept):
    student, x = hd.transfer_attention(make_teacher(family), kept), tokens(2, 23)
    full = student(x).logits
    out = student(x[:, :10], use_cache=True)
    cache, pieces = out[hd.CACHE], [out.logits]
    pieces += [student(x[:, t:t + 1], **{hd.CACHE: cache}).logits for t in range(10, 15)]          # token by token
    pieces += [student(x[:, 15:], **{hd.CACHE: cache}).logits]                                     # a second prefill
    same(torch.cat(pieces, 1), full)
    assert cache.get_seq_length() == 23

    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :7] = 0                                                                                # row 0 is shorter, left-padded
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    same(student(x, attention_mask=mask, position_ids=positions).logits[:1, 7:], student(x[:1, 7:]).logits)

    how = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    alone = student.generate(x[:1, 7:], **how)[0, 16:]
    together = student.generate(x, attention_mask=mask, **how)[0, 23:]
    uncached = student.generate(x[:1, 7:], use_cache=False, **how)[0, 16:]
    assert alone.tolist() == uncached.tolist() == together.tolist()
    beams = dict(how, num_beams=3, num_return_sequences=2)
    assert student.generate(x, **beams).tolist() == student.generate(x, use_cache=False, **beams).tolist()


def test_caches_that_cannot_work_say_so():
    student, x = hd.transfer_attention(make_teacher(), [0]), tokens(1, 6)
    with pytest.raises(ValueError, match="cache_implementation"):
        student.generate(x, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        student(x, use_cache=True)[hd.CACHE].crop(-2)
    with pytest.raises(ValueError, match="another model"):
        student(x, **{hd.CACHE: make_teacher()(x, use_cache=True)[hd.CACHE]})
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        student(x, attention_mask=torch.ones(1, 1, 6, 6))


def test_a_cache_that_no_mixer_saw_is_refused(monkeypatch):
    student, forward = hd.transfer_attention(make_teacher(), [0]), hd.GatedDeltaNet.forward
    monkeypatch.setattr(hd.GatedDeltaNet, "forward", lambda self, hidden_states, **others: forward(self, hidden_states))
    with pytest.raises(RuntimeError, match="mixer of layer 1 was not given it"):
        student.generate(tokens(1, 6), max_new_tokens=2)
    student.generate(tokens(1, 6), max_new_tokens=2, use_cache=False, pad_token_id=0)


@torch.no_grad()
def test_packed_sequences_are_each_alone():
    student, x = hd.transfer_attention(make_teacher("qwen3"), [2]), tokens(2, 23)
    positions = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, -1)
    apart = torch.cat([student(x[:, :9]).logits, student(x[:, 9:]).logits], 1)
    same(student(x, position_ids=positions, use_cache=False).logits, apart)
    same(student(x, position_ids=positions[:1], use_cache=False).logits, apart)                # one row of positions for all
    ends = torch.tensor([0, 9, 23], dtype=torch.int32)
    flash = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=14, max_length_k=14)
    same(student(x[:1], position_ids=positions[:1], use_cache=False, **flash).logits, apart[:1])
    assert torch.equal(student(x, position_ids=torch.arange(23)[None]).logits, student(x).logits)
    with pytest.raises(ValueError, match="use_cache=False"):
        student(x, position_ids=positions, use_cache=True)


def test_sampling_continues_a_cache_beyond_the_training_length():
    student, x = hd.transfer_attention(make_teacher(), [1]), tokens(1, 30)
    cache = DynamicCache()
    torch.manual_seed(0)
    first = student.generate(x, **{hd.CACHE: cache}, max_new_tokens=5, do_sample=True, pad_token_id=0, eos_token_id=None)
    more = student.generate(torch.cat([first, tokens(1, 3)], 1), **{hd.CACHE: cache}, max_new_tokens=300, do_sample=False, pad_token_id=0, eos_token_id=None)
    fresh = student.generate(torch.cat([first, tokens(1, 3)], 1), max_new_tokens=300, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert more.tolist() == fresh.tolist() and more.shape[1] == 338


# ------------------------------------------------------------------------------------------------ losses

@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_chunked_losses_match_the_plain_formulas(chunk):
    torch.manual_seed(0)
    h_s, w_s, h_t, w_t = torch.randn(3, 11, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True), torch.randn(3, 11, 24), torch.randn(50, 24)
    mask = torch.rand(3, 11) < 0.5

    def gradients(loss):
        return [loss, *torch.autograd.grad(3 * loss, [h_s, w_s], retain_graph=True)]

    per_token = F.kl_div((h_s @ w_s.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    for ours, plain in ((hd.kl_loss(h_s, w_s, h_t, w_t, chunk=chunk), per_token.mean()),
                        (hd.kl_loss(h_s, w_s, h_t, w_t, mask, chunk=chunk), per_token[mask].mean()),
                        (hd.cross_entropy_loss(h_s, w_s, tokens(3, 11) % 50, chunk=chunk), F.cross_entropy((h_s @ w_s.T).flatten(0, 1), tokens(3, 11).flatten() % 50))):
        for a, b in zip(gradients(ours), gradients(plain)):
            same(a, b, 2e-6)
    nothing = gradients(hd.kl_loss(h_s, w_s, h_t, w_t, torch.zeros(3, 11), chunk=chunk))
    assert all(x.abs().max() == 0 for x in nothing)
    with pytest.raises(ValueError, match="share a vocabulary"):
        hd.kl_loss(h_s, w_s, h_t, w_t[:40])


def test_alignment_loss_is_a_norm_not_its_square():
    y = torch.zeros(1, 2, 4)
    assert float(hd.alignment_loss(y, torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]))) == pytest.approx((5 + 0) / 2 / 2)


# ------------------------------------------------------------------------------------------------ stages

def test_stage_1_trains_the_mixers_alone_towards_the_teachers_attention():
    teacher = make_teacher()
    student = hd.transfer_attention(teacher, [2], share_rest=True)
    before = {name: p.clone() for name, p in student.named_parameters()}
    x = tokens(4, 16)
    seen = hd.attention_io(teacher, x, [0])
    start = hd.alignment_loss(student.model.layers[0].self_attn(seen[0][0])[0], seen[0][1])
    history = hd.align_hidden_states(student, teacher, [x] * 40, lr=3e-3, warmup=5)
    assert history[0]["layer 0"] == pytest.approx(start.item(), rel=1e-5)           # the first loss is that of the transferred weights
    assert history[0]["loss"] == pytest.approx(sum(history[0][f"layer {i}"] for i in (0, 1, 3)) / 3)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    for name, p in student.named_parameters():
        mixer = ".self_attn." in name and ".layers.2." not in name
        assert torch.equal(p, before[name]) != mixer, name
    assert all(p.grad is None for p in teacher.parameters())


def test_stage_2_starts_at_the_kl_stage_1_left_and_lowers_it():
    teacher, x = make_teacher(), tokens(4, 16)
    student = hd.restore_attention(hd.transfer_attention(teacher, []), teacher, [1])
    assert isinstance(student.model.layers[1].self_attn, type(teacher.model.layers[1].self_attn)) and list(hd.mixers(student)) == [0, 2, 3]
    start = hd.evaluate(student, {"text": [x]}, teacher)["kl"]
    history = hd.distill_logits(student, teacher, [x] * 30, lr=3e-3, rest_lr=1e-3)
    assert history[0]["kl"] == pytest.approx(start, rel=1e-5) and history[-1]["kl"] < 0.5 * start


def test_stage_2_rates_reach_the_right_parameters():
    student = hd.transfer_attention(make_teacher(), [1])
    names = {id(p): name for name, p in student.named_parameters()}
    groups = hd.parameter_groups(student, 1e-4, 7e-6)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for p in group["params"]:
            assert group["lr"] == (1e-4 if ".self_attn." in names[id(p)] else 7e-6)
            assert (group["weight_decay"] == 0) == (p.ndim < 2)
    frozen = hd.parameter_groups(student, 1e-4, 0.0)
    assert all(".self_attn." in names[id(p)] for group in frozen for p in group["params"])
    assert not student.model.embed_tokens.weight.requires_grad


def test_stage_3_is_cross_entropy():
    student, x = hd.transfer_attention(make_teacher(), [1]), tokens(2, 40)
    plain = F.cross_entropy(student(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    history = hd.finetune(student, [x] * 10, lr=1e-3)
    assert history[0]["ce"] == pytest.approx(plain.item(), rel=1e-5) and history[-1]["ce"] < history[0]["ce"]


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    def trained(micro):
        teacher = make_teacher()
        student = hd.transfer_attention(teacher, [1]) if torch.manual_seed(1) else None
        hd.distill_logits(student, teacher, [tokens(6, 12)] * 3, lr=1e-3, rest_lr=1e-4, micro_batch=micro)
        return student
    for (name, a), b in zip(trained(None).named_parameters(), trained(4).parameters()):       # 4 + 2: uneven parts are weighted
        same(a, b, 5e-4)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights():
    teacher = make_teacher()
    student = hd.transfer_attention(teacher, [1])
    model, saved = torch.nn.Linear(2, 1), []

    def losses(batch):
        yield "bad", (model(torch.ones(2)) * (math.nan if batch[0, 0] == 9 else 1.0)).sum(), 1.0

    class Watch(hd.Observer):
        def save(self, models, optimizer, finished):
            saved.append((finished, [p.detach().clone() for p in models[0].parameters()]))

    with pytest.raises(FloatingPointError, match="'bad' became nan at step 3 of 4"):
        hd.train([model], [[{"params": list(model.parameters()), "lr": 0.1}]], losses, [tokens(1, 1), tokens(1, 1), torch.tensor([[9]]), tokens(1, 1)], observer=Watch())
    assert saved[0][0] is False and all(torch.isfinite(p).all() and torch.equal(p, q) for p, q in zip(saved[0][1], model.parameters()))
    with pytest.raises(ValueError, match="ended after 1 of 3 steps"):
        hd.finetune(student, iter([tokens(1, 8)]), steps=3)


# ------------------------------------------------------------------------------------------------ selection

def planted(layers, seed=0):
    """A teacher whose attention matters in `layers` alone: elsewhere W_o = 0, so linear attention there is exact."""
    teacher = make_teacher(seed=seed)
    with torch.no_grad():
        for i, layer in enumerate(teacher.model.layers):
            if i not in layers:
                layer.self_attn.o_proj.weight.zero_()
    return teacher


@pytest.mark.parametrize("strategy", ["ga-s2", "greedy"])
def test_selection_finds_planted_layers(strategy):
    teacher = planted([1, 3])
    student = hd.transfer_attention(teacher, [])
    weights = {name: p.clone() for name, p in student.named_parameters()}
    found = hd.select_layers(student, teacher, (tokens(4, 16, seed=i) for i in range(100)), [tokens(8, 16, seed=99)], 2, steps=3, strategy=strategy, eval_every=1)
    assert set(found.chosen) == {1, 3} and sorted(found.ranking) == [0, 1, 2, 3] and set(found.ranking[:2]) == {1, 3}
    assert [step for step, _ in found.rounds[0]["curves"][0]] == [0, 1, 2, 3]
    assert len(found.rounds) == (1 if strategy == "ga-s2" else 2)
    assert all(torch.equal(p, weights[name]) for name, p in student.named_parameters())           # the candidates were copies


def test_candidates_in_groups_and_alone_score_the_same():
    teacher = make_teacher()
    student = hd.transfer_attention(teacher, [])
    scores = [hd.score_layers(student, teacher, lambda step: tokens(4, 12, seed=step), [tokens(4, 12, seed=50)], [2], 4, at_once=n) for n in (3, 2, 1)]
    assert scores[0] == scores[1] == scores[2] and list(scores[0]) == [0, 1, 3]
    kl = hd.evaluate(hd.restore_attention(student, teacher, [2, 0]), {"text": [tokens(4, 12, seed=50)]}, teacher)["kl"]
    assert scores[0][0][0] == [0, pytest.approx(kl, rel=1e-5)]


def test_held_out_kl_is_without_dropout_and_leaves_the_mode():
    teacher = make_teacher()
    hybrid = hd.transfer_attention(teacher, [1]).train()
    hybrid.model.layers[1].self_attn.attention_dropout = 0.5
    first, again = (hd.held_out_kl({"": hybrid}, teacher, [tokens(4, 12)])[""] for _ in range(2))
    assert first == again and hybrid.training


def test_early_stop_ends_when_the_set_settles():
    teacher = planted([1])
    student = hd.transfer_attention(teacher, [])
    found = hd.select_layers(student, teacher, lambda step: tokens(4, 16, seed=step), [tokens(4, 16)], 1, steps=10, eval_every=1, early_stop=2)
    assert found.chosen == [1] and found.rounds[0]["curves"][0][-1][0] == 2
    with pytest.raises(ValueError, match="must train together"):
        hd.select_layers(student, teacher, lambda step: tokens(4, 16), [tokens(4, 16)], 1, steps=2, early_stop=2, at_once=1)
    curves = {0: [[0, 1.0], [1, 1.0], [2, 3.0], [3, 3.0]], 1: [[0, 2.0], [1, 2.0], [2, 2.0], [3, 2.0]], 2: [[0, 9.0]] * 4}
    assert not hd.settled({i: curve[:3] for i, curve in curves.items()}, 2, 1) and hd.settled(curves, 2, 1) and not hd.settled(curves, 3, 1)
    longer = {i: [*curve, [4, curve[-1][1]]] for i, curve in curves.items()}
    summary = hd.round_summary({"kept": [], "k": 1, "curves": longer}, 4)
    assert summary["settled_at_step"] == 2 and summary["early_stop_2"] == {"step": 3, "saved": 0.25, "same_set": True} and "early_stop_3" not in summary


def test_baselines_and_published_selections():
    place = hd.place_layers
    assert place("uniform", 36, 9) == list(range(3, 36, 4)) and place("uniform", 28, 7) == [3, 7, 11, 15, 19, 23, 27] and place("uniform", 28, 4) == [6, 13, 20, 27]
    assert place("centred", 6, 1) == [3] and place("first", 6, 2) == [0, 1] and place("last", 6, 2) == [4, 5]
    assert place("random", 28, 7, seed=1) == place("random", 28, 7, seed=1) != place("random", 28, 7, seed=2)
    assert place("published", 36, 5, teacher_name="Qwen/Qwen2.5-3B-Instruct") == [20, 32, 33, 21, 22]
    assert place("published", 28, 9, teacher_name="Qwen2.5-7B-Instruct/")[-2:] == [8, 15]
    for call, message in (((("published", 28, 3, 0, "Qwen2.5-7B-Instruct")), "7, 9"), (("published", 6, 1, 0, "mine"), "no published"), (("uniform", 6, 7), "within 0..6"), (("odd", 6, 1), "placed by")):
        with pytest.raises(ValueError, match=message):
            place(*call)


# ------------------------------------------------------------------------------------------------ data

def save_teacher(folder, family="llama", **changes):
    teacher = make_teacher(family, **changes)
    teacher.save_pretrained(folder)
    hd.byte_tokenizer().save_pretrained(folder)
    return teacher


def write_corpus(folder, kind, texts):
    import datasets
    rows = datasets.Dataset.from_dict({"text": texts})
    folder.mkdir(exist_ok=True)
    if kind == "txt":
        (folder / "a.txt").write_text("\n\n".join(texts[:20]))
        (folder / "b.txt").write_text("\n\n".join(texts[20:]))
    elif kind == "jsonl":
        rows.to_json(folder / "a.jsonl")
    elif kind == "parquet":
        rows.to_parquet(folder / "a.parquet")
    else:
        rows.save_to_disk(folder)
    return str(folder)


TEXTS = [" ".join(str(1000 * i + j) for j in range(4 + i % 7)) for i in range(60)]              # no two windows alike
TINY = dict(align_tokens=64, align_length=16, align_batch=2, select_tokens=64, select_length=16, select_batch=2, distill_tokens=64, distill_length=16,
            distill_batch=2, finetune_tokens=64, finetune_length=32, finetune_batch=2, held_out=2)


def tiny_settings(**changes):
    return hd.resolve(hd.Settings(**{"teacher": "x", "data": "y", "device": "cpu", **TINY, **changes}), 4)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "saved"])
def test_every_kind_of_data_gives_the_same_documents_whole_and_apart(kind, tmp_path):
    settings = tiny_settings(data=write_corpus(tmp_path / "data", kind, TEXTS))
    corpus = hd.Corpus(settings, hd.byte_tokenizer(), tmp_path)
    corpus._fill(10 ** 6)
    stream = torch.from_numpy(np.fromfile(corpus.file, "uint32").astype("int64"))
    documents = bytes((stream - 3).clamp(min=0).tolist()).split(b"\0")[:-1]         # EOS is 1, clamped to byte 0
    assert sorted(documents) == sorted(text.encode() for text in TEXTS) and documents != sorted(documents)
    assert corpus.report["documents"] == 60 and corpus.report["tokens"] == len(stream)

    parts = {part: corpus._read(part, torch.arange(corpus._blocks(part) * corpus.block)).view(-1, corpus.block) for part in ("train", "validation", "test")}
    blocks = {part: {block.numpy().tobytes() for block in rows} for part, rows in parts.items()}
    assert not blocks["train"] & blocks["validation"] and not blocks["train"] & blocks["test"] and not blocks["validation"] & blocks["test"]
    assert set().union(*blocks.values()) == {block.numpy().tobytes() for block in stream[:corpus._blocks() * corpus.block].view(-1, corpus.block)}
    again = corpus._read("train", torch.arange(3) + corpus._blocks("train") * corpus.block)          # beyond the end: from the start
    assert torch.equal(again, parts["train"].flatten()[:3])


def test_a_stream_resumes_in_its_middle(tmp_path):
    settings = tiny_settings(data=write_corpus(tmp_path / "data", "jsonl", TEXTS * 20))
    whole = hd.Corpus(settings, hd.byte_tokenizer(), tmp_path)
    whole._fill(1000)
    (tmp_path / "again").mkdir()
    first = hd.Corpus(settings, hd.byte_tokenizer(), tmp_path / "again")
    with open(first.file, "ab") as file:
        file.write(b"half a write")                                                # a kill between the tokens and their count
    again = hd.Corpus(settings, hd.byte_tokenizer(), tmp_path / "again")
    again._fill(1000)
    assert first.meta["documents"] < whole.meta["documents"] and again.file.read_bytes() == whole.file.read_bytes()
    assert torch.equal(again.batches("distill", 3, 16)(7), whole.batches("distill", 3, 16)(7))
    assert not torch.equal(whole.batches("distill", 3, 16)(0), whole.batches("align", 3, 16)(0))


def test_chat_skips_and_missing_columns(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"question {i} " * 5}, {"role": "assistant", "content": "answer"}], "n": i} for i in range(40)]
    rows += [{"messages": [], "n": 0}] * 2
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = hd.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    how = dict(data=str(tmp_path / "chat.jsonl"), text_column="messages")
    corpus = hd.Corpus(tiny_settings(chat=True, **how), tokenizer, tmp_path)
    corpus._fill(1000)
    stream = tokenizer.decode(np.fromfile(corpus.file, "uint32").tolist())
    assert stream.count("<user>question") == 40 and corpus.report["skipped"] == {"empty": 2, "not text": 0}
    (tmp_path / "n").mkdir()
    with pytest.raises(hd.UserError, match="no column 'text'; its columns are messages, n"):
        hd.Corpus(tiny_settings(data=how["data"]), tokenizer, tmp_path / "n")
    with pytest.raises(hd.UserError, match="at least 96 are needed"):
        (tmp_path / "short.txt").write_text("too short")
        (tmp_path / "s").mkdir()
        hd.Corpus(tiny_settings(data=str(tmp_path / "short.txt")), tokenizer, tmp_path / "s")


def test_the_byte_tokenizer_is_bytes():
    text = "Añ→\n\t def x(): 🙂"
    ids = hd.byte_tokenizer()(text)["input_ids"]
    assert ids == [b + 3 for b in text.encode()] and hd.byte_tokenizer().decode(ids) == text


def test_embedded_batches_are_a_function_of_seed_stage_and_step():
    a, b = hd.EmbeddedCorpus(0), hd.EmbeddedCorpus(1)
    batch = a.batches("align", 8, 64)
    assert torch.equal(batch(3), hd.EmbeddedCorpus(0).batches("align", 8, 64)(3))
    seen = [batch(step) for step in range(200)] + [b.batches("align", 8, 64)(3), a.batches("distill", 8, 64)(3)]
    assert len({t.numpy().tobytes() for t in seen}) == len(seen)
    recall = batch(0)[4:]
    known = [dict(zip(row[0:32:2], row[1:32:2])) for row in recall.tolist()]
    assert all(len(pairs) == 16 for pairs in known)
    assert all(pairs[row[i]] == row[i + 1] for row, pairs in zip(recall.tolist(), known) for i in range(32, 64, 2))
    for length in (8, 9, 15, 127):
        assert a.batches("align", 5, length)(0).shape == (5, length)


def test_recall_prompts_hide_pairs_and_end_with_a_key():
    keys, values, random = torch.arange(100, 150), torch.arange(200, 250), torch.Generator().manual_seed(0)
    prompts, answers = hd.recall_prompts(keys, values, 5, 20, random, torch.zeros(20, 30, dtype=torch.long))
    assert prompts.shape == (20, 41)
    for row, answer in zip(prompts.tolist(), answers.tolist()):
        pairs = {row[i]: row[i + 1] for i in range(40) if 100 <= row[i] < 150}
        assert len(pairs) == 5 and all(200 <= v < 250 for v in pairs.values()) and pairs[row[-1]] == answer
        assert [t for t in row if t == 0] == [0] * 30
    filler = torch.arange(100, 145).expand(20, 45)                          # five of the 50 keys are not in it
    prompts, _ = hd.recall_prompts(keys, values, 5, 20, random, filler)
    assert all(sorted(set(row) & set(range(145, 150))) == list(range(145, 150)) and row.count(row[-1]) == 2 for row in prompts.tolist())


# ------------------------------------------------------------------------------------------------ a whole run

def command(*args, cwd=None, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, str(HERE / "hybrid_distill.py"), *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def tiny_args(teacher, data, out, *more):
    args = ["--teacher", teacher, "--data", data, "--out", out, "--softmax-layers", 1, "--baselines", "all-linear,uniform,first", "--save-seconds", 0, *more]
    return args + [x for name, value in TINY.items() for x in (f"--{name.replace('_', '-')}", value)]


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True, dtype=getattr(torch, sys.argv[2]))
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert all((p.dtype == torch.float32) == (name.endswith(("A_log", "dt_bias")) or sys.argv[2] == "float32") for name, p in model.named_parameters())
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("a prompt of some length", return_tensors="pt", add_special_tokens=False)["input_ids"]
how = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
with torch.no_grad():
    pad = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(tokens)], 1)
    print("RESULT", json.dumps({"logits": model(tokens).logits.double().sum().item(), "cached": model.generate(tokens, **how)[0, tokens.shape[1]:].tolist(),
        "uncached": model.generate(tokens, use_cache=False, **how)[0, tokens.shape[1]:].tolist(),
        "padded": model.generate(torch.cat([pad, tokens], 1), attention_mask=mask, **how)[0, tokens.shape[1] + 4:].tolist()}))
"""


@pytest.mark.parametrize("family", CONFIGS)
def test_a_run_from_a_local_folder_and_its_student_in_another_process(family, tmp_path, capsys):
    save_teacher(tmp_path / "teacher", family)
    data = write_corpus(tmp_path / "data", "txt", TEXTS)
    assert hd.main([str(a) for a in tiny_args(tmp_path / "teacher", data, tmp_path / "run", "--dtype", "bfloat16" if family == "qwen3" else "float32")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["teacher", "all-linear", "kl-guided", "uniform", "first"]
    assert report["rows"][0]["kl"] == 0 and report["rows"][0]["softmax_layers"] == [0, 1, 2, 3] and report["rows"][1]["softmax_layers"] == []
    assert report["rows"][2]["softmax_layers"] == report["selection"]["chosen"] and report["rows"][1]["cache_bytes"] < report["rows"][0]["cache_bytes"] * 4
    for row in report["rows"]:
        assert {"kl", "perplexity", "recall", "cache_bytes", "decode_ms"} <= set(row) and row["perplexity"] > 1
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"align", "select-0-0", "distill-none", "finetune-none"} <= set(stages)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert f"Softmax attention in layers {report['selection']['chosen']}" in card and "license: unknown" in card
    dtype = "bfloat16" if family == "qwen3" else "float32"
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "run" / "student"), dtype], cwd=tmp_path / "elsewhere", text=True, capture_output=True,
                          env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    other = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", trust_remote_code=True, dtype=getattr(torch, dtype))
    x = hd.byte_tokenizer()("a prompt of some length", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        assert here(x).logits.double().sum().item() == pytest.approx(other["logits"], rel=1e-6)
    if dtype == "float32":                                                           # in bf16 near ties may fall either way
        assert other["cached"] == other["uncached"] == other["padded"]


def test_a_frozen_rest_never_reaches_the_teacher(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher")
    kept = []
    monkeypatch.setattr(hd, "load_teacher", lambda settings, load=hd.load_teacher: kept.append(load(settings)) or kept[0])
    args = tiny_args(tmp_path / "teacher", write_corpus(tmp_path / "data", "txt", TEXTS), tmp_path / "run", "--distill-rest-lr", 0, "--select-rest-lr", 0, "--finetune-lr", 0.01)
    assert hd.main([str(a) for a in args]) == 0
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert all(torch.equal(p, fresh.get_parameter(name)) for name, p in kept[0][0].named_parameters())


def without_clock(folder):
    """What a run decided and measured, without how long it took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((folder / "report.json").read_text())
    for row in rows:
        del row["seconds"], row["peak_bytes"]
    for row in report["rows"]:
        del row["decode_ms"]
    return sorted(rows, key=lambda row: (row["stage"], row["step"])), report["rows"], report["selection"]


def test_killed_again_and_again_a_run_ends_with_the_same_numbers(tmp_path):
    save_teacher(tmp_path / "teacher")
    data = write_corpus(tmp_path / "data", "txt", TEXTS)
    calm = command(*tiny_args(tmp_path / "teacher", data, tmp_path / "calm"))
    assert calm.wait() == 0, calm.stderr.read()
    stops = ["align", "select-0-0", "distill-none", "finetune"]
    for stage in stops:                                                              # SIGKILL while that stage runs
        process, file = command(*tiny_args(tmp_path / "teacher", data, tmp_path / "run")), tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (file.exists() and f'"stage": "{stage}' in file.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = command(*tiny_args(tmp_path / "teacher", data, tmp_path / "run"))
    assert last.wait() == 0, last.stderr.read()
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "calm")
    student = [(tmp_path / run / "student" / "model.safetensors").read_bytes() for run in ("run", "calm")]
    assert student[0] == student[1]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    save_teacher(tmp_path / "teacher")
    data = write_corpus(tmp_path / "data", "txt", TEXTS)
    args = tiny_args(tmp_path / "teacher", data, tmp_path / "run", "--save-seconds", 1000)
    args[args.index("--align-tokens", 5) + 1] = 10 ** 6
    process, file = command(*args), tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "the same command goes on from there" in error
    rows = len(file.read_text().splitlines())
    run = hd.Run(hd.resolve(hd.parse([str(a) for a in args]), 4))
    assert run.saved_step("align") == rows == len(run.rows["align"])


# ------------------------------------------------------------------------------------------------ errors

def test_wrong_input_gets_one_sentence(tmp_path, capsys):
    save_teacher(tmp_path / "teacher")
    data = write_corpus(tmp_path / "data", "txt", TEXTS)
    gpt2, no_tokenizer, holes = tmp_path / "gpt2", tmp_path / "no_tokenizer", tmp_path / "holes"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)).save_pretrained(gpt2)
    make_teacher().save_pretrained(no_tokenizer)
    save_teacher(holes)
    from safetensors.torch import load_file, save_file
    weights = load_file(holes / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, holes / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "odd.csv").write_text("a,b")
    good, run = tmp_path / "teacher", tmp_path / "run"
    cases = [
        (tiny_args(good, data, run, "--softmax-layers", 5), "--softmax-layers must be within 1..4"),
        (tiny_args(gpt2, data, run), "is a 'gpt2' model; supported are LlamaForCausalLM"),
        (tiny_args(no_tokenizer, data, run), "has no tokenizer"),
        (tiny_args(holes, data, run), "lacks 1 of its weights or has them in another shape, model.layers.1.mlp.up_proj.weight"),
        (tiny_args(tmp_path / "nowhere", data, run), "which must be a model folder or the id of a model on the hub"),
        (tiny_args(good, tmp_path / "odd.csv", run), "must be or hold .txt, .jsonl or .parquet files"),
        (tiny_args(good, data, run, "--text-column", "body"), "no column 'body'; its columns are text"),
        (tiny_args(good, data, run, "--select", "best"), "--select must be ga-s2, greedy"),
        (tiny_args(good, data, run, "--softmax-layers", 2, "--select", "1,9"), "within 0..3"),
        (tiny_args(good, data, run, "--select", "1,2"), "--select 1,2 names 2 layers"),
        (tiny_args(good, data, run, "--data-config", "small"), "is a local path: leave it out"),
        (["--align-length", "7"], "--align-length must be at least 8"),
        (tiny_args(good, data, run, "--select", "published"), "no published selection for 'teacher'"),
        (tiny_args(good, data, run, "--baselines", "middle"), "--baselines knows all-linear"),
        (tiny_args(good, data, run, "--dtype", "int8"), "--dtype must be bfloat16 or float32"),
        (["--teacher", str(good)], "--teacher and --data go together"),
        (["--data-config", "sample-10BT"], "--data-config is for --teacher and --data"),
        (["--dtype", "bfloat16"], "the embedded teacher is trained in float32"),
        (tiny_args(good, data, run, "--chat"), "--chat needs a tokenizer with a chat template"),
    ]
    for args, sentence in cases:
        args = [str(a) for a in args]
        assert hd.main(args) == 1, args
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and sentence in error, error
        assert not any((run / name).exists() for name in ("settings.json", "tokens.json", "tokens.bin"))     # the folder is free for the next


def test_a_run_folder_refuses_other_settings_and_a_second_process(tmp_path):
    run = hd.Run(tiny_settings(out=str(tmp_path), seed=1))
    with pytest.raises(hd.UserError, match="in use by another process"):
        hd.Run(tiny_settings(out=str(tmp_path), seed=1))
    run.lock.close()
    with pytest.raises(hd.UserError, match="holds a run with --seed 1, not 2"):
        hd.Run(tiny_settings(out=str(tmp_path), seed=2))
    hd.Run(tiny_settings(out=str(tmp_path), seed=1, save_seconds=1.0, micro_batch=1))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    run, model = hd.Run(tiny_settings(out=str(tmp_path))), torch.nn.Linear(2, 1)
    observer, optimizer = hd.RunObserver(run, "align", 9), torch.optim.AdamW(model.parameters())
    observer.resume([model], optimizer)
    observer.step({"step": 1, "loss": 1.0}, [model], optimizer)
    observer.save([model], optimizer, finished=False)
    before = run.state_file("align").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hd, "save_file", full)
    observer.step({"step": 2, "loss": 1.0}, [model], optimizer)
    with pytest.raises(OSError):
        observer.save([model], optimizer, finished=False)
    assert run.state_file("align").read_bytes() == before
    run.lock.close()
    assert [row["step"] for row in hd.Run(tiny_settings(out=str(tmp_path))).rows["align"]] == [1]
    monkeypatch.setattr(hd, "run_pipeline", full)
    save_teacher(tmp_path / "teacher")
    assert hd.main([str(a) for a in tiny_args(tmp_path / "teacher", write_corpus(tmp_path / "data", "txt", TEXTS), tmp_path / "run2")]) == 1


def test_perplexity_is_a_mean_over_tokens():
    teacher, text = make_teacher(), [tokens(1, 9), tokens(3, 30)]
    labels = sum(x[:, 1:].numel() for x in text)
    with torch.no_grad():
        loss = sum(float(F.cross_entropy(teacher(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum")) for x in text) / labels
    assert hd.evaluate(teacher, {"text": text})["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


# ------------------------------------------------------------------------------------------------ clients of the saved model

@pytest.fixture(scope="module")
def saved_student(tmp_path_factory):
    folder, teacher = tmp_path_factory.mktemp("saved") / "student", make_teacher("qwen3")
    hd.save_student(hd.transfer_attention(teacher, [1]), hd.byte_tokenizer(), folder, teacher)
    return folder


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how)


def test_a_student_on_the_hub_loads(saved_student, tmp_path):
    """The folder as a download leaves it in the cache: there transformers demands every import that stands outside a `try:`."""
    hub = tmp_path / "hub" / "models--someone--student"
    shutil.copytree(saved_student, hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    code = (f"import sys, torch; sys.modules['fla'] = sys.modules['matplotlib'] = None\n"
            f"from transformers import AutoModelForCausalLM as A\nx = torch.arange(3, 12)[None]\n"
            f"a, b = (A.from_pretrained(name, trust_remote_code=True)(x).logits for name in ('someone/student', {str(saved_student)!r}))\n"
            f"assert torch.equal(a, b)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    needed = {name for file in ("hybrid_distill.py", "kernels.py") for name in dynamic_module_utils.get_imports(HERE / file)}
    assert needed - {"torch", "transformers", "numpy", "safetensors", "tokenizers", "tqdm", "huggingface_hub"} <= sys.stdlib_module_names


def test_without_trust_nothing_is_loaded(saved_student):
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(saved_student, trust_remote_code=False)


def test_pipeline_writes_what_generate_writes(saved_student):
    from transformers import pipeline
    text = pipeline("text-generation", model=str(saved_student), trust_remote_code=True)("a prompt", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    model, tokenizer = load(saved_student), hd.byte_tokenizer()
    assert text == tokenizer.decode(model.generate(**tokenizer("a prompt", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0])


def test_a_loaded_student_is_saved_again_in_shards_and_in_bf16(saved_student, tmp_path):
    model, x = load(saved_student), tokens(1, 9)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1 and (tmp_path / "shards" / "kernels.py").exists()
    assert torch.equal(load(tmp_path / "shards")(x).logits, model(x).logits)
    half = load(saved_student, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half", dtype="auto")
    gates = {name: p for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    assert again.dtype == torch.bfloat16 and gates and all(torch.equal(p, again.get_parameter(name)) for name, p in gates.items())
    assert torch.equal(again(x).logits, half(x).logits)


def test_compiled_in_one_graph(saved_student):
    model, x = load(saved_student), tokens(2, 20)
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    same(compiled(input_ids=x, use_cache=False).last_hidden_state, model.model(input_ids=x, use_cache=False).last_hidden_state)


def test_gradient_checkpointing_changes_no_gradient(saved_student):
    gradients = []
    for recompute in (False, True):
        model, x = load(saved_student).train(), tokens(2, 20)
        if recompute:
            hd.recompute_activations(model)
        model(x, labels=x).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_trainer_takes_a_step(saved_student, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments
    rows = [{"input_ids": list(range(5, 30)), "labels": list(range(5, 30)), "attention_mask": [0] * 3 + [1] * 22} for _ in range(2)]
    model = load(saved_student)
    before = model.model.layers[0].self_attn.A_log.clone()
    renamed = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
    how = TrainingArguments(output_dir=tmp_path, max_steps=1, **{renamed: True}, report_to=[], use_cpu=True, learning_rate=1e-2)
    assert math.isfinite(Trainer(model=model, args=how, train_dataset=rows).train().training_loss)
    assert not torch.equal(before, model.model.layers[0].self_attn.A_log)


def test_lora_on_the_mixers_projections(saved_student):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(saved_student), peft.LoraConfig(r=2, target_modules=["q_proj", "g_proj", "a_proj", "o_proj"], task_type="CAUSAL_LM"))
    model(input_ids=tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    assert any("layers.0.self_attn.g_proj.lora_B" in name and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if p.grad is not None)


def test_a_package_called_kernels_beside_ours(tmp_path):
    """transformers imports names from PyPI's `kernels`, when it is installed; our file of that name must hand them over."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from kernels.inner import Answer\n")
    (package / "inner.py").write_text("class Answer: pass\n")
    code = "import kernels; from kernels import Answer; import kernels.inner; assert kernels.inner.Answer is Answer; kernels.chunk_gated_delta_rule"
    for folders, good in (([HERE, tmp_path / "site"], True), ([HERE], False)):
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONNOUSERSITE": "1"},
                              cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == good, done.stderr
