"""What needs an NVIDIA GPU: `pytest tests/gpu` where there is one. Neither datasets nor evaluate is used."""
