"""Real processes that start, agree, lose one another and stop: one clear line each, within a bounded time."""

import contextlib
import json
import pathlib
import signal
import socket

import pytest
from processes import Processes, free_port, joined, run

PROGRAM = pathlib.Path(__file__).with_name("agreeing.py")
HOST = socket.gethostname()


def commands(scenario, count=2, silence=3):
  port = free_port()
  return [[PROGRAM, f"--scenario={scenario}", *joined(index, count, port, silence)] for index in range(count)]


def test_texts_and_values_are_the_same_everywhere():
  first, second = run(commands("agree"), limit=60)
  assert first.code == second.code == 0, (first, second)
  values = [["", "ü\n2"], ["again", "again"], {"from": 0}]
  assert json.loads(first.out.splitlines()[0]) == [*values, [True, True]]
  assert json.loads(second.out) == [*values, [True, False]]
  assert first.out.splitlines()[1] == "once"
  assert not first.errors and not second.errors


def test_an_error_of_the_first_is_everybodys():
  assert [(ended.code, ended.errors) for ended in run(commands("refuse"), limit=60)] == [(2, ["error: made on 0"])] * 2


def test_hosts_that_disagree_on_the_configuration_say_who_and_where():
  first, second, third = run(commands("differ", 3), limit=90)
  expected = (
    f"error: the hosts disagree on the configuration: process 1 ({HOST}) has 'SEED = 1', process 0 'SEED = 0';"
    f" process 2 ({HOST}) has 'SEED = 2', process 0 'SEED = 0'. Start every process with the same files and versions"
  )
  assert [ended.code for ended in (first, second, third)] == [2, 2, 2]
  assert [ended.errors for ended in (first, second, third)] == [[expected]] * 3


def test_a_barrier_names_who_is_late():
  first, second = run(commands("late"), limit=60)
  late = f"process 1 ({HOST}) did not come to 'lunch' within 2 s: see what it says"
  assert first.code == 3 and first.errors == [f"error: {late}"]
  assert second.code == 3 and second.errors == [f"error: process 1 ({HOST}): process 0 ({HOST}) stopped: {late}"]


def test_a_killed_process_stops_the_others():
  first, second, third = run(commands("killed", 3), limit=60)
  assert second.code == -signal.SIGKILL
  for index, ended in ((0, first), (2, third)):
    assert ended.code == 3 and len(ended.errors) == 1, ended
    # Who hears first says why; the other may hear it from that one.
    assert ended.errors[0].startswith(f"error: process {index} ({HOST}): ")
    assert f"process 1 ({HOST}) has not answered for" in ended.errors[0]


def test_a_killed_coordinator_stops_the_others():
  _, second = run(commands("coordinator_killed"), limit=60)
  assert second.code == 3 and len(second.errors) == 1
  assert f"process 1 ({HOST}): " in second.errors[0] and f"process 0 ({HOST})" in second.errors[0]


def test_the_reason_of_one_that_fails_reaches_the_others():
  first, second = run(commands("broken"), limit=60)
  assert second.code == 1 and "Traceback" in second.err and "no space left" in second.err
  assert first.code == 3
  assert first.errors == [f"error: process 0 ({HOST}): process 1 ({HOST}) stopped: no space left"]


def test_a_notice_to_one_stops_all_at_the_same_step():
  with Processes(commands("preempted", 3)) as processes:
    processes.wait_until(lambda: all("ready" in processes.said(number)[0] for number in range(3)), 60)
    processes.send(1, signal.SIGTERM)
    ended = processes.wait(60)
  assert [one.code for one in ended] == [0, 0, 0], ended
  steps = [one.out.split()[1] for one in ended]
  assert len(set(steps)) == 1 and int(steps[0]) > 3
  assert [one.err.count("told to stop: saved") for one in ended] == [1, 0, 0]


def test_sigterm_ends_what_does_not_listen_to_notices():
  with Processes(commands("waiting")) as processes:
    processes.wait_until(lambda: all("ready" in processes.said(number)[0] for number in range(2)), 60)
    processes.send(1, signal.SIGTERM)
    first, second = processes.wait(60)
  assert second.code == -signal.SIGTERM
  assert first.code == 3 and f"process 1 ({HOST}) has not answered for" in first.errors[0]


@pytest.mark.parametrize(
  "flags, expected",
  [
    (["--process_id=1"], "cannot reach the coordinator 127.0.0.1:{port} within 2 s"),
    (["--process_id=0"], "process 1 of 2 did not come to 127.0.0.1:{port} within 2 s"),
  ],
)
def test_who_comes_alone_says_so(flags, expected):
  port = free_port()
  given = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--start_timeout=2", *flags]
  (ended,) = run([[PROGRAM, "--scenario=agree", *given]], limit=60)
  assert ended.code == 2 and len(ended.errors) == 1 and "Traceback" not in ended.err, ended
  assert expected.format(port=port) in ended.errors[0]


@pytest.mark.parametrize(
  "counts, numbers, expected",
  [
    ([3, 3, 3], [0, 1, 1], f"two processes have --process_id=1, on {HOST} and on {HOST}: number them 0 to 2"),
    ([2, 3], [0, 2], f"process 2 ({HOST}) has --num_processes=3, process 0 ({HOST}) 2"),
    ([4, 4], [0, 2], "processes 1, 3 of 4 did not come to 127.0.0.1:{port} within 8 s"),
  ],
)
def test_a_roll_that_does_not_add_up_is_the_same_line_on_all(counts, numbers, expected):
  port = free_port()
  given = [
    [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={number}", "--start_timeout=8"]
    for count, number in zip(counts, numbers, strict=True)
  ]
  ended = run([[PROGRAM, "--scenario=agree", *flags] for flags in given], limit=60)
  assert [one.code for one in ended] == [2] * len(ended), ended
  assert all(len(one.errors) == 1 and expected.format(port=port) in one.errors[0] for one in ended), ended
  assert not any("Traceback" in one.err or "stack trace" in one.err for one in ended)


def test_who_calls_and_hangs_up_or_says_nonsense_is_nobody():
  port = free_port()
  given = lambda index: [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"]
  with Processes([[PROGRAM, "--scenario=agree", *given(0)]]) as first:
    lines = []

    def answers():
      with contextlib.suppress(OSError):
        lines.append(socket.create_connection(("127.0.0.1", port), timeout=1))
      return lines

    first.wait_until(answers, 60)
    lines.append(socket.create_connection(("127.0.0.1", port), timeout=1))
    lines[0].sendall(b"GET / HTTP/1.1\r\n")
    lines[1].sendall(b'{"greeting": "distillspec", "process": 1, "of": 2, "machine": "elsewhere"}\n')
    lines[1].close()  # a process that died: its number is free again
    with Processes([[PROGRAM, "--scenario=agree", *given(1)]]) as second:
      assert [one.code for one in (*first.wait(60), *second.wait(60))] == [0, 0]
    lines[0].close()


def test_a_taken_port_is_one_line():
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    given = [f"--coordinator=127.0.0.1:{taken.getsockname()[1]}", "--num_processes=2", "--process_id=0"]
    (ended,) = run([[PROGRAM, "--scenario=agree", *given]], limit=60)
  assert ended.code == 2 and len(ended.errors) == 1 and "cannot listen on port" in ended.errors[0]
