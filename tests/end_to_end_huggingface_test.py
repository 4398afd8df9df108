"""From Hugging Face to Hugging Face: a target and a draft that transformers made, distilled here, handed back.

transformers' own assisted generation then needs fewer passes of the target with the draft than it did before.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("seqio", reason="training from tasks needs seqio and TensorFlow")
torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

import distillspec_jax as ds  # noqa: E402
from distillspec_jax import evaluation, evaluation_request, train, training_setup, weights  # noqa: E402
from distillspec_jax.analysis import costs, measure  # noqa: E402
from distillspec_jax.data import pipeline  # noqa: E402
from distillspec_jax.types import ConfigError  # noqa: E402

torch.set_num_threads(1)  # on a busy machine its threads would wait for each other, and these networks are tiny

# What the target says: letters in turn, from the one that the input begins with.
LETTERS = "abcde"
INPUTS = [first + second + third for first in LETTERS for second in LETTERS for third in LETTERS]
OUTPUTS = [(LETTERS * 4)[LETTERS.index(text[0]) :][:12] for text in INPUTS]
HELD_OUT = slice(0, None, 6)
GAMMA, NEW_TOKENS = 4, 16
SIZES = dict(vocab_size=264, num_decoder_layers=1, num_layers=1, dropout_rate=0.0, decoder_start_token_id=0)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def _dataset(split, shuffle_files, seed=None):
  del shuffle_files, seed
  chosen = [(i % 6 == 0) == (split == "validation") for i in range(len(INPUTS))]
  return tf.data.Dataset.from_tensor_slices(
    {"inputs": list(itertools.compress(INPUTS, chosen)), "targets": list(itertools.compress(OUTPUTS, chosen))}
  )


if "letters_in_turn" not in seqio.TaskRegistry.names():
  seqio.TaskRegistry.add(
    "letters_in_turn",
    source=seqio.FunctionDataSource(_dataset, splits=("train", "validation")),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={name: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for name in ("inputs", "targets")},
    metric_fns=[],
  )


def network(seed, **sizes):
  torch.manual_seed(seed)
  made = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **V1_1, **sizes))
  made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.shared.weight) * 0.1)
  return made


def save(made, directory):
  made.eval().save_pretrained(str(directory))
  transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(str(directory))
  return directory


def taught(made, steps):
  """Fine-tune with torch on the training inputs; return the last loss."""
  source, target = (
    torch.tensor([[3 + code for code in text.encode()] + [1] for i, text in enumerate(texts) if i % 6])
    for texts in (INPUTS, OUTPUTS)
  )
  optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
  for _ in range(steps):
    optimizer.zero_grad()
    loss = made(input_ids=source, labels=target).loss
    loss.backward()
    optimizer.step()
  return float(loss.detach())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A target that knows its task and a draft that knows nothing, both saved by transformers."""
  folder = tmp_path_factory.mktemp("pair")
  target = network(0, d_model=32, d_kv=8, num_heads=4, d_ff=64)
  assert taught(target, 150) < 0.1
  save(target, folder / "target")
  save(network(1, d_model=24, d_kv=8, num_heads=2, d_ff=48), folder / "draft")
  return folder


def test_the_vocabulary_comes_with_the_directory(tmp_path, capsys):
  """In evaluation and training: what the directories say, which must agree; of one that says nothing a line says so."""
  data = pipeline.DataConfig(task="letters_in_turn", input_length=4, target_length=8, batch_size=2)
  said = {"a": {"extra_ids": 5}, "b": {"extra_ids": 5}, "other": {"extra_ids": 6}, "bare": None, "foreign": {}}
  for name, config in said.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    if config is not None:
      config = {**config, "tokenizer_class": "T5Tokenizer" if name == "foreign" else "ByT5Tokenizer"}
      (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))

  def both(target, draft):
    """Ask evaluation and training; return (ids, what was printed) of each."""
    target, draft = str(tmp_path / target), str(tmp_path / draft)
    found, _ = evaluation.find_vocabulary(target, draft, None, "letters_in_turn", "validation")
    yield found.vocab_size, capsys.readouterr().out
    chosen = training_setup.choose_vocabulary(tmp_path / f"run {len(list(tmp_path.iterdir()))}", data, [draft, target, None])
    yield json.loads((pathlib.Path(chosen) / "vocabulary.json").read_text())["vocab_size"], capsys.readouterr().out

  assert [*both("a", "b")] == [(264, ""), (264, "")]
  for size, line in both("bare", "a"):
    assert size == 264 and "bare carries no vocabulary: taking that of" in line and "cannot be checked" in line
  assert [size for size, _ in both("bare", "bare")] == [259, 259]  # the task's own
  for names, message in ((("a", "other"), "the vocabularies differ"), (("foreign", "foreign"), "not the spiece.model")):
    with pytest.raises(ConfigError, match=message):
      next(both(*names))
    with pytest.raises(ConfigError, match=message):
      training_setup.choose_vocabulary(tmp_path / "run", data, [str(tmp_path / name) for name in names])


