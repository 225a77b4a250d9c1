"""The house keeps its shape: who imports whom, one home for each library, nothing too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "raymaml"

LAYERS = [
    {"common"},
    {"types", "seeding", "layers"},
    {"storage"},
    {"config", "kernels"},
    {"passes"},
    {"data", "models", "meta", "statistics"},
    {"training"},
    {"evaluation"},
    {"reports"},
    {"experiments", "classify"},
    {"cluster"},
    {"convert", "bench", "doctor", "library", "demo"},
    {"cli"},
    {"__main__"},
]
"""A part imports itself and parts of lower layers, without exception."""

HOMES = {
    "ray": ["cluster/"],
    "yaml": ["config/yaml_text.py"],
    "pyarrow": ["data/", "evaluation/", "classify/", "cluster/session.py", "cluster/predict.py"],
    "tensorboardX": ["training/metrics.py"],
    "matplotlib": ["reports/figures.py", "data/importers/glyph", "bench/report.py", "demo/"],
    "sklearn": ["classify/classifier.py"],
    "onnxruntime": ["classify/export.py"],
    "jinja2": ["reports/document.py"],
    "markdown_it": ["reports/document.py"],
    "click": ["cli/"],
    "safetensors": ["training/"],
    "upath": ["storage/place.py", "storage/lease.py"],
}


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of each module, by its path inside the package."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported module, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    """``raymaml.data.bank`` and ``data/bank.py`` belong to the part ``data``."""
    return module.removeprefix("raymaml.").replace("/", ".").removesuffix(".py").split(".")[0]


def not_below(path: str, tree: ast.Module) -> list[str]:
    """The imported modules of raymaml that a module of the file ``path`` may not import."""
    part = part_of(path)
    if part == "__init__":  # re-exports, for type checkers alone; a test says it is lazy
        return []
    layer = {each: number for number, parts in enumerate(LAYERS) for each in parts}
    modules = {each for each in imports(tree) if each.startswith("raymaml.")}
    return [
        module
        for module in modules - {"raymaml.__version__"}
        if part_of(module) != part and layer[part_of(module)] >= layer[part]
    ]


def test_parts_import_only_what_lies_below_them() -> None:
    assert {part_of(path) for path in sources()} - {"__init__"} == set().union(*LAYERS)
    assert not {path: found for path, tree in sources().items() if (found := not_below(path, tree))}
    inside = "def f():\n    from raymaml.meta import rules"
    for text in (inside, "import raymaml.training.loop", "from raymaml.cli import main"):
        assert not_below("data/bank.py", ast.parse(text))  # it sees what is forbidden
    for path, tree in sources().items():
        if part_of(path) in {"data", "models", "meta"}:  # of config they know the schema alone
            assert not any(module.startswith("raymaml.config.load") for module in imports(tree))


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library: str) -> None:
    users = [
        path
        for path, tree in sources().items()
        if any(module.split(".")[0] == library for module in imports(tree))
    ]
    assert users, f"nothing imports {library}: is this test out of date?"
    strangers = [path for path in users if not path.startswith(tuple(HOMES[library]))]
    assert not strangers


def test_functions_are_at_most_60_lines_and_files_400() -> None:
    functions = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert functions["training/loop.py:meta_step"] > 20  # it sees what is long
    assert not {name: length for name, length in functions.items() if length > 60}
    files = {path: len((PACKAGE / path).read_text("utf-8").splitlines()) for path in sources()}
    assert not {path: length for path, length in files.items() if length > 400}


def test_the_algorithm_reads_in_one_sitting() -> None:
    files = ["types", "meta/inner_loop", "meta/gradients", "meta/learner", "training/loop"]
    lines = [len((PACKAGE / f"{name}.py").read_text("utf-8").splitlines()) for name in files]
    assert sum(lines) <= 795  # with any rule, loss and head, and several episodes at once


def test_no_pickle_is_trusted_and_no_text_is_run() -> None:
    """Contract 10: ``torch.load`` takes weights only; one file unpickles, and restricts it.

    Ray Tune keeps pickles of an experiment, so a campaign or a sweep resumes from raymaml's own
    files.
    """
    unpickling = {"pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle"}
    loads = 0
    for path, tree in sources().items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in {"eval", "exec", "compile", "os.system", "os.popen"}, path
            assert not name.endswith("Tuner.restore"), path
            assert keywords.get("allow_pickle") != "True", path
            assert "shell" not in keywords, path
            if name == "torch.load":
                loads += 1
                assert keywords.get("weights_only") == "True", f"{path}:{call.lineno}"
        # `from pickle import UnpicklingError` alone is harmless
        plain = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert "pickle" not in plain or path == "data/formats/pickles.py", path
        assert not unpickling & set(imports(tree)), path
        # which runs a compiler on raymaml's own source
        assert "subprocess" not in imports(tree) or path == "kernels/build.py", path
    assert loads
