"""Package metadata. `pip install -c constraints.txt -e ".[all,dev]"` gives one set that works."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "unillava/__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

EXTRAS = {
    # numpy is left free here: the torch backend works with numpy 1 and 2.
    "torch": ["torch>=2.4"],
    # MindSpore allows numpy 2 in its metadata, but is built against 1.x: arithmetic and bfloat16
    # then fail at run time.
    "mindspore": ["mindspore>=2.5,<3", "numpy<2"],
    "paddle": ["paddlepaddle>=3.0,<4"],
    "train": ["grain>=0.2.12", "matplotlib>=3.8", "tensorboardX>=2.6"],
    "deepspeed": ["deepspeed>=0.19.8"],  # needs torch; ZeRO-2 and ZeRO-3
    "serve": ["fastapi>=0.110", "uvicorn>=0.29"],
    "video": ["av>=12"],
}
ALL = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
DEV = ["hypothesis>=6.100", "ml_dtypes<0.6", "peft>=0.15", "pytest>=8", "ruff>=0.11"]

setup(
    name="unillava",
    version=VERSION,
    description="One LLaVA-family system that runs natively on PyTorch, MindSpore and PaddlePaddle",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["unillava*", "backends*", "weight_convert*"]),
    package_data={"": ["*.yaml", "*.json", "*.jinja", "*.html", "*.css", "*.js", "*.txt"]},
    install_requires=[
        "jinja2>=3.1",
        "numpy>=1.24",
        "pillow>=10",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",  # tokenizers that are a tokenizer.model alone
        "tokenizers>=0.20",
        "transformers>=4.45,<6",
        "typer>=0.12",
    ],
    extras_require={**EXTRAS, "all": ALL, "dev": DEV},
    entry_points={"console_scripts": ["unillava = unillava.cli.app:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
