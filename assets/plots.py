"""The figures of tutorial.ipynb and README. Each function draws one, from plain numbers.

One colour has one meaning in all of them: blue is a softmax layer (or the row whose softmax layers
the KL chose), grey a linear one, black the teacher, purple the delta rule; each fixed rule has its
own colour and mark, so that the figures can be read without colours.
"""

import json
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

SOFTMAX, LINEAR, DELTA, TARGET = "tab:blue", "0.68", "tab:purple", "tab:pink"
COLOURS = {"teacher": "black", "ga-s2": SOFTMAX, "gates": "tab:brown", "greedy": "tab:cyan",
           "uniform": "tab:orange", "centred": "tab:green", "random": "tab:red",
           "all-linear": "0.5"}
MARKS = {"teacher": "*", "ga-s2": "o", "gates": "X", "greedy": "D", "uniform": "s",
         "centred": "P", "random": "^", "all-linear": "v"}
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
                     "figure.constrained_layout.use": True, "legend.frameon": False,
                     "font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5})


def panels(columns, height=3.0, rows=1, **options):
    """The axes of a new figure, as wide as a page."""
    return plt.subplots(rows, columns, figsize=(9, height), **options)[1]


def style(name):
    """Colour and mark of a row; those of a selector without its own are dark grey diamonds."""
    return dict(color=COLOURS.get(name, "0.3"), marker=MARKS.get(name, "d"))


