"""A checkpoint → the graphs of a bundle. The only home of torch; needs the extra `export`.

checkpoint.py            file → tensors
architecture.py          tensors → the network's facts, with conventions.py and depth.py
guesses.py               options, and guesses without them
key_check.py             keys and shapes against a family's tables
layouts.py               how a family's files hold weights: updates, adapters without a base
training.py              the code that trained a network, and its conventions
families/                one folder and one row of registry.py for each network family
decoders.py              SAM's decoder, which families share
networks.py              facts and tensors → reference network → folded network
reference/, folded/      layers that families share: as they were trained, and folded for export
graphs.py                folded network → ONNX files, with capture.py
adapters.py              the paper's equations: adapters,
hyper_prompt_adapter.py  HyP-Adpt,
sd_trans.py              SD-Trans
lora.py                  low-rank updates, merged
"""
