"""Names on the Hugging Face hub, and errors of loading models and datasets in one line each."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdkit.config import UsageError

REASONS = {  # pattern in an error's class names or text -> the reason, and what to do
    "GatedRepoError|is a gated dataset": "is gated: ask for access at {page}, then `hf auth login` or set HF_TOKEN",
    "RevisionNotFoundError": "has no such revision: {page}/tree/main lists its branches and tags",
    "RepositoryNotFoundError|doesn't exist on the Hub": "is neither a local path nor on the hub (private: log in)",
    "Errno 28|enough disk space": "does not fit on the disk of {cache}: make room, or set HF_HOME to a larger disk",
    "custom code": "comes with Python code of its own, which is not run: read it first, then --trust_remote_code true",
    "Couldn't instantiate the backend tokenizer": "has no tokenizer: copy tokenizer*.json of its original into it",
    "UnicodeDecodeError": "is not UTF-8 ({error}): convert it with `iconv -t UTF-8 -f LATIN1` (or -f UTF-16)",
    "SafetensorError": "has a broken safetensors file ({error}): download or copy it again",
    "LocalEntryNotFoundError|ConnectionError|TransportError": (  # httpx raises the last one
        "could not be loaded: it is not a local path or cached, and there is no network, or HF_HUB_OFFLINE is set. "
        "A name that starts with ./ is always a local path"
    ),
    "": "could not be loaded: {error} ({remedy})",
}


def split_revision(name: str) -> tuple[str, str]:
    """Split "id@revision" into id and revision ("main" if there is none). A local path is not split."""
    if Path(name).exists():
        return name, "main"
    name, _, revision = name.partition("@")
    return name, revision or "main"


@contextmanager
def explained(what: str, name: str | Path, remedy: str) -> Iterator[None]:
    """Raise a UsageError of one line if the value `name` of the field `what` cannot be loaded.

    `remedy` is what to do for a reason that is not in REASONS. Errors that no user can correct are raised as they are.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub.constants import HF_HOME
    from jinja2 import TemplateError
    from safetensors import SafetensorError

    try:
        yield
    except UsageError:
        raise
    # OSError includes the hub's errors; RuntimeError is raised for weights of other shapes and for dataset scripts
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, DatasetsError, TemplateError) as error:
        causes, cause = [], error
        while cause is not None and cause not in causes:  # the libraries wrap each other's errors several times
            causes += [] if type(cause) is DatasetGenerationError else [cause]  # which says nothing itself
            cause = cause.__cause__ or cause.__context__
        found = "\n".join(f"{[kind.__name__ for kind in type(cause).__mro__]} {cause}" for cause in causes)
        reason = next(reason for pattern, reason in REASONS.items() if re.search(pattern, found))
        page = f"https://huggingface.co/{'datasets/' if 'dataset' in what else ''}{name}"
        reason = reason.format(page=page, cache=HF_HOME, error=first_line(causes[0]), remedy=remedy)
        raise UsageError(f"{what} {name} {reason}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
