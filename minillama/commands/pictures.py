"""What `adapt --task` and `generate --image` have in common: rows with pictures, the options that suit a task, and the
picture of ten test images with the answers to them."""

import torch

from .. import data, vision
from ..adapters.seeing import shown_by
from ..checkpoints.images import read_image
from ..train import answers

SUITS = {"handwriting": dict(way="places"), "calendar": dict(way="global")}


def options_of(task, options):
    """The options of image_prompt for a task, where the command line gives no others."""
    tiles = vision.TASKS[task].tiles
    return {**SUITS[task], "tokens": tiles, "features": vision.TASKS[task].features, "encoder": task, **options}


def picture_rows(args):
    """(training rows, test rows, pictures of the latter), rows (prompt, answer, features)."""
    encoder, (train_days, test_days) = vision.load_encoder(args.task), data.split_dates()
    rows = vision.see(encoder, *vision.examples(args.task, train_days, args.steps * args.batch_size, True, args.seed))
    tests, pictures = vision.examples(args.task, test_days, args.test_dates, False, 1)
    return rows, vision.see(encoder, tests, pictures), pictures


def draw_answers(model, tokenizer, rows, pictures, title, out):
    """Writes ten test images with the answers to them, and the first image alone, for `generate --image`."""
    from PIL import Image

    from ..course.plots import pictures_figure  # late: matplotlib is slow to import
    from ..course.style import save_figure

    written = answers(model, tokenizer, rows[:10], around=shown_by(model))
    said = [(prompt, text.strip(), text == answer) for (prompt, answer, _), text in zip(rows, written)]
    save_figure(pictures_figure(pictures[:10], said, title), out / "pictures.png")
    Image.fromarray((255 * (1 - pictures[0])).round().to(torch.uint8).numpy()).save(out / "example.png")


def features_of(image, adapted):
    """(features (1, N, F), task) of an image file, for the adapters on a model that take pictures."""
    named = [part["encoder"] for parts in adapted.values() for part in parts if part["method"] == "image_prompt"]
    if not named:
        raise ValueError(
            "--image needs an adapter that takes pictures: --adapter FOLDER of `python -m minillama adapt --task "
            "handwriting`"
        )
    with torch.no_grad():
        return vision.load_encoder(named[0])(read_image(image, named[0])), named[0]
