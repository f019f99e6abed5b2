"""Builds the policy against the shadowcore that is installed; pyproject.toml has the rest."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import shadowcore

NAME = "shadowcore_example_compiled"
setup(ext_modules=cythonize([Extension(NAME, [f"{NAME}.pyx"], include_dirs=[shadowcore.get_include()])]))
