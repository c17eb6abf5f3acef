"""Make the embedded teacher: a Llama of 270k parameters that knows bytes and recalls 32 pairs.

    python assets/make_teacher.py [OUT]     # default assets/teacher; about a minute on one CPU core

It is trained on the EmbeddedCorpus, half text and half recall, and saved in bfloat16 beside its
byte tokenizer: perplexity 6.25, recall 100 %. What makes recall appear so fast: Muon on the
matrices, 4, 8, 16, then 32 pairs, and in every layer alike a planted head that starts out looking
at the token before.

The weights in assets/teacher are of CPython 3.11.7 built from source, torch 2.13.0+cpu and an Intel
Xeon with AVX-512, with the loss as commit 547117e rounded it. The text is the standard library,
with what its build wrote there: another rounding, Python, torch or CPU gives other weights, of a
teacher as good (perplexity 6.27, recall 100 % with the present loss on that machine).
"""

import math
import sys
from pathlib import Path

import torch
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hybrid_distill import EmbeddedCorpus, cross_entropy_loss, seeded

SEED, STEPS = 0, 220
CONFIG = LlamaConfig(
    vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=6, head_dim=32,
    num_attention_heads=2, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True,
    max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0})  # fmt: skip

@torch.no_grad()
def untrained():
    """The teacher before its first step: every layer adds nothing yet, and looks back."""
    torch.manual_seed(SEED)
    teacher = LlamaForCausalLM(CONFIG)
    for layer in teacher.model.layers:
        look_back(layer.self_attn, teacher.model.rotary_emb.inv_freq)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return teacher

def look_back(attn, inv_freq, sharpness=20.0):
    """Biases that let the first head of `attn` start out attending to the token before.

    RoPE turns a constant query and key into a score of their distance alone; it is largest at
    distance 1, sum_f c cos((distance - 1) f), if the query's bias is the key's turned back by one.
    """
    Dh = attn.head_dim
    w = torch.full_like(inv_freq, math.sqrt(sharpness * math.sqrt(Dh) / (Dh // 2)))
    attn.k_proj.bias[:Dh] = torch.cat([w, 0 * w])
    attn.q_proj.bias[:Dh] = torch.cat([w * inv_freq.cos(), -w * inv_freq.sin()])

def batch(corpus, step):
    """(text, recall), [B / 2, T] each: the number of pairs doubles every 35 steps, up to 32."""
    pairs = 4 << min(3, step // 35)
    length = 4 * pairs  # every pair once, then every key once more with its value
    draw = seeded(SEED, "teacher", step)
    return corpus.sample("train", max(32, 2048 // length), length, draw, pairs).values()

def last_hidden(teacher, tokens):
    return teacher.model(input_ids=tokens, use_cache=False).last_hidden_state

def losses(teacher, text, recall):
    """Cross-entropy of text and of recall, where the answers weigh ten times the rest."""
    weights = torch.full_like(recall[:, 1:], 0.1, dtype=torch.float)
    weights[:, recall.shape[1] // 2 :: 2] = 1.0  # the next token is the value of a queried key
    for tokens, mask in ((text, None), (recall, weights)):
        hidden = last_hidden(teacher, tokens)[:, :-1]
        yield cross_entropy_loss(hidden, teacher.lm_head.weight, tokens[:, 1:], mask)

def train(teacher, corpus):
    matrices = [p for p in teacher.model.layers.parameters() if p.ndim == 2]
    others = [p for p in teacher.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = [(group, group["lr"]) for group in muon.param_groups + adam.param_groups]
    for step in range(STEPS):
        for group, peak in peaks:  # up for 20 steps, level, down over the last 40 %
            group["lr"] = peak * min(1, (step + 1) / 20, (STEPS - step) / (0.4 * STEPS))
        found = []
        for loss in losses(teacher, *batch(corpus, step)):
            loss.backward()
            found.append(loss.item())
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step + 1 == STEPS:
            print(f"step {step + 1}: text {found[0]:.3f}, recall {found[1]:.3f}")

def byte_tokenizer():
    """<pad> 0, <eos> 1, <unk> 2, and every byte b as token b + 3."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary |= {character: b + 3 for b, character in bytes_to_unicode().items()}
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None)
    return GPT2Tokenizer(vocab=vocabulary, merges=[], **special)

@torch.no_grad()
def report(teacher, corpus):
    """Perplexity of the test part's text, and the share of right answers in its recall."""
    text, recall = corpus.sample("test", 64, 128, seeded(SEED, "test", 128)).values()
    loss = next(losses(teacher, text, recall))
    written = teacher.lm_head(last_hidden(teacher, recall)).argmax(-1)
    right = written[:, 64:-1:2] == recall[:, 65::2]
    print(f"perplexity {math.exp(loss):.3f}, recall {right.float().mean():.1%}")

def main(out):
    torch.set_num_threads(1)  # sums are then of one order, whatever the number of cores
    corpus, teacher = EmbeddedCorpus(SEED), untrained()
    train(teacher, corpus)
    teacher.bfloat16().save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    report(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), corpus)

if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent / "teacher"))
