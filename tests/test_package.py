"""The package as a whole: what an import costs, what it exports, which module may import which."""

import ast
import importlib.util
import pathlib
import shutil
import subprocess
import sys

import pytest

import calm_jax

PACKAGE = pathlib.Path(calm_jax.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Imports run downward alone; what shares a floor may import each other.
FLOORS = [
    {"__main__", "cli"},
    {"planning"},
    {"experiment"},
    {"training", "evaluation", "serving"},
    {"checkpoints", "decoding"},
    {"models", "data"},
    {"sharding", "processes", "membership"},
    {"errors", "chips", "presets", "units", "quiet", "text_files", "programs", "mappings", "shell"},
]


def imported_modules(code: str) -> set[str]:
    """Names of all modules in a fresh Python after `code`."""
    code = f"{code}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("code", ["import calm_jax", "import calm_jax; dir(calm_jax)"])
def test_the_import_is_light(code):
    heavy = {"jax", "flax", "numpy", "tensorflow", "seqio", "orbax", "absl"}
    assert not imported_modules(code) & heavy


def test_the_public_api_needs_no_tensorflow():
    code = "import calm_jax\nfor name in calm_jax.__all__: getattr(calm_jax, name)"
    found = imported_modules(code)
    assert "jax" in found
    assert not found & {"tensorflow", "seqio", "tensorflow_datasets"}


@pytest.mark.parametrize("name", calm_jax.__all__)
def test_a_public_name_is_what_it_says(name):
    value = getattr(calm_jax, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(calm_jax)
    # The import of a submodule of that name would hide it.
    assert importlib.util.find_spec(f"calm_jax.{name}") is None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'calm_jax' has no attribute 'comopse'"):
        _ = calm_jax.comopse


def imports(path: pathlib.Path) -> set[str]:
    """Modules that a file imports anywhere, with dots; of `from a import b` also a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def floor(name: str) -> int | None:
    return next((number for number, names in enumerate(FLOORS) if name in names), None)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert floor(own) is not None, f"{own} stands on no floor"
    for module in imports(path):
        top, _, rest = module.partition(".")
        below = floor(rest.partition(".")[0])
        if top == "calm_jax" and below is not None:
            assert below >= floor(own), f"{module} is above"


def test_no_imports_form_a_cycle():
    """Imports inside functions count too: they would only hide it."""
    files = {
        ".".join(("calm_jax", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in MODULES
        if path.name != "__init__.py"
    }
    left = {name: imports(path) & set(files) - {name} for name, path in files.items()}
    while done := {name for name, below in left.items() if not below & set(left)}:
        left = {name: below for name, below in left.items() if name not in done}
    assert not left, "these import each other, or what does"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda p: p.name)
def test_models_know_no_data_files_and_flags(path):
    tops = {module.partition(".")[0] for module in imports(path)}
    assert not tops & {"seqio", "tensorflow", "tensorflow_datasets", "orbax", "grain"}
    assert not {"absl.flags", "ml_collections"} & imports(path)


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent for path in MODULES}
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
    run = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_code_is_lint_free():
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
