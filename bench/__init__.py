"""How far lipfast is ahead of plain PyTorch: `make bench`."""
