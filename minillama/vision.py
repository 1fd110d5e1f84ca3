"""A vision encoder on one page, and what there is to see: dates in real handwriting, and pages of a calendar.

    "? = "               a strip of eight digits                    ─▶ "2021-03-17"     task "handwriting"
    "March ?, 2021 = "   a page of the month, one day marked        ─▶ "2021-03-17"     task "calendar"

What the picture shows stands as a ? in the text. The encoder cuts a picture into tiles side by side, and makes F
numbers of each:

    picture (B, h, N·w) ─▶ tiles (B·N, 1, h, w) ─▶ 3 × 3 convolution ─▶ patches ─▶ linear ─▶ norm ─▶ features (B, N, F)

It is trained by itself, with a head that names what stands on a tile, and then frozen; the head is not used again. The
digits are the UCI handwritten digits (Alpaydin & Kaynak 1998, 8 × 8 pixels) that scikit-learn brings: 1,797 of them, of
which those of test pictures are never seen in training. `python -m minillama.vision` makes the bundled weights.

Shapes: B pictures, N tiles of h × w pixels, F features.
"""

import calendar
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .data import split_dates
from .train import learning_rate_at

WEIGHTS = Path(__file__).parent / "bases" / "vision"


@dataclass(frozen=True)
class Task:
    """What is shown for a day, and what its tiles are: (h, w), how many, the patch, how many things stand on one."""

    tile: tuple[int, int]
    tiles: int
    stroke: dict  # of nn.Conv2d
    patch: int
    classes: int
    prompt: str  # of Python's strftime
    noise: float  # that an encoder is trained with; drawn pages have their own
    features: int = 64


OVERLAPPING, APART = dict(kernel_size=3, padding=1), dict(kernel_size=4, stride=4)
TASKS = {
    "handwriting": Task((8, 8), 8, OVERLAPPING, 2, 10, "? = ", 0.15),  # YYYYMMDD; a tile is a digit
    "calendar": Task((24, 28), 1, APART, 1, 31, "%B ?, %Y = ", 0.0),  # six weeks of seven days; a tile is a page
}


class Encoder(nn.Module):
    """Pictures (B, h, N·w) of a task -> features (B, N, F), each of mean 0 and variance 1."""

    def __init__(self, task):
        super().__init__()
        self.tile = task.tile
        self.strokes = nn.Conv2d(1, 16, **task.stroke)
        self.patches = nn.Conv2d(16, 24, task.patch, stride=task.patch)
        patches = self.patches(self.strokes(torch.zeros(1, 1, *task.tile))).numel()
        self.hidden = nn.Linear(patches, 96)
        self.look = nn.Linear(96, task.features)
        self.head = nn.Linear(task.features, task.classes)  # in its own training alone

    def forward(self, pictures):
        h, w = self.tile
        if pictures.dim() != 3 or pictures.shape[1] != h or pictures.shape[2] % w:
            raise ValueError(f"pictures have shape {tuple(pictures.shape)}; needed is (B, {h}, a multiple of {w})")
        tiles = pictures.unflatten(2, (-1, w)).transpose(1, 2)  # (B, N, h, w)
        x = F.relu(self.strokes(tiles.flatten(0, 1)[:, None]))  # (B·N, 16, h, w)
        x = F.relu(self.patches(x)).flatten(1)  # (B·N, 24 · patches)
        x = F.layer_norm(self.look(F.relu(self.hidden(x))), (self.look.out_features,))  # (B·N, F)
        return x.unflatten(0, tiles.shape[:2])


def digits(train, seed=0, share=0.2, of=None):
    """(images (n, 8, 8) from 0 to 1, labels (n,)) of the digits for training or, a fifth of each kind, for tests.

    of: digits to split in the place of all: digits(False, of=digits(True)) are held out to validate a choice with.
    """
    if of is None:
        from sklearn.datasets import load_digits  # late: nothing else needs it

        found = load_digits()
        of = torch.tensor(found.images).float() / 16, torch.tensor(found.target)
    images, labels = of
    order, chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)), []
    for digit in range(10):
        own = order[labels[order] == digit]
        cut = int(len(own) * share)
        chosen.append(own[cut:] if train else own[:cut])
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]


def write_by_hand(days, glyphs, seed=0):
    """Strips (n, 8, 64) of the eight digits of each day, each digit drawn from glyphs, as `digits` gives them."""
    images, labels = glyphs
    own = [images[labels == digit] for digit in range(10)]
    draw = random.Random(seed)
    strips = [[own[int(c)][draw.randrange(len(own[int(c)]))] for c in f"{day:%Y%m%d}"] for day in days]
    return torch.stack([torch.cat(strip, dim=1) for strip in strips])


