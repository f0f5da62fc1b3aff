# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the source promises about itself: which module may import which, and that private names stay where they are."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("monai_ifim", "benchmarks", "study")
# The rooms of monai_ifim: a module imports from its own room and from those of the rows above.
ROOMS = (
    ("notices", "checks", "interrupts", "progress"),
    ("likelihoods",),
    ("model",),
    ("fisher",),
    ("perturbation",),
    ("statistics", "training"),
    ("__init__",),
    ("cells", "schema", "files", "metadata"),
    ("results",),
    ("transforms", "visualize"),
    ("handlers", "comparison"),
    ("archive",),
    ("bundle", "demo"),
    ("__main__",),
)
ALONE = ("data",)  # imports no other room, and no other room imports it
CORE = {room for row in ROOMS[: ROOMS.index(("__init__",)) + 1] for room in row}
FRAMEWORKS = {"monai", "ignite", "matplotlib"}
# Modules of the core that import MONAI's losses and metrics of segmentation, inside the functions that need them only.
WITH_MONAI = {"monai_ifim.likelihoods.dense", "monai_ifim.perturbation.endpoints.dense"}
# Private names of torch and MONAI that modules of ours share.
FOREIGN = {"_modules", "_do_transform", "_writer"}
HEADER = "# SPDX-FileCopyrightText: monai_ifim contributors\n# SPDX-License-Identifier: Apache-2.0\n"


@dataclass(frozen=True)
class Import:
    """One imported thing: ``name`` from ``module`` (``None``: the module itself), bound to ``alias`` in the file."""

    module: str
    name: str | None
    alias: str


class Source:
    """The modules of some packages, by their dotted name."""

    def __init__(self, root: Path, packages: tuple[str, ...] = PACKAGES) -> None:
        self.trees: dict[str, ast.Module] = {}
        self.is_package: dict[str, bool] = {}
        for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
            self.is_package[name] = parts[-1] == "__init__"
        self.attributes = {name: private_attributes(tree) for name, tree in self.trees.items()}

    def imports(self, module: str) -> Iterator[Import]:
        """Everything that a module imports, inside functions and for type checkers, too."""
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, None, alias.asname or alias.name)
            elif isinstance(node, ast.ImportFrom):
                package = module.split(".")[: None if self.is_package[module] else -1]
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    inside = f"{source}.{alias.name}"
                    bound = alias.asname or alias.name
                    yield Import(inside, None, bound) if inside in self.trees else Import(source, alias.name, bound)

    def graph(self) -> Mapping[str, set[str]]:
        """For each module, the modules of these packages that it imports."""
        return {name: {found.module for found in self.imports(name)} & self.trees.keys() for name in self.trees}

    def private_uses(self, module: str) -> Iterator[str]:
        """Private names of other modules that a module imports, or takes as an attribute."""
        aliases, packages = set(), {name.split(".")[0] for name in self.trees}
        for found in self.imports(module):
            if found.module.split(".")[0] not in packages:
                continue
            aliases.add(found.alias)
            for part in (*found.module.split("."), found.name or ""):
                if is_private(part):
                    yield f"{module} imports {part} of {found.module}"
        own = private_names(self.trees[module])
        others = set().union(*(names for other, names in self.attributes.items() if other != module))
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | FOREIGN:
                owner = ast.unparse(node.value)
                if owner in aliases or node.attr in others:
                    yield f"{module} uses {owner}.{node.attr}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def private_attributes(tree: ast.Module) -> set[str]:
    """Private names that the classes of a module define, in their body or on ``self``."""
    names = set()
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return set(filter(is_private, names))


