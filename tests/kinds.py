"""A tiny tokenizer of each kind that decoder models come with, trained here on a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import HANDBOOK

_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _corpus() -> list[str]:
    text = HANDBOOK.read_text()[:6000]
    return [text, text.replace(". ", ".\n\n"), "user\nassistant\nsystem\n[INST] What is it? [/INST] It is.\n\n" * 20]


def _byte_level(pre_tokenizer: Any = None, normalizer: Any = None, prefix_space: bool = False) -> Tokenizer:
    """Bytes, merged within what the pre-tokenizer splits off."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=pre_tokenizer is None)
    tokenizer.pre_tokenizer = last if pre_tokenizer is None else pre_tokenizers.Sequence([pre_tokenizer, last])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(normalizer: Any = None, pre_tokenizer: Any = None, byte_fallback: bool = True) -> Tokenizer:
    """Characters with ``▁`` for a space, merged across words as Llama's are; what is not among them is bytes, or unknown."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = _PREPEND
    trained.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=700, special_tokens=_SPECIAL, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = {
        token: i for i, token in enumerate([*_SPECIAL, *(_BYTES if byte_fallback else []), *sorted(model["vocab"].keys() - {*_SPECIAL})])
    }
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    never = isinstance(pre_tokenizer, pre_tokenizers.Metaspace) and pre_tokenizer.prepend_scheme == "never"
    tokenizer.decoder = decoders.Sequence(steps if never else [*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def _unigram() -> Tokenizer:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=True)
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=[*_SPECIAL, *_BYTES], unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(_corpus(), trainer)
    file = json.loads(trained.to_str())
    file["added_tokens"] = file["added_tokens"][: len(_SPECIAL)]
    file["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    )
    return tokenizer


_MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _byte_level,
    "bytes prefix space": lambda: _byte_level(prefix_space=True),
    "bytes NFC": lambda: _byte_level(pre_tokenizers.Split(Regex(_QWEN), "isolated"), normalizers.NFC()),
    "bytes NFKC": lambda: _byte_level(normalizer=normalizers.NFKC()),
    "bytes digits": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "bytes stripping": _byte_level,
    "bytes normalized": lambda: _byte_level(normalizer=normalizers.NFKC()),
    "prepend": lambda: _sentencepiece(_PREPEND),
    "prepend stripping": lambda: _sentencepiece(_PREPEND),
    "prepend unknown": lambda: _sentencepiece(_PREPEND, byte_fallback=False),
    "replace": lambda: _sentencepiece(normalizers.Replace(" ", "▁"), pre_tokenizers.Metaspace("▁", "never", split=False)),
    "metaspace always": lambda: _sentencepiece(None, pre_tokenizers.Metaspace("▁", "always", split=False)),
    "metaspace first": lambda: _sentencepiece(None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "metaspace never": lambda: _sentencepiece(None, pre_tokenizers.Metaspace("▁", "never", split=False)),
    "metaspace words": lambda: _sentencepiece(None, pre_tokenizers.Metaspace("▁", "always", split=True)),
    "unigram": _unigram,
}
KINDS = [*_MAKERS]


@cache
def _file(kind: str) -> str:
    return _MAKERS[kind]().to_str()


def tiny(kind: str, special: Sequence[Any] = (), tags: Sequence[Any] = ()) -> Any:
    """A fresh tokenizer of a kind with control tokens: ``special`` ones and ordinary added ones (``tags``).

    ``stripping`` kinds take the white space around their control tokens, ``normalized`` ones look for them in normalised text.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_file(kind)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    flags = {"lstrip": "stripping" in kind, "rstrip": "stripping" in kind, "normalized": "normalized" in kind}
    added = [token if isinstance(token, AddedToken) else AddedToken(token, **flags, special=True) for token in special]
    tokenizer.add_special_tokens({"additional_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer.add_tokens([AddedToken(tag, **flags, special=False) for tag in tags])
    return tokenizer
