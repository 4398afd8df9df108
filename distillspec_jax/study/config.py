"""The study's settings."""

from __future__ import annotations

import dataclasses

from distillspec_jax.study import lines
from distillspec_jax.types import ConfigError


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """The study's size; the defaults are for two CPU cores.

  Attributes:
    output_dir: models and caches.
    results_dir: finished lines, small enough to be kept with the code.
    data_dir: TFDS's folder.
    parts: patterns of the names of what to make (`gsm8k-*`, `multi30k-lossy`), separated by commas.
    t5_target, t5_draft, decoder_lm_target, decoder_lm_draft: the networks' gin files; the width of the logits follows
      the vocabulary.
    target_rate, draft_rate: learning rates.
    pieces: of each trained vocabulary.
    target_steps, draft_steps, distill_steps: updates of each kind of training.
    seeds: of the main recipes.
    prompts: test prompts of a line; the lossy trial and the ladder decode three times as many.
    budget_minutes: begin no line and no trial after this time; None goes on to the end.
  """

  output_dir: str
  results_dir: str = "docs/results"
  data_dir: str | None = None
  parts: str = "*"
  t5_target: str = "models/t5_mini_target.gin"
  t5_draft: str = "models/t5_mini_draft.gin"
  decoder_lm_target: str = "models/decoder_lm_mini_target.gin"
  decoder_lm_draft: str = "models/decoder_lm_mini_draft.gin"
  target_rate: float = 1e-2
  draft_rate: float = 2e-2  # the mini target's width is three times the draft's
  pieces: int = 4096
  target_steps: int = 900
  draft_steps: int = 600
  distill_steps: int = 250
  seeds: int = 3
  prompts: int = 160
  budget_minutes: float | None = None

  def __post_init__(self):
    for name in ("pieces", "target_steps", "draft_steps", "distill_steps", "seeds", "prompts"):
      if getattr(self, name) < 1:
        raise ConfigError(f"StudyConfig.{name} is {getattr(self, name)}; it must be at least 1")
    for name in ("target_rate", "draft_rate"):
      if not getattr(self, name) > 0:
        raise ConfigError(f"StudyConfig.{name} is {getattr(self, name)}; it must be above 0")
    lines.parts(self.parts, self.seeds)

  def network(self, architecture: str, role: str) -> str:
    """Name the gin file of a network; `role` is "target" or "draft"."""
    return getattr(self, f"{architecture}_{role}")


# What models depend on, and what finished parts do: with others they are other models and other parts.
OF_MODELS = (
  "t5_target",
  "t5_draft",
  "decoder_lm_target",
  "decoder_lm_draft",
  "target_rate",
  "draft_rate",
  "pieces",
  "target_steps",
  "draft_steps",
  "distill_steps",
)
OF_MEASUREMENTS = ("prompts",)
OF_PARTS = (*OF_MODELS, *OF_MEASUREMENTS)
