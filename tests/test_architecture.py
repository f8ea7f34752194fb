"""The layout's promises: one direction of imports, nothing heavy at import, plain messages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulate import left_out

PACKAGE = Path(__file__).parents[1] / "molex_kernels"

SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")

# What each layer inside an op may import from its own package's layers, lowest first.
LAYERS = ("types", "reference", "placement", "cpu", "kernels", "op", "api", "module")
# Layers in which one op may stand on another's.
ACROSS = {"kernels": ("kernels",), "op": ("op",), "module": ("module",)}
ABOVE = {
    "types": set(),
    "reference": {"types"},
    "placement": {"types"},
    "cpu": {"types"},
    "kernels": {"types", "kernels"},
    "op": {"types", "reference", "placement", "cpu", "kernels", "op"},
    "api": {"types", "reference", "placement", "op", "api"},
    "module": {"types", "api"},
}


def _layer(path: Path) -> str:
    inside = path.relative_to(PACKAGE / "ops").parts[1:]
    name = inside[0].removesuffix(".py")
    return name


def _imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module, and whether it is imported when the file is."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def _op_files() -> list[Path]:
    return [p for p in sorted(PACKAGE.glob("ops/*/**/*.py")) if p.name != "__init__.py"]


@pytest.mark.parametrize("path", _op_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    own = path.relative_to(PACKAGE / "ops").parts[0]
    layer = _layer(path)
    for name, at_import in _imports(path):
        if not name.startswith("molex_kernels."):
            if at_import and layer != "kernels":
                assert not name.startswith("triton"), f"{path.name} imports Triton at import"
            continue
        parts = name.split(".")
        if parts[1].startswith("_"):
            assert at_import or parts[1] == "_triton"
            continue
        assert parts[1] == "ops", f"{path.name} imports {name}: nothing calls back up"
        target = parts[3] if len(parts) > 3 else ""
        if parts[2] == own:
            assert _group(target) in ABOVE[_group(layer)], f"{path.name} ({layer}) imports {name}"
            if target == "kernels" and layer != "kernels":
                assert not at_import, f"{path.name} imports kernels when it is imported"
        else:
            allowed = ("types", "api", *ACROSS.get(layer, ()))
            assert _group(target) in allowed, f"{path.name} reaches into another op: {name}"


def _group(name: str) -> str:
    """The layer of a file: `losses` and other parts of the API count as `api`."""
    return name if name in LAYERS else "api"


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.glob("_*.py"), *PACKAGE.glob("_*/*.py")]), ids=lambda p: p.name
)
def test_foundations_import_no_op(path: Path):
    if path.name == "__init__.py":
        return
    for name, _ in _imports(path):
        assert not name.startswith("molex_kernels.ops"), f"{path.name} imports {name}"


def test_integrations_stand_above_everything():
    """Nobody else imports them, and they import the other library only when they are called."""
    for path in PACKAGE.rglob("*.py"):
        inside = path.parent.name == "integrations"
        allowed = "molex_kernels.integrations._" if inside else ()
        for name, at_import in _imports(path):
            is_one = name.startswith("molex_kernels.integrations")
            # Whoever shards the experts of a library's model has the library.
            is_late = path.parent.name == "parallel" and not at_import
            assert not is_one or name.startswith(allowed) or is_late, f"{path.name}: {name}"
            if inside and at_import:
                root = name.split(".")[0]
                known = root in ("torch", "molex_kernels") or root in sys.stdlib_module_names
                assert known, f"{path.name} imports {name} when it is imported"


def test_nobody_imports_what_is_over_ranks():
    """It loads DTensor, which takes a second that few want to wait."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "parallel":
            for name, _ in _imports(path):
                assert not name.startswith("molex_kernels.parallel"), f"{path.name}: {name}"


def test_nobody_imports_what_tests_share():
    """And it imports neither pytest nor anybody's library when it is imported."""
    for path in PACKAGE.rglob("*.py"):
        inside = "testing" in path.relative_to(PACKAGE).parts
        for name, at_import in _imports(path):
            if inside and at_import:
                root = name.split(".")[0]
                known = root in ("torch", "molex_kernels") or root in sys.stdlib_module_names
                assert known, f"{path.name} imports {name} when it is imported"
            elif not inside:
                assert not name.startswith("molex_kernels.testing"), f"{path.name}: {name}"


def test_one_file_talks_to_torch_library():
    users = [p.name for p in PACKAGE.rglob("*.py") if "torch.library." in _code(p)]
    assert users == ["_operators.py"]


def test_one_function_starts_kernels():
    """`kernel[grid](...)` stands in one place; another op's launchers are called by their names."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in [*PACKAGE.glob("_triton/*.py"), *PACKAGE.glob("ops/*/kernels/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert [place.partition(":")[0] for place in found] == ["_triton/direct.py"], found


def test_no_kernel_leaves_the_order_of_elements_to_the_compiler():
    """A chip's compiler mixes rows then; whatever executes the IR without one keeps the order."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in [*PACKAGE.glob("_triton/*.py"), *PACKAGE.glob("ops/*/kernels/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (
            any(keyword.arg == "can_reorder" for keyword in node.keywords)
            or ast.unparse(node.func) in ("tl.ravel", "tl.cat")
        )
    ]
    assert not found


