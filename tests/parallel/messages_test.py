"""What compiled programs send on a mesh: no logits over the vocabulary, no cache, in decoding and distilling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax.decoding import autoregressive, sampling, speculative, verification
from distillspec_jax.decoding.sampling import SamplingConfig
from distillspec_jax.distillation import methods, step
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.models import T5, DecoderLM, DecoderLMConfig, T5Config, flax_model
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.collectives import collectives
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")

# One row's logits on one device, and one head's cache of one row, are larger than all that may travel.
V, T, S, GAMMA, ROWS = 32128, 700, 20, 3, 4
SHAPE = dict(vocab_size=V, emb_dim=16, num_heads=8, head_dim=4, mlp_dim=24)
MODELS = {
  "t5": T5(T5Config(**SHAPE, num_encoder_layers=1, num_decoder_layers=1)),
  "t5_tied": T5(T5Config(**SHAPE, num_encoder_layers=1, num_decoder_layers=1, logits_via_embedding=True)),
  "decoder_lm": DecoderLM(DecoderLMConfig(**SHAPE, num_layers=1)),
}
CUT = SamplingConfig(1.0, top_k=40, top_p=0.9)
MOVING = ("all-gather", "all-to-all", "collective-permute", "collective-broadcast")  # all but sums


@functools.cache
def mesh_of(sizes):
  return make_mesh(MeshConfig(*sizes))


def replicated(model):
  return partitioning.lay_out(model, None, mesh_of((1, 1, 8)), "replicated")[0]


def _placed(model, mesh):
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(place, model.abstract_params(), partitioning.param_shardings(model, mesh))


def decoding(sizes, target, draft=None, config=CUT, rule="token"):
  """Compile a decoding program: its messages."""
  mesh = mesh_of(sizes)
  row = lambda dtype, *dims: jax.ShapeDtypeStruct((ROWS, *dims), dtype)
  arrays = row(jnp.int32, S), 0, row(jnp.int32), row(bool)
  with partitioning.use_mesh(mesh):
    if draft is None:
      lowered = autoregressive._generate.lower(
        target, _placed(target, mesh), *arrays, max_new_tokens=T, sampling=config
      )
    else:
      lowered = speculative._speculate.lower(
        target, _placed(target, mesh), draft, _placed(draft, mesh), *arrays, jnp.float32(1),
        gamma=GAMMA, max_new_tokens=T, sampling=config, rule=verification.RULES[rule],
      )  # fmt: skip
    return collectives(lowered.compile().as_text())


def distilling(sizes, student, teacher, method, rows, **fields):
  """Compile a distillation step: its messages."""
  tx, _ = OptimizerConfig(name="adafactor", learning_rate=0.01).build(10)
  config = step.StepConfig(methods.named(method), target_length=32, chunk=16, **fields)
  run = step.compile_train_step(student, teacher, tx, config, mesh=mesh_of(sizes))
  widths = dict(encoder_input_tokens=S, decoder_input_tokens=32, decoder_target_tokens=32, decoder_loss_weights=32)
  batch = {name: jax.ShapeDtypeStruct((rows, width), jnp.int32) for name, width in widths.items()}
  key = jax.eval_shape(lambda: jax.random.key(0))
  lowered = run.lower(step.abstract_state(student, tx), teacher.abstract_params(), batch, key)
  return collectives(lowered.compile().as_text())


def too_large(messages, sizes, weights=(), caches=True):
  """The messages with an array as large as a row's logits or a head's cache, but for weights of these shapes."""
  limit = min(V // sizes[2], T * SHAPE["head_dim"]) if caches else V // sizes[2]
  sorted_weights = {tuple(sorted(shape)) for shape in weights}
  large = lambda shape: np.prod(shape) >= limit and tuple(sorted(shape)) not in sorted_weights
  return [message for message in messages if any(large(array.shape) for array in message.arrays)]


def of_prompts(messages):
  """The messages that bring something of the prompts' positions elsewhere, cross-attention's caches for one."""
  of_them = lambda shape: S in shape or S + T + GAMMA in shape
  return [m for m in messages if m.kind in MOVING and any(of_them(array.shape) for array in m.arrays)]


def output_layers(sizes):
  """Shapes in which a device may get a token table or an output layer, or their gradients: whole, or its part."""
  width, vocab = SHAPE["emb_dim"], V // sizes[2]
  return [(width, vocab), (width // sizes[1], vocab)]


DECODING = {
  "speculative, T5": ((1, 1, 8), MODELS["t5"], MODELS["t5"], CUT, "token"),
  "speculative, T5, tied, greedy": ((2, 2, 2), MODELS["t5_tied"], MODELS["t5_tied"], SamplingConfig(), "token"),
  "speculative, T5, replicated draft": ((1, 1, 8), MODELS["t5"], replicated(MODELS["t5"]), CUT, "block"),
  "speculative, decoder only": ((1, 2, 4), MODELS["decoder_lm"], MODELS["decoder_lm"], CUT, "lossy_lin"),
  "plain, T5": ((2, 2, 2), MODELS["t5"], None, CUT, "token"),
}


@pytest.mark.parametrize("name", DECODING)
def test_decoding_gathers_neither_logits_nor_caches(name):
  sizes = DECODING[name][0]
  messages = decoding(*DECODING[name])
  inside = [message for message in messages if message.in_loop]
  assert inside and too_large(inside, sizes) == []  # not even a weight
  assert too_large(messages, sizes, output_layers(sizes)) == of_prompts(messages) == []


def test_a_replicated_draft_sends_nothing_while_it_drafts():
  """What travels in the loop is the target's, of G+1 positions, and verification's."""
  sizes, target, draft, config, rule = DECODING["speculative, T5, replicated draft"]
  messages = [m for m in decoding(sizes, target, draft, config, rule) if m.in_loop]
  of_layers = [m.arrays[0].shape for m in messages if m.arrays[0].shape[-1:] == (SHAPE["emb_dim"],)]
  assert of_layers and set(of_layers) == {(ROWS, GAMMA + 1, SHAPE["emb_dim"])}
  both = [m for m in decoding(sizes, target, target, config, rule) if m.in_loop]
  assert len(both) > 2 * len(messages)


def test_sampling_without_regard_for_the_parts_would_be_seen(monkeypatch):
  """Negative control: blocks of 128 tokens that lie across devices, as one device has them."""
  monkeypatch.setattr(sampling, "ways", lambda *_: 1)
  sizes, config = (1, 1, 8), SamplingConfig(0.5)  # a program of its own: traces are kept
  assert too_large(decoding(sizes, MODELS["t5"], None, config), sizes)


def test_a_cache_that_travels_would_be_seen():
  """Negative control: a loop that wants another device's heads."""
  mesh, sizes = mesh_of((1, 1, 8)), (1, 1, 8)
  split, whole = (NamedSharding(mesh, PartitionSpec(None, axis)) for axis in ("model", None))

  def loop(cache):
    body = lambda _, x: jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x * 2, whole) + 1, split)
    return jax.lax.fori_loop(0, 3, body, cache)

  cache = jax.ShapeDtypeStruct((ROWS, 8, S + T + GAMMA, 4), np.float32, sharding=split)
  messages = collectives(jax.jit(loop).lower(cache).compile().as_text())
  assert too_large(messages, sizes) and of_prompts(messages)


