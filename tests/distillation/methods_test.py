"""Pin the table of methods against the paper's, and the gin files against the table."""

import ast
import dataclasses
import itertools
import pathlib

import jax
import numpy as np
import pytest

from distillspec_jax.distillation import methods
from distillspec_jax.types import ConfigError

# DistillSpec, Table 1, then SKD and the LK losses: method -> divergence, where the sequences come from.
PAPER = {
    "sft": ("cross_entropy", {"data"}),
    "seqkd": ("cross_entropy", {"target"}),
    "supervised_kd": ("fkl", {"data"}),
    "imitkd": ("fkl", {"data", "draft"}),
    "f_distill": ("tvd", {"target", "draft"}),
    "on_policy_gkd": ("fkl", {"draft"}),
    "distillspec": ("fkl", {"draft"}),
    "skd": ("fkl", {"draft"}),
    "lk_lambda": ("lk_lambda", {"draft"}),
    "lk_alpha": ("lk_alpha", {"draft"}),
}
GIN_FILES = pathlib.Path(__file__).parents[2] / "gin_configs" / "methods"


def sources(method):
  reachable = {
      "data": method.needs_data,
      "draft": method.needs_draft_rollouts,
      "target": method.needs_target_rollouts,
  }
  return {name for name, possible in reachable.items() if possible}


def test_the_table_is_the_papers():
  assert set(methods.METHODS) == set(PAPER)
  for name, (divergence, where) in PAPER.items():
    method = methods.named(name)
    assert (method.name, method.divergence, sources(method)) == (name, divergence, where)
    assert method.rollout_temperature == method.loss_temperature == method.rollout_top_p == 1.0
    assert method.rollout_top_k == method.schedule_steps == 0
    assert method.interleave == (name == "skd")


def test_skds_settings_are_the_papers():
  assert (methods.named("skd").interleave_block, methods.named("skd").interleave_top_k) == (5, 25)


def test_the_grid_is_four_divergences_by_four_sources():
  where = {"data": {"data"}, "draft": {"draft"}, "target": {"target"}, "mixed": {"draft", "target"}}
  assert set(methods.SOURCES) == set(where) and len(methods.DIVERGENCES) == 4
  for divergence, source in itertools.product(methods.DIVERGENCES, where):
    method = methods.grid(divergence, source, rollout_temperature=0.5)
    assert (method.name, method.divergence, method.rollout_temperature) == ("distillspec", divergence, 0.5)
    assert sources(method) == where[source]
    assert method.fractions(0) == methods.SOURCES[source]
    assert methods.SOURCES[source] == (methods.fixed_data_fraction(source), methods.draft_data_fraction(source))
  assert methods.grid("tvd", "mixed").draft_data_fraction == methods.named("f_distill").draft_data_fraction == 0.5
  assert methods.grid("fkl", "draft") == methods.named("distillspec")


def test_an_unknown_source_lists_what_exists():
  with pytest.raises(ConfigError, match="unknown source 'student' of sequences; there are data, draft, target, mixed"):
    methods.grid("fkl", "student")


def test_fractions_move_in_a_straight_line_and_stay():
  """By hand, inside jit with a traced step: λ1 from 1 to 0.2 over 4 steps, λ2 as it is."""
  method = methods.named("imitkd", fixed_data_fraction=1.0, fixed_data_fraction_end=0.2, schedule_steps=4)
  fractions = jax.jit(lambda step: method.fractions(step))
  got = np.array([fractions(np.int32(step)) for step in (0, 1, 2, 3, 4, 5, 10**9)])
  np.testing.assert_allclose(got[:, 0], [1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2], rtol=1e-6)
  np.testing.assert_array_equal(got[:, 1], 1.0)
  assert got.dtype == np.float32


def test_fractions_are_exact_where_a_source_must_not_be_drawn():
  """Ends of the schedule and fractions that do not move: rounding must not make a source of probability 0 possible."""
  method = methods.named(
      "distillspec",
      fixed_data_fraction=0.1,
      fixed_data_fraction_end=1.0,
      draft_data_fraction=1.0,
      draft_data_fraction_end=1.0,
      schedule_steps=97,
  )
  fixed, draft = np.array(jax.jit(jax.vmap(method.fractions))(np.arange(200))).tolist()
  assert fixed[0] == np.float32(0.1) and fixed[97:] == [1.0] * 103 and max(fixed[:97]) < 1.0
  assert draft == [1.0] * 200
  constant = methods.named("f_distill", fixed_data_fraction=0.3)
  assert [float(x) for x in constant.fractions(12345)] == [np.float32(0.3), 0.5]


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("corners", list(itertools.product([0.0, 0.5, 1.0], repeat=4)))
def test_what_is_needed_takes_every_step_into_account(steps, corners):
  """Against a walk over all steps with exact fractions."""
  fixed, fixed_end, draft, draft_end = corners
  method = methods.Method(
      "distillspec:test",
      "fkl",
      fixed_data_fraction=fixed,
      draft_data_fraction=draft,
      fixed_data_fraction_end=fixed_end,
      draft_data_fraction_end=draft_end,
      schedule_steps=steps,
  )
  seen = set()
  for step in range(steps + 1):
    f, d = (start + (end - start) * step / steps for start, end in ((fixed, fixed_end), (draft, draft_end)))
    seen |= {"data"} if f > 0 else set()
    seen |= {"draft"} if f < 1 and d > 0 else set()
    seen |= {"target"} if f < 1 and d < 1 else set()
  assert sources(method) == seen


