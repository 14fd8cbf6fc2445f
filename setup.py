"""The build's hook for the native extension; all else about the package is in pyproject.toml."""

from setuptools import setup

setup()
