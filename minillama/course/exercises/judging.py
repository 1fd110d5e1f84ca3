"""The verdict on an answer: right, or the mistake in it by name.

What an answer does is held against the right answer's, piece by piece; where they differ, the explanations below are
tried in order, from the most particular (a mistake of the catalogue) to the most general (how the numbers differ).
"""

import contextlib
import functools
import re
from itertools import combinations, zip_longest

import torch

from .observing import End, Piece, Used, called, describe, floating, observe


@functools.cache
def expected(exercise):
    """What the right answer does, which does not change."""
    return tuple(observe(exercise, exercise.right))


def judge(exercise, answer):
    """(passed, mistake, message)."""
    if answer is None or answer is ...:
        return False, "blank", f"not written yet: it should be {exercise.call}."
    if not callable(answer):
        return False, "form", f"the answer is {describe(answer)}; needed is a function, {exercise.call}."
    with torch.random.fork_rng(devices=[]), Used(exercise.forbidden) as used:
        seen = list(observe(exercise, answer))
    with torch.random.fork_rng(devices=[]):
        right = expected(exercise)
        if end_of(right):
            raise RuntimeError(f"the reference does not answer its own exercise: {end_of(right).why}")
        asked = len(right)
        if getattr(exercise.probe, "told", False):
            asked = next(i for i, piece in enumerate(right) if piece.half)
        if alike(seen[:asked], right[:asked]) and not unstable(exercise, answer, seen[:asked], right):
            for function in used.found:
                return (
                    False,
                    "shortcut",
                    f"the numbers are right, and the point is missed: {exercise.forbidden[function]}.",
                )
            values = dict.fromkeys(piece.what for piece in right if piece.kind == "value")
            note = "" if alike(seen, right) else " (In bfloat16 it fails: there, cast what is float32, .to(x.dtype).)"
            return True, None, f"right. Equal to the reference: {', '.join(values)}.{note}" if values else "right."
        if used.found and not end_of(seen) and all(a.kind != "value" for a, _ in wrong_pieces(seen, right)):
            why = exercise.forbidden[used.found[0]]
            return False, "shortcut", f"the numbers are right, and the point is missed: {why}."
        for explain in EXPLANATIONS:
            if found := explain(exercise, answer, seen, right):
                return False, *found
    return False, "value", "it differs from the right answer, and nothing here can say how."


# ── what is alike ───────────────────────────────────────────────────────────────────────────────────────────────────


def tolerance(tensor):
    return 0.1 if tensor.dtype in (torch.bfloat16, torch.float16) else 1e-4  # there the dtype is what is looked at


