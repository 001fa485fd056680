"""Text to token ids and back, from a GGUF file or a Hugging Face folder; no pickle, no network."""

from pelton.weights.tokenizer.load import load_tokenizer
from pelton.weights.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
