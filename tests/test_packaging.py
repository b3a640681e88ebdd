"""The package as a user gets it: a wheel with everything in it and nothing else, whose pieces import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tfkit

SOURCES = ("tfkit", "export", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """The wheel, built from a copy: a build leaves files of its own beside the sources."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").iterdir()
    return path


def test_wheel_holds_every_source_file_and_no_more(wheel, root):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, prefix in (("tfkit", "tfkit"), ("export", "tfkit/export")):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".j2", ".typed") and "__pycache__" not in path.parts:
                expected.add(f"{prefix}/{path.relative_to(root / folder).as_posix()}")
    assert packed == expected
    assert {"tfkit/export/runner.py", "tfkit/compression/base.py", "tfkit/py.typed"} <= packed


def test_metadata(wheel):
    assert wheel.name == f"tfkit_keras-{tfkit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"tfkit_keras-{tfkit.__version__}.dist-info/"
        metadata = archive.read(info + "METADATA").decode()
        entry_points = archive.read(info + "entry_points.txt").decode()
        licence = archive.read(info + "licenses/LICENSE").decode()
    assert "License-Expression: Apache-2.0" in metadata and "Apache License" in licence
    assert "tfkit = tfkit.cli:main" in entry_points
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert extras == {"retrieval", "recommend", "graph", "interop", "mixed", "demo", "notebooks", "test"}


def test_wheel_imports_where_it_is_installed(wheel, tmp_path):
    """Unpacked alone, with the checkout's own finder out of the way."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path.insert(0, {str(tmp_path)!r})
import tfkit, tfkit.cli, tfkit.export, tfkit.export.runner, tfkit.data
for module in (tfkit, tfkit.cli, tfkit.export, tfkit.export.runner, tfkit.data):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checkout_imports_as_it_is_installed(root):
    """`export/` is `tfkit.export`, from the root and from anywhere else."""
    import tfkit.export

    assert tfkit.export.__file__ == str(root / "export" / "__init__.py")


def pins(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_pin_every_requirement(root):
    pinned = pins(root)
    lines = (root / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+!]*", line) for line in lines if not line.startswith("#"))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in pinned, name
        assert requirement.specifier.contains(pinned[name]), (str(requirement), pinned[name])


def test_constraints_reach_the_dependencies_of_dependencies(root):
    from importlib.metadata import PackageNotFoundError, requires

    pinned, seen, left = pins(root), set(), ["tensorflow", "keras", "mlxtend", "typer", "pytest", "nbclient"]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in pinned, name
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        left += [
            canonicalize_name(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    assert len(seen) > 50


def test_readme_is_current(root):
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_page_of_methods_has_a_row_for_each_exported_method(root):
    from tfkit import compression

    page = (root / "docs" / "methods.md").read_text()
    concrete = [
        name
        for name in compression.__all__
        if isinstance(item := getattr(compression, name), type)
        and issubclass(item, compression.Compressor)
        and item not in (compression.Compressor, compression.Chain)
    ]
    assert "MagnitudePruning" in concrete
    assert [name for name in concrete if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "docs/results.md"])
def test_links_lead_somewhere(root, page):
    links = re.findall(r"\]\(([^)#]+)\)", (root / page).read_text())
    near = (root / page).parent
    missing = [link for link in links if not link.startswith("https://") and not (near / link).exists()]
    assert missing == []


@pytest.mark.parametrize(
    ("block", "smaller", "shown"),
    [
        (0, {"epochs=4": "epochs=1", 'load("mnist5k")': 'load("mnist5k").subset(320, 100, 200)'}, "accuracy"),
        (1, {"20000, 64": "2000, 16", "500, 64": "50, 16"}, ""),
    ],
    ids=["compress", "retrieve"],
)
def test_readme_code_runs(root, tmp_path, block, smaller, shown):
    """The code of the README, on less data."""
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = blocks[block]
    for given, tried in smaller.items():
        assert given in code
        code = code.replace(given, tried)
    (tmp_path / "readme.py").write_text(code)
    done = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert (tmp_path / ("small.tflite", "items.index")[block]).is_file()