def private_names(tree: ast.Module) -> set[str]:
    """All private names that a module defines."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return private_attributes(tree) | set(filter(is_private, defined | stored))


def room_of(module: str) -> str:
    """The room of a module of monai_ifim."""
    return [*module.split("."), "__init__"][1]


def row_of(room: str) -> int:
    """The place of a room; a new one must be given a place."""
    [row] = [index for index, row in enumerate(ROOMS) if room in row] or [None]
    assert row is not None, f"The room {room} has no place in ROOMS of {Path(__file__).name}."
    return row


def wrong_ways(source: Source) -> list[str]:
    """Imports that point in another direction than ROOMS says."""
    found = []
    for module, targets in source.graph().items():
        for target in targets:
            top, other = module.split(".")[0], target.split(".")[0]
            if top != "monai_ifim" and other == "monai_ifim":
                continue
            one, another = (room_of(module), room_of(target)) if top == other == "monai_ifim" else (top, other)
            if one == another or (top == other and top != "monai_ifim"):
                continue
            inside = top == other and not {one, another} & set(ALONE)
            if top == "monai_ifim" and not (inside and row_of(another) < row_of(one)):
                found.append(f"{module} imports {target}")
    return sorted(found)


def circle(source: Source) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    try:
        TopologicalSorter(source.graph()).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def frameworks_in(source: Source, module: str) -> set[str]:
    """The frameworks that a module imports."""
    return {found.module.split(".")[0] for found in source.imports(module)} & FRAMEWORKS


def functions_in(tree: ast.Module) -> list[ast.AST]:
    """Every function of a module."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.fixture(scope="module")
def source() -> Source:
    """Read when a test asks for it, not by every process that collects."""
    return Source(ROOT)


@pytest.fixture(scope="module")
def modules(source: Source) -> list[str]:
    """The modules of monai_ifim."""
    return [name for name in source.trees if name.split(".")[0] == "monai_ifim"]


def test_every_room_has_a_place(modules: list[str]):
    for module in modules:
        assert room_of(module) in ALONE or row_of(room_of(module)) >= 0


def test_every_imported_module_exists(source: Source):
    imported = {(module, found.module) for module in source.trees for found in source.imports(module)}
    ours = {(module, name) for module, name in imported if name.split(".")[0] in PACKAGES}
    assert sorted(f"{module} imports {name}" for module, name in ours if name not in source.trees) == []


def test_imports_point_one_way(source: Source):
    assert wrong_ways(source) == []


def test_no_modules_import_each_other_in_a_circle(source: Source):
    assert circle(source) == []


def test_private_names_stay_in_their_module(source: Source):
    assert [use for module in source.trees for use in source.private_uses(module)] == []


def test_core_knows_neither_ignite_nor_matplotlib_and_monai_only_for_losses_and_metrics_of_segmentation(
    source: Source, modules: list[str]
):
    known = {module: frameworks_in(source, module) for module in modules if room_of(module) in CORE}
    assert {module: found for module, found in known.items() if found} == {module: {"monai"} for module in WITH_MONAI}
    assert len(known) > 20


def test_importing_the_core_does_not_import_monai(source: Source):
    for module in WITH_MONAI:
        at_import = [node for node in ast.walk(source.trees[module]) if isinstance(node, (ast.Import, ast.ImportFrom))]
        inside = [node for function in functions_in(source.trees[module]) for node in ast.walk(function)]
        of_monai = [node for node in at_import if (getattr(node, "module", None) or "").split(".")[0] == "monai"]
        assert of_monai
        assert all(node in inside for node in of_monai)
        assert {node.module for node in of_monai} <= {"monai.losses", "monai.metrics"}


def test_the_picture_of_the_architecture_has_every_room_in_its_row():
    picture = (ROOT / "docs" / "architecture.svg").read_text("utf-8")
    boxes = re.findall(r'<text x="\d+" y="(\d+)"[^>]*font-weight="bold">([^<]*)<', picture)
    height = {room: int(place) for place, rooms in boxes for room in re.findall(r"\w+", rooms)}
    assert set(height) == {room for row in ROOMS for room in row} - {"__init__"} | set(ALONE)
    rows = [[height[room] for room in row] for row in ROOMS[1:] if row != ("__init__",)]
    assert all(len(set(row)) == 1 for row in rows)
    assert rows == sorted(rows, reverse=True)


