"""Write files and folders that a kill or a power cut leaves complete or absent: sync them to the disk, then rename."""

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names of a folder, is on the disk."""
    if os.name == "nt":
        return  # Windows cannot sync a folder, nor a file that is open for reading only
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(path: Path, content: str | bytes) -> None:
    """Write a file; a text is encoded as UTF-8. The old content stays until the new content is on the disk."""
    temporary = path.with_name(f".writing_{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Sync a folder to the disk, then rename it. A folder that already has the final name is removed."""
    permissions = temporary.stat().st_mode & 0o666
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_file():
            path.chmod(permissions)  # those of the umask: safetensors creates files that only their owner can read
        sync(path)
    remove(final)
    os.rename(temporary, final)
    sync(final.parent)


def remove(folder: Path) -> None:
    """Remove a folder if it exists. It is renamed first, so that a kill leaves no incomplete folder under its name."""
    hidden = folder.with_name(f".removing_{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
