"""Builds `chase` against the shadowcore that is installed: python setup.py build_ext --inplace."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(name="chase", ext_modules=cythonize([Extension("chase", ["chase.pyx"])]))
