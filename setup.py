"""Installs medblip and sharding. DeepSpeed builds against the installed torch: `make install` gets the order right."""

from setuptools import find_packages, setup

DEMO = ["nilearn>=0.11"]
BIOGPT = ["sacremoses>=0.1"]  # BioGPT's tokenizer
DICOM = ["dcm2niix>=1.0.20220715"]
REMOTE = ["fsspec[http]>=2024.6", "s3fs>=2024.6"]
WANDB = ["wandb>=0.19"]

setup(
    name="medblip",
    version="0.1.0",
    description="A vision-language model that reads a 3-D brain MRI with the text of a health record",
    license="Apache-2.0",
    packages=find_packages(include=["medblip", "medblip.*", "sharding", "sharding.*"]),
    python_requires=">=3.11",
    install_requires=[
        "deepspeed>=0.19.8,<0.20",
        "deflate>=0.7",
        "einops>=0.8",
        "fsspec>=2024.6",
        "huggingface_hub>=1.0",
        "matplotlib>=3.8",
        "nibabel>=5.2",
        "numpy>=1.26",
        "openpyxl>=3.1",
        "peft>=0.21,<1",
        "pillow>=10.1",
        "pydicom>=3,<4",
        "rich>=13",
        "rouge-score>=0.1.2,<0.2",
        "sacrebleu>=2.4,<3",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy>=1.12",
        "torch>=2.6",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.24,<6",
        "tyro>=1.0",
        "webdataset>=1.0",
        "zstandard>=0.23",
    ],
    extras_require={
        "biogpt": BIOGPT,
        "demo": DEMO,
        "dicom": DICOM,
        "flash": ["flash-attn>=2.8,<3"],
        "remote": REMOTE,
        "wandb": WANDB,
        "dev": [
            "SimpleITK>=2.4",
            "hypothesis>=6.100",
            "moto[server]>=5",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            *BIOGPT,
            *DEMO,
            *DICOM,
            *REMOTE,
            *WANDB,
        ],
    },
    entry_points={"console_scripts": ["medblip = medblip.cli:main"]},
)
