"""The vocabulary that every part shares and users import: wire types (`baton.v1`), errors, configuration, block
names, metric names, model folders, and how coordinators are found (`baton.discovery`).

It stands at the bottom: it imports no other part of the system, and no torch.
"""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("baton-serve")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
