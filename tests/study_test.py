"""The study in small: its lines, one of each kind run through the door, resumed, and its tables."""

import inspect
import json
import re
import zlib

import jax
import numpy as np
import pytest

pytest.importorskip("seqio", reason="the study trains from tasks")

import tiny_task  # noqa: E402, F401

from distillspec_jax import train, training_setup, weights  # noqa: E402
from distillspec_jax.study import config, door, plots, runs, stage, tables, trials  # noqa: E402
from distillspec_jax.study import lines as study_lines  # noqa: E402
from distillspec_jax.study.lines import Line, StudyTask, Trial  # noqa: E402
from distillspec_jax.types import ConfigError  # noqa: E402

MINI = """
train.model = @T5Config()
T5Config.vocab_size = 384
T5Config.emb_dim = {width}
T5Config.num_heads = 2
T5Config.head_dim = 8
T5Config.mlp_dim = 16
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
"""


def test_the_lines_are_the_table_of_the_paper_and_its_controls():
  lines = [part for part in study_lines.parts("gsm8k-*,multi30k-*", 3) if isinstance(part, Line)]
  assert len({line.name for line in lines}) == len(lines)
  of = lambda task, seed: [line.recipe for line in lines if (line.task, line.seed) == (task, seed)]
  assert of("multi30k", 0) == ["none", *study_lines.MAIN, *study_lines.ONCE]
  assert of("gsm8k", 2) == ["none", *study_lines.MAIN]
  whole = of("gsm8k", 0)
  assert {"sft", "seqkd", "supervised_kd", "imitkd", "f_distill", "skd"} < set(whole)
  cells = {(divergence, source) for divergence in ("fkl", "rkl", "jsd", "tvd") for source in ("data", "draft", "target", "mixed")}
  found = {tuple((study_lines.same_as(f"{d}/{s}"), d, s)[1:]) for d, s in cells if study_lines.same_as(f"{d}/{s}") in whole}
  assert found == cells
  assert study_lines.same_as("fkl/draft") == "on_policy_gkd" and study_lines.same_as("tvd/mixed") == "f_distill"
  methods = [Line("gsm8k", recipe, 0).method for recipe in whole if recipe != "none"]
  assert len({str(study_lines._recipe(method)) for method in methods}) == len(methods)  # nothing is run twice
  assert [line.name for line in study_lines.main_lines("multi30k", 2)] == [
    f"multi30k-{recipe.replace('/', '_')}-{seed}" for seed in (0, 1) for recipe in ("none", *study_lines.MAIN)
  ]


def test_parts_are_chosen_by_their_names():
  names = lambda patterns: [part.name for part in study_lines.parts(patterns, 3)]
  assert names("gsm8k-none-?, multi30k-lossy") == ["gsm8k-none-0", "gsm8k-none-1", "gsm8k-none-2", "multi30k-lossy"]
  assert len(set(names("*"))) == len(names("*")) == len(names("gsm8k-*")) + len(names("[!g]*"))
  assert {trial.kind for trial in study_lines.TRIALS} == set(trials.TRIALS)


@pytest.fixture
def small(tmp_path, monkeypatch):
  """A study of one tiny task with two recipes and one trial."""
  for name, width in (("t5_target", 24), ("t5_draft", 16)):
    (tmp_path / f"{name}.gin").write_text(MINI.format(width=width))
  tasks = {"tiny_judged": StudyTask("tiny_judged", 8, 4, 8, transfer="tiny_other_vocabulary")}
  for module in (study_lines, stage):
    monkeypatch.setattr(module, "TASKS", tasks)
  monkeypatch.setattr(study_lines, "TRIALS", (Trial("tiny_judged", "larger_target"),))
  for module in (study_lines, trials, plots):
    monkeypatch.setattr(module, "MAIN", ("on_policy_gkd", "tvd/data"))
  monkeypatch.setattr(study_lines, "ONCE", ())
  monkeypatch.setattr(trials, "LENIENCES", (1.0, 0.1))
  monkeypatch.setattr(trials, "LOSSY", ((1.0, "lossy_lin"), (1.0, "lossy_exp"), (0.0, "lossy_exp")))
  monkeypatch.setattr(trials, "LONGER", 2)
  monkeypatch.setattr(trials, "BEST_GREEDY", "tvd/data")
  monkeypatch.setattr(trials, "LARGER_DRAFT", {"emb_dim": 1.25})
  monkeypatch.setattr(trials, "MIDDLE", {"emb_dim": 5 / 6})
  monkeypatch.setattr(trials, "TIMED_PROMPTS", 2)
  monkeypatch.setattr(trials, "TIMED_ROUNDS", 1)
  monkeypatch.setattr(stage, "TEST", "validation")
  return tmp_path


