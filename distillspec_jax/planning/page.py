"""A plan as text: tables for people; the same figures are in plan.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ESTIMATES = (
    "ESTIMATES, compiled for virtual CPU devices, which compute bfloat16 in float32: read temporaries, memory"
    " traffic and messages of the step as upper bounds"
)


def page(plan: dict[str, Any]) -> str:
  """Lay a plan out in Markdown.

  Args:
    plan: as plan.json holds it.
  """
  parts = [_head(plan), _memory(plan), _step(plan), _messages(plan)]
  if plan.get("decoding"):
    parts.append(_decoding(plan))
  return "\n\n".join([part for part in parts if part] + [_verdict(plan)])


def _head(plan: dict[str, Any]) -> str:
  topology, mesh = plan["topology"], plan["mesh"]
  axes = ", ".join(f"{name} {size}" for name, size in mesh.items())
  quality = "compiled by the TPU's own compiler" if plan["exact"] else _ESTIMATES
  lines = [
      f"{plan['run']} on {topology['name']}: {topology['devices']} devices ({axes}); {quality}",
      *(f"{role}: {text}" for role, text in plan["models"].items()),
  ]
  return "\n".join(lines)


def _memory(plan: dict[str, Any]) -> str:
  sizes = plan["step"]["bytes"]
  rows = [["a device's memory", "GiB"]]
  for name, size in sizes.items():
    shown = "of these, rollout caches" if name == "rollout caches" else name
    rows.append([shown, "?" if size is None else gib(size)])
  rows.append(["available", gib(plan["topology"]["memory"])])
  order = ["parameters", "optimizer", "target", "batch and rest", "temporaries", "of these, rollout caches", "program"]
  rows[1:] = sorted(rows[1:], key=lambda row: order.index(row[0]) if row[0] in order else len(order))
  return table(rows)


def _step(plan: dict[str, Any]) -> str:
  step = plan["step"]
  if step["roofline"] is None:
    return "The step does not compile for this memory, so there is no estimate of its time."
  bound, work = step["roofline"], step["work"]
  rows = [
      ["a step, a device", "amount", "seconds at least"],
      ["operations", f"{work['flops'] / 1e12:.3f} T", f"{bound['compute']:.4f}"],
      ["memory read and written", f"{work['bytes'] / 1e9:.2f} GB", f"{bound['memory']:.4f}"],
      ["sent to other devices", f"{work['wire_bytes'] / 1e9:.2f} GB", f"{bound['interconnect']:.4f}"],
  ]
  share = bound["compute"] / bound["least"]
  text = (
      f"A step takes {bound['least']:.3f} s where all overlaps, {bound['most']:.3f} s where nothing does;"
      f" {bound['binds']} binds (at best {share:.0%} of the peak operations)."
  )
  if work["unbounded"]:
    text += f" {work['unbounded']} loop(s) end when all rows have; they were counted as T rounds."
  return f"{table(rows)}\n\n{text}"


def _messages(plan: dict[str, Any]) -> str:
  work = plan["step"]["work"]
  if work is None:
    return ""
  if not work["messages"]:
    return "The devices send each other nothing."
  rows = [["messages of a step", "number", "MB got, a device", "MB sent, a device"]]
  for kind, sums in work["messages"].items():
    rows.append([kind, f"{sums['count']:,}", f"{sums['bytes'] / 1e6:,.1f}", f"{sums['sent'] / 1e6:,.1f}"])
  return table(rows)


def _decoding(plan: dict[str, Any]) -> str:
  decoding = plan["decoding"]
  rows = [["a pass at batch 1", "tokens", "weights GiB", "cache MiB", "read GB", "messages", "ms", "binds"]]
  for name, figures in decoding["passes"].items():
    rows.append([
        "target, verifying" if name == "verify" else name,
        str(figures["queries"]),
        gib(figures["parameters"]),
        f"{figures['cache'] / 2**20:.1f}",
        f"{figures['bytes'] / 1e9:.3f}",
        str(figures["messages"]),
        f"{1e3 * figures['seconds']:.3f}",
        figures["roofline"]["binds"],
    ])
  text = table(rows)
  if speculative := decoding.get("speculative"):
    even = speculative["break_even_alpha"]
    pays = "it never pays" if even is None else f"it pays above alpha = {even:.2f}"
    text += (
        f"\n\nPlain decoding takes {decoding['plain_ms_per_token']:.3f} ms a token. With gamma {speculative['gamma']} a"
        f" block takes {speculative['block_ms']:.3f} ms (c = {speculative['cost_ratio']:.3f},"
        f" v = {speculative['verify_cost']:.3f}); {pays}."
    )
    rows = [["alpha", *(f"{row['alpha']:g}" for row in speculative["at"])]]
    rows.append(["ms a token", *(f"{row['ms_per_token']:.3f}" for row in speculative["at"])])
    rows.append(["speed-up", *(f"{row['speedup']:.2f}" for row in speculative["at"])])
    text += f"\n\n{table(rows)}"
  passes = decoding["passes"]
  held = sum(passes[name]["parameters"] + passes[name]["cache"] for name in passes if name != "verify")
  available = plan["topology"]["memory"]
  if held > available:
    text += f"\n\nDecoding does NOT fit: weights and caches take {gib(held)} GiB, a device has {gib(available)} GiB."
  return text


def _verdict(plan: dict[str, Any]) -> str:
  available, total = plan["topology"]["memory"], plan["step"]["bytes"]["total"]
  if plan["fits"]:
    left = available - total
    text = f"It fits: {gib(total)} of {gib(available)} GiB, {left / available:.0%} free."
    loading = plan["step"]["loading"]
    if loading > available:
      text += (
          f" But the target as it was saved takes {gib(loading)} GiB a device while it is loaded: convert it to"
          " bfloat16 first."
      )
    return text
  needs = "more" if total is None else f"{gib(total)} GiB"
  lines = [f"It does NOT fit: it needs {needs}, a device has {gib(available)} GiB."]
  for trial in plan["advice"]["tried"]:
    settings = ", ".join(trial["settings"])
    if trial["fits"]:
      lines.append(f"It fits with {settings}: {gib(trial['total'])} GiB.")
    elif trial["total"] is None:
      lines.append(f"Not with {settings}: {gib(trial['resident'])} GiB before the step begins.")
    else:
      lines.append(f"Not with {settings}: {gib(trial['total'])} GiB.")
  if not plan["advice"]["fits_with"]:
    lines.append(_without_advice(plan["advice"]))
  return "\n".join(lines)


def _without_advice(advice: dict[str, Any]) -> str:
  end = "take more devices, or a smaller batch or shorter inputs."
  if advice["limited"]:
    begin = "Nothing that was tried fits" if advice["tried"] else "Nothing was tried"
    return f"{begin}: a larger --tries looks further, or {end}"
  return f"{'Nothing that was tried fits' if advice['tried'] else 'There is no setting to try'}: {end}"


def gib(size: float) -> str:
  """Write bytes as GiB."""
  return f"{size / 2**30:.2f}" if size >= 1e7 else f"{size / 2**30:.4f}"


def table(rows: Sequence[Sequence[str]]) -> str:
  """Lay rows out as a Markdown table, the first its head, all columns but the first to the right."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  line = lambda row: "| " + " | ".join(
      cell.ljust(width) if column == 0 else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
  ) + " |"
  dashes = lambda column, width: "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
  rule = f"|{'|'.join(dashes(column, width) for column, width in enumerate(widths))}|"
  return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
