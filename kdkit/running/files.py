"""Write files and folders that are complete or absent, even after a kill or a power cut.

The content is written under a temporary name and synced to the disk; only then is it renamed.
"""

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names of a folder, is on the disk."""
    if os.name == "nt":
        return  # Windows cannot sync a folder, nor a file that is open for reading only
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file. The old content stays until the new content is on the disk."""
    temporary = path.with_name(f".writing_{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Sync a folder to the disk, then rename it. A folder that already has the final name is removed.

    safetensors creates files that only their owner can read (mode 0600). All files get the permissions of the folder,
    which follow the umask.
    """
    permissions = temporary.stat().st_mode & 0o666
    for path in temporary.rglob("*"):
        if path.is_file():
            path.chmod(permissions)
        sync(path)
    sync(temporary)
    replaced = _hide(final)
    os.rename(temporary, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that a kill leaves no incomplete folder under its name."""
    shutil.rmtree(_hide(folder))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders that a killed process left in a folder."""
    for leftover in [*folder.glob(".writing_*"), *folder.glob(".removing_*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _hide(folder: Path) -> Path:
    hidden = folder.with_name(f".removing_{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        os.rename(folder, hidden)
    return hidden
