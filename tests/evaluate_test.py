"""Evaluation from end to end on tiny random models over bytes: the two files, their contract, the one-line errors."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_task  # noqa: F401  (registers the task)

from distillspec_jax import evaluation, weights
from distillspec_jax.analysis import costs as pass_costs
from distillspec_jax.analysis import latency, measure, report_files
from distillspec_jax.data import eval_set, lookup, vocabularies
from distillspec_jax.data.host_tensorflow import seqio
from distillspec_jax.models import T5, T5Config
from distillspec_jax.types import ConfigError

VOCABULARY = seqio.ByteVocabulary()
CONFIG = T5Config.named("t5_tiny", vocab_size=260)
SETTINGS = {"target": "target", "draft": "draft", "task": "tiny", "split": "validation"}
CONTRACT = (
    "config alpha block_efficiency acceptance_by_position accepted_length_histogram autoregressive_ms_per_token "
    "speculative_ms_per_token speedup cost_ratio predicted_speedup break_even_alpha best_gamma greedy_identical "
    "task_metrics alpha_empirical"
).split()
MEANS = (
    "alpha alpha_empirical block_efficiency autoregressive_ms_per_token speculative_ms_per_token speedup "
    "predicted_speedup"
).split()


@pytest.fixture(name="pair", scope="module")
def _pair():
  target, draft = T5(CONFIG), T5(dataclasses.replace(CONFIG, num_decoder_layers=1))
  make = lambda model, seed: jax.jit(model.init)(jax.random.key(seed))
  return pass_costs.Pair(target, make(target, 0), draft, make(draft, 1))


@pytest.fixture(name="examples", scope="module")
def _examples():
  return eval_set.eval_examples("tiny", "validation", 5, 8, 10, 0, lookup.Changes(VOCABULARY))


def _config(**changes):
  fields = dict(max_new_tokens=10, gamma=3, batch_size=2, decode_batch_size=4, timing_prompts=2, timing_repeats=1)
  return measure.MeasureConfig(**(fields | changes))


@pytest.fixture(name="written", scope="module")
def _written(pair, examples, tmp_path_factory):
  """Evaluate once, greedily; several tests look at it."""
  folder = tmp_path_factory.mktemp("greedy")
  costs = pass_costs.Costs({1: 1.0, 2: 1.1, 5: 1.4, 13: 2.0}, 0.1)
  metrics = evaluation.evaluate(
      pair, examples, VOCABULARY, _config(), folder, settings=SETTINGS, label="before", costs=costs, quiet=True
  )
  return metrics, folder


def test_metrics_hold_what_the_contract_names(written):
  metrics, folder = written
  assert json.loads((folder / "metrics.json").read_text()) == metrics
  assert set(CONTRACT) <= set(metrics)
  for name in MEANS:
    low, high = metrics[f"{name}_ci"]
    assert low <= metrics[name] <= high, name
  assert metrics["label"] == "before" and metrics["config"]["gamma"] == 3 and metrics["config"]["task"] == "tiny"
  assert metrics["greedy_identical"] == [5, 5]
  assert sum(metrics["accepted_length_histogram"]) == metrics["totals"]["blocks"]
  assert len(metrics["acceptance_by_position"]) == 3
  assert metrics["verify_cost"] == pytest.approx((1.1 + (1.4 - 1.1) * 2 / 3) / 1.0)  # between Q = 2 and Q = 5
  assert metrics["cost_ratio"] == 0.1
  assert pass_costs.Costs.from_dict(metrics["pass_times"]).draft_ms == 0.1


def test_outputs_hold_a_line_a_prompt_whose_pieces_are_the_text(written, examples):
  lines = [json.loads(line) for line in (written[1] / "outputs.jsonl").read_text().splitlines()]
  assert [line["inputs"] for line in lines] == [text["inputs"] for text in examples.texts]
  for line in lines:
    assert len(line["tokens"]) == len(line["origins"]) == len(line["pieces"])
    assert "".join(line["pieces"]) == line["speculative_output"] == line["target_output"]
    assert sum(line["origins"]) == line["accepted"]
    assert line["blocks"] <= len(line["tokens"])


def test_the_report_reads_what_is_written(written, tmp_path):
  page = report_files.write_report([written[1]], tmp_path).read_text(encoding="utf-8")
  assert "tiny" in page and "before" in page


def test_alpha_is_that_of_the_targets_own_outputs_by_numpy(pair, examples, written):
  """Score the greedy outputs with the models' full logits, prompt by prompt."""
  from distillspec_jax.decoding import autoregressive

  agree = total = 0
  prompts = examples.encoder_input_tokens
  generation = autoregressive.generate(pair.target, pair.target_params, prompts, max_new_tokens=10)
  tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
  inputs = np.concatenate([np.zeros((len(tokens), 1), int), tokens[:, :-1]], axis=1)
  batch = {"encoder_input_tokens": prompts, "decoder_input_tokens": inputs}
  p, q = (m.score(w, batch) for m, w in ((pair.target, pair.target_params), (pair.draft, pair.draft_params)))
  for row, length in enumerate(lengths):
    agree += (np.argmax(p[row, :length], -1) == np.argmax(q[row, :length], -1)).sum()
    total += length
  assert written[0]["alpha"] == pytest.approx(agree / total)


