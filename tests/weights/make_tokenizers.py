"""Small vocabularies, trained on the spot, in every container that Pelton reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from pelton.weights.tokenizer.split_patterns import SPLIT_RULES
from tests.weights.text_corpus import TRAINING_TEXTS

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IN_TEXT_TOKENS = ["<tool_call>", "</tool_call>"]
VOCAB_SIZE = 700


def train_byte_level(pre: str = "qwen2") -> tokenizers.Tokenizer:
    """Ends with the control tokens and the two that are matched in text without being special."""
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLIT_RULES[pre].patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TRAINING_TEXTS, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=False) for token in IN_TEXT_TOKENS])
    return backend


def byte_level_metadata(pre: str = "qwen2") -> dict[str, Any]:
    """`tokenizer.ggml.*` of a chat model with a byte-level vocabulary."""
    backend = train_byte_level(pre)
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    types = [3 if token in CONTROL_TOKENS else 4 if token in IN_TEXT_TOKENS else 1 for token in tokens]
    return {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
        "tokenizer.ggml.bos_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.padding_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
    }


GEMMA_OPTIONS: dict[str, Any] = {
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "pad_piece": "<pad>",
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "control_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>"],
}


def train_sentencepiece(**options: Any) -> bytes:
    """A tokenizer.model like Llama's, or with GEMMA_OPTIONS like Gemma's."""
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 1000,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXTS), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def sentencepiece_metadata(architecture: str = "llama", **options: Any) -> dict[str, Any]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(**options))
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_space_prefix": options.get("add_dummy_prefix", True),
    }


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file of metadata alone, with the few model keys that `transformers` asks for."""
    architecture = metadata["general.architecture"]
    writer = gguf.GGUFWriter(path, architecture)
    for name in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"{architecture}.{name}", 32)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(folder: Path, **files: Any) -> Path:
    """`name=value` becomes name.json; a trained byte-level tokenizer.json unless given; None: no such file."""
    folder.mkdir(parents=True, exist_ok=True)
    if "tokenizer" not in files:
        train_byte_level().save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        if value is None:
            continue
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder
