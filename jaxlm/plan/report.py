"""A plan as text, JSON and one HTML page."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.files import replace
from jaxlm.plan.make import Outcome, Plan
from jaxlm.plan.roofline import mfu
from jaxlm.speed import short

Row = tuple[str, ...]
DAY = 86_400.0


# --- Numbers ----------------------------------------------------------------


def facts(
  plan: Plan, tokens: float | None = None, price: float | None = None
) -> dict[str, Any]:
  """Everything a plan says, as JSON takes it.

  Args:
    plan: what was planned.
    tokens: a budget to train on.
    price: of one chip for one hour, in dollars.
  """
  where, model = plan.site, plan.model
  chip = where.chip
  return {
    "target": where.target.text,
    "chips": where.target.size,
    "chip": {
      "name": chip.name,
      "peak_flops": chip.flops,
      "memory_bytes": chip.memory,
      "bandwidth": chip.bandwidth,
      "links": chip.links,
      "network": chip.network,
      "sources": list(chip.sources),
    },
    "limit_bytes": where.limit,
    "mesh": {k: v for k, v in plan.mesh.shape.items() if v > 1},
    "preset": plan.config.parallel.preset,
    "model": {
      "family": plan.config.model.family,
      "parameters": model.n_params(),
      "active": model.n_active(),
      "depth": model.depth,
    },
    "attention": list(plan.attention),
    "programs": {
      o.name: _program(plan, o, tokens, price) for o in plan.outcomes
    },
    "step": _step(plan),
  }


def _step(plan: Plan) -> dict[str, Any] | None:
  """A step of PPO or GRPO: its programs, one after the other."""
  times = {o.name: o.times for o in plan.outcomes}
  if plan.step is None or not times.keys() >= plan.step.runs().keys():
    return None
  runs, rows = plan.step.runs(), plan.step.options.rows
  seconds = {
    "overlapped": sum(n * times[name].least for name, n in runs.items()),
    "serial": sum(n * times[name].most for name, n in runs.items()),
  }
  return {
    "runs": runs,
    "samples": rows,
    "tokens": plan.step.options.tokens,
    "seconds": seconds,
    "samples_per_second": {k: rows / s for k, s in seconds.items()},
  }


def _program(
  plan: Plan, o: Outcome, tokens: float | None, price: float | None
) -> dict[str, Any]:
  chips, limit = plan.site.target.size, plan.site.limit
  peak = plan.site.chip.peak(plan.config.precision)
  hardware = sum(o.reading.flops.values()) * chips
  found: dict[str, Any] = {
    "tokens": o.tokens,
    "compiled": bool(o.memory),
    "refused": o.refused.splitlines()[0] if o.refused else "",
    "seconds_here": o.seconds,
    "memory": {
      "total": o.total,
      "fits": bool(o.total <= limit) and not o.refused,
      "compiler": o.memory,
      "estimate": o.reading.peak,
      "parts": o.reading.parts(),
      "saved": o.reading.saved,
      "largest": [
        {"name": str(a), "kind": a.kind, "bytes": a.bytes}
        for a in o.reading.live[:12]
      ],
    },
    "flops": {
      "model": o.model_flops,
      "hardware": hardware,
      "overhead": hardware / o.model_flops - 1,
      "by_dtype_per_chip": dict(o.reading.flops),
    },
    "collectives": o.collectives(plan.network),
    "seconds": {
      "compute": o.times.compute,
      "memory": o.times.memory,
      "network": o.times.network,
      "compiler": o.times.compiler,
      "overlapped": o.times.least,
      "serial": o.times.most,
      "bound": o.times.bound,
    },
    "mfu": {
      "overlapped": mfu(o.model_flops, o.times.least, chips, peak),
      "serial": mfu(o.model_flops, o.times.most, chips, peak),
    },
    "tokens_per_second": {
      "overlapped": o.tokens / o.times.least,
      "serial": o.tokens / o.times.most,
    },
  }
  if o.name == "train" and tokens:
    found["budget"] = _budget(o, chips, tokens, price)
  return found


def _budget(
  o: Outcome, chips: int, tokens: float, price: float | None
) -> dict[str, Any]:
  """Days and cost of a token budget, at either end of the estimate."""
  days = {
    "overlapped": tokens / o.tokens * o.times.least / DAY,
    "serial": tokens / o.tokens * o.times.most / DAY,
  }
  found: dict[str, Any] = {"tokens": tokens, "days": days}
  if price is not None:
    cost = {k: 24 * d * chips * price for k, d in days.items()}
    found |= {"price_per_chip_hour": price, "cost": cost}
  return found


# --- Text -------------------------------------------------------------------


def text(found: dict[str, Any]) -> str:
  """The plan on a terminal."""
  mesh = ", ".join(f"{k} {v}" for k, v in found["mesh"].items()) or "one device"
  m = found["model"]
  head = [
    ("target", f"{found['target']}: {found['chips']:,} chips, {mesh}"),
    (
      "model",
      f"{m['family']}, {m['parameters']:,} parameters, {m['active']:,} active",
    ),
    ("attention", f"{found['attention'][0]} ({found['attention'][1]})"),
    ("peaks", "; ".join(found["chip"]["sources"])),
  ]
  parts = [_table(head)]
  for name, p in found["programs"].items():
    parts.append(f"{name}\n" + _table(rows(p, found)))
  if found["step"]:
    parts.append("step\n" + _table(_step_rows(found)))
  return "\n\n".join(parts)


def rows(p: dict[str, Any], found: dict[str, Any]) -> list[Row]:
  """One program's table: what, how much, by what rule."""
  return [
    *_memory_rows(p, found["limit_bytes"]),
    *_work_rows(p),
    *_network_rows(p),
    *_time_rows(p),
    *_budget_rows(p),
  ]


