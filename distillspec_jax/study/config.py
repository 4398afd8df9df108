"""The study's settings."""

from __future__ import annotations

import dataclasses

from distillspec_jax.study import lines
from distillspec_jax.types import ConfigError


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """The study's size.

  Attributes:
    output_dir: models and caches.
    results_dir: finished lines, small enough to be kept with the code.
    data_dir: TFDS's folder.
    parts: patterns of the names of what to make (`gsm8k-*`, `multi30k-lossy`), separated by commas.
    pieces: of each trained vocabulary.
    target_steps, draft_steps, distill_steps: updates of each kind of training.
    seeds: of the main recipes.
    prompts: test prompts of a line; the lossy trial decodes three times as many.
    budget_minutes: begin no line and no trial after this time; None goes on to the end.
  """

  output_dir: str
  results_dir: str = "docs/results"
  data_dir: str | None = None
  parts: str = "*"
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
    lines.parts(self.parts, self.seeds)
