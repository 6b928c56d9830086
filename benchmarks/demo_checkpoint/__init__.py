"""Trains the demonstration checkpoint: a small SAM on phantoms, then Med-SA's adapters on chunks.

    python -m benchmarks.demo_checkpoint [--state FOLDER]

writes medsa_deploy/assets/medsa_demo.pth, benchmarks/results/demo_checkpoint.json and the model
card. Interrupted, it goes on where it was.
"""
