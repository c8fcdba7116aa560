"""Attention by its definition: loops, float64, nothing shared with the layer.

Vaswani et al., arXiv:1706.03762, section 3.2; rotary positions as in
arXiv:2104.09864, section 3.2.2.
"""

from typing import Any

import numpy as np

from jaxlm.layers.attention import Attention
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.position import Rope


def covers(m: Any) -> bool:
  """Whether `attention` below says what this mixer should compute."""
  plain_rope = m.position is None if isinstance(m, Attention) else False
  if isinstance(m, Attention) and isinstance(m.position, Rope):
    plain_rope = m.position.scaling is None and not m.position.reverse
  return (
    isinstance(m, Attention)
    and plain_rope
    and (m.qk_norm is None or isinstance(m.qk_norm, RMSNorm))
    and m.norm_heads == "each"
    and not (m.sinks or m.norm_after_rope or m.bias or m.out_bias)
    and m.temperature is None
    and m.out_norm is None
  )


def attention(m: Attention, p: dict, x: np.ndarray) -> np.ndarray:
  """What `m` should make of `x` [seq, dim]: float64 [seq, dim]."""
  p = {k: v for k, v in p.items() if not isinstance(v, dict)} | {
    k: {n: np.asarray(a, np.float64) for n, a in v.items()}
    for k, v in p.items()
    if isinstance(v, dict)
  }
  seq, out = len(x), np.zeros(x.shape, np.float64)
  share = m.heads // m.groups  # query heads that share a key head
  scale = m.width**-0.5 if m.scale is None else m.scale
  wq, wk, wv, wo = (np.asarray(p[n], np.float64) for n in "qkvo")
  for head in range(m.heads):
    group = head // share
    q = _placed(m, p, "q_norm", x @ wq[:, head])
    k = _placed(m, p, "k_norm", x @ wk[:, group])
    v = x @ wv[:, group]
    for i in range(seq):
      seen = [j for j in range(seq) if m.mask.allows(np.int64(i), np.int64(j))]
      scores = np.array([q[i] @ k[j] * scale for j in seen])
      if m.softcap is not None:
        scores = m.softcap * np.tanh(scores / m.softcap)
      weights = np.exp(scores - scores.max())
      weights /= weights.sum()
      out[i] += (
        sum(w * v[j] for w, j in zip(weights, seen, strict=True)) @ (wo[head])
      )
  return out


def _placed(m: Attention, p: dict, norm: str, y: np.ndarray) -> np.ndarray:
  """One head's queries or keys [seq, head_dim], normalised and turned."""
  if m.qk_norm is not None:
    rms = np.sqrt(np.mean(y**2, axis=1, keepdims=True) + m.qk_norm.eps)
    scale = p.get(norm, {}).get("scale", 1.0 - m.qk_norm.offset)
    y = y / rms * (scale + m.qk_norm.offset)
  return y if m.position is None else _turned(m.position, y)


def _turned(rope: Rope, y: np.ndarray) -> np.ndarray:
  """Every pair of features at position t turned by t theta^(-2i/d)."""
  y, d = y.copy(), int(y.shape[1] * rope.fraction)
  for t in range(len(y)):
    row = y[t].copy()
    for i in range(d // 2):
      a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + d // 2)
      angle = t * rope.theta ** (-2 * i / d)
      c, s = np.cos(angle), np.sin(angle)
      y[t, a], y[t, b] = row[a] * c - row[b] * s, row[b] * c + row[a] * s
  return y
