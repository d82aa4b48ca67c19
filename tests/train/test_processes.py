"""What a failed collective is told as."""

from __future__ import annotations

import pytest

from hinny.checkpoint.ranks import RankFailure
from hinny.errors import TrainingError
from hinny.train.processes import joined


def test_a_rank_that_is_gone_between_two_parts_of_a_save_is_told_of_as_one_that_is_gone_in_a_step():
    """Its collective fails in the thread that saves, as a RankFailure, and nobody else tells of it."""
    failure = RuntimeError("[/src/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer.")
    with pytest.raises(TrainingError,
                       match=r"^another process .* \(Read error .*\)\. .* goes on from there\.$"), joined():
        raise RankFailure("another rank is gone or does not answer") from failure
    with pytest.raises(RankFailure, match="disk"), joined():
        raise RankFailure("the disk is full") from OSError("the disk is full")
