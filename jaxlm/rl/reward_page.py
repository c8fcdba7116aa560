"""What is found of a reward model, to be read: a table and a picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import files
from jaxlm.errors import UserError

Report = dict[str, Any]


def write(report: Report, out: Path) -> None:
  """report.md, report.json and report.png in a folder."""
  try:
    out.mkdir(parents=True, exist_ok=True)
    files.replace(out / "report.json", json.dumps(report, indent=1) + "\n")
    files.replace(out / "report.md", told(report))
    draw(report, out / "report.png")
  except OSError as error:
    raise UserError(f"cannot write to {out} ({files.reason(error)})") from error


def told(report: Report) -> str:
  """The report as a table, with what each figure should be."""
  rows = [
    (
      f"accuracy on {report['pairs']} held-out pairs",
      f"{report['accuracy']:.3f} ± {report['accuracy_error']:.3f}",
      "near 1 - share of wrong labels",
    ),
    *(
      (f"... where the better one is {name}", f"{right:.3f} ({n})", "the same")
      for name, (right, n) in report["accuracy_by_length"].items()
    ),
    ("change of a score with place and padding", f"{report['place']:.1e}", "0"),
    (
      "rank correlation of length and score, right responses",
      f"{report['length_bias']:+.2f}",
      "near 0",
    ),
    ("calibration error", f"{report['calibration']['error']:.3f}", "near 0"),
    *(_trick(name, found) for name, found in report["tricks"].items()),
  ]
  if "control" in report:
    c = report["control"]
    text = f"{c['accuracy']:.3f} ± {c['error']:.3f}"
    rows += [
      ("trained on shuffled labels: accuracy", text, "0.50 ± 0.05"),
      (
        "... probability it gives the better one",
        f"{c['promise']:.3f}",
        "near 0.5",
      ),
    ]
  if "best_of_n" in report:
    b = report["best_of_n"]
    rows += [
      (
        f"best of {n} by reward: true score",
        f"{true:.3f}",
        f"at most {best:.3f}",
      )
      for n, true, best in zip(b["n"], b["true"], b["best"], strict=True)
    ]
    bias = f"{b['length_bias_of_wrong']:+.2f}"
    rows.append(("length and reward, wrong responses", bias, "near 0"))
  lines = "".join(f"| {a} | {b} | {c} |\n" for a, b, c in rows)
  return f"| asked | found | should be |\n|---|---|---|\n{lines}"


def _trick(name: str, found: Report) -> tuple[str, str, str]:
  """The row of a worthless change."""
  words = [] if found["share"] is None else [f"{found['share']:.3f}"]
  words += [f"({found['asked']})"] if found["asked"] else []
  if found["too_long"]:
    words.append(f"{found['too_long']} are longer than the model reads")
  told = " ".join(words) or "none to ask"
  return f"{name}: scores as high as the right one", told, "0"


def draw(report: Report, path: Path) -> None:
  """Scores, calibration and, where there is one, the curve of best of n."""
  from matplotlib.figure import Figure

  panels = 3 if "best_of_n" in report else 2
  figure = Figure(figsize=(4.2 * panels, 3.8), dpi=130, layout="constrained")
  axes = figure.subplots(1, panels)
  _draw_scores(axes[0], report)
  _draw_calibration(axes[1], report["calibration"])
  if panels == 3:
    _draw_curve(axes[2], report["best_of_n"])
  figure.savefig(path)


def _draw_scores(axes: Any, report: Report) -> None:
  """Both sides in the same bins, so that their heights can be compared."""
  edges = np.histogram_bin_edges([*report["scores"].values()], 30)
  for name, scores in report["scores"].items():
    axes.hist(scores, edges, alpha=0.6, label=f"{name} responses")
  axes.set(
    title=f"{report['accuracy']:.1%} of {report['pairs']} pairs right",
    xlabel="reward",
    ylabel="responses",
  )
  axes.legend()


def _draw_calibration(axes: Any, found: Report) -> None:
  """A point of each bin, as large as there are pairs in it."""
  axes.plot([0, 1], [0, 1], color="0.7")
  axes.plot(found["promised"], found["seen"], color="C0", linewidth=1)
  sizes = 8 + 160 * np.array(found["count"]) / sum(found["count"])
  axes.scatter(found["promised"], found["seen"], sizes, color="C0", zorder=2)
  axes.set(
    title=f"calibration error {found['error']:.3f}",
    xlabel="promised probability (area: pairs)",
    ylabel="how often it was so",
  )


def _draw_curve(axes: Any, curve: Report) -> None:
  """The true score on the left axis, the reward on the right one."""
  other = axes.twinx()
  lines = [
    *axes.plot(curve["kl"], curve["true"], "o-", label="true score"),
    *axes.plot(curve["kl"], curve["best"], "--", label="a perfect judge's"),
    *other.plot(curve["kl"], curve["proxy"], "s-", color="C3", label="reward"),
  ]
  axes.set(
    title=f"best of 1 to {curve['n'][-1]}, {curve['prompts']} prompts",
    xlabel="KL from the policy, nats",
    ylabel="true score",
    ylim=(0, 1.03),
  )
  other.set_ylabel("reward", color="C3")
  axes.legend(  # below: curves may pass anywhere
    handles=lines,
    loc="upper center",
    bbox_to_anchor=(0.5, -0.14),
    ncols=3,
    fontsize="small",
  )
