"""The package map: `tfkit/` as it lies, plus `export/`, which imports as `tfkit.export`."""

from setuptools import find_packages, setup

export_packages = ["tfkit.export"] + [f"tfkit.export.{name}" for name in find_packages("export")]

setup(
    packages=find_packages(include=["tfkit", "tfkit.*"]) + export_packages,
    package_dir={"tfkit.export": "export"},
    package_data={"": ["*.j2"], "tfkit": ["py.typed"]},
)
