"""The library is laid out as the README says, and imports go in one direction."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "hnerv_clip"


def readme_lines() -> list[list[str]]:
    """The rooms on each line of the README's map of `hnerv_clip/`, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"\nhnerv_clip/ .*\n([\s\S]*?)\nbook/ ", text)[1]
    named = [re.match(r"  (\S.*?)(?:\s{2,}|$)", line) for line in block.splitlines()]
    return [match[1].replace("/", "").split() for match in named if match]


def imports() -> set[tuple[str, str]]:
    """(module, what it imports) within the library, also in functions and for types only."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in LIBRARY.rglob("*.py")}
    edges = set()
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            above = package.split(".")[:len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])]) if node.level else node.module
            if base.split(".")[0] == "hnerv_clip":
                edges |= {(name, target if (target := f"{base}.{alias.name}") in files else base)
                          for alias in node.names}
    return {(a, b) for a, b in edges if a != b}


def test_every_module_stands_in_the_readme_once():
    listed = sorted(room for line in readme_lines() for room in line)
    there = {path.stem if path.is_file() else path.name for path in LIBRARY.iterdir()
             if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}
    assert listed == sorted(there)


def test_modules_import_from_their_own_line_or_above():
    line_of = {room: i for i, line in enumerate(readme_lines()) for room in line}
    room = {name: name.split(".")[1] for edge in imports() for name in edge if "." in name}
    down = {(room[a], room[b]) for a, b in imports() if a in room and b in room
            and line_of[room[b]] > line_of[room[a]]}
    assert not down


def test_no_module_imports_itself_through_others():
    edges = {pair for pair in imports() if "hnerv_clip" not in pair}
    while edges:  # take away what imports nothing that is left, or is imported by nothing
        sources, targets = {a for a, _ in edges}, {b for _, b in edges}
        kept = {(a, b) for a, b in edges if b in sources and a in targets}
        assert kept != edges, f"a cycle among {sorted(sources & targets)}"
        edges = kept


def test_public_functions_are_typed():
    """But for Triton's kernels, whose arguments are pointers and constants."""
    untyped = []
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef):
                untyped += [f"{path.name}: {f.name}" for f in node.body
                            if isinstance(f, ast.FunctionDef) and not is_typed(f)]
    assert not untyped


def is_typed(function: ast.FunctionDef) -> bool:
    """Whether a function is private, a kernel, or has a type for all that it takes and returns."""
    if function.name.startswith("_") or "jit" in "".join(map(ast.unparse,
                                                            function.decorator_list)):
        return True
    taken = function.args
    names = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg]
    return function.returns is not None and all(
        name.annotation for name in names if name and name.arg not in ("self", "cls"))


def test_the_library_replaces_no_part_of_itself():
    """Neither by `unittest.mock` nor by other means of tests."""
    assert not [path.name for path in LIBRARY.rglob("*.py")
                if "mock" in path.read_text(encoding="utf-8")]


def test_no_module_is_long():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines())
             for path in LIBRARY.rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > 500}


def test_nothing_private_is_imported():
    private = [(path.name, alias.name) for path in LIBRARY.rglob("*.py")
               for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
               if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hnerv_clip")
               for alias in node.names if alias.name.startswith("_")]
    assert not private
