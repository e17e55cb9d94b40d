"""Mechanical checks of the design: who imports whom, and which word may stand in which file."""

import ast
import functools
import re
from pathlib import Path

import pytest
from tiny import ROOT

PACKAGE = ROOT / "qwen_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

# Who may import whom. A part may always import itself.
CONFIG = {"config", "config_alignment", "config_values"}
ABOVE_THE_MODEL = CONFIG | {"sharding", "losses", "metrics", "distributed", "text", "model"}
EVERYTHING = {*ABOVE_THE_MODEL, "data", "generate", "hf", "trainer", "stages", "evals"}
EVERYTHING |= {"inputs", "loading", "assembly", "allocator"}
ALLOWED = {
    "config_values": set(),
    "config_alignment": {"config_values"},
    "config": {"config_alignment", "config_values"},
    "allocator": set(),
    "sharding": CONFIG,
    "losses": CONFIG | {"sharding"},
    "metrics": CONFIG,
    "distributed": CONFIG,
    "text": CONFIG,
    "model": CONFIG | {"sharding"},
    "data": CONFIG | {"sharding", "text"},
    # Token ids only: no text.
    "generate": ABOVE_THE_MODEL - {"text"},
    "hf": ABOVE_THE_MODEL,
    # Does not know what a token is.
    "trainer": CONFIG | {"sharding", "metrics", "distributed"},
    "evals": ABOVE_THE_MODEL | {"data", "generate", "trainer"},
    "stages": ABOVE_THE_MODEL | {"data", "generate", "trainer", "evals"},
    # What the commands share.
    "inputs": CONFIG | {"sharding", "data", "text", "loading", "hf", "trainer", "model"},
    "assembly": ABOVE_THE_MODEL
    | {"data", "generate", "trainer", "stages", "evals", "inputs"}
    | {"hf", "loading"},
    "loading": ABOVE_THE_MODEL | {"hf", "trainer"},
    "api": ABOVE_THE_MODEL | {"generate", "hf", "loading"},
    "rewards": ABOVE_THE_MODEL | {"data", "hf", "loading"},
    "generate/__main__": EVERYTHING | {"api", "commandline", "train"},
    "train": EVERYTHING | {"commandline"},
    "commandline": set(),
    "chat": EVERYTHING | {"api", "commandline", "train"},  # its exit code
    "score": EVERYTHING | {"api", "rewards", "commandline", "train"},
    "text/view": CONFIG | {"text", "data"},
    "evaluate": EVERYTHING | {"api", "commandline", "train"},
    "preference": EVERYTHING | {"commandline", "train"},  # its exit code
    "convert": EVERYTHING | {"train"},  # its exit code and the format of its metadata
    "plan": EVERYTHING | {"train"},  # its checks of the mesh
    "plan/__main__": EVERYTHING | {"commandline", "plan", "train"},
    "pipeline": EVERYTHING,
    "pipeline/__main__": EVERYTHING | {"commandline", "pipeline", "train"},
}

# Grain workers import these: they must start fast and cannot touch a device.
WITHOUT_JAX = ("text/", "data/sources.py", "data/records.py", "data/documents.py")
WITHOUT_JAX += ("data/packing.py", "data/pipelines.py")
DEVICE_PACKAGES = {"jax", "flax", "optax", "orbax", "chex"}


@functools.cache
def source(name: str) -> str:
    return (PACKAGE / name).read_text(encoding="utf-8")


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(source(name))


def imports_of(node: ast.AST) -> set[str]:
    """Dotted names of everything imported; `from a import b` counts as a and a.b."""
    found = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        if isinstance(item, ast.ImportFrom):
            assert item.level == 0, "write imports from the root: from qwen_jax.x import y"
            found |= {item.module, *(f"{item.module}.{alias.name}" for alias in item.names)}
    return found


def part_of(name: str) -> str:
    if name.removesuffix(".py") in ALLOWED:  # the command of a package is no part of it
        return name.removesuffix(".py")
    return name.split("/")[0].removesuffix(".py")


