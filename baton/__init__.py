"""The vocabulary that every part shares and users import: wire types (`baton.v1`), errors, configuration, block
names, metric names, model folders, and how coordinators are found (`baton.discovery`).

It stands at the bottom: it imports no other part of the system, and no torch.
"""
