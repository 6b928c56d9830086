"""Our graphs beside what users would pick instead, on the same weights and inputs.

    python -m benchmarks.peers --folder DIR --prepare     makes every file; the machine may be busy
    python -m benchmarks.peers --folder DIR               → benchmarks/results/peers.json, peers.png

Each candidate runs in a process of its own (`worker`). Candidates of one group run in turn, round
by round, and every group has the network's plain export in ONNX Runtime in it, so that ratios are
of runs side by side. A group is in the JSON once it is measured; a second start measures what is
missing.
"""
