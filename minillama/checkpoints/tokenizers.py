"""Text to ids and back through the `tokenizers` library, chat templates, and text from a stream of ids.

"3 mars 2021" ──encode──▶ [35, 2216, 216, ...] ──decode──▶ "3 mars 2021"
[{"role": "user", "content": "Hi"}] ──chat──▶ "<|im_start|>user\\nHi<|im_end|>\\n..." ──encode(special=True)──▶ ids
"""

import datetime
import json

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .files import FileError, read_json, replacing, write_json

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
        try:
            return ENVIRONMENT.from_string(self.template).render(values)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None

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
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise FileError(f"{path} is not a tokenizer ({error}): it may have been cut short, copy it again") from None
    inner.no_truncation()
    inner.no_padding()
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    tokens = {
        role: token["content"] if isinstance(token, dict) else token for role in ROLES if (token := settings.get(role))
    }
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    eos = read_json(folder / "config.json").get("eos_token_id")
    eos_id = None if "eos_token" in tokens else eos[0] if isinstance(eos, list) else eos
    return TextTokenizer(inner, tokens, eos_id, template)


# ── what chat templates are written for: the sandbox and the few names that transformers gives them ──────────────────


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the model's turn for training; the text is what stands inside."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message):
    raise jinja2.TemplateError(message)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
ENVIRONMENT.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
    value, ensure_ascii=ensure_ascii, **options
)
ENVIRONMENT.globals["raise_exception"] = refuse
ENVIRONMENT.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)


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
