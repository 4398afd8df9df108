"""The search for a change that fits, with a compiler whose memory is a formula."""

import dataclasses

import pytest
from planning.request_test import SHAPE, request

from distillspec_jax.models import T5, T5Config
from distillspec_jax.parallel.mesh import MeshConfig
from distillspec_jax.planning import advice
from distillspec_jax.planning import request as requests
from distillspec_jax.planning.compiled import StepFigures
from distillspec_jax.planning.work import Work


def memory_of(wanted, per_row=10, target=400, draft=100):
  """Bytes of a made-up step: (resident, total)."""
  data, fsdp, model = wanted.mesh_config.shape(8)
  split = 1 if wanted.mesh_config.draft_partitioning == "replicated" else fsdp * model
  resident = target // (fsdp * model) // (2 if wanted.teacher_dtype == "bfloat16" else 1) + draft // split
  rows = wanted.batch_size // (data * fsdp) // wanted.step_config.accumulate
  return resident, resident + rows * per_row // (2 if wanted.step_config.remat else 1) + wanted.step_config.chunk


def search(wanted, memory, most=20, **sizes):
  compiled = []

  def compile_it(changed):
    compiled.append(changed)
    return StepFigures({"total": memory_of(changed, **sizes)[1]}, Work(), None, 0.0)

  resident = lambda changed: memory_of(changed, **sizes)[0]
  tried, _ = advice.first_that_fits(wanted, 8, memory, resident, compile_it, most)
  return tried, compiled


def limit_of(wanted, memory, most, **sizes):
  """How many changes were tried, and whether `most` ended the search."""
  figures = lambda changed: StepFigures({"total": memory_of(changed, **sizes)[1]}, Work(), None, 0.0)
  resident = lambda changed: memory_of(changed, **sizes)[0]
  tried, limited = advice.first_that_fits(wanted, 8, memory, resident, figures, most)
  return len(tried), limited


WANTED = request(mesh_config=MeshConfig(8, 1, 1), batch_size=64)


def test_the_first_change_that_fits_is_the_cheapest():
  assert memory_of(WANTED) == (500, 588)
  tried, compiled = search(WANTED, 400)  # a bfloat16 target alone does it
  assert [str(trial.change) for trial in tried] == ["train.target_dtype = 'bfloat16'"] and tried[0].fits
  assert compiled[0].teacher_dtype == "bfloat16"
  tried, _ = search(WANTED, 550)
  assert [trial.fits for trial in tried] == [True]


def test_where_rows_are_the_trouble_remat_or_micro_batches_help():
  tried, _ = search(WANTED, 920, per_row=100)
  assert str(tried[-1].change) == "StepConfig.remat = True" and tried[-1].fits
  assert str(tried[0].change) == "train.target_dtype = 'bfloat16'" and not tried[0].fits
  tried, _ = search(WANTED, 1050, per_row=100, target=100)  # parameters are the small part: not tried first
  assert [str(trial.change) for trial in tried] == ["StepConfig.remat = True"] and tried[0].fits


def test_what_cannot_fit_is_not_compiled():
  tried, compiled = search(WANTED, 290, target=1000)
  alone = [trial for trial in tried if trial.figures is None]
  assert alone and all(trial.resident >= 290 for trial in alone)
  assert len(compiled) == len(tried) - len(alone)
  assert tried[-1].fits and memory_of(tried[-1].change.request, target=1000)[1] <= 290
  together = tried[-1].change.settings
  assert len(together) > 1 and "train.target_dtype = 'bfloat16'" in together


def test_nothing_fits():
  tried, compiled = search(WANTED, 20)
  assert tried and not any(trial.fits for trial in tried)
  assert len(compiled) <= len(tried)
  assert limit_of(WANTED, 20, most=20) == (len(tried), False)


def test_no_more_is_compiled_than_asked_for():
  tried, compiled = search(WANTED, 540, most=2, per_row=1000)
  assert len(compiled) == 2 and not tried[-1].fits
  assert limit_of(WANTED, 540, most=2, per_row=1000) == (2, True)
  # With 20 bytes nothing need be compiled to be refused; without a search it is not refused either.
  assert limit_of(WANTED, 20, most=0) == limit_of(WANTED, 300, most=0) == (0, True)


def test_every_change_can_be_made():
  for change in advice.changes(WANTED, 8):
    requests.check(change.request, 8)
    assert change.request != WANTED
    assert len({text.partition(" = ")[0] for text in change.settings}) == len(change.settings)
  settings = [change.settings for change in advice.changes(WANTED, 8)]
  assert len(set(settings)) == len(settings)
  assert ("MeshConfig.data = 4", "MeshConfig.fsdp = 1", "MeshConfig.model = 2") in settings


def test_changes_stop_where_nothing_is_left_to_change():
  model = T5(T5Config(**SHAPE, dtype="bfloat16", param_dtype="bfloat16"))
  wanted = dataclasses.replace(
    request(teacher=model, mesh_config=MeshConfig(1, 1, 8), batch_size=1).with_step(remat=True, chunk=1), student=model
  )
  assert [str(change) for change in advice.changes(wanted, 8)] == []


@pytest.mark.parametrize(("memory", "fits"), [(588, True), (587, False)])
def test_it_fits_to_the_last_byte(memory, fits):
  figures = StepFigures({"total": 588}, Work(), None, 0.0)
  assert figures.fits(memory) == fits
  assert not StepFigures({"total": 588}, None, None, 0.0).fits(memory)
