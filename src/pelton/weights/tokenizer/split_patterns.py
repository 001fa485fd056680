"""How byte-level BPE vocabularies cut text before merging: one row per `tokenizer.ggml.pre`.

GGUF files carry the name of the rule, not the rule. The patterns are those of each model's own
tokenizer.json (and of `regex_exprs` in llama.cpp's llama-vocab.cpp, which names them).
"""

from __future__ import annotations

from dataclasses import dataclass

_WORD_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)


def _words_of_any_case(digits: str) -> str:
    return rf"{_WORD_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = _words_of_any_case(r"\p{N}")
_LLAMA3 = _words_of_any_case(r"\p{N}{1,3}")
_QWEN35 = (
    rf"{_WORD_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN = _CASED_WORD % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    _CASED_WORD % (f"{_WORD_CONTRACTIONS}?", f"{_WORD_CONTRACTIONS}?")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """`patterns` are applied one after another, each match becoming a piece of its own.

    `ignore_merges`: a piece that is a whole vocabulary entry is taken as it is.
    `add_bos`: whether the vocabulary wants BOS when the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_RULES_BY_NAMES: dict[tuple[str, ...], SplitRule] = {
    ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion"): SplitRule((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): SplitRule((r"\p{N}", _GPT2)),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "kormo", "megrez", "hunyuan"): SplitRule((_QWEN2,)),
    ("qwen35",): SplitRule((_QWEN35,)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"): SplitRule(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): SplitRule((_LLAMA3,)),
    ("tekken",): SplitRule((_TEKKEN,), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4"): SplitRule((_GPT4O,)),
    ("deepseek-coder",): SplitRule(_DEEPSEEK_CODER),
    ("deepseek-v3",): SplitRule(_DEEPSEEK_V3),
}

SPLIT_RULES: dict[str, SplitRule] = {name: rule for names, rule in _RULES_BY_NAMES.items() for name in names}
