"""Readability gates that ruff cannot count; prints the figures and fails where one is over its limit.

python .ci/gates.py [--report]    --report prints the figures alone and never fails
"""

import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = dict(columns=120, function=60, module=400, nodes_per_line=10.0, notebook_columns=100, cell_lines=20)
SHORT_NAMES = set("BLNDEHxqkvij_")  # the letters that formulas of the field use


def library_files():
    return sorted(f for f in (ROOT / "protmae").rglob("*.py") if f.name != "_modidx.py")


def notebooks():
    return sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [(i, "".join(c["source"])) for i, c in enumerate(cells) if c["cell_type"] == "code"]


def lacks_parameters(path):
    "Whether papermill would put a notebook's parameters in front of the defaults, which then win."
    cells = json.loads(path.read_text())["cells"]
    checked = any("check_parameters(globals()" in "".join(cell["source"]) for cell in cells)
    return checked and not any("parameters" in cell["metadata"].get("tags", []) for cell in cells)


def too_wide(source, tree):
    "Numbers of the lines that are too long; nbdev writes `__all__`."
    listed = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    exempt = {i for n in listed for i in range(n.lineno, n.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return [i for i, line in lines if len(line) > LIMITS["columns"] and i not in exempt]


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def semicolons(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(t.type == tokenize.OP and t.string == ";" for t in tokens)


def short_names(tree):
    "How many local variables there are, and how many are one letter outside SHORT_NAMES."
    names = {
        (function.name, n.id)
        for function in functions(tree)
        for n in ast.walk(function)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    return len(names), sum(len(name) == 1 and name not in SHORT_NAMES for _, name in names)


def string_subscripts(tree):
    return sum(
        isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant) and isinstance(n.slice.value, str)
        for n in ast.walk(tree)
    )


def private_imports(tree):
    return [
        f"{n.module}.{a.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and ((n.module or "").startswith("protmae") or n.level)
        for a in n.names
        if a.name.startswith("_") and not a.name.startswith("__")
    ]


def undocumented(source, tree):
    "Public functions and methods that lack a docstring, or a comment beside one of their parameters."
    lines, missing = source.splitlines(), []
    owners = [tree] + [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    for owner in owners:
        for n in owner.body:
            if not isinstance(n, ast.FunctionDef) or (n.name.startswith("_") and n.name != "__init__"):
                continue
            if n.name != "__init__" and not ast.get_docstring(n):
                missing.append(f"{n.name} (no docstring)")
            if owner is not tree:  # of methods the constructor's parameters are documented
                if n.name != "__init__":
                    continue
            for a in n.args.args + n.args.kwonlyargs:
                if a.arg in ("self", "cls"):
                    continue
                beside = "#" in lines[a.end_lineno - 1]
                if not beside:
                    missing.append(f"{n.name}({a.arg})")
    return missing


def public_definitions(source):
    "Public functions and classes that one exported cell defines."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]


def check_library(problems):
    lines = nodes = letters = local = subscripts = semis = 0
    longest_function = longest_module = longest_line = 0
    long_lines = 0
    for path in library_files():
        source = path.read_text()
        tree, name = ast.parse(source), path.relative_to(ROOT)
        count = source.count("\n")
        lines += count
        longest_module = max(longest_module, count)
        nodes += sum(1 for _ in ast.walk(tree))
        semis += semicolons(source)
        subscripts += string_subscripts(tree)
        over = too_wide(source, tree)
        long_lines += len(over)
        longest_line = max([longest_line, *map(len, source.splitlines())])
        problems += [f"{name}:{i}: over {LIMITS['columns']} columns" for i in over]
        if count > LIMITS["module"]:
            problems.append(f"{name}: {count} lines; at most {LIMITS['module']}")
        for f in functions(tree):
            size = f.end_lineno - f.lineno + 1
            longest_function = max(longest_function, size)
            if size > LIMITS["function"]:
                problems.append(f"{name}:{f.lineno}: {f.name} has {size} lines; at most {LIMITS['function']}")
        problems += [f"{name}: imports the private {p}" for p in private_imports(tree)]
        problems += [f"{name}: {m} is not documented" for m in undocumented(source, tree)]
        total, short = short_names(tree)
        local, letters = local + total, letters + short
    if nodes / lines > LIMITS["nodes_per_line"]:
        problems.append(f"{nodes / lines:.1f} AST nodes a line; at most {LIMITS['nodes_per_line']}")
    if semis:
        problems.append(f"{semis} semicolons in protmae/")
    return dict(
        lines=lines,
        lines_over_120=long_lines,
        longest_line=longest_line,
        semicolons=semis,
        ast_nodes_a_line=round(nodes / lines, 1),
        longest_function=longest_function,
        longest_module=longest_module,
        one_letter_locals_percent=round(100 * letters / local, 1),
        string_subscripts_per_1000_lines=round(1000 * subscripts / lines, 1),
    )


def check_notebooks(problems):
    for path in notebooks():
        name = path.relative_to(ROOT)
        experiment = path.parent.name == "nbs" and re.match(r"\d\d_", path.name)
        for i, source in code_cells(path):
            if re.match(r"#\|\s*export", source):
                public = public_definitions(source)
                if len(public) > 1:
                    problems.append(
                        f"{name} cell {i}: {len(public)} public definitions ({', '.join(public)}); one a cell"
                    )
            code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
            try:
                if semicolons(code):
                    problems.append(f"{name} cell {i}: a semicolon")
            except (tokenize.TokenError, IndentationError):
                pass
            if experiment:
                wide = max(map(len, source.splitlines()), default=0)
                if wide > LIMITS["notebook_columns"]:
                    problems.append(f"{name} cell {i}: {wide} columns; at most {LIMITS['notebook_columns']}")
                if len(source.splitlines()) > LIMITS["cell_lines"]:
                    problems.append(
                        f"{name} cell {i}: {len(source.splitlines())} lines; at most {LIMITS['cell_lines']}"
                    )


def main():
    problems = []
    figures = check_library(problems)
    check_notebooks(problems)
    runnable = [path for path in notebooks() if "lib" not in path.relative_to(ROOT).parts]
    problems += [f"{path.name}: no cell is tagged parameters" for path in runnable if lacks_parameters(path)]
    print(json.dumps(figures, indent=1))
    if "--report" in sys.argv:
        return 0
    print(*problems[:200], sep="\n")
    print(f"{len(problems)} readability problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
