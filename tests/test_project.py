"""What the pages say about the project is so."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def dead_links(text: str, folder: Path) -> list[str]:
  """Links and pictures of a page that lead to no file."""
  targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
  inner = [t for t in targets if not t.startswith(("http:", "https:"))]
  return [target for target in inner if not (folder / target).exists()]


def unlisted(readme: str, folder: Path) -> list[str]:
  """Modules and packages at the top that the file tree does not show."""
  tree = readme.split("## The tree")[1].split("```")[1]
  found = [
    path.name if path.is_file() else f"{path.name}/"
    for path in sorted(folder.iterdir())
    if path.suffix == ".py" or any(path.glob("*.py"))
  ]
  return [name for name in found if name[0] != "_" and name not in tree]


def test_dead_links_finds(tmp_path):
  """Pictures and places inside a page count; the web is not asked."""
  (tmp_path / "here.md").touch()
  text = "[a](here.md#part) ![b](no.png) [c](https://x.org/y) [d](gone.md#z)"
  assert dead_links(text, tmp_path) == ["no.png", "gone.md"]


def test_unlisted_finds(tmp_path):
  """A module and a package that the tree lacks; private ones may lack."""
  for name in ("told.py", "new.py", "__init__.py", "part/x.py"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  readme = "## The tree\n```\ntold.py  what it is\n```\nnew.py"
  assert unlisted(readme, tmp_path) == ["new.py", "part/"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  """Every relative link of every page."""
  assert dead_links(page.read_text("utf-8"), page.parent) == []


def test_readme_shows_every_module():
  """The tree in the README is the tree."""
  readme = (ROOT / "README.md").read_text("utf-8")
  assert unlisted(readme, ROOT / "jaxlm") == []


def test_readme_and_the_check_run_the_same_line():
  """What a newcomer types is what every commit passes."""
  line = "pip install -e '.[test]' && python -m pytest"
  assert f"\n{line}\n" in (ROOT / "README.md").read_text("utf-8")
  assert f'"{line}"' in (ROOT / ".ci" / "run").read_text("utf-8")


def test_readme_gives_a_reason_for_every_dependency():
  """None is there without one."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
  table = (ROOT / "README.md").read_text("utf-8").split("## Dependencies")[1]
  for requirement in project["project"]["dependencies"]:
    name = re.match(r"[\w-]+", requirement)[0]
    assert re.search(rf"^\|.*\b{name}\b.*\|", table, re.M), name
