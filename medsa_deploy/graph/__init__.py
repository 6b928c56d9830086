"""Typed ONNX → typed ONNX: precision is in a graph's types, never in a builder's flags.

files.py          graph ⇄ file              float32_nodes.py     the nodes that stay float32
float16.py        float32 → float16         qdq.py               float32 → INT8
ranges.py         outputs for ranges        rewrite.py           nodes and loops that replace others
attention.py      attention, per backend    token_loops.py       loops over a few tokens at a time
backend_encoders.py  one encoder for each backend
"""