def test_sampling_and_batches_of_any_size_count_the_same(pair, examples):
  prompts = examples.encoder_input_tokens
  results = []
  for size in (2, 5):
    rows, summary = measure.decode_speculatively(
        pair, prompts, _config(temperature=1.0, decode_batch_size=size), lambda items, label: items
    )
    results.append((rows, summary))
  np.testing.assert_array_equal(results[0][0].tokens, results[1][0].tokens)
  assert results[0][1].to_dict(samples=20) == results[1][1].to_dict(samples=20)
  assert len(results[0][1].lengths) == len(prompts)


def test_timing_counts_only_real_prompts_and_costs_are_measured(pair, examples):
  one = examples.encoder_input_tokens[:1]
  metrics = measure.timing_metrics(pair, one, _config(), lambda items, label: items)
  assert metrics["timed_prompts"] == 1 and metrics["autoregressive_ms_per_token"] > 0
  assert metrics["speedup"] == pytest.approx(
      metrics["autoregressive_ms_per_token"] / metrics["speculative_ms_per_token"]
  )


def test_costs_are_those_of_single_passes(pair, examples, monkeypatch):
  asked = {}

  def times(contestants, prompt, slots):
    asked.update(slots=slots, batch=len(prompt), queries={name: tuple(c[2]) for name, c in contestants.items()})
    return {"target": {q: 1.0 + q for q in contestants["target"][2]}, "draft": {1: 0.5}}

  monkeypatch.setattr(latency, "pass_times", times)
  costs = pass_costs.measure_costs(pair, examples.encoder_input_tokens[:2], 10, gamma=6)
  assert asked["batch"] == 2 and asked["slots"] >= max(asked["queries"]["target"])
  assert {1, 7} <= set(asked["queries"]["target"]) and asked["queries"]["draft"] == (1,)
  assert costs.cost_ratio == 0.25 and costs.verify_cost(6) == 4.0


def test_pieces_wait_for_whole_characters():
  tokens = VOCABULARY.encode("aé€!") + [1]
  pieces = evaluation.token_pieces(VOCABULARY, tokens)
  assert "".join(pieces) == "aé€!" and len(pieces) == len(tokens)
  assert pieces[0] == "a" and pieces[-1] == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(gamma=0), "gamma"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(batch_size=0), "batch_size"),
        (dict(seed=2**32), "seed"),
        (dict(timing_repeats=0), "timing_repeats"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(rule="nonsense"), "rule"),
        (dict(lenience=0.5), "lenience"),
        (dict(top_p=0.0), "top_p"),
        (dict(min_length=11), "min_length=11 exceeds max_new_tokens=10"),
    ],
)
def test_settings_are_checked_when_they_are_made(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    _config(**changes)
  assert "\n" not in str(error.value)


def test_no_prompts_and_foreign_ids_are_refused(pair, examples, tmp_path):
  with pytest.raises(ConfigError, match="no prompts"):
    measure.measure(pair, np.zeros((0, 4), int), _config())
  foreign = dataclasses.replace(examples, encoder_input_tokens=examples.encoder_input_tokens + 200)
  with pytest.raises(ConfigError, match="--vocabulary"):
    evaluation.evaluate(pair, foreign, VOCABULARY, _config(), tmp_path, settings={}, quiet=True)


def test_the_vocabulary_is_the_models_the_given_or_the_tasks(tmp_path):
  for name, extra_ids in (("a", 0), ("b", 0), ("other", 7)):
    vocabularies.save(seqio.ByteVocabulary(extra_ids=extra_ids), tmp_path / name / "vocabulary")
  (tmp_path / "bare").mkdir()
  find = lambda *names, given=None: evaluation.find_vocabulary(
      *(str(tmp_path / name) for name in names), given and str(tmp_path / given), "tiny", "validation"
  )
  assert find("a", "b") == (VOCABULARY, False)
  assert find("bare", "other")[0].extra_ids == 7
  assert find("bare", "bare", given="other")[0].extra_ids == 7
  own = lookup.find_tasks("tiny", "validation")["tiny"][0].output_features["targets"].vocabulary
  assert find("bare", "bare") == (own, True)
  with pytest.raises(ConfigError, match="vocabularies differ"):
    find("a", "other")
  with pytest.raises(ConfigError, match="vocabularies differ"):
    find("a", "b", given="other")
  with pytest.raises(ConfigError, match="not a vocabulary folder"):
    find("a", "b", given="bare")


def _door(tmp_path, **flags):
  given = dict(target="no_such_target", draft="no_such_draft", task="tiny", output_dir=tmp_path / "out") | flags
  command = [sys.executable, "-m", "distillspec_jax.evaluate", *(f"--{key}={value}" for key, value in given.items())]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(temperature="nan"), "temperature=nan"),
        (dict(gamma="abc"), "--gamma=abc: give a whole number of at least 1, or auto"),
        (dict(rule="lossy_exp"), "needs a lenience"),
        (dict(rule="lossy_exp", lenience="half"), "--lenience=half is not a number"),
        (dict(task="pydoc_summary"), "no_such_target"),
    ],
)
def test_the_door_answers_errors_in_one_line(tmp_path, flags, message):
  done = _door(tmp_path, **flags)
  lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert done.returncode == 2, done.stderr
  assert len(lines) == 1 and message in lines[0] and "Traceback" not in done.stderr


