"""Writing a file so that whoever looks finds either the old one or the whole new one."""

import os
import tempfile
from pathlib import Path

from baton.errors import ConfigurationError


def replace_file(path: Path, text: str) -> None:
    """Write under a temporary name, then rename. Raises ConfigurationError; an interruption leaves nothing behind."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)  # mkstemp lets nobody else read
            os.replace(name, path)
        except BaseException:  # Ctrl-C included
            os.unlink(name)
            raise
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}; choose another folder") from error


def writable_folder(path: Path) -> Path:
    """The folder, created where it is missing. Raises ConfigurationError when no file can be put there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigurationError(f"{path} is no folder that can be written to: {error.strerror}") from error
    return path
