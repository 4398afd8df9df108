"""Eight virtual devices decode what one decodes: greedy, sampled, lossless rules, a draft that lies whole on each."""

import functools

import jax
import numpy as np
import pytest
from references.random_models import perturbed, random_params, random_prompts

from distillspec_jax.decoding import autoregressive, speculative
from distillspec_jax.models import T5, DecoderLM, DecoderLMConfig, T5Config
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")

B, S, T, V, GAMMA = 8, 6, 12, 1000, 3  # parts of V that are no whole blocks of 128
SHAPE = dict(vocab_size=V, emb_dim=16, num_heads=8, head_dim=2, mlp_dim=24)
MODELS = {
  "t5": T5(T5Config(**SHAPE, num_encoder_layers=1, num_decoder_layers=1)),
  "decoder_lm": DecoderLM(DecoderLMConfig(**SHAPE, num_layers=1, positions="learned", max_positions=32)),
}
CUT = dict(temperature=1.0, top_k=60, top_p=0.9, seed=5)
SETTINGS = {"greedy": {}, "token": CUT, "block": {**CUT, "rule": "block"}}
CASES = [
  ("t5", (1, 1, 8), "sharded", "token"),
  ("t5", (1, 1, 8), "replicated", "greedy"),
  ("t5", (1, 1, 8), "replicated", "block"),
  ("t5", (1, 2, 4), "sharded", "greedy"),
  ("t5", (1, 2, 4), "sharded", "block"),
  ("t5", (2, 2, 2), "replicated", "token"),
  ("decoder_lm", (1, 2, 4), "replicated", "token"),
]
FIELDS = ("tokens", "lengths", "blocks", "drafted", "judged", "accepted", "accepted_lengths", "origins")


@functools.cache
def case(name):
  rng = np.random.default_rng(3)
  target = random_params(MODELS[name], rng, logit_scale=3.0)
  return target, perturbed(target, rng, 0.1), random_prompts(rng, B, S, V)


def speculate(model, target, draft_model, draft, prompt, settings):
  out = speculative.speculative_generate(
    model, target, draft_model, draft, prompt, gamma=GAMMA, max_new_tokens=T, **SETTINGS[settings]
  )
  return jax.device_get(out)


@functools.cache
def on_one_device(name, settings):
  target, draft, prompt = case(name)
  return speculate(MODELS[name], target, MODELS[name], draft, prompt, settings)


@pytest.mark.parametrize("name,sizes,table,settings", CASES, ids=lambda x: "x".join(map(str, x)) if len(x) == 3 else x)
def test_the_same_texts(name, sizes, table, settings):
  want, model, mesh = on_one_device(name, settings), MODELS[name], make_mesh(MeshConfig(*sizes))
  target, draft, prompt = case(name)
  place = lambda params: jax.device_put(params, partitioning.param_shardings(model, mesh))
  draft_model, placed = partitioning.lay_out(model, place(draft), mesh, table)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed)) == (table == "replicated")
  with partitioning.use_mesh(mesh):
    found = speculate(model, place(target), draft_model, placed, prompt, settings)
  for field in FIELDS:
    np.testing.assert_array_equal(getattr(found, field), getattr(want, field), field)
  assert 0.1 * np.sum(want.drafted) < np.sum(want.accepted) < np.sum(want.drafted)  # the case shows something


@pytest.mark.parametrize("settings", ["greedy", "token"])
def test_plain_decoding(settings):
  target, _, prompt = case("t5")
  model, mesh = MODELS["t5"], make_mesh(MeshConfig(1, 2, 4))
  decode = lambda params: jax.device_get(
    autoregressive.generate(model, params, prompt, max_new_tokens=T, **SETTINGS[settings])
  )
  want = decode(target)
  with partitioning.use_mesh(mesh):
    found = decode(jax.device_put(target, partitioning.param_shardings(model, mesh)))
  np.testing.assert_array_equal(found.tokens, want.tokens)
  assert len(np.unique(want.tokens)) > 5
