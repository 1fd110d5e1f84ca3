"""The verdict on an answer: right, or the mistake in it by name.

What an answer does is held against the right answer's, piece by piece; where they differ, the explanations below are
tried in order, from the most particular (a mistake of the catalogue) to the most general (how the numbers differ).
"""

import collections
import contextlib
import functools
import re
from itertools import combinations, islice, zip_longest

import torch

from .observing import End, Piece, describe, floating, other
from .running import Used, observe


class Case:
    """An answer to be judged: what was seen of it, what is seen of the right one, and where they differ."""

    def __init__(self, exercise, answer, seen, right):
        self.exercise, self.answer, self.seen, self.right = exercise, answer, seen, right
        self.wrong = [(a, b) for a, b in zip(seen, right) if isinstance(a, Piece) and not agree(a, b)]
        self.first = self.wrong[0][0] if self.wrong else None  # the first Piece that is wrong
        self.end = seen[-1] if seen and isinstance(seen[-1], End) else None
        self.ends_in_half = self.end and right[min(len(seen), len(right)) - 1].half


@functools.cache
def expected(exercise):
    """What the right answer does, which does not change."""
    right = tuple(observe(exercise, exercise.right))
    if isinstance(right[-1], End):
        raise RuntimeError(f"the reference does not answer its own exercise: {right[-1].why}")
    return right


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
        case, asked = Case(exercise, answer, seen, right), len(right)
        if getattr(exercise.probe, "told", False):  # bfloat16, which comes last, is not asked for: it is only told of
            asked = next(i for i, piece in enumerate(right) if piece.half)
        passed = alike(seen[:asked], right[:asked]) and not unstable(case, asked)
        if used.found and (passed or not case.end and all(a.kind != "value" for a, _ in case.wrong)):
            why = exercise.forbidden[used.found[0]]
            return False, "shortcut", f"the numbers are right, and the point is missed: {why}."
        if passed:
            values = dict.fromkeys(piece.what for piece in right if piece.kind == "value")
            note = "" if alike(seen, right) else " (In bfloat16 it fails: there, cast what is float32, .to(x.dtype).)"
            return True, None, f"right. Equal to the reference: {', '.join(values)}.{note}" if values else "right."
        if case.end and case.end.mistake == "blank":
            return False, "blank", case.end.why
        for explain in EXPLANATIONS:
            if found := explain(case):
                return False, *found
        for a, b in case.wrong[:1]:
            return False, *difference(str(a), a.value, b.value, exercise.hints)
    return False, "value", "it differs from the right answer, and nothing here can say how."


# ── what is alike ───────────────────────────────────────────────────────────────────────────────────────────────────


def tolerance(tensor):
    return 0.1 if tensor.dtype in (torch.bfloat16, torch.float16) else 1e-4  # there the dtype is what is looked at


