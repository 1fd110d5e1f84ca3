"""What the rows of a batch see: `with seeing(model, features)`, for adapters whose prompts carry a picture.

    with seeing(model, [one, None, other]):           # three rows; the second is text alone
        logits = model(ids)                           # (3, T, V)

The features are those that the adapter's encoder makes of a picture (vision.py). They reach the adapter's wrappers, not
the model's arguments, so a base never knows of pictures; it works with a cache, with padding, in training, and within
`mixed`, whose groups of rows take their own pictures along.
"""

import contextlib

import torch

from . import wrappers
from .holding import held


@contextlib.contextmanager
def seeing(model, features):
    """Within the block row i of every batch sees features[i], (N, F), or nothing where that is None.

    features: a tensor (B, N, F), or a list. A generation is one such batch. The block is its thread's alone. Raises
    ValueError where no adapter of the model takes a picture, and for pictures of different shapes.
    """
    eyes = [wrapper for _, wrapper in wrappers(model) if hasattr(wrapper, "seen")]
    if not eyes:
        raise ValueError("the model has no adapter that takes a picture: adapt(model, 'image_prompt') gives it one")
    device = next(eyes[0].parameters()).device
    seen = gathered(features, device)
    with held(model):
        before = [eye.seen for eye in eyes]
        try:
            for eye in eyes:
                eye.seen = seen
            yield model
        finally:
            for eye, earlier in zip(eyes, before):
                eye.seen = earlier


def gathered(features, device=None):
    """(features (B, N, F), shown (B, 1, 1, 1): 1 where the row has a picture) of a tensor or a list with None; or None
    where no row has one."""
    rows = list(features)
    shapes = {tuple(row.shape) for row in rows if row is not None}
    if not shapes:
        return None
    if len(shapes) > 1 or len(min(shapes)) != 2:
        raise ValueError(f"the pictures have shapes {sorted(shapes)}; needed is one shape (N, F) for all of a batch")
    empty = torch.zeros(shapes.pop())
    whole = torch.stack([(empty if row is None else row).to(device) for row in rows])  # (B, N, F)
    shown = torch.tensor([row is not None for row in rows], device=device).float()
    return whole, shown[:, None, None, None]


def shown_by(model):
    """For `around` of train.train and exact_match: shows each row (prompt, answer, features) its picture, and a pair
    (prompt, answer) nothing."""
    return lambda rows: seeing(model, [row[2] if len(row) > 2 else None for row in rows])
