"""The rooms and their floors, the public face, and the size of files and functions."""

import ast
import inspect
import pathlib

import pytest

import hf_switch_sae

PACKAGE = pathlib.Path(hf_switch_sae.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(module.relative_to(PACKAGE)) for module in MODULES]
EACH_MODULE = pytest.mark.parametrize("module", MODULES, ids=NAMES)

# fmt: off
FLOORS = [
    "errors",
    "features", "files", "processes", "ops", "text", "lm", "hub",
    "sae", "store", "activations",
    "edits", "geometry", "evaluation",
    "sessions", "formats", "release", "plots",
    "training", "demo",
    "comparison",
    "cli", "__init__", "__main__",
]
# fmt: on
"""Folders, and files beside them, lowest first: each imports only from those before it."""

FACE = [
    "Ablate",
    "AttachError",
    "AttachedSAE",
    "BackendError",
    "BaseModelError",
    "Clamp",
    "ConfigError",
    "ConversionError",
    "EditError",
    "FeatureIdError",
    "FeatureStore",
    "HookpointError",
    "HubError",
    "NonFiniteError",
    "Patch",
    "Preflight",
    "Recipe",
    "ResidualBlocks",
    "ResidualHandle",
    "Scale",
    "Session",
    "SparseFeatures",
    "Steer",
    "StoreError",
    "SwitchSAE",
    "SwitchSAEAdam",
    "SwitchSAEConfig",
    "SwitchSAEError",
    "SwitchSAEOutput",
    "SwitchSAETrainer",
    "SwitchSAETrainingArguments",
    "TextError",
    "TrainingError",
    "WidthError",
    "attach",
    "compare",
    "convert",
    "detach",
    "explain_backends",
    "export",
    "export_recipe",
    "find_residual_blocks",
    "fingerprint",
    "hook_residual",
    "inspect",
    "load_all",
    "partial_forward",
    "pull",
    "push",
    "record",
    "residuals",
    "status",
    "use_backend",
]

MAX_FILE, MAX_FUNCTION = 400, 60
LONG_FILES = {
    "lm/hookpoints.py": "one subject, how a model's tree is searched, whose parts need each other",
    "sae/model.py": "one class, and most of its lines are what its methods take and return",
}
"""File -> why it is longer than MAX_FILE. An entry whose file has become shorter fails."""
LONG_FUNCTIONS: dict[str, str] = {
    "cli/compare.py: compare_saes": "its arguments are its options, each said in a line",
    "cli/record.py: record_corpus": "its arguments are its options, each said in a line",
    "ops/reference.py: routed_encode": "the definition; most of it says what is what",
    "ops/triton/kernels.py: _expert_products": "one Triton kernel, whose tile stays in registers",
    "sessions/record_corpus.py: record": "its arguments are all one can say of a recording",
    "training/pipeline.py: train_release": "its arguments are all one can say of a run",
}
"""The same of functions and MAX_FUNCTION."""


def imported_names(module: pathlib.Path):
    for node in ast.walk(ast.parse(module.read_text())):  # into functions too: no lazy way around
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write the import in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: pathlib.Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


@EACH_MODULE
def test_imports_go_down_only(module):
    mine = room_of(module)
    for name in imported_names(module):
        package, _, rest = name.partition(".")
        theirs = rest.partition(".")[0] or "__init__"
        if package == PACKAGE.name and theirs != mine:
            assert theirs in FLOORS, f"{mine} may not import {theirs}: nobody imports the root"
            assert FLOORS.index(theirs) < FLOORS.index(mine), f"{mine} may not import {theirs}"


def test_every_floor_is_of_a_folder_or_file_that_exists():
    assert set(FLOORS) == {room_of(module) for module in MODULES}


def test_the_root_holds_few_files():
    assert len([module for module in MODULES if module.parent == PACKAGE]) <= 9


def test_no_room_is_a_drawer():
    drawers = {"utils", "util", "helpers", "common", "misc", "tools", "core", "base"}
    assert not drawers & {module.stem.strip("_") for module in MODULES}


def test_the_public_face_is_pinned_sorted_and_there():
    assert hf_switch_sae.__all__ == FACE
    assert sorted(FACE) == FACE
    assert len(set(FACE)) == len(FACE)
    for name in FACE:
        assert getattr(hf_switch_sae, name).__module__.startswith("hf_switch_sae.")


def test_every_public_name_says_what_it_is():
    for name in FACE:
        doc = inspect.getdoc(getattr(hf_switch_sae, name)) or ""
        assert len(doc) > 10, f"{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"{name}: the docstring is dataclass's own"


def definitions(module: pathlib.Path):
    """(qualified name, node, whether all names on the way are public) of classes and functions."""

    def walk(node: ast.AST, path: str, public: bool):
        for child in ast.iter_child_nodes(node):
            decorators = [getattr(each, "id", "") for each in getattr(child, "decorator_list", [])]
            if "overload" in decorators:
                continue  # the implementation follows
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name, shown = f"{path}{child.name}", public and not child.name.startswith("_")
                yield name, child, shown
                # what is inside a function is its own business
                yield from walk(child, f"{name}.", shown and isinstance(child, ast.ClassDef))
            else:
                yield from walk(child, path, public)

    yield from walk(ast.parse(module.read_text()), "", True)


@EACH_MODULE
def test_every_public_class_function_and_method_has_a_docstring(module):
    assert ast.get_docstring(ast.parse(module.read_text())), "the module has no header"
    for name, node, public in definitions(module):
        if public:
            assert ast.get_docstring(node), f"{name} has no docstring"


@EACH_MODULE
def test_no_file_is_long(module):
    name, lines = str(module.relative_to(PACKAGE)), len(module.read_text().splitlines())
    assert (lines > MAX_FILE) == (name in LONG_FILES), f"{name} has {lines} lines"


@EACH_MODULE
def test_no_function_is_long(module):
    for name, node, _ in definitions(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = f"{module.relative_to(PACKAGE)}: {name}"
            lines = node.end_lineno - node.lineno + 1
            assert (lines > MAX_FUNCTION) == (where in LONG_FUNCTIONS), f"{where}: {lines} lines"


@EACH_MODULE
def test_docstrings_have_no_seam_of_a_line_wrapper(module):
    """A quote mark at the end of a docstring's line is where a tool has joined strings."""
    for _, node, _ in [("", ast.parse(module.read_text()), True), *definitions(module)]:
        lines = (ast.get_docstring(node) or "").splitlines()
        for line in lines[:-1]:
            assert line.count('"') % 2 == 0 or not line.endswith(' "'), line


# --- tensors that the package makes for itself --------------------------------------------------

MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
    *("sparse_coo_tensor", "sparse_csr_tensor", "tril_indices", "triu_indices"),
}
OF_DEFAULT_DTYPE = {
    *("empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor"),
    *("tensor", "zeros"),
}


def made_by_default(module: pathlib.Path):
    """Calls that leave to torch's defaults where a tensor lies, or of which dtype it is."""
    tree, of_transformers = ast.parse(module.read_text()), set()
    for node in ast.walk(tree):
        # an SAE's own weights are made where, and of the dtype, that transformers asks for
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("nn.Parameter", "register_buffer")
        ):
            of_transformers |= {id(part) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in of_transformers:
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        given = {keyword.arg for keyword in node.keywords}
        lacks_device = name in MAKERS and "device" not in given
        lacks_dtype = name in OF_DEFAULT_DTYPE and "dtype" not in given
        if owner == "torch" and (lacks_device or lacks_dtype):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@EACH_MODULE
def test_a_tensor_is_told_its_device_and_dtype(module):
    assert not list(made_by_default(module))
