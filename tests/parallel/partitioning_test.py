"""Eight virtual devices against one: the same numbers, with the parameters really split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from references.random_models import perturbed, random_params, random_prompts

from distillspec_jax.decoding import autoregressive, speculative
from distillspec_jax.models import T5, T5Config
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh
from distillspec_jax.types import ConfigError

B, S, T, V, GAMMA = 8, 5, 9, 16, 2
MODEL = T5(
    T5Config(
        vocab_size=V,
        emb_dim=16,
        num_heads=8,
        head_dim=2,
        mlp_dim=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
    )
)
MESHES = [(2, 2, 2), (8, 1, 1), (1, 1, 8)]


@functools.cache
def mesh_of(sizes):
  return make_mesh(MeshConfig(*sizes))


def loss(params, batch):
  logits = MODEL.score(params, batch)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["decoder_target_tokens"])
  return jnp.sum(nll * batch["decoder_loss_weights"]) / jnp.sum(batch["decoder_loss_weights"]), logits


loss_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))


def _case():
  rng = np.random.default_rng(0)
  params = random_params(MODEL, rng)
  targets = rng.integers(1, V, (B, T)).astype(np.int32)
  batch = {
      "encoder_input_tokens": random_prompts(rng, B, S, V),
      "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
      "decoder_target_tokens": targets,
      "decoder_loss_weights": (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(np.int32),
  }
  return params, perturbed(params, rng, 0.3), batch


@functools.cache
def one_device():
  params, draft, batch = _case()
  return jax.tree.map(np.asarray, _everything(params, draft, batch))


def _everything(params, draft, batch):
  prompt = batch["encoder_input_tokens"]
  plain = autoregressive.generate(MODEL, params, prompt, max_new_tokens=T)
  fast = speculative.speculative_generate(MODEL, params, MODEL, draft, prompt, gamma=GAMMA, max_new_tokens=T)
  return loss_and_gradients(params, batch), plain, fast


def _place(tree, mesh):
  return jax.device_put(tree, partitioning.param_shardings(MODEL, mesh))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_changes_nothing_but_where_things_lie(sizes):
  mesh, (params, draft, batch) = mesh_of(sizes), _case()
  want = one_device()  # traced without a mesh first: the same functions are then used with one
  with partitioning.use_mesh(mesh):
    placed = _place(params, mesh)
    got = _everything(placed, _place(draft, mesh), partitioning.put_batch(batch, mesh))
  ((value, logits), gradients), plain, fast = got
  ((want_value, want_logits), want_gradients), want_plain, want_fast = want
  np.testing.assert_allclose(value, want_value, rtol=1e-5)
  np.testing.assert_allclose(logits, want_logits, rtol=1e-5, atol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(b)), err_msg=jax.tree_util.keystr(path))
  for name in ("tokens", "lengths", "blocks", "accepted", "drafted", "judged", "accepted_lengths"):
    np.testing.assert_array_equal(getattr(plain, name), getattr(want_plain, name), name)
    np.testing.assert_array_equal(getattr(fast, name), getattr(want_fast, name), name)
  np.testing.assert_array_equal(fast.tokens, plain.tokens)
  assert 0 < np.sum(want_fast.accepted) < np.sum(want_fast.drafted)
  # The logits were computed under the mesh's constraints, not by a program traced without it.
  assert len(logits.sharding.device_set) == 8
  batch_ways = sizes[0] * sizes[1]
  assert logits.addressable_shards[0].data.shape == (B // batch_ways, T, V // sizes[2])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_parameters_are_really_split(sizes):
  data, fsdp, model = sizes
  placed = _place(_case()[0], mesh_of(sizes))
  shard = lambda x: x.addressable_shards[0].data.shape
  layer = placed["decoder"]["layers_0"]
  assert shard(layer["self_attention"]["query"]["kernel"]) == (16 // fsdp, 16 // model)
  assert shard(layer["self_attention"]["out"]["kernel"]) == (16 // model, 16 // fsdp)
  assert shard(layer["mlp"]["wi_0"]["kernel"]) == (16 // fsdp, 24 // model)
  assert shard(layer["mlp"]["wo"]["kernel"]) == (24 // model, 16 // fsdp)
  assert shard(placed["token_embedder"]["embedding"]) == (V // model, 16 // fsdp)
  assert shard(placed["decoder"]["logits_dense"]["kernel"]) == (16 // fsdp, V // model)
  assert shard(placed["decoder"]["relpos_bias"]["rel_embedding"]) == (8 // model, 8)
  assert shard(layer["pre_mlp_layer_norm"]["scale"]) == (16 // fsdp,)
  assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(placed))


def test_indivisible_axes_stay_whole():
  layers = dict(num_encoder_layers=1, num_decoder_layers=1)
  odd = T5(T5Config(vocab_size=15, emb_dim=7, num_heads=3, head_dim=3, mlp_dim=5, **layers))
  for sizes in MESHES:
    params = random_params(odd, np.random.default_rng(0))
    placed = jax.device_put(params, partitioning.param_shardings(odd, mesh_of(sizes)))
    for leaf in jax.tree.leaves(placed):
      assert leaf.addressable_shards[0].data.shape == leaf.shape
  with partitioning.use_mesh(mesh_of((2, 2, 2))):  # three rows on four ways
    batch = {"encoder_input_tokens": np.ones((3, 4), np.int32), "decoder_input_tokens": np.ones((3, 4), np.int32)}
    assert np.all(np.isfinite(jax.jit(odd.score)(placed, batch)))


# ---- the table


def test_specs_by_name():
  mesh = mesh_of((2, 2, 2))
  spec = lambda shape, *names: partitioning._spec(shape, names, mesh)
  assert spec((8, 6), "embed", "mlp") == PartitionSpec("fsdp", "model")
  assert spec((8, 6, 4), "batch", "length", "heads") == PartitionSpec(("data", "fsdp"), None, "model")
  assert spec((6, 3), "batch", "mlp") == PartitionSpec(None, None)
  assert spec((8, 6), None, "length") == PartitionSpec(None, None)
  narrow = mesh_of((8, 1, 1))
  assert partitioning._spec((8, 6), ("embed", "mlp"), narrow) == PartitionSpec(None, None)
  assert partitioning._spec((8, 6), ("batch", "mlp"), narrow) == PartitionSpec("data", None)


@pytest.mark.parametrize(
    "names,message", [(("mlp", "vocab"), "twice"), (("mlp", "width"), "unknown logical axis.*width")]
)
def test_table_mistakes_are_told(names, message):
  with pytest.raises(ValueError, match=message):
    partitioning._spec((8, 8), names, mesh_of((2, 2, 2)))
  with pytest.raises(ValueError):
    partitioning._spec((8,), ("mlp", "embed"), mesh_of((2, 2, 2)))


def test_constrain_is_nothing_without_a_mesh():
  x = jnp.ones((8, 4))
  assert partitioning.constrain(x, "batch", "mlp") is x
  with partitioning.use_mesh(make_mesh(MeshConfig(), devices=jax.devices()[:1])):
    assert partitioning.constrain(x, "batch", "mlp") is x


def test_every_parameter_axis_is_in_the_table():
  for axes in jax.tree.leaves(MODEL.param_axes(), is_leaf=lambda x: isinstance(x, tuple)):
    assert set(axes) <= set(partitioning.RULES)


def test_a_program_traced_without_a_mesh_is_not_reused_with_one():
  seen = []

  @jax.jit
  def f(x):
    seen.append(jax.sharding.get_abstract_mesh().empty)
    return partitioning.constrain(x * 2, "batch", "mlp")

  x = np.ones((8, 4), np.float32)
  assert len(f(x).sharding.device_set) == 1
  with partitioning.use_mesh(mesh_of((2, 2, 2))):
    assert f(x).addressable_shards[0].data.shape == (2, 2)
  with partitioning.use_mesh(mesh_of((1, 1, 8))):
    f(x)
  assert len(f(x).sharding.device_set) == 1
  assert seen == [True, False, False]


# ---- another table for one of two models


def test_a_replicated_model_lies_whole_everywhere():
  mesh, params = mesh_of((2, 2, 2)), _case()[0]
  model, placed = partitioning.lay_out(MODEL, _place(params, mesh), mesh, "replicated")
  assert model.partitioning == "replicated" and model != MODEL and model.describe() == MODEL.describe()
  for leaf, want in zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True):
    assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
    np.testing.assert_array_equal(leaf, want)
  back, again = partitioning.lay_out(model, placed, mesh, "sharded")
  assert back == MODEL
  shardings = jax.tree.leaves(partitioning.param_shardings(MODEL, mesh))
  assert [leaf.sharding for leaf in jax.tree.leaves(again)] == shardings


def test_laying_out_changes_nothing_where_there_is_nothing_to_change():
  params = {"any": "thing"}
  assert partitioning.lay_out(MODEL, params, None, "replicated") == (MODEL, params)
  assert partitioning.lay_out(MODEL, params, mesh_of((2, 2, 2)), "sharded") == (MODEL, params)
  assert partitioning.lay_out(MODEL, None, mesh_of((2, 2, 2)), "replicated")[1] is None
  with pytest.raises(ConfigError, match="partitioning is 'split'; there are sharded, replicated"):
    partitioning.lay_out(MODEL, params, None, "split")
  with pytest.raises(ConfigError, match="partitioning='split': choose from .*sharded.*replicated"):
    T5Config.named("t5_tiny", partitioning="split")


def test_a_table_holds_inside_its_block_only():
  mesh = mesh_of((2, 2, 2))
  spec = lambda: partitioning._spec((8, 4, 6), ("batch", "heads", None), mesh)
  assert spec() == PartitionSpec(("data", "fsdp"), "model", None)
  with partitioning.use_table("replicated"):
    assert spec() == PartitionSpec(("data", "fsdp"), None, None)
    with partitioning.use_table("sharded"):
      assert spec() == PartitionSpec(("data", "fsdp"), "model", None)
  assert spec() == PartitionSpec(("data", "fsdp"), "model", None)


def test_the_joint_table_splits_where_one_model_is_split():
  other = T5(T5Config.named("t5_tiny", partitioning="replicated"))
  assert partitioning.table_of(MODEL, other) == partitioning.table_of(MODEL) == "sharded"
  assert partitioning.table_of(other, other) == "replicated"


def test_ways_counts_parts():
  assert partitioning.ways("activation_vocab", 16) == 1
  with partitioning.use_mesh(mesh_of((2, 2, 2))):
    assert partitioning.ways("activation_vocab", 16) == 2 and partitioning.ways("batch", 16) == 4
    assert partitioning.ways("activation_vocab", 15) == 1 and partitioning.ways("length", 16) == 1
    with partitioning.use_table("replicated"):
      assert partitioning.ways("activation_vocab", 16) == 1 and partitioning.ways("batch", 16) == 4


# ---- states and batches


OPTIMIZERS = {"adam": optax.adamw(1e-3), "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_lie_with_their_parameters(name):
  mesh, tx = mesh_of((2, 2, 2)), OPTIMIZERS[name]
  params = MODEL.abstract_params()
  state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": params, "opt_state": jax.eval_shape(tx.init, params)}
  shardings = partitioning.state_shardings(state, MODEL, mesh)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  want = partitioning.param_shardings(MODEL, mesh)
  assert shardings["params"] == want
  assert shardings["step"].spec == PartitionSpec()
  same, other = 0, 0
  wanted = {jax.tree_util.keystr(p): s for p, s in jax.tree_util.tree_leaves_with_path(want)}
  shapes = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}
  leaves, placed = jax.tree_util.tree_leaves_with_path(state["opt_state"]), jax.tree.leaves(shardings["opt_state"])
  for (path, leaf), sharding in zip(leaves, placed, strict=True):
    owner = next((name for name in wanted if jax.tree_util.keystr(path).endswith(name)), None)
    if owner is not None and leaf.shape == shapes[owner]:
      assert sharding == wanted[owner]
      same += 1
    else:
      assert sharding.spec == PartitionSpec()
      other += 1
  assert same and other
  if name == "adam":
    assert same == 2 * len(shapes)
  concrete = jax.jit(tx.init, out_shardings=shardings["opt_state"])(random_params(MODEL, np.random.default_rng(0)))
  assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(concrete))


def test_put_batch_splits_rows():
  mesh = mesh_of((2, 2, 2))
  batch = {"a": np.arange(24, dtype=np.int32).reshape(8, 3), "b": np.arange(8.0)}
  placed = partitioning.put_batch(batch, mesh)
  assert placed["a"].addressable_shards[0].data.shape == (2, 3) and placed["b"].addressable_shards[0].data.shape == (2,)
  np.testing.assert_array_equal(placed["a"], batch["a"])
  with pytest.raises(ConfigError, match="6 rows.*4 devices") as error:
    partitioning.put_batch({"a": np.zeros((6, 3))}, mesh)
  assert "\n" not in str(error.value)
  alone = partitioning.put_batch(batch, None)
  np.testing.assert_array_equal(alone["a"], batch["a"])
