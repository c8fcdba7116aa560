"""The one exception whose message is written for the person at the terminal.

Whatever a user can get wrong (a key, a path, a file's content, a size that
does not divide) raises `UserError` with a sentence that says what is wrong
and what to do. Programs print that sentence and exit with status 2; any other
exception is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
  """Wrong input, explained: the message says what is wrong and what to do."""
