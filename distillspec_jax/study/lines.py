"""Which parts the study consists of: its tasks, the lines of its tables with their seeds, its trials."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator

from distillspec_jax.distillation.methods import DIVERGENCES, METHODS, SOURCES, Method, grid
from distillspec_jax.types import ConfigError

NONE = "none"  # the fine-tuned draft, as it is
BASELINES = ("sft", "seqkd", "supervised_kd", "imitkd", "f_distill", "on_policy_gkd", "lk_lambda", "skd")


@dataclasses.dataclass(frozen=True)
class StudyTask:
  """A task of the study.

  Attributes:
    name: of the seqio task.
    input_length, target_length: S and T in tokens.
    batch_size: rows of an update.
    architecture: of its networks, whose gin files `StudyConfig` names: "t5" or "decoder_lm".
    vocabulary: the task on whose training texts the vocabulary is trained; None is the task's own vocabulary.
    whole_table: whether every method is run, or only the main ones.
    transfer: the task or mixture that the distilled draft is also evaluated on.
  """

  name: str
  input_length: int
  target_length: int
  batch_size: int
  architecture: str = "t5"
  vocabulary: str | None = None
  whole_table: bool = False
  transfer: str | None = None


TASKS = {
  task.name: task
  for task in (
    StudyTask("gsm8k", 128, 96, 16, vocabulary="gsm8k", whole_table=True, transfer="bbh"),
    StudyTask("multi30k", 48, 48, 32, vocabulary="multi30k"),
    StudyTask("debian_synopsis", 128, 24, 32, vocabulary="debian_synopsis", transfer="xsum"),
    StudyTask("pydoc_lm", 48, 48, 32, "decoder_lm"),
  )
}
# On every task and with every seed: GKD, and two of GSM8K's best, at T = 0 and, of those, at T = 1 (docs/results.md).
MAIN = ("on_policy_gkd", "supervised_kd", "jsd/target")
BEST_GREEDY = "supervised_kd"  # of MAIN, at T = 0
ONCE = ("lk_lambda",)  # on every task too, with one seed: it aims at acceptance itself


@dataclasses.dataclass(frozen=True)
class Line:
  """One run of the study and one line of its table.

  Attributes:
    task: a name of TASKS.
    recipe: "none", a method's name, or "DIVERGENCE/SOURCE" of DistillSpec's grid.
    seed: of the fine-tuned draft, of its distillation.
  """

  task: str
  recipe: str
  seed: int

  @property
  def name(self) -> str:
    """The line's file name, without its end."""
    return f"{self.task}-{self.recipe.replace('/', '_')}-{self.seed}"

  @property
  def method(self) -> Method | None:
    """What is run; None for the draft as it is."""
    if self.recipe == NONE:
      return None
    divergence, slash, source = self.recipe.partition("/")
    return grid(divergence, source) if slash else METHODS[self.recipe]


@dataclasses.dataclass(frozen=True)
class Trial:
  """A part of the study that is no line of the table.

  Attributes:
    task: a name of TASKS.
    kind: of `trials.TRIALS`.
  """

  task: str
  kind: str

  @property
  def name(self) -> str:
    """The trial's file name, without its end."""
    return f"{self.task}-{self.kind}"


TRIALS = (
  *(Trial(task, "longer") for task in TASKS),
  Trial("debian_synopsis", "limits"),
  Trial("multi30k", "lossy"),
  Trial("multi30k", "larger_target"),
  Trial("multi30k", "twice_the_target"),
  Trial("debian_synopsis", "ladder"),
)


def parts(patterns: str, seeds: int) -> list[Line | Trial]:
  """Give the study's lines, those that say most first, and after them its trials.

  Args:
    patterns: of their names (`gsm8k-*`, `multi30k-lossy`), separated by commas.
    seeds: of the main recipes; the others are run once.

  Raises:
    ConfigError: a pattern that no part's name matches.
  """
  known = [*_lines(seeds), *TRIALS]
  wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
  for pattern in wanted:
    if not any(fnmatch.fnmatchcase(part.name, pattern) for part in known):
      raise ConfigError(
        f"no part of the study is called {pattern!r}: there are TASK-RECIPE-SEED and TASK-TRIAL, such as"
        f" {known[0].name} and {known[-1].name}; tasks are {', '.join(TASKS)}, trials"
        f" {', '.join(dict.fromkeys(trial.kind for trial in TRIALS))}"
      )
  return [part for part in known if any(fnmatch.fnmatchcase(part.name, pattern) for pattern in wanted)]


def main_lines(task: str, seeds: int) -> list[Line]:
  """Give the lines of a task that have every seed."""
  return [line for line in _lines(seeds) if line.task == task and line.recipe in (NONE, *MAIN)]


def _lines(seeds: int) -> Iterator[Line]:
  for recipes in ((NONE, *MAIN, *ONCE), _whole_table()):
    for name, task in TASKS.items():
      if recipes[0] == NONE or task.whole_table:
        yield from (Line(name, recipe, 0) for recipe in recipes)
  for seed in range(1, seeds):
    yield from (Line(name, recipe, seed) for name in TASKS for recipe in (NONE, *MAIN))


def _whole_table() -> tuple[str, ...]:
  """The baselines and the grid, but for what the main lines are or what comes twice under two names."""
  known, recipes = {_recipe(Line("gsm8k", recipe, 0).method) for recipe in (*MAIN, *ONCE)}, []
  for recipe in (*BASELINES, *(f"{divergence}/{source}" for divergence in DIVERGENCES for source in SOURCES)):
    what = _recipe(Line("gsm8k", recipe, 0).method)
    if what not in known:
      known.add(what)
      recipes.append(recipe)
  return tuple(recipes)


def _recipe(method: Method) -> Method:
  return dataclasses.replace(method, name="distillspec")  # whatever it is called


def same_as(recipe: str) -> str:
  """Return the recipe of the table under which the same run stands: fkl/draft is on_policy_gkd."""
  what = _recipe(Line("gsm8k", recipe, 0).method)
  return next(other for other in (*MAIN, *ONCE, *_whole_table()) if _recipe(Line("gsm8k", other, 0).method) == what)
