"""Convert a model directory of any known form into a native one, Hugging Face's or T5X's.

    python -m distillspec_jax.convert --source=DIR --output_dir=DIR --format=orbax|huggingface|t5x
        [--dtype=float32|bfloat16|float16] [--verify] [--vocabulary=spiece.model]
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from absl import flags

from distillspec_jax import cli

_SOURCE = flags.DEFINE_string("source", None, "Native, T5X or Hugging Face model directory (detected).", required=True)
_OUTPUT = flags.DEFINE_string("output_dir", None, "Where the converted model goes; absent or empty.", required=True)
_FORMAT = flags.DEFINE_enum(
  "format", "orbax", ["orbax", "huggingface", "t5x"], "Native, Hugging Face's (safetensors) or T5X's (msgpack, zarr)."
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of the source; by default the newest.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"],
  "What parameters are written as; by default float32, or as a native source has them. Numbers that do not fit are an "
  "error.",
)  # fmt: skip
_VERIFY = flags.DEFINE_boolean("verify", False, "Open what was written and compare every bit with the source.")
_VOCABULARY = flags.DEFINE_string(
  "vocabulary", None, "SentencePiece file or vocabulary folder to put beside the weights; by default the source's own."
)
_EXTRA_IDS = flags.DEFINE_integer("extra_ids", 100, "Sentinel ids that a SentencePiece file given is extended by.")


def main(argv: Sequence[str]) -> None:
  """Read the flags and convert."""
  del argv
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # an exception, so that nothing stays behind
  # After the flags, so that a wrong one is answered at once.
  from distillspec_jax import conversion  # noqa: PLC0415

  conversion.run(
    conversion.Request(
      source=_SOURCE.value,
      output_dir=_OUTPUT.value,
      format=_FORMAT.value,
      step=_STEP.value,
      dtype=_DTYPE.value,
      verify=_VERIFY.value,
      vocabulary=_VOCABULARY.value,
      extra_ids=_EXTRA_IDS.value,
    )
  )


if __name__ == "__main__":
  cli.run(main)