def evaluated(pair, draft, folder):
  request = evaluation_request.Request(
    str(pair / "target"), str(draft), "letters_in_turn", str(folder), "validation", GAMMA,
    {"batch_size": 4, "decode_batch_size": 16, "temperature": 0.0},
    input_length=4, target_length=NEW_TOKENS, num_examples=16,
  )  # fmt: skip
  return evaluation_request.run(request)


def opened(directory):
  return transformers.T5ForConditionalGeneration.from_pretrained(str(directory)).eval()


def assisted(target, assistant, prompts):
  """Generate with transformers, greedily; return the texts and how many passes of the target's decoder they took."""
  assistant.generation_config.num_assistant_tokens = GAMMA
  assistant.generation_config.num_assistant_tokens_schedule = "constant"
  assistant.generation_config.assistant_confidence_threshold = 0.0
  passes, written = [], []
  hook = target.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
  try:
    for prompt in prompts:
      out = target.generate(prompt, assistant_model=assistant, max_new_tokens=NEW_TOKENS, do_sample=False)
      written.append(out[0, 1:].tolist())
  finally:
    hook.remove()
  return written, len(passes)


def convert(source, output, form):
  command = [sys.executable, "-m", "distillspec_jax.convert", f"--source={source}", f"--output_dir={output}"]
  environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(ds.__file__).parents[1])}
  done = subprocess.run([*command, f"--format={form}"], env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_a_draft_distilled_here_is_accepted_more_there(pair, tmp_path, monkeypatch):
  monkeypatch.setattr(measure, "measure_costs", lambda *_: costs.Costs({1: 1.0, 5: 1.5, 13: 2.0}, 0.02))
  before = evaluated(pair, pair / "draft", tmp_path / "before")
  settings = {
    "TASK": "letters_in_turn", "INPUT_LENGTH": 4, "TARGET_LENGTH": NEW_TOKENS, "BATCH_SIZE": 16, "TRAIN_STEPS": 300,
    "OptimizerConfig.warmup_steps": 5, "OptimizerConfig.learning_rate": 0.01, "TrainConfig.eval_every": 300,
    "TrainConfig.eval_examples": 16, "TrainConfig.checkpoint_every": 300, "MODEL_DIR": str(tmp_path / "distilled"),
    "TARGET": str(pair / "target"), "DRAFT": str(pair / "draft"),
  }  # fmt: skip
  result = train.run_from_gin(["runs/distill.gin"], [f"{name} = {value!r}" for name, value in settings.items()])
  assert result["step"] == 300
  best = tmp_path / "distilled" / "best"
  assert weights.vocabularies_match(pair / "target", best)  # the byte vocabulary came from ByT5Tokenizer's name
  after = evaluated(pair, best, tmp_path / "after")
  assert before["alpha"] < 0.3 < 0.7 < after["alpha"]
  assert before["greedy_identical"] == after["greedy_identical"] == [16, 16]

  assert "with its vocabulary" in convert(best, tmp_path / "handed_on", "huggingface")
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "handed_on"))
  texts = INPUTS[HELD_OUT]
  prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
  target, old, new = (opened(path) for path in (pair / "target", pair / "draft", tmp_path / "handed_on"))
  own = [target.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, 1:].tolist() for prompt in prompts]
  said_before, passes_before = assisted(target, old, prompts)
  said_after, passes_after = assisted(target, new, prompts)
  assert said_before == said_after == own  # lossless with either
  lengths = sum(map(len, own))
  # Of a draft that knows nothing a pass gives a token; of this one 5, less the blocks that are cut short.
  assert passes_before > 0.75 * lengths and passes_after < 0.5 * lengths, (passes_before, passes_after, lengths)
  ours = ds.speculative_generate(
    *ds.load_model(pair / "target"), *ds.load_model(tmp_path / "handed_on"),
    np.array([prompt[0].tolist() for prompt in prompts]), gamma=GAMMA, max_new_tokens=NEW_TOKENS,
  )  # fmt: skip
  assert [row[:size].tolist() for row, size in zip(np.asarray(ours.tokens), ours.lengths, strict=True)] == own
