"""What needs an NVIDIA GPU: `pytest tests/gpu` where there is one. Of datasets it needs what the package imports."""
