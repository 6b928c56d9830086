"""CUDA kernels around the engines: a frame on the device → the encoder's input; logits → masks.

preprocess.cu    rescale, window, resize, normalise, pad   preprocess.py   its tables and reference
postprocess.cu   resize, threshold or argmax, area, box    postprocess.py  its tables and reference
device.cuh       what both share                           axes.py         resize weights as tables
compilers.py     nvcc and NVRTC                            cubins.py       cache, cubins in bundles
host/            the same sources as host C++, for tests without a GPU
"""
