"""Bundles → a model repository for NVIDIA Triton, and the models that run in it.

tensors.py         every tensor of the models, each described once
config_text.py     a model's configuration → `config.pbtxt`
models.py          a bundle and options → the configurations of its models
repository.py      bundles → a folder of models, whole or not at all
wire.py            images, prompts and predictions ⇄ arrays of those tensors
refusals.py        errors of this package ⇄ the text of a server's error
embedding_store.py embeddings of the images in use, within a number of bytes
python_model.py    what the python models share: the bundle, answers, errors
session_model.py   an image once, then prompts (sequences)
segment_model.py   image and prompts together (stateless)
graph_model.py     encoder or decoder alone
"""