def draw_pages(days, seed=0):
    """Pages (n, 24, 28) of the days' months: a row for each week from Monday on, a cell of 4 × 4 pixels for each day,
    with a smudge in it where there is one, and a ring around the day that is marked; all of it shaky and noisy."""
    g = torch.Generator().manual_seed(seed)
    first = torch.tensor([calendar.monthrange(day.year, day.month) for day in days])  # (n, 2): weekday, days
    cell = torch.arange(42)
    there = (cell >= first[:, :1]) & (cell < first.sum(1, keepdim=True))  # (n, 42)
    marked = cell == first[:, :1] + torch.tensor([[day.day - 1] for day in days])
    smudge, ring = torch.zeros(4, 4), torch.ones(4, 4)
    smudge[1:3, 1:3], ring[1:3, 1:3] = 1.0, 0.0

    def ink(low, high):
        return low + (high - low) * torch.rand(len(days), 42, 4, 4, generator=g)

    page = there[..., None, None] * smudge * ink(0.25, 0.6) + marked[..., None, None] * ring * ink(0.4, 1.0)
    page = page.view(-1, 6, 7, 4, 4).transpose(2, 3).reshape(-1, 24, 28)
    return (page + 0.1 * torch.randn(page.shape, generator=g)).clamp(0, 1)


def examples(task, days, count, train, seed=0):
    """(rows, pictures): `count` pairs (prompt, answer) for days drawn from `days`, and their pictures (count, h, N·w);
    in those for tests no glyph occurs that stands in one for training."""
    chosen = random.Random(seed).choices(days, k=count)
    if task == "handwriting":
        pictures = write_by_hand(chosen, digits(train), seed)
    else:
        pictures = draw_pages(chosen, seed + 10**6 * train)
    prompt = TASKS[task].prompt
    return [(day.strftime(prompt), f"{day.isoformat()}\n") for day in chosen], pictures


@torch.no_grad()
def see(encoder, rows, pictures, batch_size=1024):
    """Rows (prompt, answer, features (N, F)), as adapters/seeing.py and train.py take them."""
    features = torch.cat([encoder(some) for some in pictures.split(batch_size)])
    return [(*row, seen) for row, seen in zip(rows, features)]


def named_tiles(task, count, train, seed=0):
    """(pictures of one tile, what stands on it) to train or test an encoder: digits, or pages and the marked day."""
    if task == "handwriting":
        return digits(train)
    days = random.Random(seed).choices(split_dates()[not train], k=count)
    return draw_pages(days, seed + 10**6 * train), torch.tensor([day.day - 1 for day in days])


def train_encoder(task, steps=400, batch_size=128, learning_rate=3e-3, seed=0, tiles=None):
    """An encoder trained from scratch, and frozen.  tiles: (pictures, names) in the place of the task's own."""
    torch.manual_seed(seed)
    encoder = Encoder(TASKS[task])
    pictures, names = tiles or named_tiles(task, 20_000, True, seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate, weight_decay=0.01)
    for step in range(steps):
        some = torch.randint(len(names), (batch_size,))
        noisy = pictures[some] + TASKS[task].noise * torch.randn(batch_size, *pictures.shape[1:])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate, 0.1)
        loss = F.cross_entropy(encoder.head(encoder(noisy)[:, 0]), names[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.requires_grad_(False).eval()


def load_encoder(task):
    """The bundled encoder of a task, frozen."""
    if task not in TASKS:
        raise ValueError(f"there is no encoder {task!r}; there are {', '.join(TASKS)}")
    encoder = Encoder(TASKS[task])
    encoder.load_state_dict(load_file(WEIGHTS / f"{task}.safetensors"))
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def named_rightly(encoder, task, count=2000):
    """The share of unseen tiles that an encoder with its head names rightly."""
    pictures, names = named_tiles(task, count, False, 1)
    return (encoder.head(encoder(pictures)[:, 0]).argmax(-1) == names).float().mean().item()


if __name__ == "__main__":
    for task in TASKS:
        encoder = train_encoder(task).half()  # half the bytes; what is measured is what is kept
        save_file(encoder.state_dict(), WEIGHTS / f"{task}.safetensors")
        numbers, right = sum(p.numel() for p in encoder.parameters()), named_rightly(load_encoder(task), task)
        print(f"{task}: {numbers:,} numbers, {right:.1%} of unseen tiles named rightly")