def test_results_draw_nothing(source: Source, modules: list[str]):
    assert not any("matplotlib" in frameworks_in(source, module) for module in modules if room_of(module) == "results")


def test_every_file_has_the_two_lines_of_the_licence():
    folders = (*PACKAGES, "bundles", "docs", "tests", "tutorials")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [str(path.relative_to(ROOT)) for path in files if not path.read_text("utf-8").startswith(HEADER)] == []


# The rules themselves, on small trees that break them.


def tree_of(root: Path, files: Mapping[str, str]) -> Source:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
    return Source(root)


@pytest.mark.parametrize(
    ("file", "statement", "finds"),
    [
        ("fisher/a.py", "from monai_ifim.model import b", False),
        ("fisher/a.py", "from monai_ifim.fisher.c import d", False),
        ("fisher/a.py", "from monai_ifim.statistics import b", True),
        ("fisher/a.py", "import monai_ifim", True),
        ("fisher/a.py", "from ..handlers import b", True),
        ("fisher/a.py", "def f():\n    import monai_ifim.handlers", True),
        ("fisher/a.py", "if TYPE_CHECKING:\n    from monai_ifim.bundle import b", True),
        ("fisher/a.py", "import study", True),
        ("fisher/a.py", "from monai_ifim import data", True),
        ("data/a.py", "from monai_ifim.fisher import b", True),
        ("visualize/a.py", "from monai_ifim.transforms import b", True),
        ("visualize/a.py", "from monai_ifim import results", False),
        ("results.py", "import monai_ifim", False),
        ("__main__.py", "from monai_ifim.bundle import b", False),
        ("bundle/a.py", "from monai_ifim.__main__ import b", True),
    ],
)
def test_an_import_in_the_wrong_direction_is_found(tmp_path: Path, file: str, statement: str, finds: bool):
    rooms = {f"monai_ifim/{room}/__init__.py": "" for row in ROOMS for room in row if not room.startswith("_")}
    del rooms["monai_ifim/results/__init__.py"]
    others = {"monai_ifim/results.py": "", "monai_ifim/__main__.py": "", "monai_ifim/data/x.py": "", "study/x.py": ""}
    source = tree_of(tmp_path, rooms | others | {f"monai_ifim/{file}": statement})
    assert bool(wrong_ways(source)) is finds


def test_a_circle_is_found_also_through_the_package_and_type_checking(tmp_path: Path):
    files = {"monai_ifim/fisher/__init__.py": "from monai_ifim.fisher.a import f", "monai_ifim/fisher/b.py": ""}
    without = tree_of(tmp_path / "1", files | {"monai_ifim/fisher/a.py": "from monai_ifim.fisher import b"})
    assert circle(without) == []
    back = "if TYPE_CHECKING:\n    from monai_ifim.fisher import g"
    assert circle(tree_of(tmp_path / "2", files | {"monai_ifim/fisher/a.py": back}))


@pytest.mark.parametrize(
    ("statement", "finds"),
    [
        ("from study.a import _f", True),
        ("from study import _hidden", True),
        ("from study._hidden import f", True),
        ("import study.a\nstudy.a._f()", True),
        ("from study import a\na._f()", True),
        ("from study.a import K\nK._made()", True),
        ("def g(k):\n    return k._kept", True),
        ("from study.a import K\nclass L(K):\n    def h(self):\n        return self._kept", True),
        ("from study.a import __doc__, K as _K\n_K()", False),
        ("class L:\n    def h(self):\n        self._kept = 1\n        return self._kept", False),
        ("import torch\ntorch._C\n_, b = 1, 2", False),
    ],
)
def test_a_private_name_of_another_module_is_found(tmp_path: Path, statement: str, finds: bool):
    other = """
        def _f(): ...
        class K:
            def __init__(self): self._kept = 1
            def _made(self): ...
    """
    files = {"study/a.py": other, "study/_hidden.py": "def f(): ...", "study/b.py": statement}
    assert bool(list(tree_of(tmp_path, files).private_uses("study.b"))) is finds
