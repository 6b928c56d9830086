"""A bundle on a Triton server → a session with the methods of a loaded bundle's.

session.py   images and prompts → requests; answers → embeddings and predictions
transport.py requests → answers over HTTP or gRPC: deadlines, retries, errors
"""

from .session import RemoteEmbedding, RemoteSession, connect

__all__ = ["RemoteEmbedding", "RemoteSession", "connect"]
