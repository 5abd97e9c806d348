"""Triton kernels of the attentions: launch, forward, backward, parameters, their tiles and their settings."""
