"""Builds the native kernels beside the Python package. Everything else is in pyproject.toml.

Without a C++ compiler the install goes on without them: torch computes then, and workers say so.
"""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

NATIVE = Path(__file__).parent / "kernels" / "native"


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        build = runpy.run_path(str(NATIVE / "build.py"))
        target = NATIVE if self.editable_mode else Path(self.build_lib) / "kernels" / "native"
        try:
            build["build_library"](target)
        except build["CompileFailed"] as failure:
            self.warn(f"going on without the native kernels: {failure}")


class PlatformWheel(bdist_wheel):
    """For this kind of machine and any Python: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
