"""Files that are whole or not there, also after a kill or a power cut: written aside, synced, then renamed.

A folder that has to be whole carries SHA256SUMS, in the format of the program sha256sum, which checks it by hand.
"""

import hashlib
import os
import shutil
from pathlib import Path

SUMS = "SHA256SUMS"


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt":
        return  # Windows syncs no folders, and no file that is open for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: what was there before stays until the new one is on the disk."""
    aside = path.with_name(f".writing_{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def publish(aside: Path, final: Path) -> None:
    """Give a folder that is written its name, once all of it is on the disk; one that had the name goes."""
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    before = _put_away(final)
    os.rename(aside, final)
    sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder that looks complete for as long as it is: it loses its name first."""
    shutil.rmtree(_put_away(folder))


def _put_away(folder: Path) -> Path:
    away = folder.with_name(f".removing_{folder.name}")
    shutil.rmtree(away, ignore_errors=True)
    if folder.exists():
        os.rename(folder, away)
    return away


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Write SHA256SUMS: file name -> SHA-256."""
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def why_broken(folder: Path, needed: set[str], share: slice = slice(None)) -> str:
    """Why a folder with SHA256SUMS is not whole, or "".

    Args:
        folder: the folder.
        needed: the files that SHA256SUMS has to list.
        share: which of the listed files to read, in the order of their names.
    """
    if not (folder / SUMS).is_file():
        return f"{SUMS} is missing"
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {line[66:]: line[:64] for line in lines}
    if unlisted := sorted(needed - sums.keys()):
        return f"{SUMS} does not list {unlisted[0]}"
    for name in sorted(sums)[share]:
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if sha256(folder / name) != sums[name]:
                return f"{name} ({(folder / name).stat().st_size:,} bytes) is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""
