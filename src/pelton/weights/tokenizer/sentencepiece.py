"""SentencePiece BPE: characters merged over the whole text, spaces made visible, bytes as a last resort."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pelton.weights.tokenizer.gguf_vocabulary import SPACE
from pelton.weights.tokenizer.merges import Merges, derive_merges
from pelton.weights.tokenizer.vocabulary import TokenType, Vocabulary


def sentencepiece_backend(
    vocabulary: Vocabulary, merges: Merges | None, order: Sequence[int] | None, *, prefix_space: bool
) -> tokenizers.Tokenizer:
    """`merges` where the file lists them; else they follow from `order`, token ids best first (None: by id).

    `prefix_space`: a text that does not begin with a space is read as if it did.
    """
    token_ids = vocabulary.ids()
    if merges is None:
        # Matched whole or by byte, never put together from other pieces.
        apart = {*vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)}
        merges = derive_merges(token_ids, order, apart)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=token_ids, merges=merges, unk_token=vocabulary.unk_token, fuse_unk=True, byte_fallback=True)
    )
    scheme = "first" if prefix_space else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix_space else []))
    return backend
