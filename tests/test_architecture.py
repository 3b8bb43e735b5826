"""The arrows of the design: who may import whom. Read from the source, so that lazy imports count too."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cad_mllm"

# What each part of the package may import of the package, besides itself. Nothing else.
_BASE = {"errors", "config"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "cad": _BASE,
    "data": _BASE | {"cad"},
    "model": _BASE,
    "train": _BASE | {"cad", "data", "model", "settings"},
    "artifacts": _BASE | {"cad", "data"},
    "inputs": _BASE | {"data"},
    "choose": _BASE | {"cad", "data", "artifacts"},
    "fit": _BASE | {"cad", "data", "artifacts"},
    "generate": _BASE | {"cad", "data", "model", "artifacts", "inputs", "choose", "fit"},
    "report": _BASE | {"cad"},
    "evaluate": _BASE | {"cad", "data", "report"},
    "settings": _BASE,
    "cluster": _BASE,
    "launch": _BASE,
    "demo": _BASE | {"cad", "data", "artifacts", "inputs", "generate", "report", "cli"},
    "bench": _BASE | {"data", "model", "train"},
    "commands": _BASE
    | {"cad", "data", "model", "train", "bench", "inputs", "generate", "evaluate", "report", "settings"}
    | {"cluster"},
    "cli": _BASE | {"commands", "settings"},
    "train_curriculum": {"cli"},
}

# Libraries that only these files (or folders) may import.
ONLY_IN: dict[str, set[str]] = {
    "deepspeed": {
        "train/engine.py",
        "train/gathering.py",
        "train/gradients.py",
        "train/zero.py",
        "model/build.py",
    },
    "wandb": {"train/tracking.py"},
    "OCP": {"cad/"},
    "pyarrow": {"data/shards.py"},
    "tyro": {"settings.py"},
    "kubernetes": {"cluster/"},
}

# Folders that must not import these.
NEVER_IN: dict[str, set[str]] = {
    "cad/": {"torch", "transformers", "deepspeed", "peft"},
    "errors.py": {"torch"},
    "config.py": {"torch"},
    "settings.py": {"torch"},
    "launch/": {"torch"},
    # Judgements are functions of facts: what asks the machine is in train/machine.py.
    "train/checks.py": {"torch", "deepspeed", "os", "socket", "subprocess", "ctypes"},
    "train/demand.py": {"torch", "deepspeed", "os"},
}

READS_ARGV = {"cli.py", "train_curriculum.py", "launch/__main__.py"}

TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".github",
    ".gitignore",
    "LICENSE",
    "Makefile",
    "README.md",
    "cad_mllm",
    "configs",
    "constraints.txt",
    "docker",
    "k8s",
    "pyproject.toml",
    "tests",
}


def imported_modules(tree: ast.Module, file: str) -> Iterator[str]:
    """Absolute dotted names of everything imported anywhere in a module; relative imports resolved."""
    package = ["cad_mllm", *Path(file).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def reads_argv(tree: ast.Module) -> bool:
    """Whether the module touches `sys.argv`, by attribute or by import."""
    attribute = any(
        isinstance(node, ast.Attribute)
        and node.attr == "argv"
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
        for node in ast.walk(tree)
    )
    imported = any(
        isinstance(node, ast.ImportFrom)
        and node.module == "sys"
        and any(a.name == "argv" for a in node.names)
        for node in ast.walk(tree)
    )
    return attribute or imported


def is_in(file: str, places: set[str]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def violations(package: Path) -> list[str]:
    """One line for each import under `package` that goes against the arrows."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        part = Path(file).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        if part not in ALLOWED:
            found.append(f"{file}: `{part}` has no place in the architecture yet: add it to ALLOWED")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module in imported_modules(tree, file):
            top, *rest = module.split(".")
            if top == "cad_mllm":
                used = rest[0] if rest else "__init__"
                if not used.startswith("__") and used not in {part, *ALLOWED[part]}:
                    found.append(f"{file} imports {module}: {part} may not use {used}")
                continue
            if top in ONLY_IN and not is_in(file, ONLY_IN[top]):
                found.append(f"{file} imports {top}, which only {sorted(ONLY_IN[top])} may")
            found += [
                f"{file} imports {top}: never in {place}"
                for place, libraries in NEVER_IN.items()
                if top in libraries and is_in(file, {place})
            ]
        if reads_argv(tree) and file not in READS_ARGV:
            found.append(f"{file} reads sys.argv: only {sorted(READS_ARGV)} do")
    return found


def test_the_arrows_hold() -> None:
    assert violations(PACKAGE) == []


def test_the_floors_have_no_circle() -> None:
    """Stacking the parts from the bottom must place every one of them."""
    placed: set[str] = set()
    while ready := {part for part, uses in ALLOWED.items() if part not in placed and uses <= placed}:
        placed |= ready
    assert placed == set(ALLOWED)


def test_every_part_that_exists_is_checked() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert parts - {"__init__", "__pycache__"} == set(ALLOWED)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("cad/codec.py", "import torch", "never in cad/"),
        ("cad/codec.py", "def f():\n    import torch.nn", "never in cad/"),
        ("cad/codec.py", "from cad_mllm.data import order", "cad may not use data"),
        ("cad/codec.py", "from ..data import order", "cad may not use data"),
        ("cad/codec.py", "from .. import train", "cad may not use train"),
        ("data/order.py", "import cad_mllm.train.engine", "data may not use train"),
        ("model/build.py", "from cad_mllm.data.collate import Batch", "model may not use data"),
        ("train/trainer.py", "from deepspeed import comm", "which only"),
        ("train/trainer.py", "import wandb", "which only"),
        ("train/checks.py", "import torch", "never in train/checks.py"),
        ("train/checks.py", "from os import environ", "never in train/checks.py"),
        ("train/trainer.py", "import sys\nprint(sys.argv)", "reads sys.argv"),
        ("train/trainer.py", "from sys import argv", "reads sys.argv"),
        ("config.py", "from cad_mllm.errors import ConfigError", "config may not use errors"),
        ("novelty.py", "", "has no place"),
    ],
)
def test_the_check_notices(file: str, source: str, complaint: str, tmp_path: Path) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(source)
    assert len(violations(tmp_path)) == 1
    assert complaint in violations(tmp_path)[0]


def test_the_check_lets_pass_what_is_allowed(tmp_path: Path) -> None:
    planted = tmp_path / "train" / "engine.py"
    planted.parent.mkdir()
    planted.write_text(
        "import deepspeed\nfrom cad_mllm.data import order\nfrom cad_mllm import __version__\n"
        "from . import zero\nimport sys\nsys.exit(0)\n"
    )
    assert violations(tmp_path) == []


def test_the_top_level_holds_only_what_the_design_names() -> None:
    """Of the files under version control; what runs leave behind is ignored by git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert {Path(line).parts[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL
