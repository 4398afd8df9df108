"""What single passes of a pair cost, measured: the c and v that predictions are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distillspec_jax.analysis import cost_model, latency
from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import multihost
from distillspec_jax.types import Params

MAX_GAMMA = 12  # predictions are made for γ = 1 ... MAX_GAMMA
_TIMED_QUERIES = (1, 2, 3, 5, 9, MAX_GAMMA + 1)  # v between them is interpolated


@dataclasses.dataclass(frozen=True)
class Pair:
  """A target, a draft of the same vocabulary, and their parameters."""

  target: LanguageModel
  target_params: Params
  draft: LanguageModel
  draft_params: Params


@dataclasses.dataclass(frozen=True)
class Costs:
  """Times of single passes at one batch size; of the models' shapes alone, so drafts of one shape can share them.

  Attributes:
    target_ms: Q -> ms of a target pass over Q tokens; Q = 1 is there.
    draft_ms: ms of a draft step.
  """

  target_ms: dict[int, float]
  draft_ms: float

  @property
  def cost_ratio(self) -> float:
    """Give c, draft step / target step."""
    return self.draft_ms / self.target_ms[1]

  def verify_cost(self, gamma: int) -> float:
    """Give v, a target pass over γ+1 tokens / over one; between measured Q by straight lines."""
    queries = sorted(self.target_ms)
    return float(np.interp(gamma + 1, queries, [self.target_ms[q] for q in queries])) / self.target_ms[1]

  def speedup(self, alpha: float, gamma: int) -> float:
    """Predict the speed-up in the measured form, τ(α, γ) / (c·γ + v(γ+1))."""
    return cost_model.speedup(alpha, gamma, self.cost_ratio, self.verify_cost(gamma))

  def best_gamma(self, alpha: float, max_gamma: int = MAX_GAMMA) -> int:
    """Choose the γ of the largest predicted speed-up, from 1 to max_gamma."""
    verify_cost = {gamma: self.verify_cost(gamma) for gamma in range(1, max_gamma + 1)}
    return cost_model.best_gamma(alpha, self.cost_ratio, max_gamma=max_gamma, verify_cost=verify_cost)

  def to_dict(self) -> dict[str, Any]:
    """Give the times in JSON's terms, as metrics.json has them under "pass_times"."""
    return {"target_ms": {str(q): ms for q, ms in sorted(self.target_ms.items())}, "draft_ms": self.draft_ms}

  @classmethod
  def from_dict(cls, times: Mapping[str, Any]) -> Costs:
    """Take the times from where `to_dict` put them."""
    return cls({int(q): ms for q, ms in times["target_ms"].items()}, times["draft_ms"])


def measure_costs(pair: Pair, prompt: np.ndarray, max_new_tokens: int, gamma: int = 1) -> Costs:
  """Time single passes of both models, in compiled loops and in turns.

  Args:
    pair: the models.
    prompt: [B, S] int32; B is the batch size that is timed.
    max_new_tokens: T, which sizes the caches.
    gamma: whose γ+1 tokens are timed beside the usual ones.
  """
  queries = sorted({*_TIMED_QUERIES, gamma + 1})
  slots = max(max_new_tokens + gamma, *queries)
  contestants = {
      "target": (pair.target, pair.target_params, queries),
      "draft": (pair.draft, pair.draft_params, (1,)),
  }
  times = latency.pass_times(contestants, prompt, slots)
  costs = Costs(times["target"], times["draft"][1])
  return Costs.from_dict(multihost.from_first("the times of passes", costs.to_dict))  # γ is chosen by them
