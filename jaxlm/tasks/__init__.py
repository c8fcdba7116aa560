"""Tasks that the project makes itself: seeded, graded, verifiable.

    task = jaxlm.tasks.make("add", levels=(1, 2))
    train = jaxlm.tasks.examples(task, "train", 1000)
    task.score(train[0], "46")

`python -m jaxlm.tasks --task=add` writes them to be read.
"""

from jaxlm.tasks.names import make
from jaxlm.tasks.rows import Listed, read
from jaxlm.tasks.skills import GROUPS, SKILLS
from jaxlm.tasks.task import Example, Mix, Task, examples, split_of

__all__ = [
  "GROUPS",
  "SKILLS",
  "Example",
  "Listed",
  "Mix",
  "Task",
  "examples",
  "make",
  "read",
  "split_of",
]
