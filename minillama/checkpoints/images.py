"""A reader's own pictures, as the tasks of vision.py take them."""

import torch
import torch.nn.functional as F

from ..vision import TASKS
from .files import FileError

INK = 0.3  # from which share of black on a pixel belongs to a stroke


def read_image(path, task):
    """The picture (1, h, N·w) in an image file, as `picture_of` makes it. FileError: Pillow cannot read it."""
    from PIL import Image  # late: nothing else needs it

    try:
        with Image.open(path) as image:
            grey = image.convert("L")
            pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(f"{path} is no image that can be read ({error}): save it as PNG") from None
    return picture_of(pixels / 255, task, path)


def picture_of(grey, task, name="the picture"):
    """Grey levels (height, width) from 0 to 1, of any size -> (1, h, N·w): ink is what stands out from the border. The
    digits of handwriting are cut apart where columns are empty, and each is brought to the size of a tile."""
    (h, w), N = TASKS[task].tile, TASKS[task].tiles
    border = torch.cat((grey[0], grey[-1], grey[:, 0], grey[:, -1])).median()
    ink = 1 - grey if border > 0.5 else grey
    if task == "calendar" or ink.shape == (h, N * w):
        return fitted(ink, h, N * w)[None]
    edges = F.pad((ink > INK).any(0).long(), (1, 1)).diff()
    runs = list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()))
    if len(runs) != N:
        raise FileError(f"{name} shows {len(runs)} strokes with gaps between them; needed are {N}, the digits YYYYMMDD")
    return torch.cat([fitted(boxed(ink[:, left:right]), h, w) for left, right in runs], 1)[None]


def boxed(digit):
    """A digit without the empty rows above and below it, and with a margin beside it where it is slim, as a 1 is."""
    rows = (digit > INK).any(1).nonzero()[:, 0]
    digit = digit[rows[0] : rows[-1] + 1]
    aside = max(0, (len(digit) - digit.shape[1]) // 2)
    return F.pad(digit, (aside, aside))


def fitted(ink, h, w):
    """A picture of any size brought to (h, w)."""
    if ink.shape == (h, w):
        return ink
    return F.interpolate(ink[None, None], (h, w), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
