"""Package distillspec_jax; the gin files of gin_configs/ travel inside the wheel."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
README = HERE / "README.md"

# Lower bounds are the versions that were seen to work together.
REQUIRED = [
  "absl-py>=2.5.1",
  "clu>=0.0.12",
  "flax>=0.12.8",
  "gin-config>=0.5.0",
  "importlib_resources>=7.1.0",  # tensorflow-datasets imports it and does not say so
  "jax>=0.10",
  "jaxlib>=0.10",
  "keras>=3.15",
  "matplotlib>=3.11",
  "nltk>=3.10",
  "numpy>=2.4.6",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "protobuf>=7.36.2",
  "rouge-score>=0.1.2",
  "sacrebleu>=2.6.0",
  "scipy>=1.17",
  "sentencepiece>=0.2.3",
  "seqio>=0.0.20",
  "tensorboard>=2.20",  # TensorFlow writes its events and no longer brings it
  "tensorflow>=2.21.0",  # never tensorflow-cpu: seqio brings this one, and both write one folder
  "tensorflow-datasets>=4.9.10",
  "tensorflow-text>=2.21.1",
  "tensorstore>=0.1.86",
  "tqdm>=4.66",
]

EXTRAS = {
  "test": [
    "pytest>=9.2",
    "pytest-xdist>=3.7",
    "hypothesis>=6.170",
    "msgpack>=1.1",
    "safetensors>=0.8.0",
    "torch==2.13.0",  # parity only; exactly this one, of which a CPU build exists
    "transformers>=5.23.0",
  ],
  "tpu": ["jax[tpu]>=0.10"],
  "cuda": ["jax[cuda12]>=0.10"],
  "plan": ["libtpu>=0.0.42"],  # plans for TPUs with their own compiler; no TPU is needed
  "huggingface": ["safetensors>=0.8.0", "transformers>=5.23.0"],
  # Not on PyPI; nothing in the package or its tests needs it.
  "t5x": [
    "t5x @ git+https://github.com/google-research/t5x.git",
    "airio @ git+https://github.com/google/airio.git",
    "jestimator @ git+https://github.com/google-research/jestimator.git",
  ],
}

DOORS = [
  "train",
  "evaluate",
  "transfer",
  "study",
  "generate_targets",
  "prepare_data",
  "convert",
  "plan",
  "report",
  "quickstart",
]

setuptools.setup(
  name="distillspec_jax",
  version="0.1.0",
  description="Distil draft models for speculative decoding, in JAX",
  long_description=README.read_text(encoding="utf-8") if README.exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=[
    *setuptools.find_packages(include=["distillspec_jax", "distillspec_jax.*"]),
    "distillspec_jax.gin_configs",
  ],
  # The one source of the gin files is gin_configs/ at the top; in a wheel they lie inside the package.
  package_dir={"distillspec_jax.gin_configs": "gin_configs"},
  package_data={"distillspec_jax.gin_configs": ["**/*.gin", "*.gin"]},
  install_requires=REQUIRED,
  extras_require=EXTRAS,
  entry_points={
    "console_scripts": [f"distillspec-{name.replace('_', '-')}=distillspec_jax.cli:{name}" for name in DOORS],
  },
)