def test_no_kernel_sums_a_product_that_a_thread_could_fuse():
    """See `tiles.rounded_product`. A product with a sign is exact either way.

    Of a norm every lane computes its own element from its own sums.
    """
    norms = {PACKAGE / "ops/layer_mixing/kernels/mix.py"}
    norms |= {PACKAGE / f"ops/momentum/kernels/{name}ward.py" for name in ("for", "back")}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in {*PACKAGE.glob("_triton/*.py"), *PACKAGE.glob("ops/*/kernels/*.py")} - norms
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.sum"
        and isinstance(node.args[0], ast.BinOp)
        and isinstance(node.args[0].op, ast.Mult)
        and "sign(" not in ast.unparse(node.args[0])
    ]
    assert not found


def _code(path: Path) -> str:
    """The file's names and attributes, without docstrings and comments."""
    return ast.unparse(
        ast.Module([n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.Expr)], [])
    )


# One argument of each op, and where it may be listed: the public function (with the types and
# modules around it), the schema, the kernel, C++; and the reference, which specifies the function.
LISTED = {
    "dispatch": "w_down",
    "routing": "expert_bias",
    "momentum": "norm_bias",
    "merging": "in1",
    "layer_mixing": "scaling",
    "rpc_attention": "key_mask",
}
ROOMS = {
    "api.py": "public",
    "choice.py": "public",
    "balance.py": "public",
    "module.py": "public",
    "types.py": "public",
    "parts.py": "public",
}
ROOMS |= {"op.py": "schema", "reference.py": "reference", "kernels": "kernel"}


@pytest.mark.parametrize(("op", "argument"), LISTED.items())
def test_an_argument_is_listed_in_four_places(op: str, argument: str):
    """And in the reference; no launcher, fake or wrapper lists it again."""
    folder = PACKAGE / "ops" / op
    rooms = set()
    for path in folder.rglob("*.py"):
        room = path.relative_to(folder).parts[0]
        listed = [node.lineno for node in ast.walk(ast.parse(path.read_text()))
                  if _lists(node, argument)]  # fmt: skip
        if listed:
            assert room in ROOMS, f"{path.relative_to(PACKAGE)} lists {argument}, line {listed[0]}"
            rooms.add(ROOMS[room])
    assert "schema" in rooms
    assert len(rooms - {"reference"}) <= 3  # C++ is the fourth
    for path in folder.glob("kernels/launch.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert len(node.args.args) == 1, f"{node.name} lists arguments of the schema"


def _lists(node: ast.AST, argument: str) -> bool:
    """Whether it declares a parameter, a field or an argument of a schema by this name."""
    if isinstance(node, ast.arg):
        return node.arg == argument
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id == argument
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (
            re.search(rf"\b(Tensor|float|int|bool|str)\??(\[\])? {argument}\b", node.value)
            is not None
        )
    return False


def test_the_operators_are_stated_briefly():
    texts = [path.read_text() for path in PACKAGE.glob("ops/*/op.py")]
    assert len(texts) == 6
    operators = sum(text.count("Pass(") for text in texts)
    assert sum(len(text.splitlines()) for text in texts) <= 45 * operators


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, molex_kernels\n"
        "heavy = {'triton', 'transformers', 'timm', 'peft', 'molex_kernels._C',\n"
        "         'torch.distributed.tensor'}\n"
        "print(sorted(m for m in sys.modules if m in heavy))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    torch_alone = subprocess.run(
        [sys.executable, "-c", script.replace(", molex_kernels", ", torch")],
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout == torch_alone.stdout


def test_emulation_leaves_out_the_tests_whose_packages_it_has_not():
    tests = Path(__file__).parent
    pins = (tests.parent / ".ci/emulate.txt").read_text().splitlines()
    has = {pin.partition("==")[0] for pin in pins}
    for path in sorted({*tests.glob("test_*.py")} - {tests / name for name in left_out.FILES}):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.For):  # over the packages' names
                asked = ast.literal_eval(statement.iter) if _skips(statement.body[0]) else ()
            else:
                asked = [ast.literal_eval(c.args[0]) for c in _skips(statement)]
            assert has >= {*asked}, f"{path.name} is not in tests/emulate/left_out.py"


def _skips(statement: ast.stmt) -> list[ast.Call]:
    """The statement itself, where it is `pytest.importorskip(...)` or assigns that."""
    value = getattr(statement, "value", None)
    is_it = isinstance(value, ast.Call) and ast.unparse(value.func) == "pytest.importorskip"
    return [value] if is_it else []


def test_no_file_is_long():
    root = PACKAGE.parent
    names = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout
    paths = [root / name for name in names.split() if name.endswith(SOURCES)]
    paths = paths or list(PACKAGE.rglob("*.py"))  # an installed package has no git
    assert paths
    long = [p.name for p in paths if p.exists() and len(p.read_text().splitlines()) > 600]
    assert not long
