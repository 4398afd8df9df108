"""What pod_run does: trains the tiny pair of small_run, or restores, and writes what it saw.

Process 0 writes `<out>.json`: losses and validations by step, greedy tokens, checksums of every array; and each process
`<out>.rows.<index>.json`: which examples it fed, by batch.
"""

import json
import pathlib
import zlib

import jax
import numpy as np
import small_run

from distillspec_jax.decoding import autoregressive, speculative
from distillspec_jax.distillation import best, costs, loop, step, validation
from distillspec_jax.distillation.methods import METHODS
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.parallel import mesh as meshes
from distillspec_jax.parallel import multihost, partitioning
from distillspec_jax.parallel.preemption import Notice
from distillspec_jax.weights import checkpoints


class Rows(small_run.Batches):
  """This process's rows of batches of 4, which depend on their number alone; notes what it hands out."""

  def __init__(self, place, mesh):
    super().__init__(place)
    self._rows, self.seen = multihost.share_of(mesh, small_run.B).rows, {}

  def __next__(self):
    number, batch = self.number, super().__next__()
    own = {name: value[self._rows] for name, value in batch.items()}
    self.seen[number] = [[int(row), own["encoder_input_tokens"][i].tolist()] for i, row in enumerate(self._rows)]
    return own


def placed(abstract, model, mesh):
  shardings = partitioning.state_shardings(abstract, model, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def checksums(tree):
  """CRC-32 of each array's bytes."""
  leaves = jax.tree_util.tree_leaves_with_path(multihost.fetch(tree))
  return {jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).tobytes()) for path, leaf in leaves}


def greedy(target_params, params, mesh):
  """Plain and speculative greedy tokens of the held-out prompts, with the student as draft."""
  prompts = small_run.held_out()["encoder_input_tokens"]
  with partitioning.use_mesh(mesh):
    plain = autoregressive.generate(small_run.TARGET, target_params, prompts, max_new_tokens=6)
    pair = (small_run.TARGET, target_params, small_run.STUDENT, params)
    drafted = speculative.speculative_generate(*pair, prompts, gamma=2, max_new_tokens=6)
  return [np.asarray(multihost.fetch(found).tokens).tolist() for found in (plain, drafted)]


def main(flags):
  mesh = meshes.make_mesh(meshes.MeshConfig(*map(int, flags.mesh)))
  config = loop.TrainConfig(flags.steps, checkpoint_every=2, eval_every=3, log_every=1)
  tx, schedule = OptimizerConfig(learning_rate=0.05).build(1)
  run = checkpoints.RunCheckpoints(flags.directory, keep=None)
  restored = run.restore_latest(placed(step.abstract_state(small_run.STUDENT, tx), small_run.STUDENT, mesh))
  if flags.do == "restore":
    write(flags.out, ".json", {"step": restored[2], "sums": checksums(restored[0])})
    return
  state, saved, _ = restored or (
    step.init_state(small_run.STUDENT, tx, rng=jax.random.key(config.seed), mesh=mesh), None, 0
  )  # fmt: skip
  place, remembered = loop.split_place(saved)
  target_params = jax.device_put(
    small_run.TARGET.init(jax.random.key(7)), partitioning.param_shardings(small_run.TARGET, mesh)
  )
  held = validation.Validation(
    small_run.STUDENT, small_run.held_out(), batch_size=4, target=small_run.TARGET, target_params=target_params,
    gamma=2, mesh=mesh,
  )  # fmt: skip
  written, batches = [], Rows(place, mesh)
  with Notice() as notice:
    parts = loop.Parts(
      step=step.compile_train_step(
        small_run.STUDENT, small_run.TARGET, tx, step.StepConfig(METHODS[flags.method], small_run.T),
        schedule=schedule, mesh=mesh,
      ),
      batches=batches,
      target_params=target_params,
      checkpoints=run,
      validation=held,
      best=best.Best(flags.directory, small_run.STUDENT, config.best_by),
      meter=costs.Meter(small_run.STUDENT, small_run.TARGET),
      remembered=remembered,
      notice=notice,
      mesh=mesh,
    )  # fmt: skip
    state = loop.train(config, parts, state, lambda number, scalars: written.append([number, dict(scalars)]))
  run.close()
  write(flags.out, f".rows.{jax.process_index()}.json", batches.seen, everybody=True)
  write(flags.out, ".json", {
    "written": written, "sums": checksums(state), "greedy": greedy(target_params, state.params, mesh),
    "processes": jax.process_count(), "devices": jax.device_count(), "shape": dict(mesh.shape),
  })  # fmt: skip


def write(out, end, what, everybody=False):
  if everybody or multihost.is_first():
    pathlib.Path(out + end).write_text(json.dumps(what))

