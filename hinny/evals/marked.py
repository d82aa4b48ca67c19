"""Answers to `Marked` samples: which of the marked tokens a model says.

Greedy decoding writes a run of marked tokens exactly if each is the likeliest after the true ones before it, so one
pass over the tokens tells what decoding would.
"""

from __future__ import annotations

import numpy as np

from hinny.errors import RequestError
from hinny.evals.task import Answer, Marked, Sample
from hinny.infer.reading.requests import Scored


def right_places(sample: Marked, scored: Scored) -> np.ndarray:
    """Of each marked token, in their order, whether it is the likeliest at its place; (marked,) bool.

    RequestError if `scored` has not one figure for each token after the first.
    """
    if len(scored.likeliest) != len(sample.tokens) - 1:
        raise RequestError(f"{sample.id}: {len(scored.likeliest)} places are answered of a sample of "
                           f"{len(sample.tokens)} tokens; every token after the first needs one.")
    places = np.flatnonzero(sample.answers)
    return np.asarray(scored.likeliest)[places - 1] == np.asarray(sample.tokens)[places]


def marked_answer(sample: Sample, answer: Answer) -> tuple[Marked, np.ndarray]:
    """`sample`, found to be a `Marked` one, and its `right_places`."""
    assert isinstance(sample, Marked), type(sample)
    assert isinstance(answer, list), type(answer)
    assert len(answer) == 1, len(answer)
    return sample, right_places(sample, answer[0])
