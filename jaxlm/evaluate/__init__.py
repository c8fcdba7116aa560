"""Evaluation: losses of a split and of a text, and how right responses are.

    python -m jaxlm.evaluate --workdir=runs/sft --task=add --out=after.json

The program generates, scores and compares (docs/evaluation.md); its parts can
be used alone. `evaluate` is what training asks of a split that is held out.
"""

from jaxlm.evaluate.loss import bits_per_byte, evaluate

__all__ = ["bits_per_byte", "evaluate"]
