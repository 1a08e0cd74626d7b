"""The rules of the house as tests: layers, doors, no pickle, no silent except, sizes, current docs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.house.figures import count_figures

PACKAGE = ROOT / "peftkit"
MODULES = sorted(PACKAGE.rglob("*.py"))
BIN = Path(sys.executable).parent


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_layers_and_doors():
    done = subprocess.run([BIN / "lint-imports"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


def test_style():
    done = subprocess.run([BIN / "ruff", "check", "."], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [BIN / "ruff", "format", "--check", "."], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_types():
    done = subprocess.run([BIN / "mypy"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_reads_or_writes_pickles():
    """One file may: the program that converts them, in a process of its own that may do nothing else."""
    reader = PACKAGE / "model" / "base" / "unpickle.py"
    text = reader.read_text()
    assert text.count("torch.load(") == text.count("weights_only=True") == 1
    assert not re.search(r"torch\.save|pickle\.load|joblib|shelve|add_safe_globals|import peftkit|from peftkit", text)
    for path in MODULES:
        assert not re.search(r"import .*\bunpickle\b", path.read_text()), "it is started, never imported"
    for path in set(MODULES) - {reader}:
        assert not re.search(r"\b(pickle|torch\.save|torch\.load|joblib|shelve)\b", path.read_text()), path


def test_no_exception_is_swallowed():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert not all(isinstance(statement, ast.Pass) for statement in node.body), f"{path}:{node.lineno}"


def test_functions_and_modules_stay_readable():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 440, path
        for node in functions(path):
            assert node.end_lineno - node.lineno < 92, f"{path}:{node.lineno} {node.name}"


def test_modules_and_public_functions_say_what_they_are():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            hooks = node.name in {"count", "peft", "learning_rate", "default_targets"} if public else False
            if public and not hooks:
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


def test_every_module_has_its_mirrored_test():
    """tests/ mirrors peftkit/: a package's modules are tested by files of the same folder."""
    modules = [path for path in MODULES if path.stem != "__init__"]
    for folder in sorted({path.parent.relative_to(PACKAGE) for path in modules}):
        assert list((ROOT / "tests" / folder).glob("test_*.py")), folder


def test_every_mend_names_a_version_and_has_a_test():
    for path in (PACKAGE / "model" / "mends").glob("[!_]*.py"):
        assert re.search(r"Seen in \w+ \d+\.\d+", path.read_text()), path
        assert (ROOT / "tests" / "model" / "mends" / f"test_{path.stem}.py").exists()


def test_foreign_attributes_are_set_in_mends_only():
    for path in MODULES:
        if "mends" not in path.parts:
            assert "setattr(" not in path.read_text(), path


def test_import_of_the_package_is_light():
    program = "import sys, peftkit; print(sorted({'torch', 'pydantic', 'yaml', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_readme_and_contributing_name_real_files():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_commands_in_the_readme_exist():
    from peftkit.cli import COMMANDS

    known = {command.name for command in COMMANDS}
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(text.split("```")[1::2])
    used = set(re.findall(r"^(?:\.venv/bin/)?peftkit (\w+)", blocks, flags=re.MULTILINE))
    assert used
    assert used <= known


def test_extras_and_constraints_pin_what_is_imported():
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "transformers", "peft", "trl", "bitsandbytes", "gguf", "datasets", "pydantic"} <= pins


def test_functions_are_whole_and_names_mean_one_thing():
    """A private function that is used once carries a concept, or is inlined."""
    figures = count_figures(ROOT)
    print(figures)
    assert figures["private functions used once"] <= 0.12
    assert figures["public class names with several meanings"] == 0
    assert figures["imports inside functions"] <= 0.08
    assert figures["functions with Any in the signature"] <= 0.14
