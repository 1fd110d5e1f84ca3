"""Pictures: what is shown reaches its own row and nothing else, encoders and digits are split and frozen, files of a
reader become pictures. (The contract of every method holds image_prompt too: test_methods.py, test_mixed.py …)"""

import base64
import io

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import KINDS, make, open_gates
from test_options import inside, sentence

import minillama
from minillama import adapt, data, seeing, vision
from minillama.adapters import adapter_parameters, base_tensors
from minillama.adapters.image_prompt import ImageAttention
from minillama.adapters.seeing import shown_by
from minillama.checkpoints.images import read_image
from minillama.course import lessons
from minillama.train import answers, exact_match, train

WAYS = ("places", "global")
PICTURES = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5))


def sighted(way="places", kind="grouped", **options):
    torch.manual_seed(0)
    return open_gates(adapt(make(kind), "image_prompt", tokens=4, features=6, way=way, **options))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_sees_its_own_picture_and_text_alone_sees_none(kind, way, ids):
    model = sighted(way, kind)
    with minillama.disabled(model):
        base = model(ids)
    assert torch.equal(model(ids), base)  # outside of a block: open gates, and the base bit for bit
    with seeing(model, [PICTURES[0], None, PICTURES[2]]):
        logits, written = model(ids), minillama.generate(model, ids, 4)
    assert torch.equal(logits[1], base[1])
    for row in (0, 2):
        assert (logits[row] - base[row]).abs().max() > 0.01
        with seeing(model, PICTURES[row : row + 1]):
            torch.testing.assert_close(model(ids[row : row + 1])[0], logits[row])
            assert torch.equal(minillama.generate(model, ids[row : row + 1], 4)[0], written[row])
    with seeing(model, [None] * 3):
        assert torch.equal(model(ids), base)


@torch.no_grad()
def test_the_prefix_is_made_once_a_generation_and_never_kept_for_another_picture(ids, monkeypatch):
    model, made = sighted(), []
    whole = ImageAttention.prefix
    monkeypatch.setattr(ImageAttention, "prefix", lambda self, dtype: made.append(self) or whole(self, dtype))
    alone = {}
    for name in (0, 1, 0):
        made.clear()
        with seeing(model, PICTURES[[name] * 3]):
            alone.setdefault(name, minillama.generate(model, ids, 5))
            assert torch.equal(minillama.generate(model, ids, 5), alone[name])
        assert len(made) in (2 * len(model.layers), len(model.layers))
    assert not torch.equal(alone[0], alone[1])


@torch.no_grad()
def test_a_global_picture_adds_one_vector_at_every_token_and_one_by_places_does_not():
    """The same vector on all prompts moves all scores of a query alike, which a softmax does not see."""
    q = torch.randn(2, 6, 5, 10, generator=torch.Generator().manual_seed(1)).double()
    for way in WAYS:
        model = sighted(way).double()
        layer = model.layers[1].self_attn
        with seeing(model, PICTURES[:2]):
            one = layer.term(q)
        with seeing(model, PICTURES[[1, 0]]):
            change = layer.term(q) - one  # (B, H, T, d)
        alike = (change - change[:, :, :1]).abs().max() / change.abs().max()
        assert (alike < 1e-12) == (way == "global")


def test_no_gradient_enters_a_frozen_half(ids):
    """Neither the base nor, through the features, the encoder: what requires gradients is the adapter's."""
    encoder, model = vision.load_encoder("handwriting"), make("llama")
    base = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    open_gates(adapt(model, "image_prompt"))
    with seeing(model, encoder(torch.rand(3, 8, 64))):
        minillama.answer_loss(model, ids, ids).backward()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(tensor.grad is None and torch.equal(tensor, base[n]) for n, tensor in base_tensors(model).items())
    assert all(parameter.grad.any() for parameter in adapter_parameters(model).values())