def run(folder, *bindings):
  steps = [f"StudyConfig.{kind}_steps = 60" for kind in ("target", "draft", "distill")]
  sizes = ["StudyConfig.seeds = 1", "StudyConfig.prompts = 6"]
  sizes += [f"StudyConfig.t5_{role} = {str(folder / f't5_{role}.gin')!r}" for role in ("target", "draft")]
  where = [f"OUTPUT_DIR = {str(folder / 'out')!r}", f"RESULTS_DIR = {str(folder / 'results')!r}"]
  return runs.run(door.config_from_gin(["runs/study.gin"], [*where, *steps, *sizes, *bindings]))


def test_a_study_from_gin_to_tables_and_resumed(small, capsys):
  assert run(small, "StudyConfig.budget_minutes = 0.0") == []
  assert "budget of 0 minutes is used up: 0 of 4 parts" in capsys.readouterr().out
  parts = run(small)
  found = [part for part in parts if "recipe" in part]
  assert [line["recipe"] for line in found] == ["none", "on_policy_gkd", "tvd/data"]
  for line in found:
    measured = line["measured"]
    assert measured["prompts"] == 6 and 0 <= measured["alpha_t0"] <= 1
    for t in (0, 1):
      efficiencies = [measured[f"tau_t{t}_gamma{gamma}"] for gamma in (3, 5, 7)]
      assert efficiencies == sorted(efficiencies) and 1 <= efficiencies[0] and efficiencies[-1] <= 8
      if line["recipe"] != "none":  # the same texts: the gain is the ratio of the two block efficiencies
        gain = measured[f"tau_t{t}_gamma7"] / found[0]["measured"][f"tau_t{t}_gamma7"]
        assert np.isclose(measured[f"gain_t{t}_gamma7"], gain)
        low, high = measured[f"gain_t{t}_gamma7_ci"]
        assert low <= gain <= high
    assert line["transfer"]["tiny_other_vocabulary"]["prompts"] == 6
  (larger,) = [part["found"] for part in parts if "kind" in part]
  assert larger["parameters"]["larger"] > larger["parameters"]["target"]
  assert [line["recipe"] for line in larger["lines"]] == ["none", "on_policy_gkd", "tvd/data"]
  made = {path: path.stat().st_mtime_ns for path in (small / "results").glob("*.json")}
  (small / "results" / "tiny_judged-tvd_data-0.json").unlink()
  again = run(small)
  assert json.dumps(again) == json.dumps(parts) and all(line["step_seconds"] > 0 for line in found)
  kept = [path.name for path, stamp in made.items() if path.stat().st_mtime_ns == stamp]
  assert set(kept) == {path.name for path in made} - {"tiny_judged-tvd_data-0.json"}
  text = tables.as_markdown(parts)
  assert "## tiny_judged" in text and "| on_policy_gkd | 1 |" in text and "| none | 1 |" in text
  assert "The same drafts on tiny_other_vocabulary" in text and "| fkl |" not in text
  grid = tables.as_markdown([*found, found[1] | {"recipe": "rkl/mixed", "name": "tiny_judged-rkl_mixed-0"}])
  cells = {row.split(" | ")[0]: row for row in grid.splitlines() if row.startswith(("| fkl ", "| rkl "))}
  assert [cells[name].count("–") for name in ("| fkl", "| rkl")] == [3, 3]
  assert "| `tiny_judged-on_policy_gkd-0` |" in text and "before a target of" in text
  assert list(plots.draw(parts)) == ["tiny_judged-block_efficiency"]


@pytest.fixture
def untrained(monkeypatch):
  """What trainings would be, checked as they are, each a step of noise from where it starts: {folder: its settings}."""
  asked = {}

  def run_from_gin(files, bindings):
    settings = train.arguments_from_gin(files, bindings)
    asked[settings["model_dir"].rpartition("/")[2]] = settings
    call = inspect.signature(train.train).bind(**settings)
    call.apply_defaults()
    setup = training_setup.prepare(**{name: given for name, given in call.arguments.items() if name != "config_text"})
    key = jax.random.key(zlib.crc32(settings["model_dir"].rpartition("/")[2].encode()))
    params = setup.student.params or setup.student.model.init(key)
    moved = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype), params)
    weights.save_model(setup.directory, setup.student.model, moved, setup.vocabulary_dir)

  monkeypatch.setattr(train, "run_from_gin", run_from_gin)
  return asked


