"""A DICOM node in a hospital's network: series come in by C-STORE, segmentations go back.

node.py            options → a running node: starts the parts below, and stops them
receiver.py        associations → images on disk (C-ECHO and C-STORE SCP)
bounded_port.py    bytes on the port → no more of them than may be kept
received.py        bytes of a C-STORE → the few facts that the node goes by
spool.py           the queue on disk, which survives a kill -9
rules.py           a series → the rule that says how it is segmented
templates.py       a rule's prompts and a volume → structures in voxels
study_prompts.py   RTSTRUCT and SR of the same study → structures in voxels; report_prompts.py
segmenting.py      the worker process: queued series → segmentations
sender.py          segmentations → PACS, by C-STORE or STOW, until it has them
health.py          counters → /healthz and Prometheus text
audit.py           studies that are finished → lines of the audit trail
"""
