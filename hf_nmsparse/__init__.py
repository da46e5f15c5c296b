"""N:M sparse translation models for Hugging Face Transformers."""

__version__ = "0.1.0"
