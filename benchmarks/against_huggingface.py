"""Hugging Face's decoders on our weights: `generate`, and at batch 1 its assisted generation with the same draft."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import numpy as np
from against import DRAFT, EXACT_COPY, PLAIN

from distillspec_jax.analysis.costs import Pair
from distillspec_jax.models import LanguageModel
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import huggingface

TITLE = "Hugging Face"


def version() -> str:
  """Import torch and transformers and say which they are; torch keeps its own number of threads.

  Raises:
    ConfigError: one of them is not installed.
  """
  try:
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from transformers import T5ForConditionalGeneration  # noqa: F401, PLC0415  (needs torch; found out only here)
  except ImportError as error:
    raise ConfigError(
        f"--against huggingface needs torch, transformers and safetensors: pip install them ({error})"
    ) from error
  return f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def prepare(pair: Pair, args) -> Callable[[np.ndarray], dict[str, Callable[[], np.ndarray]]]:
  """Take both models over through files, as a user would; see `against`.

  Raises:
    ConfigError: a model that their T5 cannot hold.
  """
  import torch  # noqa: PLC0415

  target = _torch_model(pair.target, pair.target_params)
  # A copy, so that its weights are read from memory of their own, as our exact copy's are.
  assistants = {EXACT_COPY: copy.deepcopy(target), DRAFT: _torch_model(pair.draft, pair.draft_params)}
  for assistant in assistants.values():
    # Constant and without a threshold: gamma drafts in every block, as ours. The assistant's own settings count.
    assistant.generation_config.num_assistant_tokens = args.gamma
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0

  def decoders(prompt: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    ids = torch.tensor(np.asarray(prompt), dtype=torch.long)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))

    def generate(**more) -> np.ndarray:
      # No min_new_tokens: the models never end, and their version 4 refuses it for assisted generation.
      tokens = target.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=args.output_length, **more)
      return tokens[:, 1:].numpy()  # without the start token

    calls = {PLAIN: generate}
    if len(prompt) == 1:  # assisted generation takes no more
      calls |= {
          way: lambda assistant=assistant: generate(assistant_model=assistant)
          for way, assistant in assistants.items()
      }
    return calls

  return decoders


def _torch_model(model: LanguageModel, params: Params):
  with tempfile.TemporaryDirectory() as folder:
    huggingface.export(folder, model, params)
    return load(folder)


def load(folder: str):
  """Read what `weights.huggingface.export` wrote there: a T5ForConditionalGeneration, in eval mode, on the CPU."""
  import transformers  # noqa: PLC0415

  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
