"""The engine on a GPU: launches steps without waiting for them, replays recorded ones, mirrors blocks for peers."""