def test_wrong_ways_to_show_a_picture_are_sentences(ids):
    model = sighted()
    with pytest.raises(ValueError, match="3 rows and 2 were shown"), seeing(model, PICTURES[:2]):
        model(ids)
    with pytest.raises(ValueError, match=r"\(5, 6\) features here; the adapter was made for \(4, 6\)"):
        with seeing(model, torch.zeros(3, 5, 6)):
            model(ids)
    with pytest.raises(ValueError, match="one shape"), seeing(model, [PICTURES[0], PICTURES[1, :2]]):
        pass
    with pytest.raises(ValueError, match="no adapter that takes a picture"), seeing(make("llama"), PICTURES):
        pass
    assert all(layer.self_attn.seen is None for layer in model.layers)
    for options, words in (
        (dict(way="both"), "way is .both."), (dict(tokens=0), "tokens 0"),
        (dict(prompt_length=9), "prompt_length is 9"),
        (dict(way="global", prompt_length=0), "prompt_length is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            adapt(make("llama"), "image_prompt", **options)
    with pytest.raises(ValueError, match="pictures come in by `around`"):
        train(model, minillama.ByteTokenizer(), [([1, 2], [3])], steps=1, progress=False)


def test_training_and_measuring_show_each_row_its_picture():
    """A model of random weights learns to tell two pictures apart behind one prompt, which no text could."""
    torch.manual_seed(0)
    model = minillama.LLaMA(minillama.LLaMAConfig(256, 32, 48, 2, 2))
    adapt(model, "image_prompt", tokens=4, features=6)
    rows = [("? = ", answer, picture) for answer, picture in zip("ab", PICTURES)]
    tokenizer, around = minillama.ByteTokenizer(), shown_by(model)
    train(model, tokenizer, rows, steps=30, batch_size=2, learning_rate=0.1, progress=False, around=around)
    assert exact_match(model, tokenizer, rows, around=around) == 1
    assert answers(model, tokenizer, rows[::-1], around=around) == ["b\n", "a\n"]
    assert len(set(answers(model, tokenizer, ["? = ", "? = "]))) == 1


# ── pictures and encoders ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_no_glyph_of_a_test_picture_stands_in_one_for_training():
    (mine, _), (theirs, _) = vision.digits(True), vision.digits(False)
    flat = {tuple(image.flatten().tolist()) for image in mine}
    assert not flat & {tuple(image.flatten().tolist()) for image in theirs}
    assert len(mine) + len(theirs) == 1797 and len(theirs) == 355


def test_digits_are_split_by_kind_and_again_for_a_validation():
    """Made-up digits, of which no two are alike: ten of each kind, two of them held out, and two of the other eight."""
    made = torch.arange(100.0).view(-1, 1, 1).expand(-1, 8, 8), torch.arange(10).repeat(10)
    train, test = vision.digits(True, of=made), vision.digits(False, of=made)
    parts = vision.digits(True, of=train), vision.digits(False, of=train), test
    assert [len(images) for images, _ in parts] == [70, 10, 20]
    assert len({float(image[0, 0]) for images, _ in parts for image in images}) == 100
    for images, names in parts:
        assert torch.equal(images[:, 0, 0] % 10, names.float())
        assert len(set(names.bincount().tolist())) == 1


def test_a_strip_shows_its_day_and_a_page_its_month():
    days = data.split_dates()[1][:40]
    glyphs = torch.arange(30.0).view(-1, 1, 1).expand(-1, 8, 8), torch.arange(10).repeat(3)
    for day, strip in zip(days, vision.write_by_hand(days, glyphs)):
        assert "".join(str(int(tile[0, 0]) % 10) for tile in strip.split(8, 1)) == f"{day:%Y%m%d}"
    for day, page in zip(days, vision.draw_pages(days)):
        ring = torch.ones(4, 4)
        ring[1:3, 1:3] = 0
        cells = page.view(6, 4, 7, 4).transpose(1, 2).reshape(42, 4, 4)
        assert int((cells * ring).sum((1, 2)).argmax()) == day.replace(day=1).weekday() + day.day - 1


@pytest.mark.slow
def test_the_bundled_encoder_names_digits_it_never_saw():
    assert vision.named_rightly(vision.load_encoder("handwriting"), "handwriting") > 0.98


def test_bundled_encoders():
    assert vision.named_rightly(vision.load_encoder("calendar"), "calendar", 300) > 0.97
    assert sum(path.stat().st_size for path in vision.WEIGHTS.iterdir()) < 400_000
    with pytest.raises(ValueError, match="no encoder 'faces'"):
        vision.load_encoder("faces")
    with pytest.raises(ValueError, match=r"pictures have shape \(1, 8, 60\)"):
        vision.load_encoder("handwriting")(torch.zeros(1, 8, 60))


@pytest.mark.slow
def test_an_encoder_is_trained_in_seconds():
    encoder = vision.train_encoder("handwriting", steps=150)
    assert vision.named_rightly(encoder, "handwriting") > 0.95


DAY = data.split_dates()[1][0]


def saved(picture, path):
    """Grey levels from 0 to 1 as a file."""
    Image.fromarray((255 * picture.clamp(0, 1).numpy()).round().astype(numpy.uint8)).save(path)
    return path


def written_large(strip):
    """(120, N · 100): the N tiles of a strip eight times as large, with paper between them."""
    large = torch.zeros(120, 100 * (strip.shape[1] // 8))
    for i, tile in enumerate(strip.split(8, 1)):
        large[20:84, 100 * i + 10 : 100 * i + 74] = tile.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return large


@pytest.mark.slow
def test_digits_in_a_file_are_read(tmp_path):
    """Eight real digits as a strip, and large: dark on light and light on dark."""
    (strip,), encoder = vision.write_by_hand([DAY], vision.digits(False)), vision.load_encoder("handwriting")
    assert (read_image(saved(1 - strip, tmp_path / "strip.png"), "handwriting") - strip).abs().max() < 0.01
    large = written_large(strip)
    for picture in (large, 1 - large):
        seen = encoder.head(encoder(read_image(saved(picture, tmp_path / "large.png"), "handwriting"))).argmax(-1)[0]
        assert sum(a == int(b) for a, b in zip(seen.tolist(), f"{DAY:%Y%m%d}")) >= 6


def in_many_files(large, folder):
    """The same drawing, ink from 0 to 1, in files of many kinds: {name: path}."""
    white = Image.new("L", large.shape[::-1], "white")
    ink = Image.fromarray((255 * large.numpy()).round().astype(numpy.uint8))
    dark = Image.composite(Image.new("L", ink.size, "black"), white, ink)
    clear = Image.merge("LA", (Image.new("L", ink.size, "black"), ink))  # what is no ink is transparent
    deep = Image.fromarray((65535 * (1 - large.numpy())).astype(numpy.uint16))
    pencil = (0.8 - 0.5 * large + 0.01 * torch.randn(large.shape, generator=torch.Generator().manual_seed(0))).numpy()
    kinds = {
        "light.png": ink, "rgb.png": dark.convert("RGB"), "rgba.png": dark.convert("RGBA"), "clear.png": clear,
        "clear_rgba.png": clear.convert("RGBA"), "palette.gif": dark.convert("P"), "deep.png": deep,
        "cmyk.jpg": dark.convert("CMYK"), "pencil.jpg": Image.fromarray((255 * pencil).astype(numpy.uint8)),
        "large.png": dark.resize((2400, 360), Image.Resampling.NEAREST),
    }  # fmt: skip
    for name, image in kinds.items():
        image.save(folder / name)
    return {name: folder / name for name in kinds}


def test_a_file_of_any_kind_becomes_the_picture_it_shows(tmp_path):
    """A strip and a page as they are; and eight drawings, one of them in two strokes, grey or in colours, dark on
    light or light on dark, on transparent ground, deep, noisy, large: the same picture."""
    tiles = (torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.8).float()  # (N, h, w)
    tiles[:, :, 0] = tiles[:, :, 7] = 1.0
    tiles[0, :, 4] = 0  # it falls apart
    strip = torch.cat(list(tiles), 1)
    (page,) = vision.draw_pages([DAY])
    inner = torch.cat([F.pad(tile[:, 1:7], (1, 1)) for tile in tiles], 1)  # with a border of paper
    assert (read_image(saved(1 - inner, tmp_path / "strip.png"), "handwriting") - inner).abs().max() < 0.01
    assert (read_image(saved(1 - page, tmp_path / "page.png"), "calendar") - page).abs().max() < 0.01
    large = written_large(strip)
    plain = read_image(saved(1 - large, tmp_path / "plain.png"), "handwriting")
    for tile, shown in zip(tiles, plain[0].split(8, 1), strict=True):  # a little blurred
        assert torch.corrcoef(torch.stack((tile.flatten(), shown.flatten())))[0, 1] > 0.9
    ones = torch.zeros(120, 800)
    ones[10:110, 44::100] = ones[10:110, 45::100] = 1.0
    ones = read_image(saved(ones, tmp_path / "ones.png"), "handwriting")[0].unflatten(1, (8, 8))  # stay slim
    assert (ones[..., 3:5].sum(-1) > 0.1).all() and not ones[..., :2].any() and not ones[..., 6:].any()
    for name, path in in_many_files(large, tmp_path).items():
        off = (read_image(path, "handwriting") - plain).abs().max()
        assert off < (0.2 if name.endswith("jpg") else 0.03), name  # noise makes the strongest ink stronger


def test_what_is_no_picture_of_eight_digits_is_a_sentence(tmp_path, monkeypatch):
    def refused(words, path, task="handwriting"):
        with pytest.raises(minillama.FileError, match=words) as error:
            read_image(path, task)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)

    large = written_large(torch.ones(8, 64))
    large[:, 400:] = 0
    refused("shows 4 strokes", saved(large, tmp_path / "four.png"))
    large[:, 100:] = 0
    refused("shows 1 stroke;", saved(large, tmp_path / "one.png"))
    refused("shows 9 strokes", saved(written_large(torch.ones(8, 72)), tmp_path / "nine.png"))
    for task in vision.TASKS:
        for name, shape in (("dot.png", (1, 1)), ("line.png", (1, 500)), ("blank.png", (60, 300))):
            refused("of one grey all over", saved(torch.ones(shape), tmp_path / name), task)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    whole = (tmp_path / "nine.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "empty.png", "cut.png", "missing.png"):
        refused("is no image", tmp_path / name)
    for most in (60 * 300 - 1, 100):  # Pillow's warning, and its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        refused(f"more than {most:,} pixels", tmp_path / "blank.png")


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("adapt", "--method", "image_prompt"), "image_prompt takes pictures"),
        (("adapt", "--task", "calendar", "--method", "lora"), "the method is lora and the task calendar"),
        (("adapt", "--task", "faces"), "invalid choice"),
        (("generate", "--image", "x.png"), "--image needs an adapter that takes pictures"),
        (("generate",), "there is no prompt"),
    ],
)
def test_refusals(arguments, words, tmp_path):
    code, _, err = inside(*arguments, cwd=tmp_path)
    assert code == 2 and words in sentence(err) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("task, prompt", (("handwriting", []), ("calendar", ["--prompt", "March ?, 2021 = "])))
def test_a_task_is_learned_and_a_file_is_read(task, prompt, tmp_path):
    short = ["--steps", 60, "--test-dates", 50, "--out", "here"]
    code, out, err = inside("adapt", "--task", task, *short, cwd=tmp_path)
    assert code == 0 and "logits bit-identical to the base's" in out and "100.0% (logits bit-identical)" in out, err
    assert (tmp_path / "here/pictures.png").stat().st_size > 10_000
    image = ["--adapter", "here", "--image", "here/example.png"]
    code, out, err = inside("generate", *image, *prompt, cwd=tmp_path)
    assert code == 0 and len(out.splitlines()[-1].partition(" = ")[2]) == 10, out + err


def test_what_is_drawn_on_the_pad_is_read():
    """The kernel's side: the canvas sends a PNG through a hidden text field."""
    model, tokenizer = minillama.load("dates-llama")
    pad = lessons.pad(adapt(model, "image_prompt"), tokenizer)
    canvas, answer, clear, field = pad.children
    large = 255 * torch.ones(96, 640, dtype=torch.uint8)
    for count, words in ((3, "shows 3 strokes"), (8, "? = <b>")):
        for i in range(count):
            large[20:80, 80 * i + 30 : 80 * i + 40] = 0  # ones
        buffer = io.BytesIO()
        Image.fromarray(large.numpy()).save(buffer, format="png")
        field.value = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        assert words in answer.value
    clear.click()
    assert field.value == "" and "canvas" in canvas.value
