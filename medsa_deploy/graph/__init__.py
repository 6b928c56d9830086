"""Typed ONNX → typed ONNX: precision lives in the graph's types, never in a builder's flags.

files.py    graphs ⇄ files            islands.py    which nodes stay float32, and why
scopes.py   a node → block and kind   float16.py    float32 graph → float16 graph
qdq.py      float32 graph → INT8      ranges.py     what values a graph's tensors take
rewrite.py  nodes, and loops of them  attention.py  attention as one backend runs it best
tokens.py   loops over some tokens    own_encoders.py  the encoder of each backend's own
"""
