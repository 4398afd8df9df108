"""A plan as text: every figure finds its place, also where a compiler gave none."""

import copy

import pytest

from distillspec_jax.planning.page import gib, page, table

GIB = 2**30
PLAN = {
  "run": "runs/x.gin",
  "topology": {"name": "v5e-4", "devices": 4, "memory": 16 * GIB},
  "mesh": {"data": 2, "fsdp": 1, "model": 2},
  "exact": True,
  "models": {"target": "7 parameters", "draft": "3 parameters"},
  "step": {
    "bytes": {
      "parameters": GIB, "optimizer": 0, "target": 3 * GIB, "rollout caches": GIB // 2, "batch and rest": 0,
      "temporaries": 2 * GIB, "program": 0, "total": 6 * GIB,
    },
    "loading": 6 * GIB,
    "work": {
      "flops": 2e12, "bytes": 5e9, "wire_bytes": 1e9, "unbounded": 1,
      "messages": {"all-reduce": {"count": 1200, "bytes": 2e6, "sent": 3e6}},
    },
    "roofline": {
      "compute": 0.01, "memory": 0.02, "interconnect": 0.03, "least": 0.03, "most": 0.06, "binds": "interconnect"
    },
  },
  "fits": True,
  "advice": {"tried": [], "fits_with": None, "limited": False},
}  # fmt: skip


def test_a_plan_that_fits():
  text = page(PLAN)
  assert "runs/x.gin on v5e-4: 4 devices (data 2, fsdp 1, model 2); compiled by the TPU's own compiler" in text
  rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")}
  assert (rows["parameters"], rows["target"], rows["of these, rollout caches"]) == ("1.00", "3.00", "0.50")
  assert list(rows).index("of these, rollout caches") == list(rows).index("temporaries") + 1
  assert (rows["operations"], rows["all-reduce"]) == ("2.000 T", "1,200")
  assert "0.030 s where all overlaps, 0.060 s where nothing does; interconnect binds (at best 33% of the peak" in text
  assert "1 loop(s) end when all rows have" in text
  assert text.endswith("It fits: 6.00 of 16.00 GiB, 62% free.")
  estimated = page(PLAN | {"exact": False})
  assert "ESTIMATES" in estimated and "upper bounds" in estimated


def test_a_target_that_is_too_large_while_it_is_loaded():
  plan = copy.deepcopy(PLAN)
  plan["step"]["loading"] = 17 * GIB
  assert "But the target as it was saved takes 17.00 GiB" in page(plan)


@pytest.mark.parametrize(("total", "needs"), [(20 * GIB, "20.00 GiB"), (None, "more")])
def test_a_plan_that_does_not_fit(total, needs):
  plan = copy.deepcopy(PLAN) | {"fits": False}
  plan["step"] |= {"work": None, "roofline": None}
  plan["step"]["bytes"] |= {"total": total, "temporaries": None}
  tried = [
    {"settings": ["a = 1"], "resident": 17 * GIB, "total": None, "fits": False},
    {"settings": ["b = 1"], "resident": GIB, "total": 18 * GIB, "fits": False},
    {"settings": ["a = 1", "b = 2"], "resident": GIB, "total": 9 * GIB, "fits": True},
  ]
  plan["advice"] = {"tried": tried, "fits_with": ["a = 1", "b = 2"], "limited": False}
  text = page(plan)
  assert f"It does NOT fit: it needs {needs}, a device has 16.00 GiB." in text
  assert "Not with a = 1: 17.00 GiB before the step begins." in text
  assert "Not with b = 1: 18.00 GiB." in text and text.endswith("It fits with a = 1, b = 2: 9.00 GiB.")


@pytest.mark.parametrize(
  ("tried", "limited", "last"),
  [
    (1, False, "Nothing that was tried fits: take more devices, or"),
    (1, True, "Nothing that was tried fits: a larger --tries looks further, or take more devices, or"),
    (0, True, "Nothing was tried: a larger --tries looks further, or take more devices, or"),
    (0, False, "There is no setting to try: take more devices, or"),
  ],
)
def test_a_search_without_success(tried, limited, last):
  trial = {"settings": ["b = 1"], "resident": GIB, "total": 18 * GIB, "fits": False}
  advice = {"tried": [trial] * tried, "fits_with": None, "limited": limited}
  plan = copy.deepcopy(PLAN) | {"fits": False, "advice": advice}
  assert page(plan).splitlines()[-1].startswith(last)


def test_decoding():
  a_pass = {
    "queries": 1, "parameters": GIB, "cache": 2**20, "bytes": 1e9, "messages": 5, "seconds": 0.002,
    "roofline": {"binds": "memory"},
  }  # fmt: skip
  speculative = {
    "gamma": 3, "block_ms": 9.0, "cost_ratio": 1.5, "verify_cost": 1.0, "break_even_alpha": None,
    "at": [{"alpha": 0.5, "speedup": 0.5, "ms_per_token": 4.0}],
  }  # fmt: skip
  passes = {"target": a_pass, "verify": a_pass | {"queries": 4}, "draft": a_pass}
  text = page(PLAN | {"decoding": {"passes": passes, "plain_ms_per_token": 2.0, "speculative": speculative}})
  assert "Plain decoding takes 2.000 ms a token. With gamma 3 a block takes 9.000 ms" in text
  assert "it never pays." in text and "| target, verifying" in text and "does NOT fit" not in text
  large = {"target": a_pass | {"parameters": 15 * GIB}, "verify": a_pass, "draft": a_pass}
  assert "Decoding does NOT fit: weights and caches take 16.00 GiB, a device has 16.00" in page(
    PLAN | {"decoding": {"passes": large}}
  )
  alone = page(PLAN | {"decoding": {"passes": {"draft": a_pass}}})
  assert "| draft " in alone and "Plain decoding" not in alone


def test_tables():
  assert table([["a", "b"], ["cc", "1"]]) == "| a  | b |\n|----|--:|\n| cc | 1 |"
  assert (gib(3 * GIB), gib(1000)) == ("3.00", "0.0000")
