"""The data of the embedded teacher, which is on every machine: text and in-context recall."""

import os
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

from hybrid_distill import Corpus, recall_accuracy, require, seeded


class EmbeddedCorpus(Corpus):
    """Half of each batch is text as bytes, the standard library of Python and pydoc_data.topics,
    split by file; half is recall. On text alone another layer wins."""
    def __init__(self, seed: int):
        library = Path(os.__file__).parent
        files = sorted([*library.glob("*.py"), *library.glob("*/*.py")])
        skip = {"site-packages", "dist-packages", "test", "pydoc_data", "idlelib", "lib2to3"}
        texts = [file.read_bytes() for file in files if file.parent.name not in skip]
        texts += [text.encode() for _, text in sorted(topics.items())]
        self.seed, self.parts = seed, {}
        for part, tenths in ("validation", [8]), ("test", [9]), ("train", range(8)):
            text = b"".join(text for i, text in enumerate(texts) if i % 10 in tenths)
            self.parts[part] = np.frombuffer(text, np.uint8).astype(np.int64) + 3

    def sample(self, part, count, length, draw, pairs=None):
        """{"text", "recall"}, half of `count` each, recall of 32 pairs, or as many as fit twice."""
        require(count > 1, "half is text, half recall: give a batch of 2 or more")
        most = len(self.parts[part]) - 1
        require(length <= most, f"the embedded {part} part gives at most {most} tokens in a row")
        n, pairs = count // 2, pairs or min(length // 4, 32)
        starts = torch.randint(len(self.parts[part]) - length, (count - n,), generator=draw)
        text = torch.from_numpy(self.parts[part]).unfold(0, length, 1)[starts]
        recall = recall_rows(n, pairs, -(-length // (2 * pairs)), draw)[:, :length]
        return {"text": text, "recall": recall}

    def recall(self, model, part="test", count=256) -> dict:
        """The share of right answers to one key of 32 pairs; chance is 6 %."""
        rows = recall_rows(count, 32, 0, seeded(self.seed, "recall", part))
        return {"recall": recall_accuracy(model, rows[:, :-1], rows[:, -1:])}


def recall_rows(count: int, pairs: int, rounds: int, draw):
    """Rows of `k v` pairs, distinct keys of 32 and values of 16, all single bytes; then `rounds`
    times the keys in another order, each with its value: [count, 2 pairs (1 + rounds)]. With
    rounds = 0 one key is asked: [count, 2 pairs + 2]."""
    k = 68 + torch.rand(count, 32, generator=draw).argsort(1)[:, :pairs]
    v = 100 + torch.randint(16, (count, pairs), generator=draw)
    order = torch.randint(pairs, (count, 1), generator=draw)
    if rounds:
        order = torch.rand(count, rounds, pairs, generator=draw).argsort(2).flatten(1)
    k, v = (torch.cat([t, t.gather(1, order)], 1) for t in (k, v))
    return torch.stack([k, v], -1).flatten(1)
