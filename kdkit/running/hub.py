"""Where models come from, and what goes wrong when models and datasets are loaded, in one line each.

transformers, datasets and huggingface_hub raise each other's errors, wrapped several times and many lines long. What
happened is told here from the whole chain.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kdkit.config import UsageError

ENVIRONMENT = "set HF_HOME (or HF_DATASETS_CACHE) to a folder on a larger disk"


def split_revision(name: str) -> tuple[str, str]:
    """A hub id and its revision, from "id" or "id@revision"; a local path is left as it is."""
    if Path(name).expanduser().exists():
        return name, "main"
    name, _, revision = name.partition("@")
    return name, revision or "main"


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
