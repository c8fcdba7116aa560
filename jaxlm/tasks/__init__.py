"""Tasks that the project makes itself: seeded, graded, verifiable.

    task = jaxlm.tasks.make("add", levels=(1, 2))
    train = jaxlm.tasks.examples(task, "train", 1000)
    task.score(train[0], "46")

`python -m jaxlm.tasks --task=add` writes them to be read.
"""

from jaxlm.tasks.names import GROUPS, SKILLS, make
from jaxlm.tasks.task import Example, Mix, Task, examples, split_of

__all__ = [
  "GROUPS",
  "SKILLS",
  "Example",
  "Mix",
  "Task",
  "examples",
  "make",
  "split_of",
]
