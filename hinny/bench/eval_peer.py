"""lm-eval's own model class over the same weights: to check against, and to race.

`lm-eval` and `transformers` are the extras `eval` and `oracle`; they are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from hinny.bench.peers import on_kernels, transformers_twin
from hinny.errors import BackendError
from hinny.infer.reading.requests import Score
from hinny.model import Model


class HFLM:
    """lm-eval's HFLM over transformers' twin of `model`, on its device and in its weights' type."""

    def __init__(self, model: Model, *, batch: int, length: int) -> None:
        """batch: requests at a time; length: tokens of the longest request. BackendError where a package is absent."""
        twin = transformers_twin(model)
        weight = model.embedding.weight
        kernels = ""
        if weight.is_cuda:
            twin, kernels = on_kernels(twin, weight.device)
        twin = twin.to(weight.dtype).eval().requires_grad_(False)
        try:
            module = importlib.import_module("lm_eval.models.huggingface")
        except ImportError as fault:
            raise BackendError(f"lm-eval's HFLM cannot be imported ({fault}); it needs the extras 'eval' and 'oracle': "
                               "in the checkout, .venv/bin/pip install -e '.[eval,oracle]'.") from None
        # in bfloat16 a log-probability of -12 is known to 0.06 alone
        self._model: Any = module.HFLM(pretrained=twin, tokenizer=_tokenizer(model.config.vocab_size), backend="causal",
                                       batch_size=batch, max_length=length + 1, softmax_dtype="float32")
        self.name = (f"lm-eval {version('lm_eval')} HFLM, transformers {version('transformers')} "
                     f"{type(twin).__name__}{kernels}, batch {batch}")

    @torch.no_grad()
    def score(self, requests: Sequence[Score]) -> list[float]:
        """Log-probability of each continuation, in nats."""
        # the strings are the key of a cache that is not used
        asked = [(("", ""), list(r.context), list(r.continuation)) for r in requests]
        return [total for total, _ in self._model._loglikelihood_tokens(asked, disable_tqdm=True)]


def _tokenizer(vocab_size: int) -> Any:
    """HFLM wants one; the requests are tokens already."""
    tokenizers = importlib.import_module("tokenizers")
    words = tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")
    return importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="<eos>", pad_token="<eos>")