def test_rollouts_are_sampled_apart_from_the_loss():
  method = methods.named("distillspec", rollout_temperature=0.7, rollout_top_k=40, rollout_top_p=0.9)
  assert (method.sampling.temperature, method.sampling.top_k, method.sampling.top_p) == (0.7, 40, 0.9)
  assert method.loss_temperature == 1.0


def test_mixtures_are_halves():
  assert methods.named("imitkd").fixed_data_fraction == 0.5
  assert methods.named("f_distill").draft_data_fraction == 0.5


def test_what_each_method_needs():
  assert not methods.named("sft").needs_target
  assert methods.named("seqkd").needs_target and not methods.named("seqkd").needs_teacher
  assert methods.named("supervised_kd").needs_teacher and not methods.named("supervised_kd").needs_target_rollouts


@pytest.mark.parametrize("name", sorted(set(PAPER) - {"distillspec"}))  # its file has macros: gin_configs_test.py
def test_gin_file_says_what_the_table_says(name):
  lines = (GIN_FILES / f"{name}.gin").read_text().splitlines()
  bindings = dict(line.split(" = ", 1) for line in lines if line and not line.startswith("#"))
  values = {key.removeprefix("Method."): ast.literal_eval(value) for key, value in bindings.items()}
  assert methods.Method(**values) == methods.named(name)


def test_a_name_that_is_none_lists_those_that_there_are():
  assert methods.NAMES == tuple(methods.METHODS) and set(methods.NAMES) == set(PAPER)
  with pytest.raises(ConfigError, match="unknown method 'gkdd'; there are sft, seqkd, .*lk_alpha"):
    dataclasses.replace(methods.named("imitkd"), name="gkdd")
  assert dataclasses.replace(methods.named("imitkd"), name="imitkd:annealed").needs_data


def test_each_gin_file_is_a_method():
  assert {path.stem for path in GIN_FILES.glob("*.gin")} == set(PAPER)


def test_overrides():
  method = methods.named("distillspec", divergence="jsd_0.1", draft_data_fraction=0.5, rollout_temperature=0.0)
  assert sources(method) == {"draft", "target"}
  assert methods.METHODS["distillspec"].divergence == "fkl"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fixed_data_fraction": 1.5}, r"fixed_data_fraction is 1.5; it must lie in \[0, 1\]"),
        ({"draft_data_fraction": -0.1}, r"draft_data_fraction is -0.1; it must lie in \[0, 1\]"),
        ({"fixed_data_fraction": float("nan")}, "fixed_data_fraction is nan"),
        ({"rollout_temperature": -1.0}, r"Method.rollout_temperature=-1.0: must be 0 \(greedy\)"),
        ({"loss_temperature": 0.0}, "loss_temperature is 0.0; it must be above 0"),
        ({"rollout_temperature": float("inf")}, "Method.rollout_temperature=inf"),
        ({"rollout_top_k": -1}, "Method.rollout_top_k=-1: must be a whole number of at least 0"),
        ({"rollout_top_p": 0.0}, "Method.rollout_top_p=0.0: must be above 0 and at most 1"),
        ({"fixed_data_fraction_end": 2.0, "schedule_steps": 5}, r"fraction_end is 2.0; it must lie in \[0, 1\]"),
        ({"draft_data_fraction_end": -1.0, "schedule_steps": 5}, "draft_data_fraction_end is -1.0; it must lie in"),
        ({"draft_data_fraction_end": 0.5}, "schedule_steps is 0: it must be above 0 where"),
        ({"schedule_steps": 10}, "schedule_steps is 10: it must be above 0 where .* and 0 where neither is"),
        ({"schedule_steps": -1}, "schedule_steps is -1; it must be a whole number of at least 0"),
        ({"interleave_block": 0}, "interleave_block is 0; it must be a whole number of at least 1"),
        ({"interleave_top_k": 2.5}, "interleave_top_k is 2.5; it must be a whole number of at least 1"),
        ({"interleave": True, "draft_data_fraction": 0.0}, "corrects the draft's samples, and there are none"),
        ({"interleave": True, "fixed_data_fraction": 1.0}, "corrects the draft's samples, and there are none"),
        ({"loss_temperature": float("inf")}, "loss_temperature is inf"),
        ({"divergence": "kl"}, "unknown divergence 'kl'; there are fkl, rkl"),
        ({"divergence": "jsd_2"}, r"beta is 2.0; it must lie in \[0, 1\]"),
        ({"lambda": 1}, "has no lambda; it has name, divergence"),
        ({"divergence": "cross_entropy"}, "no expected gradient"),
        (
            dict(divergence="cross_entropy", draft_data_fraction=0.0, draft_data_fraction_end=0.1, schedule_steps=9),
            "no expected gradient",
        ),
    ],
)
def test_bad_values_get_one_clear_line(overrides, message):
  with pytest.raises(ConfigError, match=message) as error:
    methods.named("distillspec", **overrides)
  assert "\n" not in str(error.value)


def test_unknown_method_lists_what_exists():
  with pytest.raises(ConfigError, match="unknown method 'gkd'; there are sft, seqkd, supervised_kd, imitkd"):
    methods.named("gkd")
