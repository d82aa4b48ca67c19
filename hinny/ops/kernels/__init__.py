"""Triton kernels of the ops, one file a subject; imported by the ops alone, when a tensor is to run on them."""