def _memory_rows(p: dict[str, Any], limit: float) -> list[Row]:
  m = p["memory"]
  fits = "fits" if m["fits"] else "does NOT fit"
  rule = "the compiler's" if p["compiled"] else "estimate"
  made = [
    (
      "memory per device",
      f"{short(m['total'])}B of {short(limit)}B",
      f"{fits}; {rule}",
    )
  ]
  if p["refused"]:
    made.append(("  the compiler", "refused", p["refused"][:100]))
  for kind, size in m["parts"].items():
    if size >= 1e-3 * m["estimate"]:
      made.append((f"  {kind}", f"{short(size)}B", "at the fullest moment*"))
  for name, size in m["compiler"].items():
    if size:
      made.append((f"  compiler: {name}", f"{short(size)}B", "exact"))
  for name, size in m["saved"].items():
    if size >= 1e-2 * m["estimate"]:
      made.append(("  kept for backward", f"{short(size)}B", name))
  return made


def _work_rows(p: dict[str, Any]) -> list[Row]:
  f = p["flops"]
  return [
    ("model FLOPs", short(f["model"]), f"{p['tokens']:,} tokens, all chips"),
    (
      "hardware FLOPs",
      short(f["hardware"]),
      f"{f['overhead']:+.1%}: again, by the optimizer, or on every chip*",
    ),
  ]


def _network_rows(p: dict[str, Any]) -> list[Row]:
  rule = "from the compiled program" if p["compiled"] else "estimate"
  return [
    (
      f"{c['kind']} over {', '.join(c['axes'])}",
      f"{short(c['bytes'])}B",
      f"{c['count']:,} times, {_time(c['seconds'])}; {rule}",
    )
    for c in p["collectives"]
    if c["seconds"] >= 1e-2 * p["seconds"]["network"]
  ]


def _time_rows(p: dict[str, Any]) -> list[Row]:
  s = p["seconds"]
  made = [("compute", _time(s["compute"]), "hardware FLOPs / peak")]
  if s["memory"] is not None:
    made.append(("memory", _time(s["memory"]), "traffic / bandwidth*"))
  made.append(("network", _time(s["network"]), "messages / links*"))
  if s["compiler"]:
    rule = "the compiler's cycles, and kernels at peak"
    made.append(("on the chip", _time(s["compiler"]), rule))
  made.append(
    (
      "it takes",
      f"{_time(s['overlapped'])} to {_time(s['serial'])}",
      f"overlapped or one after the other*; bound by {s['bound']}",
    )
  )
  low, high = p["mfu"]["serial"], p["mfu"]["overlapped"]
  made.append(("MFU", f"{low:.1%} to {high:.1%}", "model FLOPs / peak*"))
  t = p["tokens_per_second"]
  speed = f"{short(t['serial'])} to {short(t['overlapped'])}"
  made.append(("tokens a second", speed, "*estimate"))
  return made


