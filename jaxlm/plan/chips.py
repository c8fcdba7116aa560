"""What a chip can do, in one table, each figure with its source.

All figures are the vendors' peaks: FLOP/s of dense matmuls by operand dtype,
bytes of memory, bytes a second from it, and bytes a second that one chip can
send over its fast links and over the data centre's network. A float32 matmul
runs as JAX runs it by default: in one bfloat16 pass on a TPU, in TF32 on a GPU.
"""

from dataclasses import dataclass

GB = 1e9
GIB = 2**30
TERA = 1e12


@dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    name: as in `--target=NAME:...`.
    kind: 'tpu', 'gpu' or 'cpu'.
    flops: peak FLOP/s by dtype of the operands.
    memory: bytes of HBM.
    bandwidth: bytes a second from and to it.
    links: bytes a second that one chip sends to its neighbours (ICI, NVLink),
      all links together, in one direction.
    network: bytes a second that one chip sends beyond them.
    torus: dimensions of the interconnect; 0: any chip of a group reaches any.
    group: chips that the fast links join; 0: a whole slice.
    around: an axis of so many chips, or a multiple, closes to a ring.
    clock: cycles a second, for the compiler's own estimates; 0: has none.
    sources: where the figures are from.
  """

  name: str
  kind: str
  flops: dict[str, float]
  memory: float
  bandwidth: float
  links: float
  network: float
  torus: int = 0
  group: int = 0
  around: int = 1
  clock: float = 0.0
  sources: tuple[str, ...] = ()

  def peak(self, dtype: str) -> float:
    """FLOP/s with operands of this dtype; of an unknown one, the slowest."""
    return self.flops.get(dtype, min(self.flops.values()))


def _tpu(bf16: float, int8: float) -> dict[str, float]:
  """Peaks of a TPU, whose matmuls of any float dtype are bfloat16's."""
  halves = dict.fromkeys(("float32", "float16", "bfloat16"), bf16)
  return halves | {"int8": int8}


# Links: Google states what a chip sends and receives together (400, 1200 and
# 800 GB/s on the pages below); here is one direction. The clock is what makes
# the peak of the chip's matmul units: 4 of 128 x 128 in v5e, 8 of those in v5p,
# 4 of 256 x 256 in v6e.
CHIPS = {
  "v5e": Chip(
    "v5e",
    "tpu",
    _tpu(197 * TERA, 393 * TERA),
    16 * GIB,
    819 * GB,
    links=200 * GB,
    network=6.4e12 / 8 / 256,
    torus=2,
    around=16,
    clock=1.5e9,
    sources=("https://cloud.google.com/tpu/docs/v5e",),
  ),
  "v5p": Chip(
    "v5p",
    "tpu",
    _tpu(459 * TERA, 918 * TERA),
    95 * GIB,
    2765 * GB,
    links=600 * GB,
    network=50e9 / 8,
    torus=3,
    around=4,
    clock=1.75e9,
    sources=("https://cloud.google.com/tpu/docs/v5p",),
  ),
  "v6e": Chip(
    "v6e",
    "tpu",
    _tpu(918 * TERA, 1836 * TERA),
    32 * GIB,
    1600 * GB,
    links=400 * GB,
    network=25.6e12 / 8 / 256,
    torus=2,
    around=16,
    clock=1.75e9,
    sources=("https://cloud.google.com/tpu/docs/v6e",),
  ),
  "h100": Chip(
    "h100",
    "gpu",
    {
      "bfloat16": 989.4 * TERA,
      "float16": 989.4 * TERA,
      "float32": 494.7 * TERA,
      "int8": 1978.9 * TERA,
      "float8_e4m3fn": 1978.9 * TERA,
      "float8_e5m2": 1978.9 * TERA,
    },
    80 * GB,
    3352 * GB,
    links=450 * GB,
    network=50 * GB,
    group=8,
    sources=(
      "https://www.nvidia.com/en-us/data-center/h100/ (SXM; without sparsity)",
      "https://docs.nvidia.com/dgx/dgxh100-user-guide/ (8 GPUs on NVLink, one "
      "400 Gb/s adapter each)",
    ),
  ),
}
