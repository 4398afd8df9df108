"""What the guides show is run: the rule that docs/speculative_decoding.md adds, the conversions of docs/weights.md."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from references.random_models import perturbed, random_params, random_prompts

import distillspec_jax as ds
from distillspec_jax import weights
from distillspec_jax.decoding import verification
from distillspec_jax.models import T5, T5Config
from distillspec_jax.weights import huggingface, t5x

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def test_the_rule_of_the_guide_can_be_added(monkeypatch):
  monkeypatch.setattr(verification, "RULES", dict(verification.RULES))
  text = (DOCS / "speculative_decoding.md").read_text()
  (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "RULES[" in block]
  exec(compile(code, "speculative_decoding.md", "exec"), {})
  model, rng = T5(T5Config.named("t5_tiny", vocab_size=16)), np.random.default_rng(0)
  target, prompt = random_params(model, rng), random_prompts(rng, 4, 8, 16)
  draft = perturbed(target, rng, 0.1)
  out = ds.speculative_generate(
    model, target, model, draft, prompt, gamma=2, max_new_tokens=7, temperature=1.0, rule="never"
  )
  assert not np.any(out.accepted) and np.array_equal(out.blocks, out.lengths)


def _commands(guide):
  """List the calls of the package in a guide's bash blocks, each as words."""
  text = "\n".join(re.findall(r"```bash\n(.*?)```", (DOCS / guide).read_text(), re.S)).replace("\\\n", " ")
  return [shlex.split(line) for line in text.splitlines() if line.startswith("python -m distillspec_jax.")]


def test_the_conversions_of_the_guide_are_run(shared_dir, tmp_path):
  """As they stand, on small models in place of what the guide downloads."""
  pytest.importorskip("seqio", reason="a vocabulary is made of a SentencePiece file")
  sizes = dict(emb_dim=8, head_dim=4, num_heads=2, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1)
  pieces = (shared_dir / "data" / "vocab" / "t5_spiece.model").read_bytes()
  (tmp_path / "sentencepiece.model").write_bytes(pieces)
  made, widths = {}, {"flan-t5-small": 32128, "mt5-small": 32112, "byt5-small": 384, "t5_1_1_lm100k_small": 32128}
  for name, size in widths.items():
    model = T5(T5Config.named("t5_tiny", vocab_size=size, **sizes))
    made[name] = params = random_params(model, np.random.default_rng(0))
    (t5x if "lm100k" in name else huggingface).export(tmp_path / name, model, params)
  (tmp_path / "flan-t5-small" / "spiece.model").write_bytes(pieces)
  (tmp_path / "mt5-small" / "spiece.model").write_bytes(pieces)
  (tmp_path / "mt5-small" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
  (tmp_path / "byt5-small" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
  commands = _commands("weights.md")
  assert len(commands) == 7 and all(words[2] == "distillspec_jax.convert" for words in commands)
  environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
  for _, *words in commands:
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "with its vocabulary" in done.stdout, done.stderr
  for name, extra_ids in {"flan-t5-small": 100, "mt5-small": 0, "byt5-small": 125, "t5_1_1_lm100k_small": 100}.items():
    described = json.loads((tmp_path / "native" / name / "vocabulary" / "vocabulary.json").read_text())
    assert described["extra_ids"] == extra_ids
    jax.tree.map(np.testing.assert_array_equal, ds.load_model(tmp_path / "native" / name)[1], made[name])
  assert weights.vocabularies_match(tmp_path / "flan-t5-small", tmp_path / "native" / "t5_1_1_lm100k_small")
  assert (tmp_path / "out" / "huggingface" / "tokenizer.json").is_file()
  for name in ("huggingface", "t5x"):
    jax.tree.map(np.testing.assert_array_equal, ds.load_model(tmp_path / "out" / name)[1], made["flan-t5-small"])
