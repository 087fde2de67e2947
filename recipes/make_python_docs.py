"""Write the embedded text, kdkit/assets/python_docs: the documentation of the running Python's standard library.

    python3.11 recipes/make_python_docs.py

The text is the topics of the language reference and the docstrings of the library's modules, classes and functions,
about two million characters. Test suites and repeated texts are left out. train.parquet and test.parquet hold the two
splits: a hash of the name of a module or topic decides, so that no module is in both. Other versions of Python give
other texts: to change the files is to change the data that the embedded teacher was trained on.
"""

import argparse
import ast
import hashlib
import platform
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq

ASSETS = Path(__file__).parents[1] / "kdkit/assets/python_docs"
TEST_FRACTION = 0.08
SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
CARD = """---
language: en
license: other
---
# The embedded text of kdkit

The documentation of the standard library of Python {python}: the topics of the language reference, and the docstrings
of modules, classes and functions. {documents} documents, {characters:,} characters. `train.parquet` and `test.parquet`
have the columns `source` (a file of the library, or a topic) and `text`; a source is in one of the two only.

Made by `python recipes/make_python_docs.py`. Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved.
The text is under the license in LICENSE, the PSF License Agreement.
"""


def documents() -> Iterator[tuple[str, str]]:
    """Yield (source, text) of each topic and of each docstring of the library, repeated texts once."""
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    found = [(f"topics/{name}", name, text) for name, text in sorted(topics.items())]
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIP.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a test of the parser, without documentation
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found += [(relative.as_posix(), name, text) for name, text in docstrings(tree, module)]
    for source, name, text in found:
        text = text.strip()
        if len(text) >= 20 and text not in seen:
            seen.add(text)
            yield source, f"{name}\n\n{text}\n"


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module, its classes and functions, in the order of the source."""
    if docstring := ast.get_docstring(node):
        yield name, docstring
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child, f"{name}.{child.name}")


def is_test(source: str) -> bool:
    """Whether a source belongs to the test split."""
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_FRACTION * 2**64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ASSETS)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    found = list(documents())
    for split in ("train", "test"):
        chosen = [document for document in found if is_test(document[0]) == (split == "test")]
        # The teacher and the published results read the text in this order. kdkit reads the rows of a file in the
        # order random.Random(0).shuffle(range(n)), so each document goes to the row that gives it its place.
        in_order = random.Random(0).sample(chosen, len(chosen))
        places = list(range(len(chosen)))
        random.Random(0).shuffle(places)
        rows = [document for _, document in sorted(zip(places, in_order, strict=True))]
        table = pa.table({"source": [source for source, _ in rows], "text": [text for _, text in rows]})
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd", compression_level=19)
        print(f"{folder / split}.parquet: {len(rows):,} documents")
    characters = sum(len(text) for _, text in found)
    card = CARD.format(python=platform.python_version(), documents=f"{len(found):,}", characters=characters)
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", folder / "LICENSE")


if __name__ == "__main__":
    main()
