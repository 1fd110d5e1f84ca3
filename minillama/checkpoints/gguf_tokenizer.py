"""The tokenizer that a .gguf file carries, rebuilt with the `tokenizers` library:
byte-level BPE and SentencePiece's BPE."""

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from .tokenizers import TextTokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut into words before the merges: by the name in tokenizer.ggml.pre.
CUTS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
LONGEST = 1024  # letters of a token


def read_gguf_tokenizer(fields):
    """The TextTokenizer of a header's fields, None where there is none.

    Raises KeyError for a field that is missing, ValueError for what cannot be honoured.
    """
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    if "model" not in ggml:
        return None
    model, pre = ggml["model"], ggml.get("pre")
    if model != "llama" and (model != "gpt2" or pre not in CUTS):
        raise ValueError(
            f"its tokenizer is {model!r} with {pre!r}; "
            f"only 'llama', and 'gpt2' with {', '.join(map(repr, CUTS))} can be honoured"
        )
    tokens = ggml["tokens"]
    check(ggml, tokens)
    vocab = {token: id for id, token in enumerate(tokens)}
    try:
        if model == "gpt2":  # byte-level BPE: 256 letters stand for the bytes
            merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
            inner = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
            inner.pre_tokenizer, inner.decoder = CUTS[pre], decoders.ByteLevel()
        else:  # SentencePiece: a space, written ▁, before the text, and what has no token in bytes
            unknown = tokens[ggml.get("unknown_token_id", 0)]
            merges = merges_by_score(vocab, ggml["scores"])
            bpe = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
            inner = tokenizers.Tokenizer(bpe)
            first = ggml.get("add_space_prefix", True)
            inner.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁")] * first + [normalizers.Replace(" ", "▁")]
            )
            inner.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
                + [decoders.Strip(" ", 1, 0)] * first
            )
    except KeyError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"its tokenizer cannot be built ({error}): it is damaged, copy it again") from None
    kinds = zip(tokens, ggml.get("token_type", []))
    apart = [(token, kind) for token, kind in kinds if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    inner.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False) for token, kind in apart])
    ids = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    roles = {role: tokens[ggml[key]] for role, key in ids.items() if key in ggml}
    return TextTokenizer(inner, roles, ggml.get("eos_token_id"), fields.get("tokenizer.chat_template"))


def check(ggml, tokens):
    """Refuses a vocabulary that is none, before anything is built of it."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("its tokenizer's tokens are no list of texts: it is damaged, copy it again")
    if (longest := max(map(len, tokens))) > LONGEST:
        raise ValueError(f"its tokenizer has a token of {longest:,} letters; at most {LONGEST} are believed")
    for key in ("scores", "token_type"):
        if key in ggml and (isinstance(ggml[key], str | int | float) or len(ggml[key]) != len(tokens)):
            raise ValueError(f"its tokenizer has {len(tokens):,} tokens and not as many in {key}: copy it again")
    for key, id in ggml.items():
        if key.endswith("_token_id") and not (type(id) is int and 0 <= id < len(tokens)):
            raise ValueError(f"tokenizer.ggml.{key} is {id!r}; its vocabulary has {len(tokens):,} tokens")


def merges_by_score(vocab, scores):
    """SentencePiece joins the two neighbours whose joint token has the highest score;
    as a list of merges, best first."""
    best = sorted(vocab, key=lambda token: -scores[vocab[token]])
    return [
        (token[:i], token[i:])
        for token in best
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
