"""Everything about the package stands in pyproject.toml, but for this: what ships stands in data/, where people look for it, and goes
into the installed package as lora_lab/shipped (found by lora_lab.files.shipped), without its recipes (make.py). setuptools can't say
"all packages, and one more" there.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lora_lab*"]), "lora_lab.shipped"],
    package_dir={"lora_lab.shipped": "data"},
    package_data={"lora_lab": ["assets/**/*"], "lora_lab.shipped": ["*.yaml", "*/*"]},
    exclude_package_data={"lora_lab.shipped": ["*/*.py"]},
)
