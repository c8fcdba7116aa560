"""Failures to be looked at: one HTML file that needs nothing else.

A row an example: what was asked, what is right, what came, marked from where
it first departs. Rows can be searched, filtered by skill, level and outcome,
and sorted by a click on a heading. Responses are text, whatever is in them:
they are embedded as JSON and shown through `textContent`.
"""

import json
from collections.abc import Sequence
from typing import Any

from jaxlm.evaluate.results import Record


def page(
  title: str,
  summary: str,
  records: Sequence[Record],
  before: Sequence[Record] | None = None,
) -> str:
  """The file's text.

  Args:
    title: what was evaluated.
    summary: the tables, as text.
    records: what is shown.
    before: other responses to the same prompts, shown beside them.
  """
  rows = [_row(record) for record in records]
  for row, old in zip(rows, before or (), strict=False):
    row |= {"before": old.texts, "was": old.scores[0]}
  data = {"title": title, "summary": summary, "rows": rows}
  # "</script>" in a response must not end the script, nor half a character,
  # which JSON can hold and no file can, the writing.
  text = json.dumps(data).replace("<", "\\u003c")
  return _PAGE.replace("{DATA}", text)


def _row(record: Record) -> dict[str, Any]:
  example = record.example
  return {
    "prompt": example.prompt,
    "gold": example.response,
    "texts": record.texts,
    "scores": record.scores,
    "score": sum(record.scores) / len(record.scores),
    "skill": example.skill,
    "level": example.level,
    "length": len(example.response),
  }


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Evaluation</title>
<style>
  :root { color-scheme: light dark; --line: #8884; --wrong: #e5534b44; }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
  h1 { font-size: 1.3rem; }
  pre, td.text { font: 13px/1.5 ui-monospace, monospace; }
  pre { max-height: 16rem; overflow: auto; }
  nav { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0;
        align-items: center; }
  nav * { font: inherit; padding: .2rem .5rem; }
  nav input { flex: 1 1 14rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; vertical-align: top; padding: .3rem .8rem;
           border-bottom: 1px solid var(--line); }
  th { cursor: pointer; user-select: none; position: sticky; top: 0;
       background: Canvas; white-space: nowrap; }
  th[aria-sort=ascending]::after { content: " \\2191"; }
  th[aria-sort=descending]::after { content: " \\2193"; }
  td { white-space: nowrap; }
  td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 7rem; }
  td.said { width: 36%; }
  td.said div { max-height: 16rem; overflow: auto; }
  td.text div + div { border-top: 1px dotted var(--line); }
  mark { background: var(--wrong); color: inherit; }
  .empty { opacity: .6; font-style: italic; }
</style>
<h1 id="title"></h1>
<details open><summary>Figures</summary><pre id="summary"></pre></details>
<nav>
  <input id="search" type="search" placeholder="search in all texts">
  <select id="outcome" aria-label="outcome"></select>
  <select id="skill" aria-label="skill"></select>
  <select id="level" aria-label="level"></select>
  <span id="count"></span>
</nav>
<table><thead><tr id="head"></tr></thead><tbody id="body"></tbody></table>
<p><button id="more" hidden>show more</button></p>
<script type="application/json" id="data">{DATA}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const compared = data.rows.some((row) => "before" in row);
const PAGE = 200;
let shown = PAGE, key = "number", down = false;
data.rows.forEach((row, i) => { row.number = i + 1; });

const columns = [["number", "#"], ["skill", "skill"], ["level", "level"],
  ["length", "length"], ["prompt", "prompt"], ["gold", "right"]];
if (compared) columns.push(["before", "before"]);
columns.push(["texts", compared ? "after" : "response"], ["score", "score"]);

const outcomes = {
  "wrong": (row) => row.score < 1,
  "all": () => true,
  "right": (row) => row.score >= 1,
};
if (compared) {
  outcomes["come right"] = (row) => row.scores[0] >= 1 && row.was < 1;
  outcomes["gone wrong"] = (row) => row.scores[0] < 1 && row.was >= 1;
}

function choices(select, names) {
  for (const name of names) select.append(new Option(name, name));
  select.onchange = () => { shown = PAGE; draw(); };
}
function values(name) {
  const found = [...new Set(data.rows.map((row) => row[name]))];
  const order = (a, b) => (a > b) - (a < b);
  return ["every " + name, ...found.sort(order).map(String)];
}

function chosen() {
  const word = at("search").value.toLowerCase();
  const fits = (row, name) => at(name).selectedIndex === 0
    || String(row[name]) === at(name).value;
  const texts = (row) => [row.prompt, row.gold, ...row.texts,
    ...(row.before || [])].join("\\n").toLowerCase();
  return data.rows.filter((row) => outcomes[at("outcome").value](row)
    && fits(row, "skill") && fits(row, "level") && texts(row).includes(word));
}
function sorted(rows) {
  const of = (row) => Array.isArray(row[key]) ? row[key][0] : row[key];
  const sign = down ? -1 : 1;
  return rows.sort((a, b) => sign * ((of(a) > of(b)) - (of(a) < of(b)))
    || a.number - b.number);
}

function cell(row, name) {
  const td = document.createElement("td");
  const value = row[name];
  if (name === "texts" || name === "before") {
    td.className = "text said";
    for (const text of value) td.append(marked(text, row.gold));
  } else if (name === "score") {
    td.textContent = value.toFixed(2);
  } else {
    if (name === "prompt" || name === "gold") td.className = "text";
    td.textContent = value;
  }
  return td;
}
function marked(text, gold) {
  const div = document.createElement("div");
  const a = text.trim(), b = gold.trim();
  let same = 0;
  while (same < a.length && a[same] === b[same]) same++;
  div.append(a.slice(0, same));
  if (same < a.length) {
    const mark = document.createElement("mark");
    mark.textContent = a.slice(same);
    div.append(mark);
  } else if (same < b.length) {
    const span = document.createElement("span");
    span.className = "empty";
    span.textContent = a ? " (ends early)" : "(nothing)";
    div.append(span);
  }
  return div;
}

function draw() {
  const rows = sorted(chosen());
  at("count").textContent = rows.length + " of " + data.rows.length;
  at("body").replaceChildren(...rows.slice(0, shown).map((row) => {
    const tr = document.createElement("tr");
    tr.append(...columns.map(([name]) => cell(row, name)));
    return tr;
  }));
  at("more").hidden = rows.length <= shown;
  for (const th of at("head").children) {
    const order = down ? "descending" : "ascending";
    th.ariaSort = th.dataset.key === key ? order : "none";
  }
}

document.title = data.title;
at("title").textContent = data.title;
at("summary").textContent = data.summary;
choices(at("outcome"), Object.keys(outcomes));
choices(at("skill"), values("skill"));
choices(at("level"), values("level"));
at("search").oninput = () => { shown = PAGE; draw(); };
at("more").onclick = () => { shown += PAGE; draw(); };
for (const [name, label] of columns) {
  const th = document.createElement("th");
  th.textContent = label;
  th.dataset.key = name;
  th.onclick = () => { down = key === name && !down; key = name; draw(); };
  at("head").append(th);
}
if (!data.rows.some(outcomes["wrong"])) at("outcome").value = "all";
draw();
</script>
</html>
"""
