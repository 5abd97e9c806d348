"""The one fused attention behind `chunked_cross_attention`, `neighbour_self_attention` and `neighbour_cross_attention`.

All three are softmax attention within small groups of query rows and key slots, and differ in what a group is
(`common.py`). So their options, their kernels and their checks exist once: here.
"""
