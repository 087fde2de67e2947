"""Names on the Hugging Face hub, and errors of loading models and datasets in one line each.

transformers, datasets and huggingface_hub wrap each other's errors several times, in many lines. The reason is
searched for in the complete chain of causes.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kdkit.config import UsageError


def split_revision(name: str) -> tuple[str, str]:
    """Split "id@revision" into id and revision ("main" if there is none). A local path is not split."""
    if Path(name).expanduser().exists():
        return name, "main"
    name, _, revision = name.partition("@")
    return name, revision or "main"


def loading_errors() -> tuple[type[Exception], ...]:
    """The errors of loading something that the user has to correct. Others are bugs, and are not caught."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from safetensors import SafetensorError

    # OSError includes the hub's errors; RuntimeError is raised for weights of other shapes and for dataset scripts
    return (OSError, ValueError, ImportError, RuntimeError, SafetensorError, DatasetsError, TemplateError)


def explain(what: str, name: str, error: Exception, remedy: str) -> UsageError:
    """Turn an error of loading into a message of one line; the caller raises it.

    Args:
        what: the field, such as `teacher_model`.
        name: the value of the field.
        error: the error that was raised.
        remedy: what to do if the reason is not one of those that are known here.
    """
    return UsageError(f"{what} {name} {_reason(what, name, error, remedy)}")


def _reason(what: str, name: str, error: Exception, remedy: str) -> str:
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HOME
    from safetensors import SafetensorError

    page = f"https://huggingface.co/{'datasets/' if 'dataset' in what else ''}{name}"
    causes = list(_chain(error))
    for cause in causes:
        text = str(cause)
        if isinstance(cause, errors.GatedRepoError) or "is a gated dataset" in text:
            return f"is gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"has no such revision: {page}/tree/main lists its branches and tags"
        if isinstance(cause, errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in text:
            return "is neither a local path nor on the hub: check the spelling; if it is private, `hf auth login` first"
        if isinstance(cause, OSError) and (cause.errno == errno.ENOSPC or "Not enough disk space" in text):
            return f"does not fit on the disk of {HF_HOME}: make room, or set HF_HOME to a larger disk"
        if "custom code" in text:
            return "comes with Python code of its own, which is not run: read it first, then --trust_remote_code true"
        if isinstance(cause, SafetensorError):
            return f"has a broken safetensors file ({first_line(cause)}): download or copy it again"
    for cause in causes:
        # by name: the hub's client is built on one of two HTTP packages, depending on its version
        is_transport = any(kind.__name__ == "TransportError" for kind in type(cause).__mro__)
        if is_transport or isinstance(cause, (errors.LocalEntryNotFoundError, ConnectionError)):
            offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else "no network"
            return (
                f"could not be loaded: it is neither a local path nor in the cache, and the hub cannot be reached "
                f"({offline}): give a local path, or load it once with network access"
            )
    return f"could not be loaded: {first_line(error)} ({remedy})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
