"""Training: the loop, the optimiser with its schedule, and the meter. `hinny.train(...)` is `loop.train`."""

from hinny.verb import make_callable

make_callable(__name__, "hinny.train.loop:train")
