"""A corpus that every machine has: what the running Python says about itself.

The language reference that ``help()`` shows, the docstrings of the standard library and of the
interpreter's own functions, its text files and longer comments: some five megabytes of English about
programming, and on request its twelve megabytes of code. Same interpreter, same corpus.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import platform
import re
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcore.errors import UserError

_SHORTEST = 80  # characters; a shorter document teaches little but where documents end
_SKIPPED_DIRECTORIES = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "pydoc_data",
}  # fmt: skip
# Generated for one machine, or put there by a distribution.
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
# Modules in C whose import does nothing but define; those that an interpreter lacks are left out.
_C_MODULES = (
    "_bisect", "_codecs", "_collections", "_csv", "_datetime", "_decimal", "_functools", "_hashlib",
    "_heapq", "_io", "_json", "_operator", "_pickle", "_random", "_socket", "_sre", "_stat", "_string",
    "_struct", "_thread", "_weakref", "array", "binascii", "builtins", "cmath", "errno", "fcntl", "gc",
    "itertools", "marshal", "math", "mmap", "posix", "select", "sys", "time", "unicodedata", "zlib",
)  # fmt: skip
_DOCUMENTED = (
    type, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_CONTROL = re.compile(r"[^\S\n ]|[\x00-\x08\x0e-\x1f\x7f]")
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n){3,}", re.MULTILINE)


@dataclass(frozen=True)
class BuiltinCorpus:
    """``train`` and ``val``: documents. ``manifest``: Python version, bytes and documents in all and of each
    kind, the SHA-256 of the whole, the licence."""

    train: list[str]
    val: list[str]
    manifest: dict[str, Any] = field(repr=False)


def builtin(*, max_bytes: int | None = None, code: bool = False, val_fraction: float = 0.05) -> BuiltinCorpus:
    """Build the corpus, in about three seconds.

    ``max_bytes``: stop there, the best prose first. ``code``: also the source of the standard library.
    ``val_fraction``: share of the documents held out, by their SHA-256. Documents are normalised (line ends,
    trailing and control characters), and each occurs once.
    """
    from gptcore.data.corpus import held_out

    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction: got {val_fraction}, expected at least 0 and below 1")
    kinds: dict[str, Callable[[], Iterator[str]]] = {
        "language reference": _topics,
        "docstrings": _docstrings,
        "docstrings in C": _c_docstrings,
        "text files": _text_files,
        "comments": _comments,
    }
    if code:
        kinds["code"] = _code
    seen: set[bytes] = set()
    parts = {kind: {"documents": 0, "bytes": 0} for kind in kinds}
    train: list[str] = []
    val: list[str] = []
    total, whole = 0, hashlib.sha256()
    for kind, text in ((kind, text) for kind, documents in kinds.items() for text in documents()):
        clean = normalise(text).encode("utf-8", "ignore")
        digest = hashlib.sha256(clean).digest()
        if len(clean) < _SHORTEST or digest in seen:
            continue
        if max_bytes is not None and total + len(clean) > max_bytes:
            break
        seen.add(digest)
        total += len(clean)
        parts[kind]["documents"] += 1
        parts[kind]["bytes"] += len(clean)
        whole.update(digest)
        document = clean.decode()
        (val if held_out(document, val_fraction) else train).append(document)
    if not train:
        raise UserError(
            "this Python brings no text of its own (no pydoc topics, no library source); give files instead"
        )
    manifest = {
        "source": "the running Python's own documentation and library",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "licence": "PSF-2.0",
        "documents": len(train) + len(val),
        "bytes": total,
        "sha256": whole.hexdigest(),
        "kinds": parts,
    }
    return BuiltinCorpus(train, val, manifest)


def normalise(text: str) -> str:
    """One kind of line end, no control characters, no spaces at line ends, at most two blank lines."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    text = _CONTROL.sub(" ", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def library_files(suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name (with slashes) and text of the library's files, in the order of names."""
    root = sysconfig.get_path("stdlib")
    found = []
    for directory, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_DIRECTORIES]
        found += [os.path.join(directory, name) for name in names if not name.startswith(_SKIPPED_FILES)]
    for path in sorted(path for path in found if path.endswith(suffixes)):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield Path(path).relative_to(root).as_posix(), text


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for _, text in sorted(topics.items()):
        yield text


def _docstrings() -> Iterator[str]:
    """Of every module one document with its functions, and one for each of its classes."""
    told: set[str] = set()
    for name, source in library_files((".py",)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        own = [_doc_text(tree, told)]
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                yield "\n\n".join(filter(None, _class_entries(node, module, told)))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own.append(_entry(f"{module}.{node.name}({ast.unparse(node.args)})", _doc_text(node, told)))
        if any(own):
            yield "\n\n".join([module, *filter(None, own)])


def _class_entries(node: ast.ClassDef, module: str, told: set[str]) -> Iterator[str]:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield _entry(f"class {module}.{node.name}({bases})", _doc_text(node, told))
    for inner in node.body:
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = _doc_text(inner, told)
            if text:
                yield _entry(f"{node.name}.{inner.name}({ast.unparse(inner.args)})", text)


def _doc_text(node: Any, told: set[str]) -> str:
    """A node's docstring, unless an earlier one said the same."""
    text = ast.get_docstring(node) or ""
    if text in told:
        return ""
    told.add(text)
    return text


def _entry(heading: str, text: str) -> str:
    """A heading with its text indented below, as ``help()`` prints it; empty without a text."""
    body = "\n".join(f"    {line}" if line else "" for line in text.splitlines())
    return f"{heading}\n{body}" if text else ""


def _c_docstrings() -> Iterator[str]:
    told: set[str] = set()
    for name in _C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        functions = []
        for _, value in sorted(vars(module).items()):
            if isinstance(value, type) and value.__module__ in (name, "builtins", name.removeprefix("_")):
                members = [value, *(member for _, member in sorted(vars(value).items()))]
                yield "\n\n".join(filter(None, (_c_entry(member, told) for member in members)))
            elif not isinstance(value, type):
                functions.append(_c_entry(value, told))
        yield "\n\n".join(filter(None, [inspect.getdoc(module), *functions]))


def _c_entry(value: Any, told: set[str]) -> str:
    if not isinstance(value, _DOCUMENTED) or not isinstance(value.__doc__, str):
        return ""
    text = inspect.cleandoc(value.__doc__)
    if text in told or " at 0x" in text:  # an address would differ from run to run
        return ""
    told.add(text)
    signature = getattr(value, "__text_signature__", None) or ""
    return _entry(getattr(value, "__qualname__", value.__name__) + signature, text)


def _text_files() -> Iterator[str]:
    for _, text in library_files((".txt", ".rst")):
        yield text


def _comments() -> Iterator[str]:
    """The comments of three lines and more, one document per file."""
    for name, source in library_files((".py",)):
        blocks = []
        for block in _COMMENTS.findall(source):
            lines = [line.strip().lstrip("#").removeprefix(" ").rstrip() for line in block.splitlines()]
            # Rules of dashes and editor settings are not sentences.
            kept = [line for line in lines if not line or re.search(r"[A-Za-z]{2}", line)]
            blocks.append("\n".join(kept).strip("\n"))
        if any(blocks):
            yield "\n\n".join([name, *filter(None, blocks)])


def _code() -> Iterator[str]:
    for _, source in library_files((".py",)):
        yield source
