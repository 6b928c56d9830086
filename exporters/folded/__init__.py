"""The folded network: the reference network as fewer operations, which is what gets exported.

Encoders are in `families/`; the decoder and the layers that families share are here. `adapters.py`
and `sd_trans.py` fold the paper's adapters.
"""
