"""Models that are already files of the user's."""

from __future__ import annotations

from pathlib import Path

from pelton.core.errors import ModelNotFoundError


def try_local_model(text: str) -> Path | None:
    """The model at a path: a .gguf file, a Hugging Face folder, or the only .gguf of a folder.

    None where `text` is not the path of a model. Raises `ModelNotFoundError` for a folder with
    several .gguf files, of which one must be named.
    """
    path = Path(text).expanduser()
    try:
        if path.is_file():
            return path if path.suffix == ".gguf" else None
        if not path.is_dir():
            return None
        if (path / "config.json").is_file():
            return path
        files = sorted(path.glob("*.gguf"))
    except (OSError, ValueError):  # a name too long for the file system, or with a null character
        return None
    if len(files) > 1:
        raise ModelNotFoundError(f"{path} holds several models; name one: {', '.join(file.name for file in files)}")
    return files[0] if files else None


def looks_like_path(text: str) -> bool:
    if text.startswith(("/", "./", "../", "~")):
        return True
    # `owner/name/file.gguf` is a file of a hub repository.
    return text.endswith(".gguf") and "://" not in text and text.count("/") < 2
