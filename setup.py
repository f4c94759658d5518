"""The folders of the checkout under the names that they have once installed; everything else is in pyproject.toml.

`compression` becomes the package `gradwire`, since Python 3.14 has a package `compression` of its own and other
projects may have one, and `search` becomes `gradwire.search`.
"""

from setuptools import find_packages, setup

setup(
    package_dir={"gradwire": "compression", "gradwire.search": "search"},
    packages=[
        "gradwire",
        *(f"gradwire.{package}" for package in find_packages("compression")),
        "gradwire.search",
    ],
)
