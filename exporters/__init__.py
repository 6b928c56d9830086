"""A checkpoint → the graphs of a bundle. The only home of torch; needs the extra `export`.

checkpoint.py    file → tensors             architecture.py  tensors → facts and conventions
sizes.py         keys the sizes come from   encoders.py      keys and shapes → encoder facts
conventions.py   origin → conventions       guesses.py       options, and guesses without them
adapters.py      the paper's adapters       reference/       tensors → the network as it is
folded/          the same, fewer operations graphs.py        folded network → ONNX files
"""
