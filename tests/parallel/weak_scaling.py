"""Count what one device does in a distillation step and in decoding as devices along `data` grow, on virtual devices.

    python tests/parallel/weak_scaling.py [TARGET DRAFT]

Prints a JSON object a line and a row of docs/pods.md's table for each. It needs 64 devices, so it runs in a process of
its own; nothing but compilation happens.
"""

import os

os.environ["XLA_FLAGS"] = " ".join([
  os.environ.get("XLA_FLAGS", ""),
  "--xla_force_host_platform_device_count=64 --xla_backend_optimization_level=0",
])
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import sys

import jax
import jax.numpy as jnp

from distillspec_jax.decoding import speculative, verification
from distillspec_jax.decoding.sampling import SamplingConfig
from distillspec_jax.distillation import methods, step
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.models import T5, T5Config
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.collectives import collectives
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh

DEVICES = (1, 8, 64)
ROWS, S, T, GAMMA = 4, 64, 32, 3  # rows a device


def models(names):
  """Give target and draft of known sizes; without names two that compile in seconds."""
  if names:
    return tuple(T5(T5Config.named(name)) for name in names)
  shape = dict(vocab_size=4096, head_dim=16, num_encoder_layers=1)
  target = T5Config(**shape, emb_dim=128, num_heads=8, mlp_dim=256, num_decoder_layers=2)
  return T5(target), T5(T5Config(**shape, emb_dim=64, num_heads=4, mlp_dim=128, num_decoder_layers=1))


def batch_of(rows):
  widths = {"encoder_input_tokens": S, "decoder_input_tokens": T, "decoder_target_tokens": T, "decoder_loss_weights": T}
  return {name: jax.ShapeDtypeStruct((rows, width), jnp.int32) for name, width in widths.items()}


def compiled_step(target, draft, mesh):
  tx, _ = OptimizerConfig(name="adafactor", learning_rate=1e-3).build(10)
  config = step.StepConfig(methods.named("distillspec"), target_length=T, chunk=16)
  run = step.compile_train_step(draft, target, tx, config, mesh=mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  arguments = step.abstract_state(draft, tx), target.abstract_params(), batch_of(ROWS * mesh.size), key
  return run.lower(*arguments).compile()


def compiled_decoding(target, draft, mesh):
  rows = ROWS * mesh.size
  split = lambda ndim: partitioning.batch_sharding(mesh, ndim)
  row = lambda dtype, *dims: jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=split(1 + len(dims)))
  settings = dict(gamma=GAMMA, max_new_tokens=T, sampling=SamplingConfig(1.0), rule=verification.RULES["token"])
  with partitioning.use_mesh(mesh):
    return speculative._speculate.lower(
      target, target.abstract_params(), draft, draft.abstract_params(),
      row(jnp.int32, S), 0, row(jnp.int32), row(bool), jnp.float32(1), **settings,
    ).compile()  # fmt: skip


def figures(compiled):
  """FLOPs and bytes of one device; a loop's body counts once."""
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  return {
    "flops": cost["flops"],
    "bytes": cost["bytes accessed"],
    "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    "sent": sum(message.bytes for message in collectives(compiled.as_text())),
  }


def compiled_without_splitting(target, draft, mesh):
  """What a mistake would give: every device decodes all rows."""
  jax.clear_caches()
  partitioning.RULES["batch"] = ()
  return compiled_decoding(target, draft, mesh)


PROGRAMS = {
  "distillation step": (compiled_step, DEVICES),
  "speculative decoding": (compiled_decoding, DEVICES),
  "all rows everywhere": (compiled_without_splitting, DEVICES[-1:]),  # last: it changes the table
}


def main(names):
  target, draft = models(names)
  for name, (compile_it, numbers) in PROGRAMS.items():
    for devices in numbers:
      mesh = make_mesh(MeshConfig(devices, 1, 1), devices=jax.devices()[:devices])
      found = figures(compile_it(target, draft, mesh))
      print(json.dumps({"program": name, "devices": devices, **found}), flush=True)
      columns = [found["flops"] / 1e9, found["bytes"] / 1e9, found["memory"] / 1e6, found["sent"] / 1e6]
      print(f"| {name} | {devices} | {' | '.join(f'{value:.3f}' for value in columns)} |", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
