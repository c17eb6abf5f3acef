"""Check every backend of kernels.py against the fp64 recurrence, then time it beside its peers.

    python kernels.py            # or python assets/benchmark.py; on a CPU about a minute

Peers, where installed: on a GPU flash-linear-attention (FLA) for the rule and Liger for the loss
over a vocabulary, hybrid_distill.kl_loss; on a CPU the rule that transformers falls back to.
"""

import contextlib
import functools
import inspect
import itertools
import sys
import timeit
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import LIMITS, chunk_gated_delta_rule, errors, example, triton, why_not_triton

def check(device):
    """Print the largest error of every backend there is -> are all within their limits?"""
    print("Largest error against the fp64 recurrence: o, final state, six gradients, fused step")
    cases, good = [("torch", torch.float32)], True
    if why_not_triton(device, torch.float32, 2, 4, 64, 64) is None:  # the interpreter lacks bf16
        cases += [("triton", x) for x in LIMITS if device == "cuda" or x == torch.float32]
    sizes = (1, 64, 64), (75, 60, 100), (200, 64, 64), (200, 128, 128)
    kinds = "random", "identical", "underflow"
    for (backend, dtype), (T, Dk, Dv), kind in itertools.product(cases, sizes, kinds):
        inputs = example(2, T, 2, 4, Dk, Dv, kind, dtype, device)
        found = torch.tensor(errors(chunk_gated_delta_rule, inputs, backend=backend))
        verdict = "" if (found < LIMITS[dtype]).all() else "EXCEEDS ITS LIMIT"  # NaN too
        case = f"{backend:6} {str(dtype)[6:]:8} T={T:<3} d={Dk},{Dv:<3} {kind:9}"
        print(f"  {case} {found.max():.0e} {verdict}", flush=True)
        good = good and not verdict
    return good

def benchmark(device):
    """Print what the rule and, on a GPU, kl_loss take, beside a peer that is installed."""
    rules, losses, T, dtype = {"ours": chunk_gated_delta_rule}, {}, 16_384, torch.float32
    shapes = [(4, 512, 4, 32), (1, 2048, 8, 64), (1, 4096, 4, 128), (16, 256, 4, 32)]
    if device == "cuda":
        from hybrid_distill import kl_loss
        losses["ours"] = lambda *x: [kl_loss(*x)]
        dtype = torch.bfloat16
        shapes = [(6, n, 16, d) for d in (64, 128) for n in (4096, T, 2 * T)]
        shapes += [(8, 512, 9, 64), (32, 1024, 9, 64), (1, 2 * T, 16, 64)]
        with contextlib.suppress(ImportError):
            import fla.ops.gated_delta_rule as fla
            rules["FLA"] = fla.chunk_gated_delta_rule
        with contextlib.suppress(ImportError):  # 0.0 is KL(teacher || student)
            from liger_kernel.transformers import LigerFusedLinearJSD
            losses["Liger"] = lambda *x: [LigerFusedLinearJSD(0.0)(*x, None)]
    else:
        with contextlib.suppress(ImportError):
            from transformers.models.qwen3_next import modeling_qwen3_next as qwen
            rules["transformers"] = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)
    print("\nmilliseconds                  of             forward  + backward  peak GiB")
    for (B, n, H, d), (name, rule) in itertools.product(shapes, rules.items()):
        x = [y.requires_grad_() for y in example(B, n, H, H, d, d, "random", dtype, device)[:5]]
        rule = functools.partial(rule, use_qk_l2norm_in_kernel=True)
        report(f"B={B} T={n} H={H} d={d}", name, rule, x, x)
    for (D, V), name in itertools.product(((576, 49_152), (2048, 128_256)), losses):
        x = [torch.randn(n, D, device=device, dtype=dtype) for n in (T, V, T, V)]
        trained = [y.requires_grad_() for y in x[:2]]
        report(f"KL T={T} D={D} V={V}", name, losses[name], x, trained)

def report(case, name, function, inputs, trained):
    """Print a line: median milliseconds forward, with backward; on a GPU the peak of memory."""
    def both():
        o = function(*inputs)[0]
        torch.autograd.grad(o, trained, torch.ones_like(o))

    def median(run):
        if inputs[0].is_cuda:
            return triton.testing.do_bench(run, return_mode="median")
        return sorted(1e3 * x for x in timeit.repeat(run, number=1, repeat=7))[3]

    both()  # compiles
    before = torch.cuda.memory_allocated()
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    forward = median(functools.partial(torch.no_grad()(function), *inputs))
    print(f"{case:29} {name:12} {forward:9.3f} {median(both):10.3f} {peak:9.2f}", flush=True)

def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chip = torch.cuda.get_device_name() if device == "cuda" else torch.get_num_threads()
    print(f"{device}, {chip}; torch {torch.__version__}, triton {triton and triton.__version__}")
    if not check(device):
        sys.exit("an error exceeds its limit: nothing is timed")
    benchmark(device)

if __name__ == "__main__":
    main()