def close(a, b, limit=None):
    """Equal in shape, dtype and, to rounding, in value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit, a, b = limit or tolerance(a), a.double(), b.double()
    if not a.numel() or not torch.equal(a.isnan(), b.isnan()):
        return not a.numel()
    a, b = (z.nan_to_num(0.0, 1e30, -1e30) for z in (a, b))
    return bool((a - b).abs().max() <= limit * b.abs().max() + 1e-12)


def agree(a, b):
    """Whether two Pieces, or two Ends, are the same."""
    if isinstance(a, End) or isinstance(b, End) or a is None or b is None:
        return isinstance(a, End) and isinstance(b, End) and a.plain == b.plain
    if a.kind == "count":
        return a.what == b.what and bool(a.value <= b.value)
    return a.what == b.what and close(a.value, b.value, 0.1 if a.half else None)


def alike(seen, others):
    """Whether two observations are the same; the second is asked for no further than they are."""
    return all(agree(a, b) for a, b in zip_longest(seen, others))


def counted(piece):
    return isinstance(piece, Piece) and piece.kind == "count"


def does(exercise, answer, seen, upto=None, same=agree):
    """Whether an answer does what was seen, up to that many pieces."""
    with contextlib.closing(observe(exercise, answer)) as others:
        if upto is None:
            return all(counted(a) or same(a, b) for a, b in zip_longest(seen, others))
        return all(same(a, next(others, None)) for a in seen[:upto])


def agree_roughly(a, b):
    """The same, where half precision counts by its dtype and shape: there a mistake rounds as it was written."""
    pieces = not isinstance(a, End) and not isinstance(b, End) and a is not None and b is not None
    if pieces and a.half and floating(a.value):
        return a.what == b.what and (a.value.shape, a.value.dtype) == (b.value.shape, b.value.dtype)
    return agree(a, b)


def wrong_pieces(seen, right):
    """Pairs (seen, needed) of Pieces that differ."""
    return [(a, b) for a, b in zip(seen, right) if not isinstance(a, End) and not agree(a, b)]


def end_of(seen):
    return seen[-1] if seen and isinstance(seen[-1], End) else None


# ── the explanations, each (exercise, answer, seen, right) -> (mistake, sentence) or None ─────────────────────────────


def blank(exercise, answer, seen, right):
    end = end_of(seen)
    return (end.mistake, end.why) if end and end.mistake == "blank" else None


@functools.cache
def begins(exercise, mistake):
    """The first thing that a mistake does, by which most of the catalogue is out of the question."""
    with contextlib.closing(observe(exercise, mistake.answer)) as pieces:
        return next(pieces, None)


@functools.cache
def pairs(exercise):
    """Two mistakes of the catalogue at once, (the first, both), where both can be made: of those that stand first in
    it, as many as are tried in a few seconds."""
    rows = [mistake for mistake in exercise.mistakes if mistake.edited is not None]
    places = sorted(combinations(range(len(rows)), 2), key=sum)[:400]
    both = ((rows[i], rows[i] + rows[j]) for i, j in places)
    return [(one, pair) for one, pair in both if pair]


def known(exercise, answer, seen, right):
    """A mistake of the catalogue."""
    for same in (agree, agree_roughly) if wrong_pieces(seen, right) else (agree,):
        for mistake in exercise.mistakes:
            if same(seen[0], begins(exercise, mistake)) and does(exercise, mistake.answer, seen, same=same):
                return mistake.name, f"this equals a known mistake: {mistake.sentence}."


def told(exercise, answer, seen, right):
    """What the probe itself has said: something changed in place, a weight unfrozen, a form not kept."""
    end = end_of(seen)
    if end and end.mistake != "error" and not wrong_pieces(seen, right):
        return end.mistake, end.why


def fact_missed(exercise, answer, seen, right):
    """A fact that is not as it should be, where no value before it is wrong."""
    for a, _ in wrong_pieces(seen, right)[:1]:
        return (a.mistake, a.why) if a.kind in ("fact", "count") else None


def known_so_far(exercise, answer, seen, right):
    """A mistake of the catalogue, up to where the answer stops or goes on in another dtype: two mistakes in one."""
    same = ((a, b) for a, b in zip(seen, right) if not isinstance(a, End))
    upto = next((i for i, (a, b) in enumerate(same) if a.value.dtype != b.value.dtype), None)
    upto = len(seen) - bool(end_of(seen)) if upto is None else upto
    if upto < len(right) and wrong_pieces(seen[:upto], right):
        for mistake in exercise.mistakes:
            if agree(seen[0], begins(exercise, mistake)) and does(exercise, mistake.answer, seen, upto):
                also = "It also fails elsewhere; mend this first."
                return mistake.name, f"this equals a known mistake: {mistake.sentence}. {also}"


def known_pair(exercise, answer, seen, right):
    """Two mistakes of the catalogue at once: the first is named, the second comes after it is mended."""
    if wrong_pieces(seen, right):
        for one, both in pairs(exercise):
            if agree(seen[0], begins(exercise, both)) and does(exercise, both.answer, seen):
                return one.name, f"two known mistakes at once. The first: {one.sentence}."


def unstable(exercise, answer, seen, right):
    """Other results for the same input: something kept, or drawn anew."""
    for salt, mistake, reason in (
        (0, "kept", "something is kept from an earlier call."),
        (1, "random", "is a dropout left on, or something drawn anew?"),
    ):
        for a, b in zip(seen, observe(exercise, answer, salt)):
            if not agree(a, b) and not isinstance(a, End):
                return mistake, f"{a} changes from call to call on the same input: {reason}"


def kept(exercise, answer, seen, right):
    """Right at the first call of a size, and wrong where the size comes again with other numbers."""
    for a, _ in wrong_pieces(seen, right)[:1]:
        if "again" in a.where and a.kind != "fact":
            return "kept", f"right at first, and wrong {a.where}: something is kept from an earlier call."


def detached(exercise, answer, seen, right):
    """Right values, and a gradient that does not flow."""
    wrong, stops = wrong_pieces(seen, right), end_of(seen) and not right[min(len(seen), len(right)) - 1].half
    if stops or not wrong or any(piece.kind == "value" for piece, _ in wrong):
        return None
    cut = [a.of for a, b in wrong if a.kind == "gradient" and not a.value.any() and b.value.any()]
    part = [a.of for a, b in wrong if a.kind == "gradient"]
    cause = ".detach(), .data, .item(), no_grad, numpy (no gradient goes through it), or a new tensor made of it"
    if cut:
        names = " and ".join(dict.fromkeys(cut))
        return (
            "detached",
            f"the values are right, and no gradient reaches {names}: cut off by {cause}; it never learns.",
        )
    if part:
        return (
            "detached",
            f"the values are right, and {part[0]}'s gradient is not: a part of its way is cut off, by {cause}.",
        )


def not_cast(exercise, answer, seen, right):
    """Right in float32, and not in bfloat16."""
    wrong = wrong_pieces(seen, right)
    halves = [i for i, piece in enumerate(right) if piece.half]
    if not halves or halves[0] == 0 or any(not a.half for a, _ in wrong) or len(seen) <= halves[0]:
        return None
    if wrong and wrong[0][0].value.dtype != wrong[0][1].value.dtype:
        a, b = wrong[0]
        needed = f"is {a.value.dtype}; needed is {b.value.dtype}"
        return (
            "not_cast",
            f"right in float32; but {a} {needed}: cast what is float32 to the dtype of what it meets, .to(x.dtype).",
        )
    if not wrong and end_of(seen) and right[min(len(seen), len(right)) - 1].half:
        return "not_cast", (
            f"right in float32; in bfloat16 {end_of(seen).why} Cast what is float32 to the dtype of what it meets, "
            ".to(x.dtype)."
        )
    if wrong and not end_of(seen):
        return "precision", f"right in float32; but {wrong[0][0]} is too far off: what is computed there needs float32."


def one_size(exercise, answer, seen, right):
    """Right at the first sizes, and not at others."""
    wrong, end = wrong_pieces(seen, right), end_of(seen)
    first = next((piece for piece, _ in wrong), None)
    where = first.where if first else right[len(seen) - 1].where if end and len(seen) <= len(right) else ""
    if where.startswith("for ") and (first or end.mistake == "error"):
        how = f"{first.what} is wrong" if first else end.why.removesuffix(".")
        return (
            "one_size",
            f"right at the first sizes; but {where} {how}: does something hold for those first sizes only?",
        )


def unread(exercise, answer, seen, right):
    """An input that changes nothing, though it should."""
    if not hasattr(exercise.probe, "inputs") or not wrong_pieces(seen, right):
        return None
    generator = torch.Generator()

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def out(function, changed=None):
        given = exercise.probe.inputs((generator.manual_seed(0), draw)[1])
        if changed:
            given[changed] = other(given[changed])
        torch.manual_seed(0)
        return [piece.value for piece in called(function, given, seen_outputs(right), gradient=False)]

    with contextlib.suppress(Exception):
        mine, theirs = out(answer), out(exercise.right)
        for name, value in exercise.probe.inputs(draw).items():
            if other(value) is not None:
                with contextlib.suppress(Exception):
                    stays = all(map(torch.equal, mine, out(answer, name)))
                    if stays and not all(map(close, theirs, out(exercise.right, name))):
                        return "unread", f"{name} makes no difference to what your function returns; it should."


def seen_outputs(right):
    names = tuple(dict.fromkeys(piece.what for piece in right if piece.kind == "value"))
    return names if len(names) > 1 else names[0]


def other(value):
    """Another value of the same form, or None."""
    if floating(value):
        return value.flip(-1) * 1.5 + 0.25
    if isinstance(value, torch.Tensor):
        return value.flip(-1)
    return value * 2 + 1 if isinstance(value, int | float) and not isinstance(value, bool) else None


def ended(exercise, answer, seen, right):
    end = end_of(seen)
    return (end.mistake, end.why) if end and not wrong_pieces(seen, right) else None


def swapped(exercise, answer, seen, right):
    for a, b in wrong_pieces(seen, right)[:1]:
        for c, d in zip(seen, right):
            if not isinstance(c, End) and a.value.dim() and close(a.value, d.value) and close(c.value, b.value):
                return "swapped", f"{a} and {c} are in each other's place."


def different(exercise, answer, seen, right):
    for a, b in wrong_pieces(seen, right)[:1]:
        return difference(str(a), a.value, b.value, exercise.hints)
    return ended(exercise, answer, seen, ())


EXPLANATIONS = (
    blank, known, told, fact_missed, known_so_far, kept, detached, not_cast, one_size, known_pair, ended, unread,
    unstable, swapped, different,
)  # fmt: skip


# ── how numbers differ ──────────────────────────────────────────────────────────────────────────────────────────────


def difference(what, value, wanted, hints):
    """(mistake, sentence): how a value differs from what it should be."""
    axes = re.search(r"\(([A-Za-z0-9·, ]+)\)", what)
    axes = [letter.strip() for letter in axes[1].split(",")] if axes else []
    if value.shape != wanted.shape:
        swapped = ""
        if sorted(value.shape) == sorted(wanted.shape) and value.dim() == wanted.dim():
            swapped = " The sizes are right and their order is not: look at your transposes."
        return "shape", f"{what} has shape {tuple(value.shape)}; needed is {tuple(wanted.shape)}.{swapped}"
    if value.dtype != wanted.dtype:
        return "dtype", f"{what} is {value.dtype}; needed is {wanted.dtype}."
    if not value.is_floating_point():
        return "value", f"{what} is {value.tolist()}; needed is {wanted.tolist()}."
    a, b = value.double(), wanted.double()
    if a.isnan().any():
        return "value", f"{what} holds NaN: is a whole row of the softmax masked, or something divided by 0?"
    if a.dim() == 0:
        return "value", f"{what} is {a:.3g}; needed is {b:.3g}."
    if close(-value, wanted):
        return "sign", f"{what} has the wrong sign, and is right otherwise."
    if close(1 - value, wanted):
        return "value", f"{what} is 1 minus what it should be."
    if not a.any():
        return "value", f"{what} is 0 everywhere; it should not be: does anything reach it?"
    if b.any():
        factor = (a * b).sum() / (b * b).sum()
        if (a - factor * b).abs().max() <= tolerance(value) * a.abs().max():
            times = f"{factor:.4g} times what it should be, everywhere"
            return "scale", f"{what} is {times}: look for a missing or a doubled factor."
    wrong = (a - b).abs() > tolerance(value) * b.abs().max()
    for axis in range(wrong.dim()):
        name = axes[axis] if len(axes) == wrong.dim() else f"axis {axis}"
        at = wrong.flatten() if wrong.dim() == 1 else wrong.transpose(0, axis).flatten(1).any(1)
        if not at.all() and wrong.any():
            bad = at.nonzero()[:, 0].tolist()
            good = [i for i in range(len(at)) if i not in bad]
            hint = f" {hints[name]}" if name in hints else ""
            return "place", f"{what} is right at {name} = {good[:8]} and wrong at {name} = {bad[:8]}.{hint}"
    most, largest = (float(x.abs().max()) for x in (a - b, b))
    far = f"{what} is wrong everywhere, by up to {most:.3g} where numbers go up to {largest:.3g}"
    return "value", f"{far}; neither a sign, nor one factor, nor a known mistake explains it."
