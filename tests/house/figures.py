"""Figures of the code: lines, functions, private functions used once, names, imports, `Any`.

python -m tests.house.figures [FOLDER ...]    one column per checkout
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path


def count_figures(root: Path) -> dict[str, str | float]:
    """Return the figures of a checkout; shares are of all functions, or of all imports."""
    lines = {
        name: sum(len(p.read_text().splitlines()) for p in (root / name).rglob("*.py")) for name in ("peftkit", "tests")
    }
    class_names, references, private = Counter(), Counter(), []
    num_functions = num_any = num_imports = num_inner_imports = 0
    for path in sorted((root / "peftkit").rglob("*.py")):
        tree, inner_imports = ast.parse(path.read_text()), set()
        class_names.update(n.name for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                references[path, node.id if isinstance(node, ast.Name) else node.attr] += 1
            elif isinstance(node, ast.Import | ast.ImportFrom):
                num_imports += 1
            elif isinstance(node, ast.FunctionDef):
                num_functions += 1
                inner_imports |= {n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)}
                if node.name.startswith("_") and not node.name.startswith("__"):
                    private.append((path, node.name))
                signature = [ast.walk(node.args), ast.walk(node.returns) if node.returns else ()]
                num_any += any(isinstance(n, ast.Name) and n.id == "Any" for part in signature for n in part)
        num_inner_imports += len(inner_imports)
    return {
        "lines in peftkit/": lines["peftkit"],
        "lines in tests/": lines["tests"],
        "files in run/": len(list((root / "peftkit" / "run").rglob("*.py"))),
        "functions": num_functions,
        "private functions used once": sum(references[one] == 1 for one in private) / num_functions,
        "public class names with several meanings": sum(count > 1 for count in class_names.values()),
        "imports inside functions": num_inner_imports / num_imports,
        "functions with Any in the signature": num_any / num_functions,
    }


def main() -> None:
    columns = [count_figures(Path(folder)) for folder in sys.argv[1:] or ["."]]
    for name in columns[0]:
        values = [f"{c[name]:.1%}" if isinstance(c[name], float) else f"{c[name]:,}" for c in columns]
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
