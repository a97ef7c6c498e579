"""The `baton` command. It wires parts together and talks to people; it decides nothing about serving."""