DISTILLING = {
  "supervised, T5": ((2, 2, 2), MODELS["t5_tied"], MODELS["t5"], "supervised_kd", 16, {}),
  "on policy, chunks of V": ((2, 1, 4), MODELS["t5"], MODELS["t5"], "distillspec", 8, {"vocab_chunk": 1600}),
  "decoder only": ((1, 2, 4), MODELS["decoder_lm"], MODELS["decoder_lm"], "lk_lambda", 8, {}),
}


@pytest.mark.parametrize("name", DISTILLING)
def test_a_distillation_step_gathers_no_logits(name):
  sizes, *_, fields = DISTILLING[name]
  messages = distilling(*DISTILLING[name][:-1], **fields)
  assert messages and too_large(messages, sizes, output_layers(sizes), caches=False) == []


def test_a_replicated_student_meets_its_teacher_token_by_token(monkeypatch):
  """Each device makes the student's logits of the teacher's tokens that it has; gradients may be gathered, no logits."""
  sizes, arguments = (1, 1, 8), (replicated(MODELS["t5"]), MODELS["t5"], "supervised_kd", ROWS)
  whole = [(SHAPE["emb_dim"], V)]
  assert too_large(distilling(sizes, *arguments), sizes, whole, caches=False) == []
  # Negative control: a student whose logits must be whole.
  monkeypatch.setattr(flax_model, "constrain_logits", partitioning.constrain_vocabulary)
  assert too_large(distilling(sizes, *arguments), sizes, whole, caches=False)