def test_every_trial_to_tables_and_plots(small, untrained, monkeypatch):
  others = [Trial("tiny_judged", kind) for kind in trials.TRIALS if kind not in trials.LARGER]
  monkeypatch.setattr(study_lines, "TRIALS", tuple(others))
  parts = run(small, "StudyConfig.distill_steps = 250", f"PARTS = {','.join(trial.name for trial in others)!r}")
  check_trials({part["kind"]: part["found"] for part in parts})
  check_settings(untrained)
  text, drawn = tables.as_markdown(parts), plots.draw(parts)
  assert "`tiny_judged-longer`: 500 updates instead" in text and "lossy rules on" in text
  assert "| middle, taught, distilled draft |" in text
  assert "tvd/data with one setting changed" in text and "| larger draft, none | 1 |" in text
  assert set(drawn) == {"tiny_judged-lossy", "tiny_judged-ladder"}
  assert all(png.startswith(b"\x89PNG") for png in drawn.values())


@pytest.fixture
def done(small):
  """A study with one finished part, made up, and no models."""
  known = {name: getattr(door.StudyConfig, name) for name in config.OF_PARTS}
  networks = {f"t5_{role}": str(small / f"t5_{role}.gin") for role in ("target", "draft")}
  steps = {f"{kind}_steps": 60 for kind in ("target", "draft", "distill")}
  part = {"task": "tiny_judged", "recipe": "none", "seed": 0, "name": "tiny_judged-none-0"}
  path = small / "results" / "tiny_judged-none-0.json"
  path.parent.mkdir()
  path.write_text(json.dumps(part | {"study": known | networks | steps | {"prompts": 6}}))
  return path


ONLY = "PARTS = 'tiny_judged-none-0'"


def test_finished_parts_of_other_settings_are_refused(done, small, untrained):
  with pytest.raises(ConfigError, match="target_steps = 60, and this study has 61: give that, or another RESULTS_DIR"):
    run(small, ONLY, "StudyConfig.target_steps = 61")  # and it notes nothing that would stand in the corrected one's way
  assert [part["name"] for part in run(small, ONLY)] == [done.stem]
  for binding, said in (
    ("StudyConfig.prompts = 5", "was made with StudyConfig.prompts = 6, and this study has 5"),
    ("StudyConfig.distill_steps = 61", "was made with StudyConfig.distill_steps = 60, and this study has 61"),
    ("StudyConfig.t5_draft = 'models/t5_1_1_small.gin'", "t5_draft.gin', and this study has 'models/t5_1_1_small.gin'"),
  ):
    with pytest.raises(ConfigError, match=re.escape(said)):
      run(small, ONLY, binding)
  part = json.loads(done.read_text())
  del part["study"]["pieces"]  # an old file: made with what is the default now
  done.write_text(json.dumps(part))
  assert len(run(small, ONLY)) == 1
  assert not untrained


def test_models_of_other_settings_are_refused(done, small, untrained):
  run(small, ONLY)
  done.unlink()
  with pytest.raises(ConfigError, match=r"study.json was made with StudyConfig.draft_rate = 0.02.* another OUTPUT_DIR"):
    run(small, ONLY, "StudyConfig.draft_rate = 0.01")
  (small / "out" / "study.json").unlink()  # models from before settings were noted have the defaults
  (small / "out" / "tiny_judged").mkdir()
  with pytest.raises(ConfigError, match="out was made with StudyConfig.t5_target = 'models/t5_mini_target.gin'"):
    run(small, ONLY)
  with pytest.raises(ConfigError, match="no gin file 'models/t5_mini_draf.gin'.* did you mean"):
    run(small, ONLY, "StudyConfig.t5_draft = 'models/t5_mini_draf.gin'")
  assert not untrained


@pytest.mark.parametrize("text, message", [
  ('{"task": "tiny_judged", "rec', "cannot be read as JSON .* delete it, and what it held is made again"),
  ("[]", "is not a JSON object"),
  ('{"rungs": 3}', "is no part of a study: move it away"),
  ('{"task": "t", "recipe": "none", "name": "other", "study": {}}', "is no part of a study: move it away"),
])  # fmt: skip
def test_what_is_no_finished_part_is_one_line(done, small, untrained, text, message):
  done.write_text(text)
  with pytest.raises(ConfigError, match=message) as caught:
    run(small, ONLY)
  assert "\n" not in str(caught.value) and not untrained


