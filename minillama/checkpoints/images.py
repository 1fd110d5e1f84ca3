"""A reader's own pictures, as the tasks of vision.py take them."""

import warnings

import torch
import torch.nn.functional as F

from ..vision import TASKS
from .files import FileError

INK = 0.3  # from which share of the strongest ink on a pixel belongs to a stroke
LARGEST = 2048  # pixels on a side, more than any task looks at
SLIM = 0.9  # a digit's least width in heights: lines of a pen are read best so, and UCI's digits as well as at 1


def read_image(path, task):
    """The picture (1, h, N·w) in an image file, as `picture_of` makes it. FileError: Pillow cannot read it."""
    from PIL import Image, ImageOps  # late: nothing else needs it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)  # a photograph's way up
                if image.has_transparency_data:  # on white paper
                    paper = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(paper, image.convert("RGBA"))
                elif image.mode.startswith("I"):  # 16 bits, of which convert would keep the lower ones
                    image = image.convert("I").point(lambda level: level / 257)
                grey = image.convert("L")
                grey.thumbnail((LARGEST, LARGEST))
                pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise FileError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: save it smaller") from None
    except (OSError, ValueError, SyntaxError) as error:  # the last of broken PNGs
        raise FileError(f"{path} is no image that can be read ({error}): save it as PNG") from None
    return picture_of(pixels / 255, task, path)


def picture_of(grey, task, name="the picture"):
    """Grey levels (height, width) from 0 to 1, of any size -> (1, h, N·w): ink is what stands out from the border, dark
    or light. The digits of handwriting are cut apart where columns are empty; each is brought to the size of a tile.

    FileError: nothing stands out, or it is not as many strokes as there are digits."""
    (h, w), N = TASKS[task].tile, TASKS[task].tiles
    border = torch.cat((grey[0], grey[-1], grey[:, 0], grey[:, -1])).median()
    darker, lighter = border - grey.min(), grey.max() - border
    if max(darker, lighter) < 0.1:
        raise FileError(f"{name} is of one grey all over: nothing stands out from its border")
    if task == "calendar" or grey.shape == (h, N * w):
        return fitted(1 - grey if darker > lighter else grey, h, N * w)[None]
    ink = (border - grey) / darker if darker > lighter else (grey - border) / lighter
    ink = ink.clamp(min=0)
    edges = F.pad((ink > INK).any(0).long(), (1, 1)).diff()
    left, right = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    gaps = left[1:] - right[:-1]
    if len(gaps) >= N:  # a digit may fall into several strokes, less than half as far from each other as from the next
        apart = gaps > gaps.sort(descending=True).values[N - 2] / 2
        left, right = left[F.pad(apart, (1, 0), value=True)], right[F.pad(apart, (0, 1), value=True)]
    if len(left) != N:
        strokes = "1 stroke" if len(left) == 1 else f"{len(left)} strokes with gaps between them"
        raise FileError(f"{name} shows {strokes}; needed are {N}, the digits YYYYMMDD")
    return torch.cat([fitted(boxed(ink[:, a:b]), h, w) for a, b in zip(left.tolist(), right.tolist())], 1)[None]


def boxed(digit):
    """A digit without the empty rows above and below it, and with a margin beside it where it is slim, as a 1 is."""
    rows = (digit > INK).any(1).nonzero()[:, 0]
    digit = digit[rows[0] : rows[-1] + 1]
    aside = max(0, int(SLIM * len(digit) - digit.shape[1]) // 2)
    return F.pad(digit, (aside, aside))


def fitted(ink, h, w):
    """A picture of any size brought to (h, w)."""
    if ink.shape == (h, w):
        return ink
    return F.interpolate(ink[None, None], (h, w), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