def whole_numbers(*axes):
    """Ticks of an x axis of steps or layers at whole numbers alone."""
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def logarithmic(ax):
    """A logarithmic y axis, with ticks as close as its range has room for."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.2 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:.3g}")
    ax.yaxis.set_minor_locator(NullLocator())


def key(ax, *entries, **where):
    """A legend of (label, colour) patches."""
    handles = [Patch(color=colour, label=label) for label, colour in entries]
    ax.legend(handles=handles, **where)


def beside(ax):
    """The legend at the right of the axes, where nothing is drawn."""
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def layer_colours(count, softmax):
    """Blue for the layers in `softmax`, grey for the others, of `count`."""
    return [SOFTMAX if i in softmax else LINEAR for i in range(count)]


def costs(contexts, cache):
    """KiB of cache against the context length: {row: (label, [bytes, ...])}."""
    ax = panels(1, 2.9)
    for name, (label, sizes) in cache.items():
        ax.plot(contexts, [size / 1024 for size in sizes], label=label, **style(name))
    ax.set_xscale("log")
    logarithmic(ax)
    ax.set(xlabel="context (tokens)", ylabel="cache of one sequence (KiB)",
           title="what a new token has to read")
    ax.set_xticks(contexts, [f"{n:,}" for n in contexts])
    ax.xaxis.set_minor_locator(NullLocator())
    beside(ax)


def states(matrices, reads):
    """The 4 x 4 states of a toy memory, {title: S}, and what is read from it, {title: {bar: o}}."""
    axes = panels(4, 4.9, rows=2).flat
    for ax, (name, S) in zip([axes[0], axes[1], axes[2], axes[3], axes[5]], matrices.items()):
        ax.imshow(S, cmap="PuOr", vmin=-1.2, vmax=1.2)
        for i, j in (S.abs() > 1e-6).nonzero().tolist():
            x = float(S[i, j])
            ax.text(j, i, f"{x:.1f}", ha="center", va="center", color="w" if abs(x) > 0.6 else "k")
        ax.set(title=name, xlabel="value index", ylabel="key index", xticks=range(4),
               yticks=range(4))
    bars = {"delta rule": DELTA, "plain sum": LINEAR, "q = k0": "0.2", "q = k1": "0.8"}
    for ax, (title, outputs) in zip([axes[4], axes[6], axes[7]], reads.items()):
        for i, (name, o) in enumerate(outputs.items()):
            ax.bar([j + 0.4 * i - 0.2 for j in range(4)], o, 0.4, label=name, color=bars[name])
        ax.axhline(0, color="0.2", linewidth=0.8)
        ax.set(title=title, xlabel="value index", ylabel="output o", xticks=range(4),
               ylim=(-0.6, 1.9))
        ax.legend(loc="upper center", ncols=1)


def answered(numbers, curves):
    """Right answers (%) against the number of keys: {d_k: (delta rule, plain sum)}."""
    ax = panels(1, 3.0)
    for (d, both), mark in zip(curves.items(), "^os"):
        rules = zip(both, ("delta rule", "plain sum"), (DELTA, "0.5"), "-:")
        for shares, rule, colour, line in rules:
            ax.plot(numbers, shares, line, color=colour, marker=mark, markersize=4,
                    label=f"{rule}, $d_k$ = {d}")
    ax.axhline(100 / 16, color="0.8", linestyle="--", label="chance")
    ax.set_xscale("log")
    ax.set(xlabel="different keys, each written twice", ylabel="right answers (%)", ylim=(0, 106),
           title="how much a state can hold")
    ax.set_xticks(numbers, numbers)
    ax.xaxis.set_minor_locator(NullLocator())
    beside(ax)


def chunks(weights, C):
    """Left: how a sequence is worked through. Right: weights [T, T], which token reads which."""
    left, right = panels(2, 3.9, width_ratios=[1, 1.15])
    T = len(weights)
    count = T // C
    for n in range(count):
        for i in range(C):
            for j in range(i + 1):
                left.add_patch(Rectangle((n * C + j, n * C + i), 1, 1, facecolor="#b9a0d4",
                                         edgecolor="w"))
        if n:
            left.add_patch(Rectangle((0, n * C), n * C, C, facecolor="0.88", edgecolor="w"))
            left.text(n * C / 2, n * C + C / 2, f"$S_{{{n * C}}}$", ha="center", va="center")
    left.set(xlim=(0, T), ylim=(T, 0), aspect="equal", xlabel="is read (token)",
             ylabel="reads (token)", title=f"{count} chunks of {C} tokens")
    image = right.imshow(weights, cmap="PuOr", vmin=-1, vmax=1)
    for n in range(1, count):
        right.axhline(n * C - 0.5, color="0.6", linewidth=0.7)
        right.axvline(n * C - 0.5, color="0.6", linewidth=0.7)
    right.set(xlabel="is read (token)", title="weights of a random sequence")
    right.figure.colorbar(image, ax=right, label="weight of $v_s$ in $o_t$")
    for ax in (left, right):
        at = range(0, T, C)
        offset = 0.5 if ax is left else 0
        ax.set_xticks([i + offset for i in at], at)
        ax.set_yticks([i + offset for i in at], at)
    key(left, ("in the chunk: matrix products", "#b9a0d4"),
        ("earlier chunks: through the state", "0.88"), loc="upper center",
        bbox_to_anchor=(0.5, -0.2))


def alignment(history, L):
    """The alignment loss of every layer over stage 1, and its mean over the last steps."""
    left, right = panels(2, 3.0, width_ratios=[3, 2])
    last = {i: statistics.fmean(row[f"layer {i}"] for row in history[-9:]) for i in range(L)}
    order = sorted(last, key=last.get)
    named = order if L < 9 else [order[0], order[L // 4], order[L // 2], order[-1]]
    steps = [row["step"] for row in history]
    for i in order:
        line = left.plot(steps, [row[f"layer {i}"] for row in history], color="0.85", linewidth=1)
        if i in named:
            n = named.index(i)
            line[0].set(color=plt.cm.copper(n / len(named)), label=f"layer {i}", zorder=3,
                        linestyle=["-", "--", ":", "-."][n % 4])
    left.set(xlabel="step of stage 1", ylabel="alignment loss", title="training batches")
    logarithmic(left)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], loc="upper right", ncols=2)  # as the curves lie
    right.bar(range(L), [last[i] for i in range(L)], color=LINEAR)
    right.set(xlabel="layer", ylabel="alignment loss", title="mean of the last 9 steps")
    whole_numbers(left, right)


def selection(curves, chosen, kinds):
    """Stage S: {layer: {steps: KL}}, and by kind of data {kind: {layer: KL}}.

    Blue bars and curves stay softmax, whatever the data; a star marks the best of that kind."""
    axes = panels(1 + len(kinds), 3.3)
    L = len(curves)
    for i, colour in enumerate(layer_colours(L, chosen)):
        kept = i in chosen
        axes[0].plot([*curves[i]], [*curves[i].values()], color=colour, zorder=2 + kept,
                     marker="o" if kept else None, markersize=4,
                     linestyle="-" if kept else ["-", "--", ":"][i % 3])
    axes[0].set(xlabel="training step of the candidates", ylabel="held-out KL (nats)",
                title="only one layer softmax", ylim=(0, None))
    for ax, (kind, kl) in zip(axes[1:], kinds.items()):
        gain = [max(kl.values()) - kl[i] for i in range(L)]
        ax.bar(range(L), gain, color=layer_colours(L, chosen))
        best = sorted(kl, key=kl.get)[: len(chosen)]
        ax.plot(best, [gain[i] + 0.04 * max(gain) for i in best], "k*", markersize=6)
        ax.set(xlabel="layer", ylabel="I(l) above the worst layer's (nats)",
               ylim=(0, 1.12 * max(gain) or 1), title=f"scored on {kind} alone")
    whole_numbers(*axes)
    best = "the best layer" if len(chosen) == 1 else f"the {len(chosen)} best layers"
    handles = [Patch(color=SOFTMAX, label="stays softmax"), Patch(color=LINEAR, label="linear"),
               Line2D([], [], color="k", marker="*", linestyle="", label=f"{best} of this kind")]
    axes[0].figure.legend(handles=handles, loc="outside lower center", ncols=3)


def before_after(curves, chosen):
    """Held-out KL of the candidates before training against after it: {layer: {steps: KL}}."""
    ax, k = panels(1, 3.2), len(chosen)
    points = {i: (c[min(c)], c[max(c)]) for i, c in curves.items()}
    starts = sorted(before for before, _ in points.values())
    if 0 < k < len(starts):
        ax.axvline(statistics.fmean(starts[k - 1:][:2]), color="0.6", linestyle="--",
                   label=f"left of it: the best {k} before training")
    for kept, colour, label in ((True, SOFTMAX, "stays softmax"), (False, LINEAR, "linear")):
        some = [points[i] for i in points if (i in chosen) == kept]
        ax.plot(*zip(*some), "o", color=colour, label=label, markersize=6 if kept else 4)
    ax.margins(0.08, 0.12)
    label_apart(ax, points, chosen)
    ax.set(xlabel="held-out KL before training (nats)", ylabel="after training (nats)",
           title="what a little training changes")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    beside(ax)


def label_apart(ax, points, names):
    """Write the names of points beside them, at the corner that is farthest from all the others."""
    ax.figure.canvas.draw()
    at = {i: ax.transData.transform(point) for i, point in points.items()}
    taken = [*at.values()]
    for i in names:
        corners = [(x, y) for y in (5, -12) for x in (5, -6 - 6 * len(str(i)))]
        middle = {c: at[i] + [c[0] + 3 * len(str(i)), c[1] + 4] for c in corners}
        others = [place for place in taken if place is not at[i]]
        best = max(corners, key=lambda c: min(math.dist(middle[c], place) for place in others))
        taken.append(middle[best])
        ax.annotate(i, points[i], best, textcoords="offset points")


def sets(kls, rules, mean, tradeoff, context):
    """Left: {layers: test KL} of sets, and {rule: its layers}. Right: (K, bytes of cache, KL)."""
    left, right = panels(2, 3.8)
    order = sorted(kls, key=kls.get)
    left.plot(range(1, len(order) + 1), [kls[x] for x in order], ".", color="0.6", label="a set")
    left.axhline(mean, color="0.6", linestyle="--", label="mean of the sets")
    for i, (name, layers) in enumerate(rules.items()):
        layers = tuple(sorted(layers))
        left.plot(1 + order.index(layers), kls[layers], linestyle="", label=name,
                  markersize=9 + 3 * i, fillstyle="none", markeredgewidth=2, clip_on=False,
                  **style(name))
    left.set(xlabel="rank of the set", ylabel="test KL (nats)", ylim=(0, 1.15 * max(kls.values())),
             title=f"sets of {len(order[0])} layer{'s' * (len(order[0]) > 1)}")
    left.margins(x=0.08)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, markerscale=0.6)
    _, cache, values = zip(*tradeoff)
    right.plot([x / 1e6 for x in cache], values, "-", color=SOFTMAX, linewidth=1)
    for k, x, y in tradeoff:
        name = "teacher" if k == tradeoff[-1][0] else "all-linear" if k == 0 else "ga-s2"
        right.plot(x / 1e6, y, linestyle="", clip_on=False, zorder=3, **style(name))
        right.annotate(f"K = {k}", (x / 1e6, y), (5, 6), textcoords="offset points")
    right.set(xlabel=f"cache of {context:,} tokens (MB)", ylabel="test KL (nats)",
              xlim=(-2e-8 * max(cache), 1.15e-6 * max(cache)), ylim=(0, 1.15 * max(values)),
              title="the first K layers of the ranking of ga-s2 stay softmax")
    whole_numbers(left)


def rounds(scores):
    """One panel a round of `greedy`: ([layers kept before it], {layer: KL with it kept, too})."""
    axes = panels(len(scores), 3.0, sharey=True)
    for n, (ax, (kept, kl)) in enumerate(zip(axes, scores)):
        best = min(kl, key=kl.get)
        ax.bar([*kl], [*kl.values()], color=[SOFTMAX if i == best else LINEAR for i in kl])
        for i in kept:
            ax.axvspan(i - 0.4, i + 0.4, color=SOFTMAX, alpha=0.25, linewidth=0)
        title = f"with {', '.join(map(str, kept))} kept" if kept else "each layer alone"
        ax.set(xlabel="layer", ylabel="" if n else "held-out KL (nats)",
               title=f"round {n + 1}: {title}")
        whole_numbers(ax)
    light = Patch(color=SOFTMAX, alpha=0.25, label="kept in an earlier round")
    handles = [Patch(color=SOFTMAX, label="lowest KL: kept"), light,
               Patch(color=LINEAR, label="the others")]
    axes[0].figure.legend(handles=handles, loc="outside lower center", ncols=3)


def ranks(rankings, costs, k):
    """{selector: layers, best first} as rows of ranks, and {selector: training tokens}."""
    left, right = panels(2, 1.2 + 0.27 * len(rankings), sharey=True, width_ratios=[3, 1])
    L = len(next(iter(rankings.values())))
    table = [[ranking.index(i) for i in range(L)] for ranking in rankings.values()]
    left.imshow(table, cmap="Greys_r", vmin=-L / 2, vmax=1.2 * L, aspect="auto")
    for y, row in enumerate(table):
        for i, rank in enumerate(row):
            left.text(i, y, rank + 1, ha="center", va="center", fontsize=9 if L < 20 else 6.5,
                      fontweight="bold" if rank < k else "normal")
            if rank < k:
                left.add_patch(Rectangle((i - 0.46, y - 0.44), 0.92, 0.88, fill=False, linewidth=2,
                                         edgecolor=SOFTMAX))
    left.set(xlabel="layer", title=f"rank of each layer; framed: the {k} that stay softmax")
    left.set_yticks(range(len(rankings)), rankings)
    millions = [costs[name] / 1e6 for name in rankings]
    right.barh(range(len(rankings)), millions, color="0.4")
    for y, x in enumerate(millions):
        right.annotate(f"{x:.2g}" if x else "0", (x, y), (3, 0), textcoords="offset points",
                       va="center", fontsize=8)
    right.set(xlabel="training tokens (millions)", title="what it costs",
              xlim=(0, 1.25 * max(millions) or 1))
    whole_numbers(left)


def attention(pattern, places, shares, softmax, title):
    """One head's attention [queries, tokens], the places it should look at, and the share of
    attention that the best head of each layer gives them."""
    ax, right = panels(2, 3.3)
    image = ax.imshow(pattern, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="attention")
    ax.plot(places, range(len(places)), "s", color=TARGET, markersize=11, fillstyle="none",
            markeredgewidth=1.5, label="the value of the queried key")
    ax.set(title=title, ylabel="query", xlabel="token it looks at")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    right.bar(range(len(shares)), shares, color=layer_colours(len(shares), softmax))
    right.set(xlabel="layer", ylabel="attention on the right value", ylim=(0, 1),
              title="the best head of each layer")
    key(right, ("stays softmax", SOFTMAX), ("linear in the student", LINEAR), loc="upper center",
        bbox_to_anchor=(0.5, -0.2), ncols=2)
    whole_numbers(ax, right)


def stage_2(histories):
    """Training KL over stage 2: {row: (label, history)}."""
    ax = panels(1, 3.1)
    for i, (name, (label, history)) in enumerate(histories.items()):
        ax.plot([row["step"] for row in history], [row["kl"] for row in history], label=label,
                markevery=(2 * i, max(1, len(history) // 8)), **style(name))
    ax.set(xlabel="step of stage 2", ylabel="training KL (nats)",
           title="stage 2, the same batches for every student")
    logarithmic(ax)
    beside(ax)
    whole_numbers(ax)


def evidence(runs, k):
    """{row: its rows of all runs} with Gated DeltaNet and k softmax layers, best median first."""
    found = {}
    for run in runs:
        for row in run["rows"] if run["K"] == k and run["mixer"] == "gdn" else ():
            found.setdefault(row["name"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: statistics.median(r["kl"] for r in item[1])))


def readme(runs, k=8):
    """The README's figure: test KL by way of choosing, and needles against the context length."""
    left, right = panels(2, 4.2, gridspec_kw={"width_ratios": [1.15, 1]})
    known = evidence(runs, k)
    rows = {name: tries for name, tries in known.items() if name != "teacher"}
    for y, (name, tries) in enumerate(rows.items()):
        kl = [row["kl"] for row in tries]
        middle, look = statistics.median(kl), style(name)
        left.plot([min(kl), max(kl)], [y, y], color=look["color"], linewidth=2)
        left.plot(middle, y, linestyle="", markersize=7, **look)
        needles = statistics.median(row["recall"] for row in tries)
        left.annotate(f"{middle:.3f} nats, {100 * needles:.0f} % of needles", (max(kl), y), (9, 0),
                      textcoords="offset points", va="center", fontsize=8)
    count = {name: f"{name} ({len(tries)} seeds)" if len(tries) > 1 else name
             for name, tries in rows.items()}
    left.set_yticks(range(len(rows)), [count[name] for name in rows])
    worst = max(row["kl"] for tries in rows.values() for row in tries)
    left.set(xlabel="test KL to the teacher (nats)", xlim=(0, 1.75 * worst),
             ylim=(len(rows) - 0.5, -0.5), title=f"{k} of 30 layers stay softmax: who chooses them")
    lengths, ends = (512, 1024, 2048, 4096), {}
    named = [name for name in ("teacher", "ga-s2", "gates", "centred", "all-linear")
             if name == "teacher" or name in rows]
    for name in named:
        found = [100 * statistics.median(
            (row["needles"][f"1 in {length}"] + row["needles"][f"4 in {length}"]) / 2
            for row in known[name]) for length in lengths]
        right.plot(range(len(lengths)), found, clip_on=False, **style(name),
                   markersize=9 if name == "ga-s2" else 6)
        ends[name] = found[::-1]
    low = -10
    for name, end in sorted(ends.items(), key=lambda item: item[1]):  # labels do not overlap
        low = max(end[0], low + 5)
        right.annotate(name, (len(lengths) - 1, low), (8, -3), textcoords="offset points",
                       color=style(name)["color"])
    right.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    right.set(xlabel="tokens of context", ylabel="needles found (%)", ylim=(-2, 100),
              xlim=(0, len(lengths) - 0.2), title="numbers hidden in a text, found again")


if __name__ == "__main__":  # python assets/plots.py: the README's figure again
    here = Path(__file__).parent
    readme(json.loads((here / "smollm2.json").read_text())["runs"])
    plt.savefig(here / "smollm2.png", dpi=150)
