"""Trains the demonstration checkpoint: a small SAM on phantoms, then Med-SA's adapters on chunks.

    python -m benchmarks.demo_checkpoint [--state FOLDER] [--validate]

writes medsa_deploy/assets/medsa_demo.pth and benchmarks/results/demo_checkpoint.json; then
`python benchmarks/tables.py` writes the model card's table. Interrupted, it goes on where it was.
With --automatic it trains medsa_deploy/assets/samed_demo.pth over that checkpoint, a SAMed for
three tissues, and writes benchmarks/results/demo_automatic.json.
With --validate the test split is left alone, and nothing outside the folder is written.
"""
