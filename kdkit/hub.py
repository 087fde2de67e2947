"""Where models come from, and what goes wrong when models and datasets are loaded, in one line each.

transformers, datasets and huggingface_hub raise each other's errors, wrapped several times and many lines long. What
happened is told here from the whole chain.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kdkit.config import DistillConfig, UsageError

ASSETS = Path(__file__).parent / "assets"

ENVIRONMENT = "set HF_HOME (or HF_DATASETS_CACHE) to a folder on a larger disk"


def resolve(name: str, role: str) -> str:
    """The folder of "embedded", and any other name as it is.

    Raises:
        UsageError: a name that can only be a folder, and is not one with a model in it.
    """
    if name == "embedded":
        return str(ASSETS / f"embedded_{role}")
    path = Path(name).expanduser()
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"{role}_model {name} is a folder without a config.json: give a Hugging Face model folder")
    if looks_like_path and not path.is_dir() and "/" in name:
        raise UsageError(f"{role}_model {name} does not exist: give a model folder, a hub id, or embedded")
    return str(path) if path.is_dir() else name


def load_pretrained(auto_class, name: str, role: str, config: DistillConfig | None = None, **options):
    """from_pretrained, with what transformers raises for a wrong name turned into one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading a file; downloads keep theirs
    path = resolve(name, role)
    options["trust_remote_code"] = config is not None and config.trust_remote_code
    if config is not None and name != "embedded":
        options["revision"] = getattr(config, f"{role}_revision") or "main"
    try:
        return auto_class.from_pretrained(path, **options)
    except loading_errors() as error:
        remedy = "give a Hugging Face model folder with safetensors files, or a hub id"
        raise explain(f"{role}_model", name, error, remedy) from error


def loading_errors() -> tuple[type[Exception], ...]:
    """What loading something that is not as it should be raises; anything else is a defect, and is not caught."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from safetensors import SafetensorError

    # the hub's own errors are OSErrors; RuntimeError is weights of other shapes, and datasets that are scripts
    return (OSError, ValueError, ImportError, RuntimeError, SafetensorError, DatasetsError, TemplateError)


def explain(what: str, name: str, error: Exception, remedy: str) -> UsageError:
    """The error to raise for what came of loading `name`.

    Args:
        what: the field, such as `teacher_model`.
        name: its value.
        error: what was raised.
        remedy: what to do when the reason is none of those known here.
    """
    return UsageError(f"{what} {name} {_reason(what, name, error, remedy)}")


def _reason(what: str, name: str, error: Exception, remedy: str) -> str:
    from huggingface_hub import errors
    from safetensors import SafetensorError

    page = f"https://huggingface.co/{'datasets/' if 'dataset' in what else ''}{name}"
    for cause in _chain(error):
        if isinstance(cause, errors.GatedRepoError) or "is a gated dataset" in str(cause):
            return f"is gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"has no such revision: {page}/tree/main lists its branches and tags"
        if isinstance(cause, errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in str(cause):
            return "is neither a local path nor on the hub: check the spelling; if it is private, `hf auth login` first"
        if isinstance(cause, OSError) and (cause.errno == errno.ENOSPC or "Not enough disk space" in str(cause)):
            return f"does not fit on the disk of {cache_folder()}: make room, or {ENVIRONMENT}"
        if "custom code" in str(cause):
            return "comes with Python code of its own, which is not run: read it first, then --trust_remote_code true"
        if isinstance(cause, SafetensorError):
            return f"has a broken safetensors file ({_first_line(cause)}): download or copy it again"
    for cause in _chain(error):
        # by name: which of two packages the hub's client is made of depends on its version
        of_transport = any(kind.__name__ == "TransportError" for kind in type(cause).__mro__)
        if of_transport or isinstance(cause, (errors.LocalEntryNotFoundError, ConnectionError)):
            offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else "no network"
            return (
                f"could not be loaded: no local path, not in the cache, and the hub cannot be reached ({offline}): "
                "give a local path, or load it once with the network up"
            )
    return f"could not be loaded: {_first_line(error)} ({remedy})"


def cache_folder() -> str:
    """Where the hub's files are kept, and under it datasets and tokenised rows."""
    from huggingface_hub.constants import HF_HOME

    return HF_HOME


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
