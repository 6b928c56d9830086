"""Trains the demonstration checkpoint: a small SAM on phantoms, then Med-SA's adapters on chunks.

    python -m benchmarks.demo_checkpoint [--state FOLDER]

writes medsa_deploy/assets/medsa_demo.pth and benchmarks/results/demo_checkpoint.json; then
`python benchmarks/tables.py` writes the model card's table. Interrupted, it goes on where it was.

Large tensors come and go in every step, so on Linux it pays to let malloc keep its memory, in huge
pages: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000.
"""