def own_parts(imported: set[str]) -> set[str]:
    """The parts of this package among dotted names."""
    parts = {dotted.split(".")[1] for dotted in imported if dotted.startswith("qwen_jax.")}
    return {part for part in parts if (PACKAGE / part).is_dir() or f"{part}.py" in NAMES}


def illegal_imports(part: str, imported: set[str]) -> set[str]:
    return own_parts(imported) - ALLOWED[part] - {part}


def test_every_part_has_its_place():
    parts = {part_of(name) for name in NAMES} - {"__init__"}
    assert parts <= ALLOWED.keys(), f"give it a line in ALLOWED: {parts - ALLOWED.keys()}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__init__.py"])
def test_imports_point_down(name):
    bad = illegal_imports(part_of(name), imports_of(tree(name)))
    assert not bad, f"{name} imports {bad}, which its layer may not"


def test_the_import_check_can_fail():
    for statement in ("import qwen_jax.data.packing", "from qwen_jax.data import packing"):
        assert illegal_imports("model", imports_of(ast.parse(statement))) == {"data"}
    assert illegal_imports("trainer", {"qwen_jax.stages", "qwen_jax.config"}) == {"stages"}
    for part, allowed in ALLOWED.items():
        assert not any(part in ALLOWED[other] for other in allowed), f"{part} goes in a circle"


