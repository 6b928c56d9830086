"""A server for people at a screen: images come in, masks go back at every click.

server.py          options → a running server, until it is stopped
service.py         what the routes of every protocol share
app.py             the routes of all protocols, and their errors as answers
access.py          who may ask: token, host, origin; what a browser may load
refusals.py        why a request is refused, and its HTTP status
bodies.py          a request's body → bytes, JSON or a file, within bounds of size and time
leases.py          users: each holds an image, until idle for too long
work.py            a bounded pool of workers; work that can be cancelled
cache.py           values by key, the last used within a number of bytes
bundles.py         the bundles that are served, opened
cached_session.py  a session whose embeddings and logits are computed once
images.py          files or arrays → a volume in memory
segmenting.py      a volume and structures → masks, slice by slice
frames.py          masks and progress → the bytes of an answer
api.py             the page's own protocol; openapi.py describes it
exports.py         masks → NIfTI, DICOM SEG, PNG …
nninteractive.py   nnInteractive's protocol, for napari, Slicer, MITK, OHIF: interaction.py, an
                   object; array_wire.py, arrays
monai_label.py     MONAI Label's protocol
page/              the page in a browser
"""
