"""Texts that tell tokenizers apart: code, scripts, emoji, spaces, control characters, special tokens."""

import random

_PROSE = [
    "Hello, world!",
    "I'm sure you're right; WE'LL see what they'Ve done. Don't! D'",
    "don’t “quotes” — dash… €5 ½ ¾ № ™",
    "http://example.com/?q=1&b=%20#frag user@example.com",
    "1234567890 3.14159e-10 v1.2.3 0x1F 1,000,000",
    "ÀÉÎõü ßẞ İıŞş ǅ ǈ ﬁ ﬂ Ⅷ ① ²",
]
_SCRIPTS = [
    "中文分词测试，你好世界。一二三",
    "日本語のテキスト、カタカナ。",
    "한국어 텍스트입니다",
    "العربية نص تجريبي ١٢٣",
    "हिन्दी पाठ क्षत्रिय ४५६",
    "ภาษาไทยไม่มีช่องว่าง \u0e33\u0e49",
    "Русский текст, ёжик",
    "עברית Ελληνικά tiếng Việt",
    "𝓗𝓮𝓵𝓵𝓸 𐍈",
]
_CODE = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n",
    'for (int i=0;i<10;++i){ printf("%d\\n", i); }',
    "SELECT * FROM t WHERE a<>'b';",
    '{"k": [1, 2.5, null, true]}',
    "<table><tr><td>html</td></tr></table>\r\n$x^2 + \\frac{a}{b}$",
    "    four\n        eight\n\t\ttabs\r\nrow2\r\n",
]
_SPACES = [
    "",
    "a",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "\n",
    "\n\n\n",
    "\t\t x",
    "\r\n\r\n",
    "  \n \n  x",
    "  a  b  c  ",
]
_ODD = [
    "a\u00a0b\u3000c\u2028d\u2029e\u0085f",
    "\u0301 lone mark, e\u0301 against é, a" + "\u0300" * 50,
    "\u200b\u200c\u200d\u2060\ufeff\u00ad",
    "a\x00b\x01\x02\x1b[31m\x7f",
    "\ud7ff\ue000\uffff\U0010ffff",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 👍🏽 ❤️ 🇩🇪🇫🇷",
    "▁▁ meta ▁ Ġ Ċ byte <0x41> <0x0A> <0xZZ>",
]
_SPECIAL = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<|endoftext|>y <|im_end|>  <|im_end|><|im_end|>",
    '<tool_call>{"a": 1}</tool_call> <|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>',
    "<bos>hi<eos> <s>[INST] hi [/INST]</s> <unk> <pad>",
    "<start_of_turn>user\nhi<end_of_turn>\n<unused0>[multimodal]",
]
_LONG = ["a" * 10_000, " " * 10_000, "ab" * 5_000, "word " * 2_000, "x=1;" * 2_500, "字" * 5_000]

_RANGES = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0xD7F), (0xE00, 0xE7F),
    (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0, 0x1F),
    (0xFE00, 0xFE0F),
]  # fmt: skip
_INSERTS = [" ", "  ", "\n", "'s", "<|im_end|>", "<eos>", "</s>"]


def _random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(1, 60)):
        low, high = rng.choice(_RANGES) if rng.random() < 0.5 else _RANGES[0]
        parts.append(chr(rng.randint(low, high)) if rng.random() < 0.75 else rng.choice(_INSERTS))
    return "".join(parts)


_rng = random.Random(7)
TEXTS = [*_PROSE, *_SCRIPTS, *_CODE, *_SPACES, *_ODD, *_SPECIAL, *_LONG, *(_random_text(_rng) for _ in range(500))]
TRAINING_TEXTS = [
    *_PROSE,
    *_SCRIPTS,
    *_CODE,
    "Hello hello the there then world word work this is it a b c 12 34 567",
] * 4
