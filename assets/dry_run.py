"""python hybrid_distill.py --dry-run: what a run will take, measured."""

import torch

from hybrid_distill import STAGES, TeacherPass, table, transfer_attention


def dry_run(s, teacher) -> str:
    """Three steps of every stage, of an all-linear student on random tokens -> a table of what a
    run will take, by the last of them: the first ones compile."""
    student, teach, rows = transfer_attention(teacher, mixer=s.mixer), TeacherPass(teacher, 0), []
    inputs, L, each = ([teacher], [teach], [teach], []), len(teacher.model.layers), len(s.placed)
    counts = 1, L * (None in s.placed.values()), each, each
    for (name, b), others, times in zip(s.budgets.items(), inputs, counts):
        tokens = torch.randint(s.vocab, (min(b.batch, s.at_a_time[name]), b.length))
        step = STAGES[name](student, *others, [tokens] * 3, 3)[-1]
        # a selection that agrees at once trains on select_from and on twice as many
        total = min(b.tokens, 3 * s.select_first.tokens) if name == "select" else b.tokens
        speed, peak = step["tokens"] / step["seconds"], torch.cuda.max_memory_allocated()
        row = {"stage": name, "tokens": total, "times": times, "tokens/s": round(speed)}
        rows.append(row | {"hours": times * total / speed / 3600, "GiB so far": peak / 2**30})
    hours = sum(row["hours"] for row in rows)
    return f"{table(rows)}\nIn all {hours:.2g} hours, without evaluations; selection by ga-s2."
