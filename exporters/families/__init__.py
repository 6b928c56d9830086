"""Network families: one folder and one row of `registry.py` each.

keys.py         keys of a checkpoint, and how their shapes agree
facts.py        keys and shapes → facts for the manifest
conventions.py  conventions that do not depend on the code that trained a network
lora.py         low-rank updates of a layout of its own, merged
reference.py    the network as it was trained
folded.py       the same network, folded for export
"""
