"""Parameters on disk: native checkpoints (Orbax), T5X, Hugging Face, and the vocabulary beside them."""

from __future__ import annotations

from distillspec_jax.weights.checkpoints import (
  RunCheckpoints,
  check_description,
  ensure_writable,
  is_described,
  save_description,
  save_model,
)
from distillspec_jax.weights.loading import load_model
from distillspec_jax.weights.vocabulary_files import vocabularies_match, vocabulary_dir

__all__ = [
  "RunCheckpoints",
  "check_description",
  "ensure_writable",
  "is_described",
  "load_model",
  "save_description",
  "save_model",
  "vocabularies_match",
  "vocabulary_dir",
]
