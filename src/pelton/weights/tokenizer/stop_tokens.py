"""Tokens that end a turn, known by their text: files often name only one of them as EOS."""

# Qwen and ChatML, Llama 3, Gemma, Phi, DeepSeek, and base models' end of document.
TURN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<|end|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
