"""Text to ids and back through the `tokenizers` library, chat templates, and text from a stream of ids.

"3 mars 2021" ──encode──▶ [35, 2216, 216, ...] ──decode──▶ "3 mars 2021"
[{"role": "user", "content": "Hi"}] ──chat──▶ "<|im_start|>user\\nHi<|im_end|>\\n..." ──encode(special=True)──▶ ids
"""

import json
import re

import tokenizers

from . import templates
from .files import FileError, first_line, read_json, reading, replacing, shortened, write_json

LONGEST = 2**20  # bytes of a chat template
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")  # what a chat template may ask for by name


class TextTokenizer:
    """A tokenizer of the `tokenizers` library behind the same three names as data.ByteTokenizer,
    with its chat template.

    Nothing is added around a text, and text that looks like a special token stays text unless `special` is true.
    tokens: the strings of the ROLES that there are, such as {"eos_token": "<|im_end|>"}.
    eos_id: the id that ends a text; None: the one of tokens["eos_token"].
    """

    def __init__(self, inner, tokens=None, eos_id=None, template=None):
        tokens = dict(tokens or {})
        self.inner, self.tokens, self.template = inner, tokens, template
        self.vocab_size = inner.get_vocab_size()
        self.eos_id = inner.token_to_id(tokens["eos_token"]) if eos_id is None and "eos_token" in tokens else eos_id

    def encode(self, text, special=False):
        """Ids of a text. special: whether "<|im_end|>" and its like become their ids, as a rendered chat needs it."""
        self.inner.encode_special_tokens = not special
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def chat(self, messages, add_generation_prompt=True):
        """The text of a conversation, [{"role": "user", "content": "Hi"}, ...], by the model's own template.

        add_generation_prompt: end where the model's answer begins.  Encode the text with `special=True`.
        Raises ValueError for a model without a template, and where the template refuses the messages.
        """
        if self.template is None:
            raise ValueError("the model has no chat template: it continues texts, so give it the text itself")
        messages = json.loads(json.dumps(messages))  # a template is someone else's program: it sees plain data only
        values = (
            dict(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None)
            | self.tokens
        )
        return templates.render(self.template, values)

    def question(self, text):
        """Ids of a user's question in the model's own template, up to where its answer begins. What looks like a
        special token in the question stays text, so that nobody who asks can end the turn and begin another."""
        special = [token.content for token in self.inner.get_added_tokens_decoder().values() if token.special]
        pattern, mark, ids = re.compile("|".join(map(re.escape, special))), "\ue000", []
        while mark in text:
            mark += "\ue000"
        found = pattern.findall(text) if special else []
        text = pattern.sub(mark, text) if special else text
        for i, part in enumerate(self.chat([{"role": "user", "content": text}]).split(mark)):
            ids += (self.encode(found[i - 1]) if i else []) + self.encode(part, special=True)
        return ids

    def save(self, folder):
        """Writes tokenizer.json and tokenizer_config.json; transformers and `read_tokenizer` read them."""
        with replacing(folder / "tokenizer.json") as temporary:
            self.inner.save(str(temporary))
        template = {} if self.template is None else {"chat_template": self.template}
        write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | self.tokens | template
        )


def read_tokenizer(folder):
    """The TextTokenizer of a folder in Hugging Face's layout, None where it has no tokenizer.json."""
    path, beside = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.exists():
        return None
    read_json(path)  # that it is JSON, of a size and depth that can be believed
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises nothing narrower, and where it panics not even an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise FileError(
            f"{path} is not a tokenizer ({first_line(error)}): it may have been cut short, copy it again"
        ) from None
    inner.no_truncation()
    inner.no_padding()
    settings = read_json(beside) if beside.exists() else {}
    tokens = {}
    for role in ROLES:
        token = settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise FileError(f"{beside}: {role} is {shortened(token)}; needed is a text")
        if token:
            tokens[role] = token
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[0].get("template") if entries else None
    if (jinja := folder / "chat_template.jinja").exists():
        with reading(jinja):
            template = jinja.read_bytes()[:LONGEST].decode("utf-8", "replace")
    if template is not None and not isinstance(template, str):
        raise FileError(f"{beside}: chat_template is {shortened(template)}; needed is a text, or texts by name")
    eos = read_json(folder / "config.json").get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if eos is not None and not (type(eos) is int and 0 <= eos < inner.get_vocab_size()):
        raise FileError(
            f"{folder / 'config.json'}: eos_token_id is {shortened(eos)}, which is none of the tokenizer's ids"
        )
    return TextTokenizer(inner, tokens, None if "eos_token" in tokens else eos, template)


# ── streaming ────────────────────────────────────────────────────────────────────────────────────────────────────────


def pieces(tokenizer, prompt, new):
    """Yields the text of the ids in `new` as they come, in pieces that never end within a character.

    A token may hold half an emoji, which decodes to "�" until the other half is there; so what ends in "�" waits, at
    the latest for the end. A token's text can depend on the one before (a leading space), so each is decoded behind the
    last ones that ended with a whole character: a few tokens at a time, however long the text.
    """
    known, window = list(prompt), []  # ids whose text was given out, ids whose text was not
    for id in new:
        window.append(id)
        before, text = tokenizer.decode(known), tokenizer.decode(known + window)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            if len(text) > len(before):
                yield text[len(before) :]
            known, window = window, []
    if window:
        yield tokenizer.decode(known + window)[len(tokenizer.decode(known)) :]