def own_modules(name: str) -> set[str]:
    """The files of this package that a file imports, directly or through others."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for dotted in imports_of(tree(current)):
            path = "/".join(dotted.split(".")[1:])
            todo += [path + end for end in (".py", "/__init__.py") if path + end in NAMES]
    return seen


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(WITHOUT_JAX)])
def test_workers_import_no_jax(name):
    for reached in own_modules(name):
        roots = {dotted.split(".")[0] for dotted in imports_of(tree(reached))}
        assert not roots & DEVICE_PACKAGES, f"{name} imports {roots & DEVICE_PACKAGES} ({reached})"


def test_the_jax_check_can_fail():
    assert len([name for name in NAMES if name.startswith(WITHOUT_JAX)]) >= 7
    assert "model/layers.py" in own_modules("model/transformer.py")
    assert "jax" in imports_of(tree("model/layers.py"))


# An import can be compared with its source in `transformers`, by those who have it installed.
REFERENCE_PACKAGES = {"torch", "transformers", "modelscope"}
MAY_COMPARE = {"convert.py"}


@pytest.mark.parametrize("name", NAMES)
def test_no_reference_package(name):
    statements = tree(name).body if name in MAY_COMPARE else [tree(name)]
    for statement in statements:
        if name in MAY_COMPARE and isinstance(statement, ast.FunctionDef):
            continue
        roots = {dotted.split(".")[0] for dotted in imports_of(statement)}
        assert not roots & REFERENCE_PACKAGES, name


# Words with one home. Comments and docstrings may speak of anything.


def identifiers(name: str) -> set[str]:
    """Names, attributes and imported names of a file."""
    nodes = list(ast.walk(tree(name)))
    found = {node.id for node in nodes if isinstance(node, ast.Name)}
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return found | {node.name for node in nodes if isinstance(node, ast.alias)}


def strings(name: str) -> set[str]:
    """String constants of a file."""
    nodes = ast.walk(tree(name))
    return {node.value for node in nodes if isinstance(node, ast.Constant)}


@pytest.mark.parametrize(
    "word, homes",
    [
        ("PartitionSpec", {"sharding.py"}),
        ("NamedSharding", {"sharding.py"}),
        ("apply_updates", {"trainer/step.py"}),
        ("value_and_grad", {"trainer/step.py"}),
        ("grad", {"trainer/step.py"}),
        ("ConfigDict", {"config.py", "commandline.py"}),
        ("hasattr", set()),
        # Who lays out turns is `chatml.py`; the tokenizers only name the token.
        ("im_start", {"text/chatml.py"}),
        (
            "custom_vjp",
            {"losses.py", "model/attention.py", "model/layers.py", "model/transformer.py"},
        ),
    ],
)
def test_names_with_one_home(word, homes):
    found = {name for name in NAMES if word in identifiers(name)}
    assert found <= homes, f"{word!r} belongs in {homes or 'no file'}, found in {found - homes}"


@pytest.mark.parametrize(
    "text, home",
    [
        ("dcn", "sharding.py"),
        ("fsdp", "sharding.py"),
        ("tensor", "sharding.py"),
        ("<|im_start|>", "text/tokenizer.py"),
        ("assistant", "text/chatml.py"),
    ],
)
def test_strings_with_one_home(text, home):
    found = {name for name in NAMES if text in strings(name)}
    assert found == {home}, f"{text!r} belongs in {home}, found in {found}"


def test_the_home_check_can_fail():
    assert "PartitionSpec" in identifiers("sharding.py")
    assert {"apply_updates", "value_and_grad"} <= identifiers("trainer/step.py")
    assert "grad" in {
        node.attr for node in ast.walk(ast.parse("jax.grad(f)")) if "attr" in vars(node)
    }


def lines_with(pattern: str) -> set[str]:
    return {name for name in NAMES if re.search(pattern, source(name), re.MULTILINE)}


def test_one_loop():
    assert lines_with(r"^\s*(for step in|while step)\b") == {"trainer/loop.py"}


def test_no_mean_of_means_in_stages():
    assert not [name for name in lines_with(r"\.mean\(") if name.startswith("stages/")]


def calls(name: str):
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]


# A foreign file may leave a key out, and its format says what that means.
FOREIGN_FORMATS = (
    "plan/hlo.py",
    "hf/",
)


@pytest.mark.parametrize("name", NAMES)
def test_no_silent_defaults(name):
    for call in calls(name):
        where = f"{name}:{call.lineno}"
        if isinstance(call.func, ast.Attribute) and call.func.attr == "get":
            allowed = name.startswith(FOREIGN_FORMATS)
            assert allowed or len(call.args) < 2, f"{where}: .get() with a default"
        if isinstance(call.func, ast.Name) and call.func.id == "getattr":
            assert len(call.args) == 2, f"{where}: getattr with a default"


@pytest.mark.parametrize("name", NAMES)
def test_no_broad_except(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ExceptHandler):
            where = f"{name}:{node.lineno}"
            assert node.type is not None, f"{where}: names no exception"
            silent = all(isinstance(part, ast.Pass) for part in node.body)
            broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            assert not (silent and broad), f"{where}: swallows every failure"


@pytest.mark.parametrize("name", NAMES)
def test_no_drawer_for_odds_and_ends(name):
    assert not set(Path(name).with_suffix("").parts) & {"utils", "common", "helpers", "misc"}


MAX_FILE, MAX_FUNCTION = 450, 80


@pytest.mark.parametrize("name", NAMES)
def test_size(name):
    lines = len(source(name).splitlines())
    assert lines <= MAX_FILE, f"{name} has {lines} lines: split it by idea"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{name}: {node.name} has {length} lines"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_what_it_is(name):
    assert ast.get_docstring(tree(name)), f"{name} has no module docstring"


def blocks(name: str, size: int) -> dict[str, int]:
    """Runs of `size` lines of code that hold something besides imports, with their first line."""
    imported = {
        number
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    lines = [(number, line.strip()) for number, line in enumerate(source(name).splitlines(), 1)]
    lines = [(n, t) for n, t in lines if len(t) > 3 and n not in imported and t[0] != "#"]
    return {
        "\n".join(text for _, text in lines[i : i + size]): lines[i][0]
        for i in range(len(lines) - size + 1)
    }


def test_no_copied_blocks():
    """The same eight lines in two files are one fact with two homes."""
    seen = {}
    for name in NAMES:
        for block, line in blocks(name, 8).items():
            assert block not in seen, f"{name}:{line} repeats {seen[block]}:\n{block}"
            seen[block] = f"{name}:{line}"


def test_every_path_in_the_readme_exists():
    readme = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    paths = {
        path
        for row in rows
        for path in re.findall(
            r"`((?:qwen_jax|configs|tests|launch|benchmarks|docs)/[^`*\s]*)[`\s]", row
        )
    }
    if not paths:
        pytest.skip("the README has no table with paths yet")
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing, f"README names {missing}"