# A process of its own, because flags are one set a process; single passes are timed elsewhere.
_DOOR = """
import sys
import tiny_task
from distillspec_jax import cli, evaluate
from distillspec_jax.analysis import costs, gamma_choice, measure
measure.measure_costs = gamma_choice.measure_costs = lambda *args: costs.Costs({1: 1.0, 5: 1.5, 13: 2.0}, 0.02)
cli.run(evaluate.main)
"""


@pytest.fixture(name="saved", scope="module")
def _saved(pair, tmp_path_factory):
  """A target's and a draft's directory."""
  folder = tmp_path_factory.mktemp("saved")
  vocabularies.save(VOCABULARY, folder / "vocabulary")
  for name, model, params in (("target", pair.target, pair.target_params), ("draft", pair.draft, pair.draft_params)):
    weights.save_model(folder / name, model, params, folder / "vocabulary")
  return folder


def _run_door(saved, output_dir, **changes):
  given = dict(
      target=saved / "target", draft=saved / "draft", task="tiny", split="validation", gamma=3, temperature=0,
      top_k=0, top_p=1, rule="token", lenience="", batch_size=2, decode_batch_size=4, num_examples=5, seed=0,
      timing_examples=2, timing_repeats=1, input_length=8, target_length=10, output_dir=output_dir,
  )  # fmt: skip
  command = [sys.executable, "-c", _DOOR, *(f"--{key}={value}" for key, value in (given | changes).items())]
  path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
  return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})


def test_the_door_from_directories_to_files(saved, tmp_path):
  done = _run_door(saved, tmp_path / "out")
  assert done.returncode == 0, done.stderr
  assert "greedy texts identical: 5 of 5" in done.stdout
  metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert metrics["config"]["target"] == str(saved / "target") and metrics["greedy_identical"] == [5, 5]
  assert metrics["config"]["valid_ids"] == VOCABULARY.vocab_size < CONFIG.vocab_size
  done = _run_door(saved, tmp_path / "out", split="empty")
  assert done.returncode == 2 and "error: the split 'empty' of 'tiny' is empty" in done.stderr


def test_the_door_chooses_gamma_says_what_it_expects_and_writes_a_trace(saved, tmp_path):
  settings = dict(gamma="auto", profile=tmp_path / "trace", rule="lossy_exp", lenience=0.5, temperature=1, min_length=3)
  done = _run_door(saved, tmp_path / "out", **settings)
  assert done.returncode == 0, done.stderr
  metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert f"gamma {metrics['config']['gamma']}: " in done.stdout and "x predicted" in done.stdout
  assert metrics["best_gamma"] == metrics["config"]["gamma"]
  assert metrics["config"]["lenience"] == 0.5 and metrics["config"]["min_length"] == 3
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))
