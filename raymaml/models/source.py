"""The code of a user's own encoder or inner rule, as a digest of its files."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import site
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from raymaml.common.errors import UserError
from raymaml.config.inner import RULE_ARGS, InnerConfig
from raymaml.config.model import ENCODERS, ModelConfig

_INSTALLED = tuple(
    Path(place).resolve()
    for place in (
        *(sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")),
        site.getusersitepackages(),
    )
)


def encoder_source(model: ModelConfig) -> str | None:
    """Return the SHA-256 of an own encoder's ``source_files``.

    None for the encoders of raymaml and of libraries, which a version names.

    Raises:
        UserError: the encoder's module cannot be imported.
    """
    if model.encoder in ENCODERS or model.library is not None:
        return None
    return _digest(source_files(model))


def rule_source(inner: InnerConfig) -> str | None:
    """Return the SHA-256 of the files of an own inner rule; None for the rules of raymaml.

    Raises:
        UserError: the rule's module cannot be imported.
    """
    return None if inner.rule in RULE_ARGS else _digest(rule_files(inner))


def rule_files(inner: InnerConfig) -> dict[str, Path]:
    """Return the files of an own inner rule, as ``source_files``."""
    return _files("inner.rule", inner.rule)


def source_files(model: ModelConfig) -> dict[str, Path]:
    """Return the files of an own encoder by the name of their module.

    They are the encoder's module, its parent packages, and every module that an import statement
    in one of these names, if it belongs to the same top-level package or is not installed
    (standard library, site-packages, raymaml). Data files, and modules imported by a computed name,
    do not count.

    Raises:
        UserError: the encoder's module cannot be imported.
    """
    return _files("model.encoder", model.encoder)


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(key: str, place: str) -> dict[str, Path]:
    """Return the files of ``package.module:Name``, the value of a key."""
    module = place.partition(":")[0]
    try:
        importlib.import_module(module)
    except Exception as error:  # of any kind, from a user's module
        raise UserError(
            f"{key}: {place} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    package, found, waiting = module.partition(".")[0], dict[str, Path](), [module]
    while waiting:
        name = waiting.pop()
        if name in found or not _is_own(name.partition(".")[0], package):
            continue
        if (file := _file(name)) is not None:
            found[name] = file
            waiting += [name.rpartition(".")[0], *_imported(name, file)]
    return found


def _is_own(top: str, package: str) -> bool:
    if top in ("", "raymaml", package):
        return top == package
    file = _file(top)
    return file is not None and not any(file.is_relative_to(place) for place in _INSTALLED)


def _file(name: str) -> Path | None:
    """Return the file of a module; None if there is no such module, or it has no file.

    Imports nothing: a module that only a function imports may be a script.
    """
    top, *parts = name.split(".")
    with contextlib.suppress(ImportError, ValueError, AttributeError, KeyError):
        spec = importlib.util.find_spec(top)
        for part in parts:
            if spec is None or spec.submodule_search_locations is None:
                return None
            places = list(spec.submodule_search_locations)
            spec = PathFinder.find_spec(f"{spec.name}.{part}", places)
        if spec is not None and spec.has_location and spec.origin is not None:
            return Path(spec.origin).resolve()
    return None


def _imported(name: str, file: Path) -> Iterator[str]:
    """Yield every name in the import statements of a module that may be a module.

    A file that Python cannot parse has none: the encoder was imported without it.
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    with contextlib.suppress(SyntaxError, ValueError, ImportError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                base = importlib.util.resolve_name(base, package) if node.level else base
                yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
