from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "probing", "cli", "data")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Every `patchbank` module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "patchbank"}


def test_every_package_of_the_tree_is_in_the_wheel_and_no_other() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {
        "patchbank." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in sources()
        if path.name == "__init__.py"
    }
    assert set(listed) == on_disk


def test_the_top_level_holds_what_the_design_names() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    generated = {"build", "dist", "patchbank.egg-info", "demo"}
    named = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", *FOLDERS, "tests", "docs"}
    assert visible - generated == named


ALLOWED = {
    "probing": ("patchbank.probing", "patchbank.pipeline.bank", "patchbank.pipeline.specs",
                "patchbank.pipeline.errors"),
    "pipeline": ("patchbank.pipeline", "patchbank.data"),
    "data": (),
}  # fmt: skip


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_follow_the_design(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources()
        if path.relative_to(ROOT).parts[0] == folder
        for module in imported_modules(path)
        if not module.startswith(ALLOWED[folder])
    ]
    assert wrong == []


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_imports_neither_torch_nor_zarr_nor_distributed() -> None:
    code = (
        "import sys\n"
        "from patchbank.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'zarr', 'distributed', 'numpy', 'pyarrow', 'sklearn'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    for command in ("extract", "train-probe", "predict", "demo", "check"):
        assert command in done.stdout


def test_the_list_of_encoders_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from patchbank.cli.main import main\n"
        "assert main(['encoders']) == 0\n"
        "assert not {'torch', 'zarr', 'numpy'} & set(sys.modules)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "tiny-random" in done.stdout


def test_the_bank_loads_neither_audio_nor_encoders() -> None:
    code = (
        "import sys\n"
        "from patchbank.pipeline.bank import open_bank\n"
        "heavy = {'torchaudio', 'soundfile', 'distributed', 'patchbank.pipeline.encoders'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["patchbank.pipeline", "patchbank.probing"])
def test_every_public_name_can_be_imported(package: str) -> None:
    module = __import__(package, fromlist=["__all__"])
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