def close(a, b, limit=None):
    """Equal in shape, dtype and, to rounding, in value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not a.is_floating_point():
        return torch.equal(a, b)
    limit, a, b = limit or tolerance(a), a.double(), b.double()
    if not a.numel() or not torch.equal(a.isnan(), b.isnan()):
        return not a.numel()
    a, b = (z.nan_to_num(0.0, 1e30, -1e30) for z in (a, b))
    return bool((a - b).abs().max() <= limit * b.abs().max() + 1e-12)


def agree(a, b, roughly=False):
    """Whether two Pieces, or two Ends, are the same.

    roughly: half precision counts by its dtype and shape, for there a mistake rounds as it was written.
    """
    if not isinstance(a, Piece) or not isinstance(b, Piece):
        return isinstance(a, End) and isinstance(b, End) and a.plain == b.plain
    if a.what != b.what or a.kind == "count":
        return a.what == b.what and bool(a.value <= b.value)
    if roughly and a.half and floating(a.value):
        return (a.value.shape, a.value.dtype) == (b.value.shape, b.value.dtype)
    return close(a.value, b.value, 0.1 if a.half else None)


def alike(seen, others):
    """Whether two observations are the same; the second is asked for no further than they are."""
    return all(agree(a, b) for a, b in zip_longest(seen, others))


# ── the explanations, each a function of a Case -> (mistake, sentence) or None ────────────────────────────────────────


DONE = collections.defaultdict(list)  # what a mistake of an exercise does, as far as anyone has asked


def equals(case, mistake, roughly=False, upto=None):
    """Whether a mistake does what was seen, up to that many Pieces; all of them, however often it runs a module."""
    done = DONE[case.exercise, mistake]

    def differ(a, b):
        return not (upto is None and getattr(a, "kind", "") == "count" or agree(a, b, roughly))

    if any(map(differ, case.seen[:upto], done)):
        return False
    with contextlib.closing(observe(case.exercise, mistake.answer)) as pieces:
        for i, (a, b) in enumerate(zip_longest(case.seen[:upto], islice(pieces, upto))):
            done += [b] if b and i == len(done) else []
            if differ(a, b):
                return False
    return True


def known(case):
    """A mistake of the catalogue."""
    for roughly in (False, True) if case.wrong else (False,):
        for mistake in case.exercise.mistakes:
            if equals(case, mistake, roughly=roughly):
                return mistake.name, f"this equals a known mistake: {mistake.sentence}."


def known_so_far(case):
    """A mistake of the catalogue, up to where the answer stops or goes on in another dtype: two mistakes in one."""
    dtypes = [a.value.dtype == b.value.dtype for a, b in zip(case.seen, case.right) if isinstance(a, Piece)]
    upto = dtypes.index(False) if False in dtypes else len(case.seen) - bool(case.end)
    if upto < len(case.right) and not all(map(agree, case.seen[:upto], case.right)):
        for mistake in case.exercise.mistakes:
            if equals(case, mistake, upto=upto):
                also = "It also fails elsewhere; mend this first."
                return mistake.name, f"this equals a known mistake: {mistake.sentence}. {also}"


def fact_missed(case):
    """A fact that is not as it should be, where no value before it is wrong."""
    if case.first and case.first.kind in ("fact", "count"):
        return case.first.mistake, case.first.why


@functools.cache
def pairs(exercise):
    """Two mistakes of the catalogue at once, (the first, both), where both can be made: of those that stand first in
    it, as many as are tried in a few seconds."""
    rows = exercise.mistakes
    places = sorted(combinations(range(len(rows)), 2), key=sum)[:400]
    return [(rows[i], both) for i, j in places if (both := rows[i] + rows[j])]


def known_pair(case):
    """Two mistakes of the catalogue at once: the first is named, the second comes after it is mended."""
    for one, both in pairs(case.exercise) if case.wrong else ():
        if equals(case, both):
            return one.name, f"two known mistakes at once. The first: {one.sentence}."


def unstable(case, upto=None):
    """Other results for the same input: something kept, or drawn anew; or an earlier result written over."""
    value = next((a for a, _ in case.wrong if a.kind == "value"), None)
    if value is not None and "again" in value.where:
        why = "something is kept from an earlier call, or written over by a later one"
        return "kept", f"right at first; but {value} is wrong: {why}."

    def changed(salt):
        again = zip(case.seen[:upto], observe(case.exercise, case.answer, salt))
        return next((a for a, b in again if not agree(a, b) and not isinstance(a, End)), None)

    if drawn := changed(1):
        if kept := changed(0):
            return (
                "kept",
                f"{kept} changes from call to call on the same input: something is kept from an earlier call.",
            )
        why = "is a dropout left on, or something drawn anew?"
        return "random", f"{drawn} changes from call to call on the same input: {why}"


def detached(case):
    """Right values, and a gradient that does not flow."""
    wrong = [(a, b) for a, b in case.wrong if a.kind == "gradient"]
    stops_in_float32 = case.end and not case.ends_in_half
    if not wrong or stops_in_float32 or any(a.kind == "value" for a, _ in case.wrong):
        return None
    cause = ".detach(), .data, .item(), no_grad, numpy (no gradient goes through it), or a new tensor made of it"
    how = f"{wrong[0][0].of}'s gradient is not: a part of its way is cut off, by {cause}."
    if cut := dict.fromkeys(a.of for a, b in wrong if not a.value.any() and b.value.any()):
        how = f"no gradient reaches {' and '.join(cut)}: cut off by {cause}; it never learns."
    return "detached", f"the values are right, and {how}"


def not_cast(case):
    """Right in float32, and not in bfloat16."""
    halves = next((i for i, piece in enumerate(case.right) if piece.half), 0)  # where they begin
    if not 0 < halves < len(case.seen) or not all(a.half for a, _ in case.wrong):
        return None
    cast = "cast what is float32 to the dtype of what it meets, .to(x.dtype)."
    if not case.wrong and case.ends_in_half and case.end.mistake == "error":
        return "not_cast", f"right in float32; in bfloat16 {case.end.why} {cast.capitalize()}"
    for a, b in case.wrong[:1]:
        if a.value.dtype != b.value.dtype:
            return "not_cast", f"right in float32; but {a} is {a.value.dtype}; needed is {b.value.dtype}: {cast}"
        if not case.end:
            return "precision", f"right in float32; but {a} is too far off: what is computed there needs float32."


def one_size(case):
    """Right at the first sizes, and not at others."""
    first, end, reached = case.first, case.end, len(case.seen)
    where = first.where if first else case.right[reached - 1].where if end and reached <= len(case.right) else ""
    if where.startswith("for ") and (first or end.mistake == "error"):
        how = f"{first.what} is wrong" if first else end.why.removesuffix(".")
        only = "does something hold for those first sizes only?"
        return "one_size", f"right at the first sizes; but {where} {how}: {only}"


def unread(case):
    """An input that changes nothing, though it should."""
    inputs = getattr(case.exercise.probe, "inputs", None)
    if not inputs or not case.wrong:
        return None

    def out(function, changed=None):
        generator = torch.Generator().manual_seed(0)
        given = inputs(lambda *shape: torch.randn(shape, generator=generator))
        if changed:
            given[changed] = other(given[changed])
        torch.manual_seed(0)
        result = function(*given.values())
        return result if isinstance(result, tuple | list) else [result]

    for name in (name for name, value in inputs(torch.randn).items() if other(value) is not None):
        with contextlib.suppress(Exception):
            stays = all(map(torch.equal, out(case.answer), out(case.answer, name)))
            if stays and not all(map(close, out(case.exercise.right), out(case.exercise.right, name))):
                return "unread", f"{name} makes no difference to what your function returns; it should."


def ended(case):
    """An error, or what the probe itself has said: something changed in place, a weight unfrozen, a form not kept."""
    return (case.end.mistake, case.end.why) if case.end and not case.wrong else None


EXPLANATIONS = known, fact_missed, known_so_far, detached, not_cast, unstable, one_size, known_pair, ended, unread


# ── how numbers differ ──────────────────────────────────────────────────────────────────────────────────────────────


def difference(what, value, wanted, hints):
    """(mistake, sentence): how a value differs from what it should be."""
    axes = re.search(r"\(([A-Za-z0-9·, ]+)\)", what)
    axes = [letter.strip() for letter in axes[1].split(",")] if axes else []
    if value.shape != wanted.shape:
        turned = " The sizes are right and their order is not: look at your transposes."
        turned = turned if sorted(value.shape) == sorted(wanted.shape) else ""
        return "shape", f"{what} has shape {tuple(value.shape)}; needed is {tuple(wanted.shape)}.{turned}"
    if value.dtype != wanted.dtype:
        return "dtype", f"{what} is {value.dtype}; needed is {wanted.dtype}."
    if not value.is_floating_point() and value.numel() < 50:
        return "value", f"{what} is {value.tolist()}; needed is {wanted.tolist()}."
    a, b = value.double(), wanted.double()
    if a.isnan().any():
        return "value", f"{what} holds NaN: is a whole row of the softmax masked, or something divided by 0?"
    if a.dim() == 0:
        return "value", f"{what} is {a:.3g}; needed is {b:.3g}."
    if close(-value, wanted):
        return "sign", f"{what} has the wrong sign, and is right otherwise."
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
