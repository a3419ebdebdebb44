"""A callback for the Trainer of Hugging Face transformers, which is imported with it."""

from diffract.callback.spectral import SpectralCallback

__all__ = ["SpectralCallback"]