def check_settings(asked):
  """Each trial's trainings differ from the table's in what they are about, and in nothing else."""
  known = {
    name: (
      found["loop_config"].steps,
      found["optimizer"].learning_rate,
      found["step_config"].method.loss_temperature,
      (found.get("target") or "").rpartition("/")[2],
      (found.get("initial_checkpoint") or "").rpartition("/")[2],
    )
    for name, found in asked.items()
  }
  usual = (250, 2e-2, 1.0, "target", "none-0")
  assert known["on_policy_gkd-0"] == known["skd-0"] == usual
  assert known["longer-on_policy_gkd"] == known["longer-tvd_data"] == (500, *usual[1:])
  assert known["rate-halved"] == (250, 1e-2, *usual[2:]) and known["rate-doubled"] == (250, 4e-2, *usual[2:])
  assert known["loss-temperature-0.5"] == (250, 2e-2, 0.5, *usual[3:])
  assert known["larger-draft-distilled"] == (*usual[:4], "larger-draft")
  assert known["middle-taught"] == (250, 1e-2, 1.0, "target", "middle")
  assert known["draft-for-middle"] == (*usual[:3], "middle-taught", "none-0")


def check_trials(found):
  """The trials' figures hang together."""
  lossy = {(p["recipe"], p["temperature"], p["rule"], p["lenience"]): p for p in found["lossy"]}
  assert len(lossy) == 2 * 3 * 2
  for recipe in ("none", "on_policy_gkd"):  # lenience 1 is lossless: at T = 1 whatever the rule's name
    exact = {lossy[recipe, 1.0, rule, 1.0]["tau"] for rule in ("lossy_lin", "lossy_exp")}
    assert len(exact) == 1
    assert lossy[recipe, 0.0, "lossy_exp", 0.1]["tau"] >= lossy[recipe, 0.0, "lossy_exp", 1.0]["tau"]
  longer = found["longer"]["lines"]
  assert [(line["recipe"], line["steps"]) for line in longer] == [("on_policy_gkd", 500), ("tvd/data", 500)]
  limits = found["limits"]
  settings = {line["recipe"]: line["measured"]["alpha_t1"] for line in limits["lines"]}
  assert list(settings) == [
    "rate-halved", "rate-doubled", "loss-temperature-0.5", "skd", "larger draft, none", "larger draft",
  ]  # fmt: skip
  assert limits["draft_parameters"]["larger"] > limits["draft_parameters"]["usual"]
  rungs = found["ladder"]["rungs"]
  assert rungs["small"]["relative_latency"] == 1.0 and len(rungs) == 9
  metric = tables.metric_of(rungs["large"])
  for name in ("fine-tuned draft", "distilled draft"):  # lossless: the same texts, so the same quality
    assert rungs[f"large, {name}"][metric] == rungs["large"][metric]
    assert rungs[f"middle, taught, {name}"][metric] == rungs["middle, taught"][metric]


def test_gains_are_over_the_draft_of_the_same_seed():
  keys = [key for key, *_ in tables._COLUMNS]
  figure = lambda names, value: {f"{key}{ci}": [value - 0.1, value + 0.1] if ci else value for key in names for ci in ("", "_ci")}
  of = lambda recipe, seed, value, **more: {
    "task": "x", "recipe": recipe, "seed": seed, "name": f"x-{recipe}-{seed}", "transfer": {},
    "measured": figure(keys, value) | more | {"target_metrics": {"bleu": 3.0, "bleu_ci": [2.0, 4.0]}, "prompts": 2},
  }  # fmt: skip
  gains = lambda value: figure(tables._GAINS, value)
  lines = [of("none", 0, 1.0), of("none", 1, 2.0), of("skd", 0, 1.1, **gains(1.1)), of("skd", 1, 2.6, **gains(1.3))]
  text = tables.as_markdown(lines)
  (row,) = [line for line in text.splitlines() if line.startswith("| skd")]
  assert row.endswith("| +20% [+0, +40] | +20% [+0, +40] | `x-skd-*` |") and "1.85 [1.00, 2.70]" in row
  assert "bleu 3.0 [2.0, 4.0]" in text


@pytest.mark.parametrize("binding, message", [
  ("PARTS = 'gsm8k-none-0,gsm9k-*'", "no part of the study is called 'gsm9k-\\*'"),
  ("StudyConfig.seeds = 0", "StudyConfig.seeds is 0"),
  ("StudyConfig.target_rate = 0.0", "StudyConfig.target_rate is 0.0; it must be above 0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, binding, message):
  with pytest.raises(ConfigError, match=message):
    door.config_from_gin(["runs/study.gin"], [f"OUTPUT_DIR = {str(tmp_path)!r}", binding])
