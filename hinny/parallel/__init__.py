"""Spreads a finished model over processes: mesh, tensor, context, pipeline, recomputation, FSDP. Layers know nothing
of it.
"""
