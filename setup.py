"""Package the recipes, which stay beside ``ppo_kit`` in the repository, inside of it in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ppo_kit*"]), "ppo_kit.recipes"],
    package_dir={"ppo_kit.recipes": "recipes"},
)
