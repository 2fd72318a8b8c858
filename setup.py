"""The packages of a wheel; everything else is in setup.cfg.

configs/ stands beside the package in a checkout and is installed inside it, as jaxcl/configs.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["jaxcl*"]), "jaxcl.configs"], package_dir={"jaxcl.configs": "configs"})
