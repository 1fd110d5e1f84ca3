"""Dates as a language task: "3 mars 2021" -> "2021-03-03", in any language that CLDR knows; and a reader's own pairs.

The text comes from the Unicode CLDR through Babel (formats medium, long and full), so every language is real data
and nothing is downloaded. One example is a prompt, an answer and the tokenizer's end token; the loss falls on the last
two. To a model whose tokens are bytes an example is one line; to a real one it says what is asked for:

    3 mars 2021 = 2021-03-03⏎                  Date: 3 mars 2021 ISO: 2021-03-03<end>
    └── prompt ──┘└─ answer ─┘                 └────── prompt ──────┘└─── answer ───┘
"""

import datetime
import difflib
import functools
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
LINE, LABELLED = ("{} = ", "{}\n"), ("Date: {} ISO:", " {}")  # the forms of (prompt, answer)
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
        raise ValueError(
            f"CLDR knows no language {language!r}: {hint}Tried and tested are en, {', '.join(LANGUAGES)}"
        ) from None
    return (str(locale),)


@functools.cache
def split_dates(seed=0, test_share=0.1):
    """(train, test): the 73,049 days of 1900 to 2099 shuffled by `seed` and cut in two tuples without a common day."""
    days = [FIRST_DAY + datetime.timedelta(days=n) for n in range((LAST_DAY - FIRST_DAY).days + 1)]
    random.Random(seed).shuffle(days)
    cut = int(len(days) * test_share)
    return tuple(days[cut:]), tuple(days[:cut])


def form(tokenizer):
    """The form of prompt and answer that suits a tokenizer: LINE for bytes, LABELLED for others."""
    return LINE if isinstance(tokenizer, ByteTokenizer) else LABELLED


def examples(languages, days, count, seed=0, form=LINE):
    """`count` pairs (prompt, answer) of one language or of several in turn; days, locales, formats drawn by `seed`."""
    languages = [languages] if isinstance(languages, str) else languages
    names, draw, (prompt, answer) = [locales(language) for language in languages], random.Random(seed), form
    return [
        (
            prompt.format(format_date(day, draw.choice(FORMATS), draw.choice(names[i % len(names)]))),
            answer.format(day.isoformat()),
        )
        for i, day in enumerate(draw.choice(days) for _ in range(count))
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


def hold_out(pairs, most, share=0.1, seed=0):
    """(train, test): shuffled by `seed` and cut, `share` of them, at least 1 and at most `most`, for the second.

    Equal prompts go to the same side, so that nothing is tested that was trained on.
    """
    prompts = sorted({prompt for prompt, _ in pairs})
    if len(prompts) < 2:
        raise ValueError(f"the data has {len(prompts)} prompts; needed are at least 2, one to train on and one to test")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: min(most, max(1, int(len(prompts) * share)))])
    return [pair for pair in pairs if pair[0] not in held], [pair for pair in pairs if pair[0] in held]


def encode(pairs, tokenizer, max_length=None, chat=False):
    """Pairs of text -> pairs of ids, the answer's with the end token, which is added where the text does not bring it.

    Where the two together are longer than max_length, the prompt loses its beginning, for its end is what the answer
    follows; an answer that leaves no room for one token of the prompt loses its end.
    chat: the prompt is a question, put into the tokenizer's chat template.  Pairs of ids are returned as they are, and
    what stands third in a row, such as a picture, stays there.
    """
    rows, end = [], [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for prompt, answer, *picture in pairs:
        if isinstance(answer, str):
            prompt = tokenizer.question(prompt) if chat else tokenizer.encode(prompt)
            answer = tokenizer.encode(answer)
            answer = answer if answer[-1:] == end else answer + end
            if max_length is not None:
                answer = answer[: max_length - 1]
                prompt = prompt[-(max_length - len(answer)) :]
        rows.append((prompt, answer, *picture))
    return rows


def collate(pairs, tokenizer, multiple=1):
    """Pairs (prompt, answer), of text or of ids -> ids (B, T) and labels (B, T), padded on the right to a multiple of
    `multiple`, labels -100 outside the answers.

    Padding on the right of a causal model needs no mask: no real token sees it.
    """
    rows = encode(pairs, tokenizer)
    T = -(-max(len(prompt) + len(answer) for prompt, answer, *_ in rows) // multiple) * multiple
    ids, labels = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), IGNORED)
    for i, (prompt, answer, *_) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def batches(pairs, batch_size, seed=0, bucket=16):
    """Endless batches of pairs of like length: each round shuffles them, sorts within `bucket` batches at a time, and
    shuffles the batches, so that little is spent on padding and the order still differs from round to round.

    bucket: 1 leaves the lengths of a batch to chance. A small batch of like length is one language or one format, and
    its gradient speaks for that alone.
    """
    draw, pairs = random.Random(seed), list(pairs)
    while True:
        draw.shuffle(pairs)
        size, whole = bucket * batch_size, []
        for start in range(0, len(pairs), size):
            near = sorted(pairs[start : start + size], key=lambda pair: len(pair[0]) + len(pair[1]))
            whole += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        draw.shuffle(whole)
        yield from whole


# ── several texts in one row ─────────────────────────────────────────────────────────────────────────────────────────


def tokens(pair):
    return len(pair[0]) + len(pair[1])


def packed_batches(pairs, batch_size, length, seed=0):
    """Endless batches of rows, each a list of pairs of ids, together at most `length` tokens: where lengths differ
    much, rows of one text each would be padding for the most part.

    Each round shuffles the pairs and fills rows from a thousand at a time, the longest first, each into the first row
    that has room for it (first-fit decreasing; Johnson 1973), then shuffles the rows.
    Raises ValueError where a pair is longer than a row.
    """
    draw, pairs = random.Random(seed), list(pairs)
    if (longest := max(map(tokens, pairs))) > length:
        raise ValueError(f"the longest example has {longest} tokens, and a packed row {length}: make rows longer")
    while True:
        draw.shuffle(pairs)
        rows = []
        for start in range(0, len(pairs), 1000):
            open_rows, room = [], []
            for pair in sorted(pairs[start : start + 1000], key=tokens, reverse=True):
                i = next((i for i, left in enumerate(room) if left >= tokens(pair)), len(room))
                if i == len(room):
                    open_rows.append([])
                    room.append(length)
                open_rows[i].append(pair)
                room[i] -= tokens(pair)
            rows += open_rows
        draw.shuffle(rows)
        yield from (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))


def collate_packed(rows, length):
    """Rows of `packed_batches` -> ids, labels and texts, (B, length) each.

    texts is the attention mask that keeps them apart: 1 where the first text stands, 2 where the second, on through the
    batch, 0 on padding (attention.positions_and_mask). A text's first token carries no loss: nothing stands before it.
    """
    ids, texts = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    labels, number = torch.full((len(rows), length), IGNORED), 0
    for i, row in enumerate(rows):
        start = 0
        for prompt, answer in row:
            number, end = number + 1, start + len(prompt) + len(answer)
            ids[i, start:end] = torch.tensor(prompt + answer)
            labels[i, start + max(1, len(prompt)) : end] = ids[i, start + max(1, len(prompt)) : end]
            texts[i, start:end] = number
            start = end
    return ids, labels, texts
