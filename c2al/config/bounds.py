"""Bounds of settings that several sections share."""

LARGEST_FACTOR = 1e6
"""Of what multiplies a loss or initial weights. The optimizers keep squares of gradients, and of 1e30 there are none in
float32: training would end in its first step. Nothing that anyone has a use for is near either."""
