"""Dates as a language task: "3 mars 2021" -> "2021-03-03", in any language that CLDR knows.

The text comes from the Unicode CLDR through Babel (formats medium, long and full), so every language is real data
and nothing is downloaded. One example is one line of bytes, and the loss falls on the answer alone:

    3 mars 2021 = 2021-03-03⏎
    └── prompt ──┘└─ answer ─┘
"""

import datetime
import difflib
import random

import babel
import torch
from babel.dates import format_date

FORMATS = ("medium", "long", "full")
# From near to far from the English that the bundled bases know. Any other CLDR locale works by its own name.
LANGUAGES = ("fr", "de", "es", "it", "pt", "nl", "sv", "pl", "fi", "tr", "hu", "id")
LOCALES = {"en": ("en_US", "en_GB")}
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
STOP = ord("\n")
IGNORED = -100  # a label that carries no loss, as in transformers


class ByteTokenizer:
    """A token is a byte of the UTF-8 text, so the vocabulary has 256 entries and no text is unknown."""

    vocab_size = 256
    eos_id = STOP

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def locales(language):
    """The Babel locales of a language: ("en_US", "en_GB") for "en", else the one of that name.

    Raises ValueError for a name that CLDR does not have, with the nearest ones that it has.
    """
    if language in LOCALES:
        return LOCALES[language]
    try:
        locale = babel.Locale.parse(language)
    except (ValueError, TypeError, babel.UnknownLocaleError):
        near = difflib.get_close_matches(str(language), babel.localedata.locale_identifiers(), n=3, cutoff=0.5)
        hint = f"perhaps {' or '.join(near)}? " if near else ""
        raise ValueError(f"CLDR knows no language {language!r}: {hint}Tried and tested are en, {', '.join(LANGUAGES)}") from None
    return (str(locale),)


def split_dates(seed=0, test_share=0.1):
    """(train, test): the 73,049 days of 1900 to 2099 shuffled by `seed` and cut in two lists without a common day."""
    days = [FIRST_DAY + datetime.timedelta(days=n) for n in range((LAST_DAY - FIRST_DAY).days + 1)]
    random.Random(seed).shuffle(days)
    cut = int(len(days) * test_share)
    return days[cut:], days[:cut]


def examples(language, days, count, seed=0):
    """`count` pairs (prompt, answer) of a language, their days, locales and formats drawn by `seed`."""
    draw, names = random.Random(seed), locales(language)
    return [
        (f"{format_date(day, draw.choice(FORMATS), draw.choice(names))} = ", f"{day.isoformat()}\n")
        for day in (draw.choice(days) for _ in range(count))
    ]


def with_typos(pairs, share=0.1, seed=0):
    """The same pairs, in every second prompt each letter replaced by a random one with probability `share`.

    A base that was trained on spotless English alone reads two or three letters of a month and nothing else; one that
    met typos reads words, knows the bytes of other alphabets, and adapts when frozen.
    """
    draw, letters = random.Random(seed), "abcdefghijklmnopqrstuvwxyzáéíóúäöüßçãâêîôûàèìòùñłąęşığ"

    def smudge(text):
        return "".join(draw.choice(letters) if c.isalpha() and draw.random() < share else c for c in text)

    return [(smudge(prompt) if draw.random() < 0.5 else prompt, answer) for prompt, answer in pairs]


def collate(pairs, tokenizer):
    """Pairs (prompt, answer) -> ids (B, T) and labels (B, T), padded on the right, labels -100 outside the answers.

    Padding on the right of a causal model needs no mask: no real token sees it.
    """
    rows = [(tokenizer.encode(prompt), tokenizer.encode(answer)) for prompt, answer in pairs]
    T = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def batches(pairs, batch_size, seed=0):
    """Endless batches of pairs of like length: each round shuffles them, sorts within stretches of 16 batches, and
    shuffles the batches, so that little is spent on padding and the order still differs from round to round."""
    draw, pairs = random.Random(seed), list(pairs)
    while True:
        draw.shuffle(pairs)
        stretch, whole = 16 * batch_size, []
        for start in range(0, len(pairs), stretch):
            near = sorted(pairs[start : start + stretch], key=lambda pair: len(pair[0]) + len(pair[1]))
            whole += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        draw.shuffle(whole)
        yield from whole
