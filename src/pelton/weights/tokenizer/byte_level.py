"""Byte-level BPE, as GPT-2 began it: text is cut by a pattern, its bytes are merged by rank."""

from __future__ import annotations

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from pelton.weights.tokenizer.merges import Merges
from pelton.weights.tokenizer.split_patterns import SplitRule
from pelton.weights.tokenizer.vocabulary import Vocabulary


def byte_level_backend(vocabulary: Vocabulary, merges: Merges, rule: SplitRule) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
