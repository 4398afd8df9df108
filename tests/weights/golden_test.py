"""The golden checkpoints through `ds.load_model`: the logits and greedy tokens of the programs that wrote them."""

import jax
import numpy as np
import pytest

import distillspec_jax as ds


@pytest.mark.parametrize("form", ["t5x_native", "t5x_orbax", "t5x_scanned", "huggingface"])
def test_logits_and_greedy_tokens(shared_dir, form):
  same_state = "t5x_native" if form == "t5x_orbax" else form
  golden = np.load(shared_dir / "fixtures" / same_state / "golden.npz")
  model, params = ds.load_model(shared_dir / "fixtures" / form)
  batch = {name: golden[name] for name in ("encoder_input_tokens", "decoder_input_tokens")}
  logits = np.asarray(jax.jit(model.score)(params, batch))
  counted = golden["decoder_target_tokens"] != 0  # T5X masks padded targets in self-attention
  assert counted.sum() > 30
  np.testing.assert_allclose(logits[counted], golden["logits"][counted], atol=2e-5, rtol=0)
  expected = golden["greedy_tokens"]
  if form == "huggingface":
    assert not expected[:, 0].any()  # theirs begin with the start token
    expected = expected[:, 1:]
  made = ds.generate(model, params, batch["encoder_input_tokens"], max_new_tokens=expected.shape[1])
  np.testing.assert_array_equal(made.tokens, expected)