def _step_rows(found: dict[str, Any]) -> list[Row]:
  """A step of PPO or GRPO on a terminal."""
  step, programs = found["step"], found["programs"]
  s, rate = step["seconds"], step["samples_per_second"]
  runs = ", ".join(f"{n} x {name}" for name, n in step["runs"].items())
  fullest = max(step["runs"], key=lambda n: programs[n]["memory"]["total"])
  most = programs[fullest]["memory"]["total"]
  samples = f"{step['samples']:,} responses of {step['tokens']:,} tokens"
  return [
    ("memory per device", f"{short(most)}B", f"the fullest is {fullest}"),
    (
      "a step takes",
      f"{_time(s['overlapped'])} to {_time(s['serial'])}",
      f"{runs}*; without what judges the responses",
    ),
    (
      "samples a second",
      f"{short(rate['serial'])} to {short(rate['overlapped'])}",
      f"{samples}; *estimate",
    ),
  ]


def _budget_rows(p: dict[str, Any]) -> list[Row]:
  b = p.get("budget")
  if not b:
    return []
  days = f"{b['days']['overlapped']:.3g} to {b['days']['serial']:.3g}"
  made = [("days", days, f"for {short(b['tokens'])} tokens*")]
  if "cost" in b:
    cost = f"${b['cost']['overlapped']:,.0f} to ${b['cost']['serial']:,.0f}"
    rule = f"at ${b['price_per_chip_hour']:g} per chip and hour, as given"
    made.append(("cost", cost, rule))
  return made


def _time(seconds: float) -> str:
  """Three digits and a unit."""
  for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
    if seconds >= size or unit == "us":
      return f"{seconds / size:.3g} {unit}"
  raise AssertionError(seconds)


def _table(lines: Sequence[Row]) -> str:
  left = max(len(r[0]) for r in lines)
  middle = max((len(r[1]) for r in lines if len(r) > 2), default=0)
  return "\n".join(
    f"  {r[0]:{left}}  {r[1]:{middle}}  {r[2] if len(r) > 2 else ''}".rstrip()
    for r in lines
  )


# --- Files ------------------------------------------------------------------


def save(found: dict[str, Any], folder: Path, extra: str = "") -> list[Path]:
  """Writes plan-TARGET.json and plan-TARGET.html; returns their paths."""
  folder.mkdir(parents=True, exist_ok=True)
  name = "plan-" + found["target"].replace(":", "-")
  paths = [folder / f"{name}.json", folder / f"{name}.html"]
  replace(paths[0], json.dumps(found, indent=2) + "\n")
  replace(paths[1], page(found, extra))
  return paths


def page(found: dict[str, Any], extra: str = "") -> str:
  """One HTML page, pictures inside."""
  title = html.escape(f"{found['model']['family']} on {found['target']}")
  body = [f"<h1>{title}</h1>", f"<pre>{html.escape(text(found))}</pre>"]
  if extra:
    body.append(f"<pre>{html.escape(extra)}</pre>")
  for name, p in found["programs"].items():
    body.append(f"<h2>{name}</h2>")
    picture = base64.b64encode(_plots(p, found["limit_bytes"])).decode()
    body.append(f'<img src="data:image/png;base64,{picture}" alt="{name}">')
  return (
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    f"<title>{title}</title><style>body{{font:15px sans-serif;margin:2em}}"
    "pre{font:13px monospace}img{max-width:100%}</style></head><body>"
    + "\n".join(body)
    + "</body></html>\n"
  )


def _plots(p: dict[str, Any], limit: float) -> bytes:
  """Memory by part beside the limit, and time by part, as a PNG."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 2.6), layout="constrained")
  memory, seconds = figure.subplots(1, 2)
  left = 0.0
  for kind, size in p["memory"]["parts"].items():
    memory.barh(["estimate"], [size / 1e9], left=left, label=kind)
    left += size / 1e9
  m = p["memory"]["compiler"]
  if m:
    memory.barh(["compiler"], [m["arguments"] / 1e9], color="0.5")
    rest = (p["memory"]["total"] - m["arguments"]) / 1e9
    memory.barh(["compiler"], [rest], left=m["arguments"] / 1e9, color="0.75")
  memory.axvline(limit / 1e9, color="red", linestyle="--")
  memory.set_xlabel("GB per device (red: the limit)")
  memory.legend(fontsize=6)
  names = ("compute", "memory", "network", "compiler", "overlapped", "serial")
  known = {k: p["seconds"][k] for k in names if p["seconds"][k]}
  known = {k: v for k, v in known.items() if math.isfinite(v)}
  seconds.barh(list(known), list(known.values()))
  seconds.set_xlabel("seconds")
  file = io.BytesIO()
  figure.savefig(file, format="png", dpi=110)
  return file.getvalue()
