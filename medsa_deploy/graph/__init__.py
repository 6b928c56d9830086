"""Typed ONNX → typed ONNX: precision lives in the graph's types, never in a builder's flags.

files.py    graphs ⇄ files            islands.py  which nodes stay float32, and why
scopes.py   a node → block and kind   float16.py  float32 graph → float16 graph
"""
