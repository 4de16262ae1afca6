"""Maths on local tensors.

Shape letters, used in every docstring here: s sequence, b micro-batch, h hidden, a heads, k key/value heads,
d head size, f mlp hidden, v vocabulary. A local extent is written h/tp. Activations are [s, b, h], Megatron's order.
"""
